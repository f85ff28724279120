"""The three parts of `benchmarks.gpu`: steps, attacks, training steps, each of one family in one precision.

A part gives rows of plain values: seconds as medians, ratios with their intervals, and a note where something was
skipped.
"""

from __future__ import annotations

import copy
import enum
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device import (
    NUM_CLASSES,
    Clock,
    Images,
    InPrecision,
    Precision,
    captured,
    reason,
    stopwatch,
    take_turns,
)
from benchmarks.timing import Ratio, make_attack
from robustbench_deq.attacks import JointPGDConfig
from robustbench_deq.configs import merge, read_yaml, validate
from robustbench_deq.data import SplitName
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.models import FAMILIES
from robustbench_deq.optimise import Classification, Norm, ProjectedAscent, Settled, optimise
from robustbench_deq.optimise.sources.joint import augmented
from robustbench_deq.protocol import Attack, AttackResult, frozen
from robustbench_deq.threats import Threat
from robustbench_deq.training.config import TrainingConfig
from robustbench_deq.training.loop import Trainer

TRAINING = Path("configs/training/cifar10-mdeq-base-joint-linf.yaml")
THREAT = Threat(Norm.LINF, 8 / 255)
PARTS = ("bare work", "augmented", "whole step")
COMPILING = 75.0
"""Seconds that must be left before a cell is compiled; that cannot be interrupted."""
Row = dict[str, Any]
Work = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    families          config of each
    images            what they are like
    batch             images in a batch
    steps, pgd_steps  of the joint attack and of PGD
    warm_up           steps of the attacks that warm up
    batches           of a training epoch that is timed
    train_batch       images in a batch of the training that comes before
    standard          batches of standard training
    adversarial       batches of joint adversarial training, after them
    rounds            at most
    training          changes to the settings of `TRAINING`
    """

    families: dict[str, Row]
    images: Images
    batch: int
    steps: int
    pgd_steps: int
    warm_up: int
    batches: int
    train_batch: int
    standard: int
    adversarial: int
    rounds: int
    training: Row = field(default_factory=dict)


SIZES = {
    "full": Size(
        families={"deq-conv": {"size": "base"}, "mdeq": {"size": "base"}},
        images=Images((3, 32, 32)),
        batch=512,
        steps=JointPGDConfig().steps,
        pgd_steps=20,
        warm_up=4,
        batches=2,
        train_batch=64,
        standard=100,
        adversarial=20,
        rounds=9,
    ),
    "small": Size(
        families={
            "deq-conv": {"channels": 8, "groups": 2},
            "mdeq": {
                "channels": (4,) * 4,
                "head_channels": (2,) * 4,
                "groups": 2,
                "expansion": 1,
                "has_weight_norm": True,
            },
        },
        images=Images((3, 16, 16), 0.4, 0.05),
        batch=16,
        steps=4,
        pgd_steps=2,
        warm_up=1,
        batches=1,
        train_batch=16,
        standard=6,
        adversarial=4,
        rounds=2,
        training={"attack": {"config": {"steps": 2}}},
    ),
}


class How(enum.Enum):
    """How a step is run."""

    EAGER = "eager"
    CAPTURED = "captured"
    COMPILED = "compiled cell"
    BOTH = "compiled cell, captured"

    @property
    def is_compiled(self) -> bool:
        return self in (How.COMPILED, How.BOTH)

    @property
    def is_captured(self) -> bool:
        return self in (How.CAPTURED, How.BOTH)


@dataclass(frozen=True)
class Case:
    """One family in one precision, and how long it may take."""

    family: str
    precision: Precision
    model: EquilibriumModel
    x: Tensor
    y: Tensor
    device: torch.device
    size: Size
    clock: Clock
    compiles: bool

    @property
    def place(self) -> Row:
        return {"family": self.family, "dtype": self.precision.value, "batch": len(self.x)}

    def __str__(self) -> str:
        return f"{self.family}, {self.precision.value}"

    def cannot_compile(self) -> str | None:
        """Why the cell is not to be compiled; None: it is."""
        if not self.compiles:
            return "not asked for (--compile)"
        if self.clock.left < COMPILING:
            return f"no time to compile: {max(0.0, self.clock.left):.0f} s left"
        return None


class At(NamedTuple):
    """Where steps begin: what a captured graph has as static buffers."""

    z: Tensor
    mu: Tensor
    delta: Tensor


# Steps


def start_of(case: Case) -> At:
    """State and adjoint as the warm-up of `joint-pgd` leaves them, in the case's precision."""
    config = JointPGDConfig()
    problem = Classification(InPrecision(case.model, case.precision), case.x, config.bind(case.y, None))
    delta = torch.zeros_like(case.x)
    state = config.source().start(problem, delta, None)
    return At(state.z.contiguous(), state.mu.contiguous(), delta)


def step_works(model: EquilibriumModel, case: Case, at: At) -> dict[str, Work]:
    """The three parts at `at`, by name; what each returns first is compared with what others return.

    The whole run is that of training: relaxation looks at values on the host, which a graph cannot.
    """
    x, y, steps = case.x, case.y, case.size.steps
    config = JointPGDConfig(has_fallback=False)
    problem = Classification(model, x, config.bind(y, None))
    parts = (config.source(), THREAT.ball(x), ProjectedAscent(config.step_size, config.schedule), config.highest_loss())
    settled = Settled(at.z, at.mu, x.new_ones(len(x)))
    seed = x.new_ones(len(x), NUM_CLASSES)

    def bare() -> tuple[Tensor, ...]:
        z, delta = at.z.detach().requires_grad_(), at.delta.detach().requires_grad_()
        f, logits = model.cell(z, model.inject(x + delta)), model.head(z)
        g, gradient = torch.autograd.grad([f, logits], [z, delta], [at.mu, seed])
        return gradient, g, f.detach()

    def one() -> tuple[Tensor, ...]:
        look = augmented(problem, at.z, at.mu, at.delta)
        assert look.gradient is not None and look.f is not None and look.g is not None
        return look.gradient, look.g, look.f

    def whole() -> tuple[Tensor, ...]:
        found = optimise(problem, *parts, at.delta, num_steps=steps, settled=settled, settles=False)
        return found.variable, found.loss

    return dict(zip(PARTS, (bare, one, whole), strict=True))


def replayed(model: EquilibriumModel, case: Case, at: At, part: str) -> Work:
    """A part as a graph whose static buffers are filled from `at` before every replay."""
    buffers = At(*(tensor.clone() for tensor in at))
    replay = captured(step_works(model, case, buffers)[part], case.device)

    def work() -> tuple[Tensor, ...]:
        for buffer, tensor in zip(buffers, at, strict=True):
            buffer.copy_(tensor)
        return replay()

    return work


def prepared(case: Case, at: At) -> tuple[dict[tuple[str, How], Work], dict[tuple[str, How], str]]:
    """All parts in all ways, warm; and why others are missing."""
    works: dict[tuple[str, How], Work] = {}
    why: dict[tuple[str, How], str] = {}
    cannot_compile = case.cannot_compile()
    models = {False: InPrecision(case.model, case.precision)}
    if cannot_compile is None:
        models[True] = InPrecision(case.model, case.precision, is_compiled=True)
    for how in How:
        missing = cannot_compile if how.is_compiled else None
        if how.is_captured and case.device.type != "cuda":
            missing = "needs CUDA"
        for part in PARTS:
            if missing is not None:
                why[part, how] = f"skipped: {missing}"
                continue
            model = models[how.is_compiled]
            try:
                work = replayed(model, case, at, part) if how.is_captured else step_works(model, case, at)[part]
                work()
                works[part, how] = work
            except RuntimeError as error:
                why[part, how] = f"failed: {reason(error)}"
    return works, why


def measure_steps(case: Case, seconds: float) -> list[Row]:
    """All parts in all ways, in turn; seconds are those of one step."""
    steps, bare = case.size.steps, (PARTS[0], How.EAGER)
    with torch.enable_grad(), frozen(case.model), case.precision.active():
        works, why = prepared(case, start_of(case))
        differences = {key: difference(work, works[key[0], How.EAGER]) for key, work in works.items()}
        timed = {
            key: stopwatch(repeated(work, 1 if key[0] == PARTS[-1] else steps), case.device)
            for key, work in works.items()
        }
        taken = take_turns(timed, case.size.rounds, seconds)
    rows = []
    for how in How:
        reasons = {why.get((part, how)) for part in PARTS}
        is_missing = len(reasons) == 1 and None not in reasons  # for the same reason
        for part in ("all",) if is_missing else PARTS:
            note = reasons.pop() if is_missing else why.get((part, how), "")
            row = {"part": "steps", **case.place, "what": part, "how": how.value, "note": note}
            if (part, how) in taken:
                mine = taken[part, how]
                row |= {"seconds": statistics.median(mine) / steps, "rounds": len(mine)}
                row |= against("bare", mine, taken[bare]) | {"difference": differences[part, how]}
                row |= against("eager", taken[part, How.EAGER], mine)
            rows.append(row)
    return rows


def repeated(work: Work, times: int) -> Callable[[], None]:
    """`work` several times in a row, so that the host may run ahead of the device as it does in a loop."""

    def call() -> None:
        for _ in range(times):
            work()

    return call


def difference(work: Work, other: Work) -> float:
    """Of what both return first, relative: a gradient, or the perturbation after a whole run, in which rounding changes
    the sign of entries whose gradient is near zero."""
    mine, its = work()[0].clone(), other()[0]
    return float((mine - its).norm() / its.norm().clamp_min(1e-12))


def against(name: str, slow: list[float], fast: list[float]) -> Row:
    """How many times longer `slow` took, round by round, as the columns of a row."""
    ratio = Ratio.of(slow, fast)
    return {f"{name} ratio": ratio.median, f"{name} low": ratio.low, f"{name} high": ratio.high}


# Attacks


def measure_attacks(case: Case, seconds: float) -> list[Row]:
    """The three attacks in turn; seconds are those of the attack alone, on the whole batch."""
    pgd = {"steps": case.size.pgd_steps, "tolerance": 1e-3}
    attacks: dict[str, Attack] = {
        "joint-pgd": make_attack("joint-pgd", THREAT, steps=case.size.steps),
        f"warm PGD-{case.size.pgd_steps}": make_attack("pgd", THREAT, **pgd),
        f"cold PGD-{case.size.pgd_steps}": make_attack("pgd", THREAT, warm_start=False, **pgd),
    }
    x, y = case.x, case.y
    with Precision.FLOAT32.active():
        clean = judge_clean(case.model, x, y)
        with frozen(case.model):
            known = {
                label: clean.known(case.model, x, attack.first_objective(y, None)) for label, attack in attacks.items()
            }

    def confirm(rows: Tensor, images: Tensor) -> Tensor:
        with Precision.FLOAT32.active():
            return ~judge(case.model, images, y[rows]).is_correct

    model = InPrecision(case.model, case.precision).eval()
    results: dict[str, AttackResult] = {}

    def run(label: str, attack: Attack) -> Callable[[], float]:
        def work() -> float:
            with case.precision.active():
                results[label] = attack(model, x, y, clean=known[label], confirm=confirm)
            return results[label].cost.wall_seconds

        return work

    for label, attack in attacks.items():
        run(label, attack.with_(steps=case.size.warm_up))()
    taken = take_turns({label: run(label, attacks[label]) for label in attacks}, case.size.rounds, seconds)
    rows = []
    for label, times in taken.items():
        result = results[label]
        with Precision.FLOAT32.active():
            verdict = judge(case.model, result.x_adv, y)
        is_robust = verdict.is_correct & clean.verdict.is_correct & ~result.is_failed.cpu()
        missed = sum(count for name, count in result.diagnostics.items() if name.startswith("unconverged"))
        fallbacks = sum(result.diagnostics.get(f"num_{rung}", 0.0) for rung in ("damped", "accelerated", "full_solve"))
        rows.append(
            {"part": "attacks", **case.place, "what": label, "how": "eager"}
            | {"seconds": statistics.median(times), "rounds": len(times)}
            | against("joint", times, taken["joint-pgd"])
            | {
                "robust accuracy": float(is_robust.double().mean()),
                "clean accuracy": float(clean.verdict.is_correct.double().mean()),
                "cell evals": result.cost.cell_evals,
                "cell VJPs": result.cost.cell_vjps,
                "missed solves": missed / max(1, int(result.is_attacked.sum())),
                "fallbacks": fallbacks,
                "unconverged": int((~verdict.is_converged).sum()),
                "note": "" if bool(result.is_attacked.any()) else "no image is classified correctly: none attacked",
            }
        )
    return rows


# Training


def training_config(size: Size, **changes: Any) -> TrainingConfig:
    """The settings of `TRAINING`, as they are from its first epoch with a full radius on."""
    settings = merge(merge(read_yaml(TRAINING), size.training), {"batch_size": size.batch, "epochs": 1, **changes})
    return validate(TrainingConfig, settings, str(TRAINING))


def trained(family: str, size: Size, device: torch.device) -> EquilibriumModel:
    """A model from its seed after a few batches in float32: of standard training, then of joint adversarial training.

    Without the former the larger model has not learnt enough to be attacked, without the latter nothing is left of it,
    and joint attacks cannot follow its states.
    """
    found = FAMILIES.get(family)
    settings = {"input_shape": size.images.shape, "num_classes": NUM_CLASSES, "pixel_mean": 0.5, "pixel_std": 0.25}
    one = size.images.split(SplitName.VALIDATION, 1, seed=2)
    with torch.random.fork_rng(devices=[]), Precision.FLOAT32.active():
        torch.manual_seed(0)
        model = found.build(validate(found.config_type, settings | size.families[family], f"model {family}"))
        for number, batches in enumerate((size.standard, size.adversarial)):
            config = training_config(size, batch_size=size.train_batch, attack_warmup_epochs=0.5)
            assert config.attack is not None
            data = size.images.split(SplitName.TRAIN, batches * size.train_batch, seed=5 + number)
            attack = config.attack.build() if number else None
            model = Trainer(config, model, data, one, attack, None, device=device).run()
    return model


def measure_training(case: Case, seconds: float) -> list[Row]:
    """Standard and joint steps in turn; seconds are those of one batch."""
    size = case.size
    config = training_config(size, attack_warmup_epochs=0.0, learning_rate=1e-6)
    assert config.attack is not None
    adversaries = {"standard": None, "joint adversarial": config.attack.build()}
    data = size.images.split(SplitName.TRAIN, size.batches * len(case.x), seed=4)

    def run(adversary: Attack | None) -> Callable[[], float]:
        def work() -> float:
            model = InPrecision(copy.deepcopy(case.model), case.precision)
            trainer = Trainer(config, model, data, data, adversary, None, device=case.device)
            with case.precision.active():
                return stopwatch(lambda: trainer._epoch(0, None), case.device)() / size.batches

        return work

    works = {label: run(adversary) for label, adversary in adversaries.items()}
    for work in works.values():
        work()
    taken = take_turns(works, size.rounds, seconds)
    return [
        {"part": "training", **case.place, "what": label, "how": "eager"}
        | {"seconds": statistics.median(times), "rounds": len(times)}
        | {"images a second": len(case.x) / statistics.median(times)}
        | against("standard", times, taken["standard"])
        | {"note": ""}
        for label, times in taken.items()
    ]
