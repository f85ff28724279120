"""The protocol every attack keeps: the attack proposes a perturbation, nothing here judges it.

Subclasses write `run`. The final `__call__` checks the input, freezes the model, counts the cost and enforces the
budget, runs restarts, lets samples leave that are done, does not trust the subclass with the threat model (it projects
the result itself), and leaves mode, buffers, `requires_grad` and `.grad` of the model as they were.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar, final

import torch
from torch import Tensor

from robustbench_deq.configs import validate
from robustbench_deq.equilibrium import EquilibriumModel, check_labels, check_model
from robustbench_deq.errors import UsageError, kind_of
from robustbench_deq.inputs import as_ids
from robustbench_deq.meter import Meter
from robustbench_deq.optimise import Classification, Keep, Objective, Optimum, Source, Step, optimise
from robustbench_deq.protocol.batch import Batch, Clean, Proposal
from robustbench_deq.protocol.recorder import Recorder
from robustbench_deq.protocol.runs import AttackResult, Confirm, Run, Runs
from robustbench_deq.protocol.settings import AttackConfig, ObjectiveConfig, RunConfig
from robustbench_deq.registry import Registry
from robustbench_deq.threats import Threat

A = TypeVar("A", bound=AttackConfig)
M = TypeVar("M", bound=ObjectiveConfig)


class Attack(abc.ABC, Generic[A]):
    """An attack with its threat model and settings.

    Attributes:
        name: in the registry.
        summary: one line for listings.
        config_type: the typed settings.
        is_gradient_based: False where it never asks for a gradient, and so attacks models that have none.
        version: of the standard evaluation that it is, see `protocol.cascade`; None: it is none.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    config_type: ClassVar[type[AttackConfig]] = AttackConfig
    is_gradient_based: ClassVar[bool] = True
    version: ClassVar[str | None] = None

    def __init__(self, threat: Threat, config: A | Mapping[str, Any] | None = None, **settings: Any) -> None:
        """An attack within `threat`.

        Args:
            config: a `config_type`, or its fields by name; None is the defaults.
            settings: fields of the config, laid over it.

        Raises:
            UsageError: for a threat or config of another type, and for settings that the config refuses.
        """
        if not isinstance(threat, Threat):
            raise UsageError.of(
                f"attack {_title(type(self))}",
                expected="a Threat",
                got=kind_of(threat),
                fix='pass for example Threat("l2", 0.5)',
            )
        self.threat = threat
        self.config: A = self._configured(config, settings)

    def _configured(self, config: object, settings: dict[str, Any]) -> A:
        kind, where = self.config_type, f"attack {_title(type(self))}"
        if isinstance(config, kind):
            if not settings:
                return config  # type: ignore[return-value]  # its own
            config = {name: getattr(config, name) for name in config.model_fields_set}
        elif not isinstance(config, Mapping | None):
            raise UsageError.of(
                where,
                expected=f"a {kind.__name__}",
                got=kind_of(config),
                fix=f"pass settings by name: {type(self).__name__}(threat, restarts=2)",
            )
        return validate(kind, {**(config or {}), **settings}, where)  # type: ignore[return-value]  # its own

    def __repr__(self) -> str:
        settings = (f"{name}={getattr(self.config, name)!r}" for name in sorted(self.config.model_fields_set))
        return f"{type(self).__name__}({', '.join([repr(self.threat), *settings])})"

    def with_(self, threat: Threat | None = None, **settings: Any) -> Self:
        """The same attack with another threat, or other settings. Raises `UsageError` as the attack itself does."""
        return type(self)(threat or self.threat, self.config, **settings)

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        """The loss that a run ascends first, if its adjoint at the clean equilibrium is of use; None: it is not."""
        return None

    @abc.abstractmethod
    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        """Perturb the images of `batch`. Gradients with respect to parameters are off."""

    def runner(self, model: EquilibriumModel) -> Run:
        """One run on `model`, as a function of what is attacked."""
        return partial(self.run, model)

    def carry_out(self, model: EquilibriumModel, runs: Runs, rows: Tensor | None, confirm: Confirm | None) -> None:
        """All runs on the samples `rows` (None: all), and again on those that `confirm` refutes."""
        run = self.runner(model)
        runs.attack(run, self.config, rows)
        if confirm is not None:
            runs.attack_on(run, self.config, rows, confirm)

    @final
    @torch.inference_mode(False)
    def __call__(
        self,
        model: EquilibriumModel,
        x: Tensor,
        y: Tensor,
        *,
        targets: Tensor | None = None,
        sample_ids: Tensor | None = None,
        seed: int = 0,
        num_snapshots: int = 0,
        clean: Clean | None = None,
        confirm: Confirm | None = None,
        progress: Callable[[float, str], None] | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: left as it was found.
            x: images `(batch, channels, height, width)` in [0, 1], up to rounding, which is clipped.
            y: true classes `(batch,)`, of any integer type.
            targets: classes to be reached `(batch,)`; None is untargeted.
            sample_ids: what a sample's randomness is keyed by, integers >= 0 `(batch,)`; None numbers the batch.
            seed: an integer >= 0.
            num_snapshots: points of the accuracy-against-cost curve.
            clean: what is known of the clean images: solves start there, and unless `stop_at_success` is off, samples
                that are misclassified there are not attacked.
            confirm: who has the last word on samples that leave because they are fooled; those that it refutes are
                attacked on, without leaving. None believes the attack.
            progress: told after each step what share is done of the present run, or of a cascade, and the stage that it
                is in, "" of none; the clock goes on meanwhile.

        Raises:
            UsageError: for an object that is not an `EquilibriumModel`, a model whose parts do not return what they
                should or give no gradient, images or labels that do not fit it, and other numbers of ids or of clean
                verdicts than of images.
        """
        check_model(model)
        given = validate(RunConfig, {"seed": seed, "num_snapshots": num_snapshots}, f"attack {_title(type(self))}")
        seed, num_snapshots = given.seed, given.num_snapshots
        model.check_images(x)
        x = x.detach().clamp(0.0, 1.0).contiguous()  # rounding, other layouts, and views of inference mode end here
        for what, function in (("confirm", confirm), ("progress", progress)):
            if function is not None and not callable(function):
                raise UsageError.of(what, expected="a function", got=kind_of(function), fix="pass what is called")
        y = check_labels(y, len(x), model.num_classes).to(x.device, copy=True)
        if targets is not None:
            targets = check_labels(targets, len(x), model.num_classes).to(x.device, copy=True)
        ids = torch.arange(len(x)) if sample_ids is None else as_ids(sample_ids, len(x))
        if not isinstance(clean, Clean | None):
            raise UsageError.of(
                "clean",
                expected="a Clean",
                got=type(clean).__name__,
                fix="pass judge_clean(model, x, y).known(model, x)",
            )
        if clean is not None and not len(clean.is_correct) == len(clean.settled.z) == len(x):
            raise UsageError.of(
                "clean",
                expected=f"{len(x)} samples",
                got=f"{len(clean.is_correct)} verdicts and {len(clean.settled.z)} states",
                fix="judge the same images",
            )
        with frozen(model):
            (model.check_gradient if self.is_gradient_based else model.check_parts)(x)
        settled = None if clean is None else clean.settled
        batch = Batch(x, y, targets, ids, seed, torch.zeros_like(x), settled, self.config.stop_at_success)
        with torch.enable_grad(), frozen(model), self._meter(model, len(x)) as meter:
            runs = Runs(self.threat, batch, meter, num_snapshots, progress)
            rows = None
            if clean is not None and self.config.stop_at_success:
                rows = clean.is_correct.nonzero()[:, 0]
            self.carry_out(model, runs, rows, confirm)
        return runs.result(rows)

    def _meter(self, model: EquilibriumModel, num_rows: int) -> Meter:
        evaluations, seconds = self.config.max_evaluations, self.config.max_seconds
        return Meter(
            model,
            max_rows=None if evaluations is None else evaluations * num_rows * (1 + 1e-9),
            max_seconds=None if seconds is None else seconds * num_rows,
        )


class ObjectiveAttack(Attack[M]):
    """An attack whose `run` is a run of `optimise` on the classification problem, or several."""

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        return self.config.bind(labels, targets).at(0.0)

    def runner(self, model: EquilibriumModel) -> Run:
        run, rank = super().runner(model), self.config.heading
        if rank is None:
            return run
        if rank >= model.num_classes:
            raise UsageError.of(
                f"{self.name}: heading",
                expected=f"a rank of the wrong classes, 1 to {model.num_classes - 1}",
                got=rank,
                fix="lower it",
            )

        def headed(batch: Batch, record: Recorder) -> Proposal:
            if batch.targets is not None:
                raise UsageError.of(self.name, expected="no targets with a heading", got="targets", fix="drop either")
            return run(replace(batch, headings=likely_classes(model, batch, rank)[:, -1]), record)

        return headed

    def search(
        self,
        model: EquilibriumModel,
        batch: Batch,
        source: Source,
        step: Step,
        keep: Keep,
        num_steps: int,
        record: Recorder | None = None,
        objective: Objective | None = None,
    ) -> Optimum:
        """Optimise the perturbation of `batch` within the threat's ball.

        Args:
            record: takes the snapshots of this run; None takes none.
            objective: of the rows of `batch`; None is the config's.
        """
        return optimise(
            Classification(model, batch.images, objective or self._objective(batch)),
            source,
            self.threat.ball(batch.images),
            step,
            keep,
            batch.start,
            num_steps=num_steps,
            settled=batch.settled,
            leaves=batch.leaves,
            seed=batch.seed,
            ids=batch.ids,
            watch=None if record is None else record.watch,
        )

    def _objective(self, batch: Batch) -> Objective:
        return self.config.bind(batch.labels, batch.targets, batch.headings)


@torch.no_grad()
def likely_classes(model: EquilibriumModel, batch: Batch, count: int) -> Tensor:
    """The wrong classes with the largest logits at the clean images `(rows, count or fewer)`, the first in place of
    those that are masked."""
    z = model.equilibrium(batch.images).value if batch.settled is None else batch.settled.z
    wrong = model.head(z).scatter(1, batch.labels[:, None], -torch.inf)
    likely = wrong.topk(min(count, wrong.shape[1] - 1), dim=1)
    return torch.where(likely.values.isneginf(), likely.indices[:, :1], likely.indices)


@contextlib.contextmanager
def frozen(model: EquilibriumModel) -> Iterator[None]:
    """Evaluation mode, and no gradients with respect to parameters; on leaving, everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


ATTACKS: Registry[type[Attack[Any]]] = Registry("attack")


def _title(kind: type[Attack[Any]]) -> str:
    """The name of an attack, or of its class where it has none."""
    return getattr(kind, "name", kind.__name__)


def make_attack(name: str, threat: Threat, settings: dict[str, Any], where: str | None = None) -> Attack[Any]:
    """A registered attack with settings that are checked.

    Args:
        where: what the settings are from, for the message.

    Raises:
        UsageError: for an unknown name, or settings or a threat that the attack refuses.
    """
    kind = ATTACKS.get(name)
    return kind(threat, validate(kind.config_type, settings, where or f"attack {name}"))
