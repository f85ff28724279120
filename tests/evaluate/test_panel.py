"""Every flag is raised by a model or an attack that deserves it, together with what follows from it and nothing else;
the shipped models raise none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hard_cells import Coordinates, Damped, Scaled, Shifted
from robustbench_deq import load_model
from robustbench_deq.attacks import build_attack
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate import panel
from robustbench_deq.evaluate.batch import batch_of
from robustbench_deq.evaluate.clean import judge_clean
from robustbench_deq.evaluate.evaluation import Evaluation, evaluate
from robustbench_deq.evaluate.measures import Gap
from robustbench_deq.evaluate.panel import probe
from robustbench_deq.meter import Meter
from robustbench_deq.models import describe_model
from robustbench_deq.models.defences import EarlyState, EntropyReduction
from robustbench_deq.protocol import Attack, Batch, Proposal, Recorder
from robustbench_deq.records.flags import FLAGS, PROBES, flags
from robustbench_deq.records.record import Record, StageRecord
from robustbench_deq.threats import Threat
from tests.evaluate.patients import Sound, having, labelled

L2, LINF = Threat("l2", 0.5), Threat("linf", 0.1)


def seen(
    model: EquilibriumModel, data: Split | None = None, attack: Attack | None = None, threat: Threat = L2
) -> Record:
    data = labelled(model, panel.NUM_IMAGES) if data is None else data
    return evaluate(model, attack or build_attack("joint-pgd", threat, {}), data, has_panel=True).record


def raised(record: Record) -> set[str]:
    return {flag.name for flag in flags(record)}


# ---------------------------------------------------------------- sound models


@pytest.mark.parametrize("threat", [L2, LINF, Threat("l1", 1.0), Threat("l2", 1e-4)], ids=str)
def test_a_sound_model_raises_no_flag(threat: Threat) -> None:
    record = seen(Sound(), threat=threat)
    assert record.probes is not None and set(record.probes) == set(PROBES)
    assert record.probes["num_probed"] == panel.NUM_IMAGES and raised(record) == set()


CHEAP = ("deq-fc.digits-joint-l2", "mondeq-fc.digits-joint-l2", "lben.fashion-joint-l2", "unrolled.fashion-fc-standard")
CONVOLUTIONAL = ("deq-conv.digits-standard", "resnet.fashion-standard", "mondeq-multi.fashion-joint-l2")


@pytest.mark.parametrize(("name", "num"), [*((name, 32) for name in CHEAP), *((name, 8) for name in CONVOLUTIONAL)])
def test_a_shipped_model_raises_no_flag(name: str, num: int) -> None:
    card = describe_model(name).card
    assert card is not None and card.evaluated_under is not None
    record = seen(load_model(name), load(card.data, SplitName.VALIDATION, num), threat=card.evaluated_under.build())
    assert record.probes is not None and set(record.probes) == set(PROBES) and raised(record) == set()


@pytest.mark.parametrize(
    "dressed",
    [
        lambda model: Damped(model, 0.05),
        lambda model: Damped(model, 0.01),
        lambda model: Coordinates(model, 30.0),
        lambda model: Shifted(model, 10.0),
        lambda model: Scaled(model, 1e4),
        lambda model: EarlyState(model, 5),
    ],
    ids=["20 times slower", "100 times slower", "other coordinates", "shifted", "large logits", "early state"],
)
def test_a_model_in_hard_dress_raises_no_flag(dressed: Callable[[EquilibriumModel], EquilibriumModel]) -> None:
    model = dressed(load_model("deq-fc.digits-joint-l2"))
    assert raised(seen(model, load("digits", SplitName.VALIDATION, 16))) == set()


def test_input_entropy_reduction_is_seen_through_a_gradient_that_is_not_its_own() -> None:
    model = EntropyReduction(load_model("mondeq-fc.digits-joint-l2"))
    assert raised(seen(model, load("digits", SplitName.VALIDATION, 16))) == {"wrong gradient"}


# ---------------------------------------------------------------- broken models


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, v: Tensor) -> Tensor:
        return v


def steps_back_and_forth(z: Tensor) -> Tensor:
    """No fixed point: every number is sent to one of the other sign."""
    return torch.where(z >= 0, -1.0, 1.0)


BROKEN: dict[str, tuple[dict[str, Callable], set[str]]] = {
    "dropout in evaluation mode": (
        {"inject": lambda self, x: F.dropout(Sound.inject(self, x), 0.3)},
        {"random output"},
    ),
    "noisy head": (
        {"head": lambda self, z: Sound.head(self, z) + 0.01 * torch.randn(3)},
        {"random output"},
    ),
    "batch statistics": (
        {"head": lambda self, z: Sound.head(self, F.batch_norm(z, None, None, training=len(z) > 1))},
        {"batch mates"},
    ),
    "mean of the batch": (
        {"inject": lambda self, x: Sound.inject(self, x - x.mean())},
        {"batch mates"},
    ),
    "two equilibria": (
        {"cell": lambda self, z, u: torch.tanh(3 * z + 0.1 * u)},
        {"other equilibrium"},
    ),
    "logits of NaN on some": (
        {"head": lambda self, z: torch.where(z[:, :1] > 0.3, torch.nan, Sound.head(self, z))},
        {"unreadable logits", "huge radius"},
    ),
    "rounded pixels": (
        {"inject": lambda self, x: Sound.inject(self, (x * 8).round() / 8)},
        {"zero gradient", "noise beats gradients"},
    ),
    "saturated head": (
        {"head": lambda self, z: (1e4 * Sound.head(self, z)).softmax(1)},
        {"zero gradient", "noise beats gradients"},
    ),
    "one-hot head": (
        {"head": lambda self, z: F.one_hot(Sound.head(self, z).argmax(1), 3) + 0 * Sound.head(self, z)},
        {"zero gradient", "noise beats gradients"},
    ),
    "rounded pixels, straight through": (
        {"inject": lambda self, x: Sound.inject(self, StraightThrough.apply(x))},
        {"wrong gradient"},
    ),
    "detached state": (
        {"cell": lambda self, z, u: Sound.cell(self, z.detach(), u)},
        {"wrong gradient"},
    ),
    "gradient reversed": (
        {"head": lambda self, z: 2 * Sound.head(self, z).detach() - Sound.head(self, z)},
        {"wrong gradient", "loss does not rise", "noise beats gradients", "huge radius"},
    ),
    "half of the images without an equilibrium": (
        {"cell": lambda self, z, u: torch.where(u[:, :1] > 0, Sound.cell(self, z, u), steps_back_and_forth(z))},
        {"lagging states", "unconverged"},
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_model_raises_its_flags_and_no_other(name: str) -> None:
    methods, expected = BROKEN[name]
    assert raised(seen(having(**methods))) == expected


def test_a_rugged_loss_is_climbed_better_by_one_step() -> None:
    """Clean pixels on a grid, at whose points the gradient is right; half-way to the next ones it points back."""

    def inject(self: Sound, x: Tensor) -> Tensor:
        return Sound.inject(self, x + 2 * torch.sin(2 * math.pi * 16 * x) / (2 * math.pi * 16))

    model = having(inject=inject)
    data = labelled(model, panel.NUM_IMAGES)
    grid = (16 * data.x).round() / 16
    with torch.no_grad():
        data = dataclasses.replace(data, x=grid, y=model(grid).argmax(1))
    assert raised(seen(model, data, threat=Threat("linf", 1 / 16))) == {"one step beats many"}


# ---------------------------------------------------------------- weak attacks


@pytest.mark.parametrize("name", ["joint-pgd", "pgd"])
def test_an_attack_that_hardly_moves_is_weak(name: str) -> None:
    weak = build_attack(name, L2, {"steps": 1, "step_size": 1e-3})
    assert raised(seen(Sound(), attack=weak)) == {"weak attack"}


def test_a_targeted_attack_is_not_weak_for_breaking_less() -> None:
    attack, data = build_attack("joint-pgd", L2, {}), labelled(Sound(), panel.NUM_IMAGES)
    record = evaluate(Sound(), attack, data, is_targeted=True, has_panel=True).record
    assert record.probes is not None and "missed" not in record.probes and raised(record) == set()


def test_a_model_without_a_gradient_is_told_of_an_attack_that_needs_none() -> None:
    model = having(inject=lambda self, x: Sound.inject(self, x.detach()))
    assert raised(seen(model, attack=build_attack("noise", L2, {}))) == {"zero gradient", "wrong gradient"}


class Boaster(Attack):
    """Calls every image fooled and leaves it as it is."""

    name, summary = "boaster", ""

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        nothing = torch.zeros_like(batch.images)
        return Proposal(nothing, torch.zeros(len(batch)), torch.ones(len(batch), dtype=torch.bool))


def test_an_attack_that_the_judge_refutes_is_told() -> None:
    assert raised(seen(Sound(), attack=Boaster(L2))) == {"weak attack", "refuted"}


def stage(name: str, result: Evaluation) -> tuple[StageRecord, Any]:
    """What a cascade would write of a stage, and the samples that it leaves."""
    is_left = result.samples["is_robust"].to_numpy()
    broken = int((result.samples["is_clean_correct"] & ~is_left).sum())
    cost = result.record.cost
    counts = {"cell_evals": cost.cell_evals, "cell_vjps": cost.cell_vjps, "wall_seconds": cost.wall_seconds}
    return StageRecord(name=name, num_attacked=len(is_left), num_broken=broken, **counts), torch.tensor(is_left)


def cascade(model: EquilibriumModel, *named: tuple[str, Attack]) -> Record:
    """A record of attacks one after the other, each on what those before have left, with the panel of the first."""
    data, stages, first = labelled(model, panel.NUM_IMAGES), [], None
    for name, attack in named:
        result = evaluate(model, attack, data, has_panel=first is None)
        first = first or result.record
        written, rows = stage(name, result)
        stages.append(written)
        data = dataclasses.replace(data, x=data.x[rows], y=data.y[rows], sample_ids=data.sample_ids[rows])
    assert first is not None
    return first.model_copy(update={"stages": stages})


def test_what_exact_gradients_break_behind_weak_joint_stages_is_told() -> None:
    weak, exact = build_attack("joint-pgd", L2, {"steps": 1, "step_size": 1e-3}), build_attack("apgd", L2, {})
    assert raised(cascade(Sound(), ("joint-ce", weak), ("apgd-ce", exact))) == {"weak attack", "not exhausted"}
    strong = build_attack("joint-pgd", L2, {})
    assert raised(cascade(Sound(), ("joint-ce", strong), ("apgd-ce", exact))) == set()


def test_a_black_box_that_beats_gradients_is_told() -> None:
    model = having(**BROKEN["rounded pixels"][0])
    gradients, blind = build_attack("joint-pgd", LINF, {}), build_attack("noise", LINF, {"restarts": 50})
    record = cascade(model, ("joint-ce", gradients), ("square", blind))
    assert raised(record) == {"zero gradient", "noise beats gradients", "beats white box"}


def stages_of(num_attacked: int, num_broken: int, name: str = "square-audit") -> dict[str, Any]:
    stage = StageRecord(
        name=name, num_attacked=num_attacked, num_broken=num_broken, cell_evals=1, cell_vjps=0, wall_seconds=1
    )
    return {"stages": [stage], "probes": {"num_probed": 32.0}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (stages_of(100, 0), set()),
        (stages_of(100, 1), {"black box finds more"}),
        (stages_of(100, 3), {"black box finds more"}),
        (stages_of(100, 4), {"beats white box"}),
        (stages_of(10, 1, "intermediate"), set()),
        (stages_of(10, 2, "intermediate"), {"beats white box"}),
        (stages_of(10, 2, "joint-ce"), set()),
        (stages_of(100, 4, "apgd-t"), {"not exhausted"}),
        (stages_of(100, 3, "apgd-t"), set()),
        ({"probes": {"noise_wins": 0.1, "gradient_gap": None}}, set()),
        ({"probes": {"noise_wins": 0.11}}, {"noise beats gradients"}),
        ({"probes": {"repeat_gap": 1.0, "batch_gap": 1.0, "noise_wins": 1.0}}, {"random output"}),
        ({"probes": None, "num_lagging": 32}, set()),
        ({"probes": {}, "num_nonfinite": 1}, set()),
        ({"probes": {}, "num_lagging": 32}, {"lagging states"}),
    ],
)
def test_flags_are_functions_of_the_record_with_the_thresholds_they_name(change: dict, expected: set[str]) -> None:
    record = seen(Sound()).model_copy(update={"num_attacked": 32, **change})
    assert raised(record) == expected


def test_every_flag_is_proved_here() -> None:
    proved = set().union(*(expected for _, expected in BROKEN.values()))
    proved |= {"one step beats many", "weak attack", "refuted", "beats white box", "black box finds more"}
    assert proved | {"not exhausted"} == {flag.name for flag in FLAGS}
    assert all(set(flag.rests_on) <= {other.name for other in FLAGS} for flag in FLAGS)


# ---------------------------------------------------------------- the panel itself


def test_the_panel_leaves_everything_as_it_was_and_gives_the_same_twice() -> None:
    model = having(**BROKEN["noisy head"][0])
    x, y = batch_of(labelled(model, 40), slice(0, 40), torch.device("cpu"))
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}

    def numbers(n: int) -> dict[str, float]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            clean = judge_clean(model, x, y)
        return probe(model, L2, x[:n], y[:n], torch.arange(n), 3, clean, clean.verdict.is_correct)

    torch.set_rng_state(state)
    first, again = numbers(40), numbers(40)
    assert first == again and first["num_probed"] == panel.NUM_IMAGES
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_panel_costs_less_than_the_attack_on_a_batch() -> None:
    model = load_model("deq-fc.fashion-joint-l2")
    data, threat = load("fashion-mnist", SplitName.VALIDATION, 128), Threat("l2", 1.0)
    x, y = batch_of(data, slice(0, 128), torch.device("cpu"))
    clean = judge_clean(model, x, y)
    with Meter(model) as attack:
        build_attack("joint-pgd", threat, {})(model, x, y)
    with Meter(model) as looked:
        probe(model, threat, x, y, data.sample_ids, 0, clean, clean.verdict.is_correct)
    assert looked.vjp_rows < attack.vjp_rows and looked.eval_rows < 1.5 * attack.eval_rows


def test_what_cannot_be_measured_is_left_out() -> None:
    model = Sound()
    nothing = seen(model, threat=Threat("l2", 0.0))
    assert nothing.probes is not None and set(nothing.probes) == {
        "num_probed",
        "repeat_gap",
        "batch_gap",
        "gradient_gap",
        "other_equilibrium",
        "other_prediction",
    }
    data = labelled(model, 1)
    assert "batch_gap" not in (seen(model, data).probes or {})
    wrong = dataclasses.replace(data, y=(data.y + 1) % 3)
    assert "no_rise" not in (seen(model, wrong).probes or {})
    assert seen(having(cell=lambda self, z, u: steps_back_and_forth(z) + 0 * u)).probes.keys() == {
        "num_probed",
        "repeat_gap",
        "batch_gap",
    }


def test_an_infinite_gap_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel, "repeat_gap", lambda case: Gap("head", math.inf))
    assert raised(seen(Sound())) == {"random output"}


def test_only_the_first_batch_is_looked_at_and_only_where_it_is_asked_for() -> None:
    data, stages = labelled(Sound(), 8), []
    attack = build_attack("joint-pgd", L2, {})
    record = evaluate(
        Sound(), attack, data, has_panel=True, batch_size=4, progress=lambda at: stages.append((at.done < 4, at.stage))
    ).record
    assert record.probes is not None and record.probes["num_probed"] == 4
    assert {is_first for is_first, stage in stages if stage == "panel"} == {True}
    assert evaluate(Sound(), attack, data).record.probes is None
