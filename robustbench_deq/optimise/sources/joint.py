"""`Joint`: state, adjoint and variable advance together as one augmented fixed point.

To maximise `L(h(z*), d)` over a variable d with `z* = f(z*, u(d))`, the stationarity conditions are three coupled fixed
points, iterated side by side:

    z  <- f(z, u(d))                      equilibrium
    mu <- J_z^T mu + dL/dz                adjoint: the gradient of the loss by the equilibrium equation
    d  <- step(d, J_d^T mu + dL/dd)       any step of `optimise.steps`

One evaluation of the cell and one vector-Jacobian product give all three right-hand sides. The loss is summed over the
batch; mu has the sign of the loss gradient (ascent adds). With k inner iterations of (z, mu) for every step of d the
same source spans a family: k = 1 is JIIO, k large is projected gradient ascent with warm-started inexact solves.

Source: Gurumurthy, Bai, Manchester, Kolter, "Joint inference and input optimization in equilibrium networks", NeurIPS
2021, Eqs. 4-8.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from robustbench_deq.adjoints import seed_scale
from robustbench_deq.optimise.contraction import estimate_contraction
from robustbench_deq.optimise.domains import Domain
from robustbench_deq.optimise.pace import AdaptivePace, PaceState
from robustbench_deq.optimise.problem import Problem
from robustbench_deq.optimise.sources.base import Look, Moment, Settled, Source
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import CellMap, FixedPointMap, Solve, Solver
from robustbench_deq.solvers.base import Iterate, State, residual_norms


class _NoMap(FixedPointMap):
    """What an accelerator here is given as its map: it mixes what is there, and may ask for nothing."""

    def __call__(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def restrict(self, index: Tensor) -> FixedPointMap:
        raise NotImplementedError

    def jvp(self, z: Tensor, tangent: Tensor) -> Tensor:
        raise NotImplementedError


NO_MAP = _NoMap()
SLOWER = 0.5
LEAST_RELAXATION = 0.3
"""By what a row's relaxation falls at every look of `check_every` where its state goes the wrong way, and no lower than
this. A row that comes down to it has gone astray."""
SETTLED = 0.03
"""A residual up to which a state is not watched."""


class Mixing(enum.Enum):
    """What the inner solver accelerates."""

    STATE = "state"  # z and mu, each with its own history
    ALL = "all"  # one history over (z, d, mu), as published


class JointState(NamedTuple):
    """z, mu      state and adjoint
    u          injection at the present variable, once an inner iteration has needed it
    history    of the accelerator, and the steps it has taken
    pace       of the adaptive mode
    num_moves  steps that each row of the variable has taken
    relaxation of state and adjoint, a factor a row of the state; None: the plain iteration everywhere
    size       what residuals are relative to, one a row of the state; None: the state's own
    last       the absolute residuals of the last look, one a row of the state
    """

    z: Tensor
    mu: Tensor
    u: Tensor | None
    history: State | None
    num_mixed: int
    pace: PaceState | None
    num_moves: Tensor
    relaxation: Tensor | None = None
    size: Tensor | None = None
    last: Tensor | None = None


@dataclass(frozen=True)
class Joint(Source):
    """The augmented iteration; one evaluation of the cell and one vector-Jacobian product a step.

    Args:
        inner_steps: k, iterations of (z, mu) per step of the variable; None chooses k per row and step.
        pace: how the adaptive mode chooses.
        damping_z, damping_mu: in (0, 1]; 1 is the plain iteration.
        accelerator: a step-wise solver for the inner iteration; None is the plain (damped) one.
        mixing: what it accelerates.
        warmup: brings the state near its equilibrium first, where none is known; None starts at the initial state.
        has_loss_start: the adjoint starts at the loss's gradient with respect to the state, or at zero; from zero the
            first step has no gradient, and nothing moves.
        relaxes: whether slowly contracting rows are relaxed (`optimise.contraction`); where no contraction is known, it
            is estimated after the warm-up.
    """

    check_every: ClassVar[int] = 2
    inner_steps: int | None = 1
    pace: AdaptivePace = field(default_factory=AdaptivePace)
    damping_z: float = 1.0
    damping_mu: float = 1.0
    accelerator: Solver | None = None
    mixing: Mixing = Mixing.STATE
    warmup: Solve | None = None
    has_loss_start: bool = True
    relaxes: bool = False

    def start(self, problem: Problem, variable: Tensor, settled: Settled | None) -> JointState:
        z, mu, _, size, contraction = settled or (self._warm_up(problem, variable), None, None, None, None)
        if mu is None:
            mu = loss_gradient(problem, z, variable) if self.has_loss_start else torch.zeros_like(z)
        relaxation = None
        if self.relaxes:
            if contraction is None:
                start = mu / per_sample(seed_scale(mu), mu)  # its direction: its squares may overflow
                contraction = estimate_contraction(problem.model, z, problem.inject(variable), start)
            if bool((contraction.relaxation > 1.0).any()):
                relaxation = contraction.relaxation
        return JointState(
            z=z,
            mu=mu,
            u=None,
            history=self.accelerator.init(self._pack(z, variable, mu)) if self.accelerator is not None else None,
            num_mixed=0,
            pace=self.pace.init(len(variable), z) if self.inner_steps is None else None,
            num_moves=torch.zeros(len(variable), dtype=torch.int32, device=z.device),
            relaxation=relaxation,
            size=size,
        )

    @torch.no_grad()
    def _warm_up(self, problem: Problem, variable: Tensor) -> Tensor:
        u = problem.inject(variable)
        z = problem.model.initial_state(u)
        if self.warmup is None:
            return z
        solution = self.warmup(CellMap(problem.model.evaluate, u), z)
        problem.model.report(solution)
        return solution.value

    def look(self, problem: Problem, state: JointState, variable: Tensor, moment: Moment) -> tuple[Look, JointState]:
        may_move = self.inner_steps is None or (moment.number + 1) % self.inner_steps == 0
        if not may_move and state.u is None:
            with torch.no_grad():
                state = state._replace(u=problem.inject(variable))
        look = augmented(problem, state.z, state.mu, variable, moment.progress, None if may_move else state.u)
        assert look.f is not None and look.g is not None
        absolute, residual = residual_norms(state.z, look.f)
        residual = residual if state.size is None else absolute / state.size
        if self.relaxes:
            state = state._replace(relaxation=self._relaxation(state, absolute, residual, moment), last=absolute)
        if state.relaxation is not None:
            factor = state.relaxation
            look = look._replace(f=_relaxed(state.z, look.f, factor), g=_relaxed(state.mu, look.g, factor))
            absolute, residual = absolute * factor, residual * factor
        look = look._replace(residual=problem.worst(residual))
        if state.pace is not None:
            ready, pace = self.pace.decide(state.pace, problem.worst(absolute), moment.length)
            look, state = look._replace(is_moving=ready), state._replace(pace=pace)
        return look, state

    def _relaxation(self, state: JointState, absolute: Tensor, residual: Tensor, moment: Moment) -> Tensor | None:
        """Less for rows whose state goes the wrong way: none where it is farther off than its equilibrium was from the
        start, damping where its residual grows although the steps of the variable shrink."""
        factor = state.relaxation
        if factor is not None:
            factor = torch.where((factor <= 1.0) | (factor * residual <= 1.0), factor, 1.0)
        if state.last is None or moment.length > 0.5 or moment.number % self.check_every:
            return factor
        is_growing = (absolute > state.last) & (residual > SETTLED)
        if factor is None:
            if not bool(is_growing.any()):
                return None
            factor = torch.ones_like(absolute)
        return torch.where(is_growing, (SLOWER * factor).clamp_min(LEAST_RELAXATION), factor)

    def advance(
        self, problem: Problem, domain: Domain, state: JointState, look: Look, variable: Tensor, moved: Tensor
    ) -> tuple[JointState, Tensor]:
        assert look.f is not None and look.g is not None
        problem.model.count_steps(len(state.z))
        has_moved = look.gradient is not None
        pace, num_moves = state.pace, state.num_moves
        if has_moved:
            num_moves = num_moves + (1 if look.is_moving is None else look.is_moving)
            pace = None if pace is None else self.pace.note(pace, moved - variable)
        f = look.f if self.damping_z == 1.0 else torch.lerp(state.z, look.f, self.damping_z)
        g = look.g if self.damping_mu == 1.0 else torch.lerp(state.mu, look.g, self.damping_mu)
        history, num_mixed = state.history, state.num_mixed
        if history is not None and self.accelerator is not None:
            at = Iterate.measure(self._pack(state.z, variable, state.mu), self._pack(f, moved, g), num_mixed)
            y, history = self.accelerator.step(NO_MAP, at, history)
            num_mixed += 1
            f, moved, g = self._unpack(y, f, moved, g, domain)
            if has_moved and self.mixing is Mixing.STATE:  # differences taken before the move are of another map
                history = self.accelerator.restart(history, self._restarted(problem, state.z, look))
        u = None if has_moved else state.u
        after = state._replace(z=f, mu=g, u=u, history=history, num_mixed=num_mixed, pace=pace, num_moves=num_moves)
        return after, moved

    def close(self, problem: Problem, state: JointState, variable: Tensor) -> tuple[Look, JointState]:
        """One evaluation without a graph settles the loss of the last variable, at the state after it."""
        with torch.no_grad():
            f = problem.model.evaluate(state.z, problem.inject(variable))
            absolute, residual = residual_norms(state.z, f)
            residual = residual if state.size is None else absolute / state.size
            if state.relaxation is not None:
                f, residual = _relaxed(state.z, f, state.relaxation), residual * state.relaxation
            residual = problem.worst(residual)
            output = problem.model.head(f)
            loss = problem.losses(output, variable, 1.0).compared
        return Look(loss, residual, output, f=f, mu=state.mu, g=state.mu), state._replace(z=f)

    def take(self, problem: Problem, state: JointState, rows: Tensor) -> JointState:
        kept, history = problem.state_rows(rows), state.history
        if history is not None:
            stacked = torch.cat([kept, kept + len(state.z)]) if self.mixing is Mixing.STATE else kept
            history = tuple(part[stacked] for part in history)
        pace = state.pace
        if pace is not None:
            pace = PaceState(pace.per_length[rows], pace.num_looks[rows], pace.has_moved[rows], pace.last_length)
        whole = (state.u, state.relaxation, state.size, state.last)
        u, relaxation, size, last = (None if part is None else part[kept] for part in whole)
        z, mu, num_moves = state.z[kept], state.mu[kept], state.num_moves[rows]
        return JointState(z, mu, u, history, state.num_mixed, pace, num_moves, relaxation, size, last)

    def tally(self, problem: Problem, state: JointState) -> dict[str, Tensor]:
        """Steps that each row has taken, and whether its state has gone the wrong way again and again, and was relaxed
        less and less."""
        is_astray = torch.zeros_like(state.num_moves, dtype=torch.bool)
        if state.relaxation is not None:
            is_astray = problem.worst((state.relaxation <= LEAST_RELAXATION).to(state.relaxation)) > 0
        return {"perturbation_steps": state.num_moves, "is_astray": is_astray}

    def _pack(self, z: Tensor, variable: Tensor, mu: Tensor) -> Tensor:
        if self.mixing is Mixing.STATE:
            return torch.cat([z.flatten(1), mu.flatten(1)])  # twice the rows: each with coefficients of its own
        return torch.cat([z.flatten(1), variable.flatten(1), mu.flatten(1)], dim=1)

    def _unpack(
        self, y: Tensor, z: Tensor, variable: Tensor, mu: Tensor, domain: Domain
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A mixed variable may have left the domain, and is brought back."""
        if self.mixing is Mixing.STATE:
            return y[: len(z)].view_as(z), variable, y[len(z) :].view_as(mu)
        sizes = [z[0].numel(), variable[0].numel(), mu[0].numel()]
        z_new, moved, mu_new = torch.split(y, sizes, dim=1)
        return z_new.reshape(z.shape), domain.project(moved.reshape(variable.shape)), mu_new.reshape(mu.shape)

    def _restarted(self, problem: Problem, z: Tensor, look: Look) -> Tensor:
        """Rows of the stacked history whose variable has moved."""
        if look.is_moving is None:
            return torch.ones(2 * len(z), dtype=torch.bool, device=z.device)
        return problem.spread(look.is_moving).repeat(2)


def _relaxed(old: Tensor, new: Tensor, factor: Tensor) -> Tensor:
    """`old + factor (new - old)`, a factor a row."""
    return torch.lerp(old, new, per_sample(factor, old))


def augmented(
    problem: Problem, z: Tensor, mu: Tensor, variable: Tensor, progress: float = 0.0, u: Tensor | None = None
) -> Look:
    """The three right-hand sides at `(z, mu, variable)` as `f`, `g` and `gradient`; the residual is left at zero.

    One cell evaluation and one vector-Jacobian product.

    Args:
        progress: of the run, from 0 to 1, for problems that ascend one loss after another.
        u: the injection, where it is known and no gradient with respect to the variable is wanted: an inner iteration.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        inputs = [z]
        variable = variable.detach()
        if u is None:
            variable.requires_grad_()
            inputs.append(variable)
            u = problem.inject(variable)
        f = problem.model.evaluate(z, u)
        output = problem.model.head(z)
        losses = problem.losses(output, variable, progress)
        outputs, seeds = [losses.ascended], [torch.ones_like(losses.ascended)]
        if f.requires_grad:  # a cell may ignore its state
            outputs, seeds = [f, losses.ascended], [mu, *seeds]
        g, *rest = torch.autograd.grad(outputs, inputs, seeds, materialize_grads=True)
    loss, f = losses.compared.detach(), f.detach()
    return Look(loss, loss, output.detach(), rest[0] if rest else None, f=f, mu=mu, g=g)


def loss_gradient(problem: Problem, z: Tensor, variable: Tensor) -> Tensor:
    """dL/dz at `z`, the first term of the adjoint's Neumann series; asks only the head."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        loss = problem.losses(problem.model.head(z), variable, 0.0).ascended
        return torch.autograd.grad(loss.sum(), z, materialize_grads=True)[0]
