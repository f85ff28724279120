"""The protocol every attack keeps: the attack proposes a perturbation, nothing here judges it.

Subclasses write `run`. The final `__call__` checks the input, freezes the model, counts the cost, runs restarts, does
not trust the subclass with the threat model (it projects the result itself), and leaves mode, buffers, `requires_grad`
and `.grad` of the model as they were.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Generic, TypeVar, final

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from robustbench_deq.configs import Config, named_in, validate
from robustbench_deq.equilibrium import EquilibriumModel, check_labels, check_model
from robustbench_deq.meter import Cost, Meter
from robustbench_deq.objectives import OBJECTIVES, Objective, Targeted
from robustbench_deq.registry import Registry
from robustbench_deq.rows import per_sample
from robustbench_deq.threats import Threat


class AttackConfig(Config):
    """Settings that every attack has."""

    restarts: int = Field(1, ge=1, description="runs; the highest loss is kept per sample")
    random_start: bool = Field(False, description="start in a random point of the ball (later restarts always do)")
    max_evaluations: float | None = Field(
        None, gt=0, description="cell evaluations per sample, mean of the batch; the last iterate within is returned"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="seconds per sample, likewise; what comes out depends on the machine"
    )

    @property
    def has_budget(self) -> bool:
        return self.max_evaluations is not None or self.max_seconds is not None

    @model_serializer(mode="wrap")
    def _leave_out_no_budget(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a budget the settings are those of records from before there were any."""
        values = handler(self)
        return {key: value for key, value in values.items() if value is not None or key not in BUDGET_SETTINGS}


BUDGET_SETTINGS = ("max_evaluations", "max_seconds")


class ObjectiveConfig(AttackConfig):
    """Settings of attacks that maximise a loss."""

    objective: Annotated[str, named_in(OBJECTIVES)] = Field(
        "ce-then-margin", description="cross-entropy, margin, dlr or ce-then-margin"
    )

    def bind(self, y: Tensor, targets: Tensor | None) -> Objective:
        """The objective for labels `y`, or for reaching `targets` where they are given."""
        kind = OBJECTIVES.get(self.objective)
        return kind(y) if targets is None else Targeted(kind(targets))


@dataclass(frozen=True)
class Snapshot:
    """The perturbation that would be returned after `step`, with what it had cost until then (means per sample)."""

    step: int
    delta: Tensor
    cell_evals: float
    cell_vjps: float
    solver_steps: float
    wall_seconds: float


@dataclass(frozen=True)
class Proposal:
    """What `run` returns.

    delta        perturbation `(batch, channels, height, width)`
    loss         the attack's own estimate `(batch,)`; chooses between restarts, nothing else
    z, mu        state and adjoint at the end, if the attack has them: training starts from these
    diagnostics  counts and means worth recording, such as samples that needed a fallback
    """

    delta: Tensor
    loss: Tensor
    z: Tensor | None = None
    mu: Tensor | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackResult:
    """Perturbed images in ball and box, and how they were found. No verdict in it: see `evaluate.judge`.

    is_failed    samples `(batch,)` whose perturbation came back not finite; it was replaced by zero
    snapshots    for the curve, if asked for
    residuals    mean relative residual of the state after each solver step, if snapshots were asked for
    proposal     of the last restart, its diagnostics summed over all restarts
    cost         of all of it; of an attack that its budget stopped, until the iterate that is returned
    """

    x_adv: Tensor
    delta: Tensor
    is_failed: Tensor
    cost: Cost
    snapshots: tuple[Snapshot, ...]
    residuals: tuple[float, ...]
    proposal: Proposal


class BudgetSpent(Exception):
    """Leaves an attack whose budget is spent. Only `Attack.__call__` catches it."""


class Recorder:
    """Takes snapshots at a few steps that are fixed beforehand, so that memory does not grow with the steps.

    Where the attack has a budget, it also keeps the last iterate within it, with what that had cost, and stops the
    attack at the first one beyond: the budget is kept exactly, at the price of one step that is thrown away.
    """

    def __init__(
        self, meter: Meter, threat: Threat, x: Tensor, num_snapshots: int, config: AttackConfig | None = None
    ) -> None:
        self.meter, self.threat, self.x, self.num_snapshots = meter, threat, x, num_snapshots
        self.config = config or AttackConfig()
        self.within: tuple[Tensor, Tensor] | None = None
        self.cost_within = Cost(0.0, 0.0, 0.0, 0.0, 0.0)
        self.snapshots: list[Snapshot] = []
        self.residuals: list[Tensor] = []
        self._wanted: set[int] = set()
        self._offset = 0
        self._incumbent: tuple[Tensor, Tensor] | None = None

    def plan(self, num_steps: int) -> None:
        """Spread the snapshots over the `num_steps` steps of this restart."""
        count = min(self.num_snapshots, num_steps)
        self._wanted = {round(num_steps * (i + 1) / count) for i in range(count)}

    def follow(self, residual: Tensor) -> None:
        """Note the relative residuals `(batch,)` or `(steps, batch)` of the state; NaN is a sample at rest."""
        if self.num_snapshots:
            self.residuals.extend(torch.atleast_2d(residual).nanmean(1))

    def next_restart(self, incumbent: tuple[Tensor, Tensor], num_steps: int) -> None:
        self._incumbent, self._offset = incumbent, self._offset + num_steps
        self.within = None

    def __call__(self, step: int, delta: Tensor, loss: Tensor) -> None:
        """Offer the perturbation `(batch, ...)` that would be returned after `step`, with its losses `(batch,)`.

        Raises:
            BudgetSpent: when it has cost more than the budget.
        """
        if self.config.has_budget:
            cost = self.meter.cost(len(self.x))
            if self._is_beyond(cost):
                raise BudgetSpent
            self.within, self.cost_within = (delta, loss), cost
        if step not in self._wanted:
            return
        if self._incumbent is not None:
            delta = _better(delta, loss, *self._incumbent)[0]
        rows = len(self.x)
        self.snapshots.append(
            Snapshot(
                step=step + self._offset,
                delta=self.threat.project(delta, self.x),
                cell_evals=self.meter.eval_rows / rows,
                cell_vjps=self.meter.vjp_rows / rows,
                solver_steps=self.meter.num_steps / rows,
                wall_seconds=self.meter.elapsed_seconds,
            )
        )

    def _is_beyond(self, cost: Cost) -> bool:
        evaluations, seconds = self.config.max_evaluations, self.config.max_seconds
        return (evaluations is not None and cost.cell_evals > evaluations) or (
            seconds is not None and cost.wall_seconds > seconds * len(self.x)
        )


def _better(delta: Tensor, loss: Tensor, other: Tensor, other_loss: Tensor) -> tuple[Tensor, Tensor]:
    wins = (loss > other_loss) | torch.isnan(other_loss)
    return torch.where(per_sample(wins, delta), delta, other), torch.where(wins, loss, other_loss)


A = TypeVar("A", bound=AttackConfig)


class Attack(abc.ABC, Generic[A]):
    """An attack with its threat model and settings.

    Attributes:
        name: in the registry.
        summary: one line for listings.
        config_type: the typed settings.
        is_gradient_based: False where it never asks for a gradient, and so attacks models that have none.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    config_type: ClassVar[type[AttackConfig]] = AttackConfig
    is_gradient_based: ClassVar[bool] = True

    def __init__(self, threat: Threat, config: A | None = None) -> None:
        self.threat = threat
        self.config: A = config if config is not None else self.config_type()

    @abc.abstractmethod
    def run(
        self,
        model: EquilibriumModel,
        x: Tensor,
        y: Tensor,
        targets: Tensor | None,
        start: Tensor,
        record: Recorder,
    ) -> Proposal:
        """Perturb `x`, beginning with the perturbation `start`. Gradients by parameters are off."""

    @final
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
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: left as it was found.
            x: images `(batch, channels, height, width)` in [0, 1].
            y: true classes `(batch,)`.
            targets: classes to be reached `(batch,)`; None is untargeted.
            sample_ids: what a sample's randomness is keyed by `(batch,)`; None numbers the batch.
            num_snapshots: points of the accuracy-against-cost curve.

        Raises:
            UsageError: for a model that is none or has no gradient, and images or labels that do not fit it.
        """
        check_model(model)
        x = x.detach()
        model.check_images(x)
        check_labels(y, len(x), model.num_classes)
        if targets is not None:
            check_labels(targets, len(x), model.num_classes)
        sample_ids = torch.arange(len(x)) if sample_ids is None else sample_ids
        best: tuple[Tensor, Tensor] | None = None
        diagnostics: dict[str, float] = {}
        if self.is_gradient_based:
            with frozen(model):
                model.check_gradient(x)
        with torch.enable_grad(), frozen(model), Meter(model) as meter:
            record = Recorder(meter, self.threat, x, num_snapshots, self.config)
            is_stopped = False
            for restart in range(self.config.restarts):
                start = torch.zeros_like(x)
                if restart or self.config.random_start:
                    start = self.threat.random_start(x, seed, sample_ids, restart)
                try:
                    proposal = self.run(model, x, y, targets, start, record)
                except BudgetSpent:
                    is_stopped = True
                    proposal = Proposal(*(record.within or (start, x.new_full((len(x),), -torch.inf))))
                mine = (proposal.delta, proposal.loss)
                best = mine if best is None else _better(*mine, *best)
                for key, value in proposal.diagnostics.items():
                    diagnostics[key] = diagnostics.get(key, 0.0) + value
                last = record.snapshots[-1].step - record._offset if record.snapshots else 0
                record.next_restart(best, last)
                if is_stopped:
                    break
            if self.config.has_budget:
                diagnostics["stopped_by_budget"] = float(is_stopped)
            delta = best[0].detach()
            is_failed = ~torch.isfinite(delta.flatten(1)).all(1)
            delta = self.threat.project(delta.masked_fill(per_sample(is_failed, delta), 0.0), x)
        return AttackResult(
            x_adv=(x + delta).clamp_(0.0, 1.0),
            delta=delta,
            is_failed=is_failed,
            cost=record.cost_within if is_stopped else meter.cost(len(x)),
            snapshots=tuple(record.snapshots),
            residuals=tuple(float(value) for value in record.residuals),
            proposal=replace(proposal, diagnostics=diagnostics),
        )


@contextlib.contextmanager
def frozen(model: EquilibriumModel) -> Iterator[None]:
    """Evaluation mode, and no gradients by parameters; on leaving, everything is as it was."""
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


ATTACKS: Registry[type[Attack]] = Registry("attack")


def make_attack(name: str, threat: Threat, settings: dict[str, Any], where: str | None = None) -> Attack:
    """A registered attack with settings that are checked.

    Args:
        where: what the settings are from, for the message.

    Raises:
        UsageError: for an unknown name, or settings or a threat that the attack refuses.
    """
    kind = ATTACKS.get(name)
    return kind(threat, validate(kind.config_type, settings, where or f"attack {name}"))
