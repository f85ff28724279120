"""Joint inference and input optimisation: state, adjoint and input advance together as one augmented fixed point.

To maximise `L(h(z*))` over a variable d with `z* = f(z*, u(d))`, the stationarity conditions are three coupled fixed
points, iterated side by side:

    z  <- f(z, u(d))                      equilibrium
    mu <- J_z^T mu + dL/dz                adjoint: the gradient of the loss by the equilibrium equation
    d  <- step(d, J_d^T mu)               any input step: projected ascent, later Adam or Langevin

One evaluation of the cell and one vector-Jacobian product give all three right-hand sides. The loss is summed over the
batch; mu has the sign of the loss gradient (ascent adds). With k inner iterations of (z, mu) for every step of d the
same driver spans a family: k = 1 is JIIO, k large is projected gradient ascent with warm-started inexact solves.

Source: Gurumurthy, Bai, Manchester, Kolter, "Joint inference and input optimization in equilibrium networks", NeurIPS
2021, Eqs. 4-8.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.objectives import Objective, objective_at
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import CellMap, Solver
from robustbench_deq.solvers.base import Iterate, residual_norms
from robustbench_deq.threats import Threat


class Evaluation(NamedTuple):
    """One look at the augmented map at `(z, mu, d)`.

    f         `f(z, u(d))`, like z
    g         `J_z^T mu + dL/dz`, like mu
    gradient  `J_d^T mu`, like d; None when it was not asked for
    loss      objective at `head(z)`, one per row of z: by this iterates are compared, whatever is ascended
    """

    f: Tensor
    g: Tensor
    gradient: Tensor | None
    loss: Tensor


@dataclass(frozen=True)
class AugmentedMap:
    """The coupled right-hand sides.

    Args:
        model: the equilibrium model; its parameters should not require gradients.
        inject: maps the variable to the injection of every row of the state. The variable's batch axis is its own: one
            variable may serve many rows.
        objective: logits to losses, maximised.
    """

    model: EquilibriumModel
    inject: Callable[[Tensor], Tensor]
    objective: Objective

    def evaluate(self, z: Tensor, mu: Tensor, variable: Tensor, progress: float = 0.0) -> Evaluation:
        """One cell evaluation and one vector-Jacobian product to the state and to the variable.

        Args:
            progress: of the run, from 0 to 1, for objectives that ascend one loss after another.
        """
        with torch.enable_grad():
            variable = variable.detach().requires_grad_()
            return self._evaluate(z, mu, self.inject(variable), variable, progress)

    def evaluate_state(self, z: Tensor, mu: Tensor, u: Tensor, progress: float = 0.0) -> Evaluation:
        """The same at a known injection, without the gradient by the variable: an inner iteration."""
        with torch.enable_grad():
            return self._evaluate(z, mu, u, None, progress)

    def loss_gradient(self, z: Tensor) -> Tensor:
        """dL/dz at `z`, the first term of the adjoint's Neumann series; asks only the head."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            loss = objective_at(self.objective, 0.0)(self.model.head(z))
            return torch.autograd.grad(loss.sum(), z, materialize_grads=True)[0]

    def _evaluate(self, z: Tensor, mu: Tensor, u: Tensor, variable: Tensor | None, progress: float) -> Evaluation:
        z = z.detach().requires_grad_()
        f = self.model.evaluate(z, u)
        logits = self.model.head(z)
        ascended = objective_at(self.objective, progress)
        loss = ascended(logits)
        inputs = [z] if variable is None else [z, variable]
        outputs, seeds = [loss], [torch.ones_like(loss)]
        if f.requires_grad:  # a cell may ignore its state
            outputs, seeds = [f, loss], [mu, *seeds]
        g, *rest = torch.autograd.grad(outputs, inputs, seeds, materialize_grads=True)
        if ascended is not self.objective:
            loss = self.objective(logits.detach())
        return Evaluation(f.detach(), g, rest[0] if rest else None, loss.detach())


class Schedule(enum.Enum):
    """Step size over the run, as a factor of the first one."""

    COSINE = "cosine"
    CONSTANT = "constant"
    DROP = "drop"  # a third after 5/8 of the run (JIIO's 0.6 then 0.2)

    def factor(self, progress: float) -> float:
        """`progress` runs from 0 to 1."""
        if self is Schedule.COSINE:
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if self is Schedule.DROP and progress >= 5 / 8:
            return 1 / 3
        return 1.0


@dataclass(frozen=True)
class ProjectedAscent:
    """`d <- Project(d + a(progress) * epsilon * direction(velocity))`, `velocity <- momentum * velocity +
    direction(g)`.

    Args:
        threat: ball, direction and projection.
        x: the clean images `(batch, ...)`.
        step_size: first step as a fraction of epsilon.
    """

    threat: Threat
    x: Tensor
    step_size: float
    schedule: Schedule = Schedule.COSINE
    momentum: float = 0.0

    def init(self, variable: Tensor) -> Tensor | None:
        return torch.zeros_like(variable) if self.momentum else None

    def step(
        self, variable: Tensor, gradient: Tensor, velocity: Tensor | None, progress: float
    ) -> tuple[Tensor, Tensor | None]:
        direction = self.threat.direction(gradient)
        if velocity is not None:
            velocity = self.momentum * velocity + direction
            direction = self.threat.direction(velocity)
        length = self.step_size * self.schedule.factor(progress) * self.threat.epsilon
        return self.threat.project(torch.add(variable, direction, alpha=length), self.x), velocity

    def restrict(self, variable: Tensor) -> Tensor:
        """The feasible point nearest to `variable`, after something else has moved it."""
        return self.threat.project(variable, self.x)


class Mixing(enum.Enum):
    """What the inner solver accelerates."""

    STATE = "state"  # z and mu, each with its own history
    ALL = "all"  # one history over (z, d, mu), as published


class Keep(enum.Enum):
    """Which iterate of the variable is returned."""

    LOSS = "loss"  # the highest loss among those whose state follows its equilibrium
    JIIO = "jiio"  # the published rule
    LAST = "last"


@dataclass(frozen=True)
class JointSettings:
    """How the augmented iteration runs.

    Args:
        num_steps: evaluations of the augmented map.
        inner_steps: k, iterations of (z, mu) per step of the variable; None chooses k per sample and step.
        max_lag: for the adaptive mode, how many steps of the variable the state may be behind its equilibrium.
        max_inner_steps: for the adaptive mode, the largest k.
        damping_z, damping_mu: in (0, 1]; 1 is the plain iteration.
        accelerator: a step-wise solver for the inner iteration; None is the plain (damped) one.
        keep_residual: `Keep.LOSS` trusts the loss of an iterate whose residual is at most this: a state on its way may
            show a loss that its equilibrium does not have.
        last_residual: the same for the last iterate, whose state has settled most.
    """

    num_steps: int
    inner_steps: int | None = 1
    max_lag: float = 4.0
    max_inner_steps: int = 20
    damping_z: float = 1.0
    damping_mu: float = 1.0
    accelerator: Solver | None = None
    mixing: Mixing = Mixing.STATE
    keep: Keep = Keep.LOSS
    keep_residual: float = 0.005
    last_residual: float = 0.1


class JointResult(NamedTuple):
    """The kept variable with its loss, the last state and adjoint, and per row of the state:

    residual   relative residual of the last state
    num_moves  steps the variable has taken
    """

    variable: Tensor
    loss: Tensor
    z: Tensor
    mu: Tensor
    residual: Tensor
    num_moves: Tensor


Watcher = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with the number of finished steps, the variable that would be returned, its loss, and the state's residual."""


def ascend(
    augmented: AugmentedMap,
    ascent: ProjectedAscent,
    settings: JointSettings,
    z: Tensor,
    mu: Tensor,
    variable: Tensor,
    watch: Watcher | None = None,
) -> JointResult:
    """Run the augmented iteration from `(z, mu, variable)`.

    The variable has one row per row of the state here. No step waits for the device, except inside an accelerator.
    """
    rows = z.shape[0]
    velocity = ascent.init(variable)
    keeper = _Keeper(settings, variable)
    mixer = _Mixer(settings, z, mu, variable)
    pace = _Pace(settings, rows, z)
    u = None
    num_moves = torch.zeros(rows, dtype=torch.int32, device=z.device)

    for step in range(settings.num_steps):
        may_move = settings.inner_steps is None or (step + 1) % settings.inner_steps == 0
        progress = step / settings.num_steps
        if may_move:
            now = augmented.evaluate(z, mu, variable, progress)
        else:
            if u is None:
                with torch.no_grad():
                    u = augmented.inject(variable)
            now = augmented.evaluate_state(z, mu, u, progress)
        absolute, residual = residual_norms(z, now.f)
        keeper.offer(step, variable, now.loss, residual, now.g, mu)
        if watch is not None:
            watch(step, *keeper.kept, residual)
        moved = variable
        is_moving = None
        if may_move:
            moved, next_velocity = ascent.step(variable, now.gradient, velocity, progress)
            if settings.inner_steps is None:
                is_moving = pace.is_ready(absolute, ascent.schedule.factor(progress))
                mask = per_sample(is_moving, moved)
                moved = torch.where(mask, moved, variable)
                pace.note(moved - variable)
                if velocity is not None:
                    next_velocity = torch.where(mask, next_velocity, velocity)
                num_moves += is_moving
            else:
                num_moves += 1
            velocity = next_velocity
            u = None
        z, mu, mixed = mixer.mix(z, mu, variable, now, moved)
        variable = ascent.restrict(mixed) if settings.mixing is Mixing.ALL else mixed
        if may_move:
            mixer.restart(is_moving)

    # The last variable has not been looked at: one evaluation without a graph settles its loss.
    with torch.no_grad():
        f = CellMap(augmented.model.evaluate, augmented.inject(variable))(z)
        _, residual = residual_norms(z, f)
        if settings.keep is not Keep.JIIO:  # the published rule compares joint residuals, and has no such look
            loss = augmented.objective(augmented.model.head(f))
            keeper.offer(settings.num_steps, variable, loss, residual, mu, mu)
    if watch is not None:
        watch(settings.num_steps, *keeper.kept, residual)
    return JointResult(*keeper.kept, f, mu, residual, num_moves)


class _Keeper:
    """The kept iterate of the variable, per row."""

    def __init__(self, settings: JointSettings, variable: Tensor) -> None:
        self.rule, self.settings = settings.keep, settings
        self.variable = variable
        self.loss = torch.full((len(variable),), -torch.inf, device=variable.device, dtype=variable.dtype)
        self.residual = torch.full_like(self.loss, torch.inf)

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        return self.variable, self.loss

    def offer(self, step: int, variable: Tensor, loss: Tensor, residual: Tensor, g: Tensor, mu: Tensor) -> None:
        if self.rule is Keep.LAST:
            self.variable, self.loss = variable, loss
            return
        if self.rule is Keep.JIIO:
            joint = residual + residual_norms(mu, g)[1]
            takes = (joint < self.residual) | ((loss > self.loss) & (joint < 1.3 * self.residual))
            takes = takes | (step < 10)
            self.residual = torch.where(takes, joint, self.residual)
        else:
            is_last = step == self.settings.num_steps
            is_trusted = residual <= (self.settings.last_residual if is_last else self.settings.keep_residual)
            self.variable, self.loss = keep_better(
                self.variable, self.loss, variable, loss, is_trusted, torch.isfinite(residual)
            )
            return
        takes = takes & torch.isfinite(residual)
        self.loss = torch.where(takes, loss, self.loss)
        self.variable = torch.where(per_sample(takes, variable), variable, self.variable)


def keep_better(
    kept: Tensor, kept_loss: Tensor, variable: Tensor, loss: Tensor, is_trusted: Tensor, is_usable: Tensor
) -> tuple[Tensor, Tensor]:
    """Per row the variable of the highest trusted loss, and that loss.

    Until a row has a trusted loss it keeps the newest usable variable, so that something is returned, at a loss of
    minus infinity (which is not below minus infinity). `is_trusted`, `is_usable` and the losses are `(rows,)`.
    """
    loss = torch.where(is_trusted, loss, -torch.inf)
    takes = (loss >= kept_loss) & is_usable
    return torch.where(per_sample(takes, variable), variable, kept), torch.where(takes, loss, kept_loss)


class _Pace:
    """When the adaptive mode lets a row's variable move.

    A step of the variable leaves the state behind its equilibrium. The residual seen right after the first step, over
    that step's length, tells how far one step throws the state off. From then on the variable waits until the residual
    is at most what `max_lag` steps of the present length would leave: a fast cell is never held back (k = 1), a slow
    one gets the inner iterations it needs.
    """

    def __init__(self, settings: JointSettings, rows: int, z: Tensor) -> None:
        self.max_lag, self.limit = settings.max_lag, settings.max_inner_steps
        self.per_length = torch.full((rows,), torch.nan, device=z.device, dtype=z.dtype)
        self.count = torch.zeros(rows, dtype=torch.int32, device=z.device)
        self.has_moved = torch.zeros(rows, dtype=torch.bool, device=z.device)
        self.last_length = 1.0

    def is_ready(self, residual: Tensor, length: float) -> Tensor:
        """Rows that may move now, given the absolute residuals `(rows,)` and the length of the step to come."""
        fresh = residual / self.last_length
        self.per_length = torch.where(self.has_moved & torch.isnan(self.per_length), fresh, self.per_length)
        self.count += 1
        ready = (residual <= self.max_lag * self.per_length * length) | (self.count >= self.limit)
        ready = ready | torch.isnan(self.per_length)  # nothing has moved yet
        self.count = torch.where(ready, 0, self.count)
        self.last_length = length
        return ready

    def note(self, displacement: Tensor) -> None:
        """Tell how far the rows `(rows, ...)` have just moved."""
        self.has_moved = self.has_moved | (displacement.flatten(1) != 0).any(1)


class _Mixer:
    """The inner iteration: plain damping, or a step-wise solver over the state and the adjoint."""

    def __init__(self, settings: JointSettings, z: Tensor, mu: Tensor, variable: Tensor) -> None:
        self.settings, self.rows, self.device = settings, len(z), z.device
        self.state, self.count = None, 0
        if settings.accelerator is not None:
            self.state = settings.accelerator.init(self._pack(z, mu, variable))

    def _pack(self, z: Tensor, mu: Tensor, variable: Tensor) -> Tensor:
        if self.settings.mixing is Mixing.STATE:
            return torch.cat([z.flatten(1), mu.flatten(1)])  # twice the rows: each with coefficients of its own
        return torch.cat([z.flatten(1), variable.flatten(1), mu.flatten(1)], dim=1)

    def mix(
        self, z: Tensor, mu: Tensor, variable: Tensor, now: Evaluation, moved: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.settings
        f = now.f if settings.damping_z == 1.0 else torch.lerp(z, now.f, settings.damping_z)
        g = now.g if settings.damping_mu == 1.0 else torch.lerp(mu, now.g, settings.damping_mu)
        if self.state is None:
            return f, g, moved
        y, self.state = settings.accelerator.step(
            None, Iterate.measure(self._pack(z, mu, variable), self._pack(f, g, moved), self.count), self.state
        )
        self.count += 1
        if settings.mixing is Mixing.STATE:
            return y[: len(z)].view_as(z), y[len(z) :].view_as(mu), moved
        sizes = [z[0].numel(), variable[0].numel(), mu[0].numel()]
        z_new, d_new, mu_new = y.split(sizes, dim=1)
        return z_new.reshape(z.shape), mu_new.reshape(mu.shape), d_new.reshape(variable.shape)

    def restart(self, is_moving: Tensor | None) -> None:
        """Forget differences taken before the variable moved; None means that every row moved."""
        if self.state is None or self.settings.mixing is Mixing.ALL:
            return
        if is_moving is None:
            is_moving = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        self.state = self.settings.accelerator.restart(self.state, is_moving.repeat(2))
