"""`optimise()`: the one loop over inputs of equilibrium models.

    a step:  look (source) -> keep -> leave -> step -> advance (source)

Every part is interchangeable: the `Problem` says what is maximised over which variable, the `Source` where the gradient
comes from, the `Domain` what is feasible, the `Step` how the variable moves, the `Keep` which iterate is returned. What
a row gets does not depend on who else is in the batch, or has left it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.meter import BudgetSpent
from robustbench_deq.optimise.domains import Domain
from robustbench_deq.optimise.keep import Keep, Kept
from robustbench_deq.optimise.problem import Problem, where_rows
from robustbench_deq.optimise.sources.base import Look, Moment, Settled, Source
from robustbench_deq.optimise.steps.base import At, Step
from robustbench_deq.shown import briefly_shown

LEAVING_ERROR = 0.02
"""A row is done when it is successful at a state whose estimated relative error is at most this."""
LOOKS_FOR_SLOPES = 2
"""Looks with a gradient that are searched for rows without a slope: the first may have none of any row."""
UNKNOWN_AMPLIFICATION = 10.0
"""The error of a state a unit of its residual, where no equilibrium is known from which to estimate it."""


@briefly_shown
class Optimum(NamedTuple):
    """What a run has found; `z`, `mu` and `f` have the rows of the state, all else those of the variable.

    variable    the kept one `(rows, ...)`, its `loss` `(rows,)` (minus infinity: no state could be trusted)
    gain        by how much that is above the loss of the first look
    residual    relative residual of the last state
    z, mu       the last state and adjoint; None where the source has none, or where rows have left and no equilibrium
                was known. Rows that have left have the known one
    is_done     rows that have left, or would have: successful at a state of small error
    is_flat     rows whose gradient was exactly zero, or no number, in the first two looks that had one
    is_stopped  whether the budget ended the run
    tally       the source's counts, `(rows,)` each
    """

    variable: Tensor
    loss: Tensor
    gain: Tensor
    residual: Tensor
    z: Tensor | None
    mu: Tensor | None
    is_done: Tensor
    is_flat: Tensor
    is_stopped: bool
    tally: dict[str, Tensor]


Watcher = Callable[[int, Callable[[], tuple[Tensor, Tensor]], Tensor], None]
"""Called with the number of finished steps, what gives the variable that would be returned and its loss, and the
relative residuals `(rows,)` or `(steps, rows)` of the rows that are left; no steps where all have left."""


@dataclass
class _Whole:
    """All rows, of which some have left: what they left with."""

    variable: Tensor
    loss: Tensor
    residual: Tensor
    is_done: Tensor
    tally: dict[str, Tensor]

    def put(self, rows: Tensor, kept: Kept, residual: Tensor, is_done: Tensor, tally: dict[str, Tensor]) -> None:
        self.variable[rows], self.loss[rows] = kept.variable, kept.loss
        self.residual[rows], self.is_done[rows] = residual, is_done
        for name, counts in tally.items():
            self.tally.setdefault(name, counts.new_zeros(len(self.loss)))[rows] = counts


def optimise(
    problem: Problem,
    source: Source,
    domain: Domain,
    step: Step,
    keep: Keep,
    variable: Tensor,
    *,
    num_steps: int,
    settled: Settled | None = None,
    leaves: bool = False,
    settles: bool = True,
    seed: int = 0,
    ids: Tensor | None = None,
    watch: Watcher | None = None,
) -> Optimum:
    """Maximise the problem's loss from `variable` `(rows, ...)`.

    Args:
        num_steps: looks with a gradient.
        settled: an equilibrium near where the variable starts, if somebody knows it.
        leaves: rows that are successful at a settled state leave the batch.
        settles: a last look, without a gradient, at the last variable. Without it that variable's loss is not known
            (NaN), so that only `Last` returns it.
        seed, ids: what noise is keyed by; a number a row `(rows,)`.
        watch: see `Watcher`.

    Returns:
        What was found until the budget of the open meter was spent, if it has one.
    """
    kept, moves, state = keep.init(variable), step.init(variable, domain), None
    amplification = None if settled is None else problem.worst(settled.amplification)
    residual, is_done = torch.full_like(kept.loss, torch.inf), torch.zeros_like(kept.loss, dtype=torch.bool)
    rows = torch.arange(len(variable), device=variable.device)  # those that are left
    ids = None if ids is None else ids.to(variable.device)
    whole: _Whole | None = None

    def present() -> tuple[Tensor, Tensor]:
        """What would be returned of all rows."""
        if whole is None:
            return kept.variable, kept.loss
        variable, loss = whole.variable.clone(), whole.loss.clone()
        variable[rows], loss[rows] = kept.variable, kept.loss
        return variable, loss

    is_stopped, trace, seen, first = False, residual, 0, torch.full_like(kept.loss, torch.nan)
    owner, is_flat, num_gradients = problem, torch.ones_like(is_done), 0
    try:
        state = source.start(problem, variable, settled)
        for count in range(num_steps):
            moment = Moment(count, num_steps, step.length(count / num_steps))
            look, state = source.look(problem, state, variable, moment)
            residual = look.residual
            first = look.loss if count == 0 else first
            kept = keep.offer(kept, problem, domain, variable, look, count, is_last=False)
            if watch is not None:
                trace = residual if look.trace is None else look.trace
                watch(count, present, trace)
                seen = count + 1
            if leaves and count % source.check_every == 0:
                is_done = _is_done(problem, look, amplification)
                if bool(is_done.any()):
                    kept = _with_done(kept, variable, look, is_done)
                    if whole is None:
                        whole = _Whole(kept.variable.clone(), kept.loss.clone(), residual.clone(), is_done.clone(), {})
                    whole.put(rows, kept, residual, is_done, source.tally(problem, state))
                    left = (~is_done).nonzero()[:, 0]
                    rows, state = rows[left], source.take(problem, state, left)
                    look = look.take(problem, left)
                    problem, domain = problem.take(left), domain.take(left)
                    variable, kept, residual, is_done = variable[left], kept.take(left), residual[left], is_done[left]
                    moves = tuple(part[left] for part in moves)
                    amplification = None if amplification is None else amplification[left]
                    if len(left) == 0:
                        trace = trace.new_zeros(0, len(whole.loss))  # no state is looked at any more
                        break
            moved = variable
            if look.gradient is not None:
                if num_gradients < LOOKS_FOR_SLOPES:
                    num_gradients += 1
                    is_flat = is_flat.index_put((rows,), is_flat[rows] & ~has_slope(look.gradient))
                success = problem.is_success(look.output) if step.needs_success else None
                keys = None if ids is None else ids[rows]
                at = At(variable, look.gradient, look.loss, residual, success, moment, seed, keys)
                moved, after = step.step(at, domain, moves)
                if leaves:  # what seems successful stands still until its state has settled, and shows whether it is
                    stays = problem.is_success(look.output)
                    look = look._replace(is_moving=~stays if look.is_moving is None else look.is_moving & ~stays)
                if look.is_moving is not None:
                    moved = where_rows(look.is_moving, moved, variable)
                    after = tuple(where_rows(look.is_moving, new, old) for new, old in zip(after, moves, strict=True))
                moves = after
            state, variable = source.advance(problem, domain, state, look, variable, moved)
        if len(variable):
            if settles:
                look, state = source.close(problem, state, variable)
                residual = look.residual
                trace = residual if look.trace is None else look.trace
            else:
                look = look._replace(loss=torch.full_like(look.loss, torch.nan))
            if keep.sees_last:
                kept = keep.offer(kept, problem, domain, variable, look, num_steps, is_last=True)
            if leaves:
                is_done = _is_done(problem, look, amplification)
                kept = _with_done(kept, variable, look, is_done)
        if watch is not None:
            for step_left in range(seen, num_steps + 1):  # all but the last only where everybody has left
                watch(step_left, present, trace)
    except BudgetSpent:
        is_stopped = True

    if num_gradients == 0:  # the budget was spent before: nothing is known of slopes
        is_flat = torch.zeros_like(is_flat)
    tally = {} if state is None else source.tally(problem, state)
    z, mu = (None, None) if state is None else (state.z, state.mu)
    if whole is None:
        gain = kept.loss - first
        return Optimum(kept.variable, kept.loss, gain, residual, z, mu, is_done, is_flat, is_stopped, tally)
    whole.put(rows, kept, residual, is_done, tally)
    if settled is None or settled.mu is None or z is None or mu is None:
        z = mu = None
    else:
        where = owner.state_rows(rows)
        z, mu = settled.z.index_copy(0, where, z), settled.mu.index_copy(0, where, mu)
    gain = whole.loss - first
    found = (whole.variable, whole.loss, gain, whole.residual, z, mu, whole.is_done)
    return Optimum(*found, is_flat & ~whole.is_done, is_stopped, whole.tally)


def has_slope(gradient: Tensor) -> Tensor:
    """Rows whose gradient `(rows, ...)` leads anywhere: it is not zero, and all of it is a number."""
    largest = gradient.flatten(1).abs().amax(1)
    return (largest > 0) & torch.isfinite(largest)


def _is_done(problem: Problem, look: Look, amplification: Tensor | None) -> Tensor:
    """Rows that are successful at a state of small error; a residual that is not finite never is."""
    error = look.residual * (UNKNOWN_AMPLIFICATION if amplification is None else amplification)
    return (error <= LEAVING_ERROR) & problem.is_success(look.output)


def _with_done(kept: Kept, variable: Tensor, look: Look, is_done: Tensor) -> Kept:
    """What rows that are done leave with: the variable that was successful, whatever the rule has kept."""
    return Kept(where_rows(is_done, variable, kept.variable), torch.where(is_done, look.loss, kept.loss), kept.score)
