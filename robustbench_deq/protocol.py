"""The protocol every attack keeps: the attack proposes a perturbation, nothing here judges it.

Subclasses write `run`. The final `__call__` checks the input, freezes the model, counts the cost and enforces the
budget, runs restarts, lets samples leave that are done, does not trust the subclass with the threat model (it projects
the result itself), and leaves mode, buffers, `requires_grad` and `.grad` of the model as they were.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Self, TypeVar, final

import torch
from pydantic import Field
from torch import Tensor

from robustbench_deq.configs import Config, named_in, validate
from robustbench_deq.equilibrium import EquilibriumModel, check_labels, check_model
from robustbench_deq.meter import BudgetSpent, Cost, Meter
from robustbench_deq.optimise import (
    OBJECTIVES,
    Ball,
    Classification,
    Keep,
    Objective,
    Optimum,
    Settled,
    Source,
    Step,
    Targeted,
    optimise,
)
from robustbench_deq.registry import Registry
from robustbench_deq.rows import per_sample
from robustbench_deq.threats import Threat


class AttackConfig(Config):
    """Settings that every attack has."""

    restarts: int = Field(1, ge=1, description="runs; the highest loss is kept per sample")
    random_start: bool = Field(False, description="start in a random point of the ball (later restarts always do)")
    stop_at_success: bool = Field(
        True,
        description="fooled samples leave, misclassified ones stay out; false: all go for the highest loss",
    )
    max_evaluations: float | None = Field(
        None, gt=0, description="cell evaluations per sample, mean of the batch; the best within is returned"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="seconds per sample, likewise; what comes out depends on the machine"
    )

    @property
    def has_budget(self) -> bool:
        return self.max_evaluations is not None or self.max_seconds is not None


class ObjectiveConfig(AttackConfig):
    """Settings of attacks that maximise a loss."""

    objective: Annotated[str, named_in(OBJECTIVES)] = Field(
        "ce-then-margin", description="cross-entropy, margin, dlr or ce-then-margin"
    )

    def bind(self, labels: Tensor, targets: Tensor | None) -> Objective:
        """The objective for the true classes, or for reaching `targets` where they are given."""
        kind = OBJECTIVES.get(self.objective)
        return kind(labels) if targets is None else Targeted(kind(targets))


class Clean(NamedTuple):
    """What is known of the clean images before an attack: their equilibria, and which are classified correctly there,
    `(batch,)`."""

    settled: Settled
    is_correct: Tensor


@dataclass(frozen=True)
class Batch:
    """What an attack is given; rows are samples.

    images   `(rows, channels, height, width)` in [0, 1]
    labels   true classes `(rows,)`
    targets  classes to be reached `(rows,)`; None is untargeted
    ids      what a sample's randomness is keyed by `(rows,)`, with `seed`
    start    perturbation to begin with, like the images
    settled  the equilibrium at the clean images, if it is known
    leaves   whether samples that are done leave the batch
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None
    ids: Tensor
    seed: int
    start: Tensor
    settled: Settled | None = None
    leaves: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor) -> Batch:
        """The same for the rows `rows`."""
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            targets=None if self.targets is None else self.targets[rows],
            ids=self.ids[rows.to(self.ids.device)],
            start=self.start[rows],
            settled=None if self.settled is None else self.settled.take(rows),
        )


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

    delta        perturbation, like the images
    loss         the attack's own estimate `(rows,)`; chooses between restarts, nothing else
    is_done      samples `(rows,)` that are fooled at a settled state, so that no more need be tried; None: none
    z, mu        state and adjoint at the end, if the attack has them: training starts from these
    diagnostics  counts and means worth recording, such as samples that needed a fallback
    """

    delta: Tensor
    loss: Tensor
    is_done: Tensor | None = None
    z: Tensor | None = None
    mu: Tensor | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackResult:
    """Perturbed images in ball and box, and how they were found. No verdict in it: see `evaluate.judge`.

    loss         the attack's own estimate `(batch,)`
    is_failed    samples `(batch,)` whose perturbation came back not finite; it was replaced by zero
    is_attacked  samples `(batch,)` that were attacked at all
    snapshots    for the curve, if asked for
    residuals    mean relative residual of the state after each solver step, if snapshots were asked for
    z, mu        of the last run, where it was of the whole batch
    diagnostics  summed over all runs
    cost         of all of it
    """

    x_adv: Tensor
    delta: Tensor
    loss: Tensor
    is_failed: Tensor
    is_attacked: Tensor
    cost: Cost
    snapshots: tuple[Snapshot, ...]
    residuals: tuple[float, ...]
    z: Tensor | None
    mu: Tensor | None
    diagnostics: dict[str, float]


Confirm = Callable[[Tensor, Tensor], Tensor]
"""Asked with the rows `(k,)` of samples that an attack left because they are fooled, and their perturbed images, in
ball and box; says which of them are, `(k,)`."""


class _Best(NamedTuple):
    """The best perturbation of every sample of the batch so far; a loss of NaN is beaten by any."""

    delta: Tensor
    loss: Tensor

    def merged(self, rows: Tensor | None, delta: Tensor, loss: Tensor, is_done: Tensor | None = None) -> _Best:
        """With what a run on `rows` has found, where that is better; None is all rows.

        Samples that are done win: they are fooled, and a higher loss of an earlier run need not mean that.
        """
        mine = self if rows is None else _Best(self.delta[rows], self.loss[rows])
        wins = (loss > mine.loss) | torch.isnan(mine.loss)
        wins = wins if is_done is None else wins | is_done
        delta = torch.where(per_sample(wins, delta), delta, mine.delta)
        loss = torch.where(wins, loss, mine.loss)
        if rows is None:
            return _Best(delta, loss)
        return _Best(self.delta.index_copy(0, rows, delta), self.loss.index_copy(0, rows, loss))


class Recorder:
    """Takes snapshots at a few steps that are fixed beforehand, so that memory does not grow with the steps."""

    def __init__(self, meter: Meter, ball: Ball, num_snapshots: int) -> None:
        self._meter, self._ball, self.num_snapshots = meter, ball, num_snapshots
        self.snapshots: list[Snapshot] = []
        self._residuals: list[Tensor] = []
        self._wanted: set[int] = set()
        self._last = self._offset = self._seen = 0
        self._rows: Tensor | None = None
        self._best = _Best(torch.zeros_like(ball.x), ball.x.new_zeros(len(ball.x)))

    @property
    def residuals(self) -> tuple[float, ...]:
        return tuple(float(value) for value in self._residuals)

    def begin(self, rows: Tensor | None, best: _Best) -> None:
        """A run on `rows` of the batch (None: all) begins, beside what is best so far."""
        self._rows, self._best, self._offset = rows, best, self._offset + self._last
        self._wanted, self._last, self._seen = set(), 0, 0

    def plan(self, num_steps: int) -> None:
        """Called by the attack: spread the snapshots over the `num_steps` steps of this run."""
        count = min(self.num_snapshots, num_steps)
        self._wanted = {round(num_steps * (i + 1) / count) for i in range(count)}
        self._last = num_steps if count else 0

    def watch(self, step: int, present: Callable[[], tuple[Tensor, Tensor]], residual: Tensor) -> None:
        """The watcher of `optimise`. The last step is left to the protocol: an attack may still change its result."""
        if self.num_snapshots:
            self._residuals.extend(residual.view(-1, residual.shape[-1]).nanmean(1))
        self._seen = step
        if step in self._wanted and step < self._last:
            self._take(step, *present())

    def end(self, proposal: Proposal, is_stopped: bool) -> None:
        """The run has ended with `proposal`, or its budget has ended it after the last step that was seen."""
        if is_stopped:
            self._last = min(self._last, self._seen)
        if self._last and (not self.snapshots or self.snapshots[-1].step < self._last + self._offset):
            self._take(self._last, proposal.delta, proposal.loss, proposal.is_done)

    def _take(self, step: int, delta: Tensor, loss: Tensor, is_done: Tensor | None = None) -> None:
        delta, rows, meter = self._best.merged(self._rows, delta, loss, is_done).delta, len(self._ball.x), self._meter
        self.snapshots.append(
            Snapshot(
                step=step + self._offset,
                delta=self._ball.project(delta),
                cell_evals=meter.eval_rows / rows,
                cell_vjps=meter.vjp_rows / rows,
                solver_steps=meter.num_steps / rows,
                wall_seconds=meter.elapsed_seconds,
            )
        )


A = TypeVar("A", bound=AttackConfig)
M = TypeVar("M", bound=ObjectiveConfig)


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
        self.config: A = config if config is not None else self.config_type()  # type: ignore[assignment]  # its own

    def with_(self, threat: Threat | None = None, **settings: Any) -> Self:
        """The same attack with another threat, or other settings."""
        config = self.config.model_copy(update=settings) if settings else self.config
        return type(self)(threat or self.threat, config)

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        """The loss that a run ascends first, if its adjoint at the clean equilibrium is of use; None: it is not."""
        return None

    @abc.abstractmethod
    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        """Perturb the images of `batch`. Gradients with respect to parameters are off."""

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
        clean: Clean | None = None,
        confirm: Confirm | None = None,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: left as it was found.
            x: images `(batch, channels, height, width)` in [0, 1].
            y: true classes `(batch,)`.
            targets: classes to be reached `(batch,)`; None is untargeted.
            sample_ids: what a sample's randomness is keyed by `(batch,)`; None numbers the batch.
            num_snapshots: points of the accuracy-against-cost curve.
            clean: what is known of the clean images: solves start there, and unless `stop_at_success` is off, samples
                that are misclassified there are not attacked.
            confirm: who has the last word on samples that leave because they are fooled; those that it refutes are
                attacked on, without leaving. None believes the attack.

        Raises:
            UsageError: for an object that is not an `EquilibriumModel`, a model without a gradient, and images or
                labels that do not fit it.
        """
        check_model(model)
        x = x.detach()
        model.check_images(x)
        check_labels(y, len(x), model.num_classes)
        if targets is not None:
            check_labels(targets, len(x), model.num_classes)
        ids = torch.arange(len(x)) if sample_ids is None else sample_ids
        if self.is_gradient_based:
            with frozen(model):
                model.check_gradient(x)
        settled = None if clean is None else clean.settled
        batch = Batch(x, y, targets, ids, seed, torch.zeros_like(x), settled, self.config.stop_at_success)
        with torch.enable_grad(), frozen(model), self._meter(model, len(x)) as meter:
            runs = _Runs(self, model, batch, meter, num_snapshots)
            rows = None
            if clean is not None and self.config.stop_at_success:
                rows = clean.is_correct.nonzero()[:, 0]
            runs.attack(rows)
            if confirm is not None:
                runs.attack_on(confirm)
        return runs.result(rows)

    def _meter(self, model: EquilibriumModel, num_rows: int) -> Meter:
        evaluations, seconds = self.config.max_evaluations, self.config.max_seconds
        return Meter(
            model,
            max_rows=None if evaluations is None else evaluations * num_rows * (1 + 1e-9),
            max_seconds=None if seconds is None else seconds * num_rows,
        )


class _Runs:
    """All runs of an attack on one batch: restarts, on the rows that are left, and again on rows that were refuted."""

    def __init__(
        self, attack: Attack[Any], model: EquilibriumModel, batch: Batch, meter: Meter, num_snapshots: int
    ) -> None:
        self.of, self.model, self.batch, self.meter = attack, model, batch, meter
        self.ball = attack.threat.ball(batch.images)
        self.record = Recorder(meter, self.ball, num_snapshots)
        x = batch.images
        self.best = _Best(torch.zeros_like(x), x.new_full((len(x),), torch.nan))
        self.is_done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.diagnostics: dict[str, float] = {}
        self.last: Proposal | None = None

    def attack(self, rows: Tensor | None) -> None:
        """All restarts on `rows` (None: all), those of samples that are not done by then."""
        config = self.of.config
        for restart in range(config.restarts):
            if (rows is not None and len(rows) == 0) or self.meter.is_spent:
                return
            part = self.batch if rows is None else self.batch.take(rows)
            if restart or config.random_start:
                start = self.of.threat.ball(part.images).random_start(part.seed, part.ids, restart)
                part = replace(part, start=start)
            self.record.begin(rows, self.best)
            try:
                proposal = self.of.run(self.model, part, self.record)
            except BudgetSpent:  # outside of `optimise`, which returns what it has
                return
            self.record.end(proposal, self.meter.is_spent)
            self._note(rows, proposal)
            if part.leaves and proposal.is_done is not None and config.restarts > 1:
                rows = self._left(rows, proposal.is_done)

    def attack_on(self, confirm: Confirm) -> None:
        """Attack those samples again that are called done and are not fooled, to the end and for the highest loss."""
        claimed = self.is_done.nonzero()[:, 0]
        if len(claimed) == 0:
            return
        with self.meter.paused(), torch.no_grad():
            delta = self.of.threat.ball(self.batch.images[claimed]).project(self.best.delta[claimed])
            is_fooled = confirm(claimed, (self.batch.images[claimed] + delta).clamp_(0.0, 1.0))
        refuted = claimed[~is_fooled.to(claimed.device)]
        self.diagnostics["num_refuted"] = float(len(refuted))
        if len(refuted):
            self.batch = replace(self.batch, leaves=False)
            self.best = _Best(self.best.delta, self.best.loss.index_fill(0, refuted, torch.nan))
            self.is_done = self.is_done.index_fill(0, refuted, False)
            self.attack(refuted)

    def _note(self, rows: Tensor | None, proposal: Proposal) -> None:
        self.best, self.last = self.best.merged(rows, proposal.delta, proposal.loss, proposal.is_done), proposal
        for key, value in proposal.diagnostics.items():
            self.diagnostics[key] = self.diagnostics.get(key, 0.0) + value
        if proposal.is_done is not None:
            done = proposal.is_done
            self.is_done = self.is_done | done if rows is None else self.is_done.index_put((rows,), done)

    @staticmethod
    def _left(rows: Tensor | None, is_done: Tensor) -> Tensor:
        left = (~is_done).nonzero()[:, 0]
        return left if rows is None else rows[left]

    def result(self, rows: Tensor | None) -> AttackResult:
        x, delta, last = self.batch.images, self.best.delta.detach(), self.last
        is_failed = ~torch.isfinite(delta.flatten(1)).all(1)
        delta = self.ball.project(delta.masked_fill(per_sample(is_failed, delta), 0.0))
        is_attacked = torch.ones_like(is_failed)
        if rows is not None:
            is_attacked = torch.zeros_like(is_failed).index_fill(0, rows, True)
        z, mu = (last.z, last.mu) if last is not None and len(last.delta) == len(x) else (None, None)
        if self.of.config.has_budget:
            self.diagnostics["stopped_by_budget"] = float(self.meter.is_spent)
        return AttackResult(
            x_adv=(x + delta).clamp_(0.0, 1.0),
            delta=delta,
            loss=self.best.loss,
            is_failed=is_failed,
            is_attacked=is_attacked,
            cost=self.meter.cost(len(x)),
            snapshots=tuple(self.record.snapshots),
            residuals=self.record.residuals,
            z=z,
            mu=mu,
            diagnostics=self.diagnostics,
        )


class ObjectiveAttack(Attack[M]):
    """An attack whose `run` is a run of `optimise` on the classification problem, or several."""

    def first_objective(self, labels: Tensor, targets: Tensor | None) -> Objective | None:
        return self.config.bind(labels, targets).at(0.0)

    def search(
        self,
        model: EquilibriumModel,
        batch: Batch,
        source: Source,
        step: Step,
        keep: Keep,
        num_steps: int,
        record: Recorder | None = None,
    ) -> Optimum:
        """Optimise the perturbation of `batch` within the threat's ball, for the config's objective.

        Args:
            record: takes the snapshots of this run; None takes none.
        """
        return optimise(
            Classification(model, batch.images, self.config.bind(batch.labels, batch.targets)),
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


def make_attack(name: str, threat: Threat, settings: dict[str, Any], where: str | None = None) -> Attack[Any]:
    """A registered attack with settings that are checked.

    Args:
        where: what the settings are from, for the message.

    Raises:
        UsageError: for an unknown name, or settings or a threat that the attack refuses.
    """
    kind = ATTACKS.get(name)
    return kind(threat, validate(kind.config_type, settings, where or f"attack {name}"))
