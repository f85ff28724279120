"""The judge: an attack proposes, this decides.

The equilibrium at the perturbed images is solved again, from the initial state, to a tolerance far below the attack's,
by a ladder of solvers, each from the best state of those before. A sample whose equilibrium none of them finds within
`MAX_STEPS` steps in all is *unconverged*; it is counted, shown, and never robust. A sample is robust when it is
classified correctly and has converged at both the clean and the perturbed image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.rows import per_sample
from robustbench_deq.shown import briefly_shown
from robustbench_deq.solvers import Anderson, Broyden, CellMap, Solution, Solve, Status
from robustbench_deq.solvers.base import FixedPointMap, residual_norms

JUDGE_RTOL = 1e-5
RUN_AWAY = 1e3
DOMINANT = 0.1
"""The share of the farthest component's way that one has gone which may have run away: to make the relative residual
small it has to be among the farthest. What a solve to any tolerance leaves of smaller ones says nothing."""
SLOW = 3.0
"""The relaxation from which a cell is brought to its own pace before it is solved."""
NUM_DIFFERENCES = 3
FAR = 100.0
"""Times its first step that an equilibrium lies from the start, where the judge solves further."""
POLISHED_RTOL = 1e-8
LADDER = (
    Solve(Anderson(ridge=1e-8), rtol=JUDGE_RTOL, max_steps=200),
    Solve(Broyden(history_size=60, patience=20), rtol=JUDGE_RTOL, max_steps=200),
)
MAX_STEPS = sum(rung.max_steps for rung in LADDER)
"""Solver steps on one image after which it is unconverged; a relaxed cell gets those of the first rung more."""
FEW = 4
"""Rows to a multiple of which the judge fills up what it computes. Products and convolutions of fewer, or of a
remainder, are rounded otherwise, and where a solve hangs by a thread that would decide the verdict."""
FINER = Solve(Anderson(ridge=1e-8), rtol=JUDGE_RTOL, max_steps=50)
"""Goes on from what a rung has found."""


@briefly_shown
@dataclass(frozen=True)
class Verdict:
    """Per sample, on the CPU, `(batch,)`.

    prediction     class with the largest logit
    loss           cross-entropy of the true class
    residual       relative residual of the state that was read
    is_converged   whether that is below the judge's tolerance
    is_readable    whether the logits name a class
    is_correct     converged, readable, and classified as labelled
    """

    prediction: Tensor
    loss: Tensor
    residual: Tensor
    is_converged: Tensor
    is_readable: Tensor
    is_correct: Tensor

    def take(self, rows: Tensor) -> Verdict:
        """On the samples `rows`."""
        return Verdict(*(part[rows] for part in self.parts()))

    def put(self, rows: Tensor, other: Verdict) -> Verdict:
        """With that on the samples `rows` replaced by `other`."""
        return Verdict(*(mine.index_copy(0, rows, its) for mine, its in zip(self.parts(), other.parts(), strict=True)))

    def parts(self) -> tuple[Tensor, ...]:
        return self.prediction, self.loss, self.residual, self.is_converged, self.is_readable, self.is_correct


@torch.no_grad()
def judge(model: EquilibriumModel, x: Tensor, y: Tensor, ladder: Sequence[Solve] = LADDER) -> Verdict:
    """Judge images `x` `(batch, channels, height, width)` with classes `y` `(batch,)`. The model's mode is
    respected.

    Args:
        ladder: the solvers that are tried, at least one.
    """
    return verdict_at(model, tight_solve(model, filled_up(model.inject)(x), ladder), y)


def filled_up(part: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A part of a model, evaluated on a multiple of `FEW` rows, of which the last is repeated."""

    def evaluated(*inputs: Tensor) -> Tensor:
        rows = len(inputs[0])
        num_missing = -rows % FEW
        if not num_missing:
            return part(*inputs)
        repeated = (torch.cat([each, each[-1:].expand(num_missing, *each.shape[1:])]) for each in inputs)
        return part(*repeated)[:rows]

    return evaluated


@torch.no_grad()
def verdict_at(model: EquilibriumModel, solution: Solution, y: Tensor) -> Verdict:
    """The verdict on equilibria that have been solved."""
    logits = filled_up(model.head)(solution.value)
    can_read = is_readable(logits)
    prediction = logits.argmax(1)
    loss = torch.where(can_read, F.cross_entropy(logits, y, reduction="none"), torch.nan)
    is_correct = solution.is_converged & can_read & (prediction == y)
    parts = (prediction, loss, solution.residual, solution.is_converged, can_read, is_correct)
    return Verdict(*(part.cpu() for part in parts))


def is_readable(logits: Tensor) -> Tensor:
    """Which rows of `logits` `(batch, classes)` name a class: no NaN, and the largest is finite. A class at -infinity
    is masked."""
    return torch.isfinite(logits.amax(1))


class _Start(NamedTuple):
    """Where cold solves begin, and the step `f(z0) - z0` that they begin with; rows first."""

    z: Tensor
    step: Tensor

    def take(self, rows: Tensor) -> _Start:
        return _Start(self.z[rows], self.step[rows])


@torch.no_grad()
def tight_solve(
    model: EquilibriumModel, u: Tensor, ladder: Sequence[Solve] = LADDER, z0: Tensor | None = None
) -> Solution:
    """The equilibrium for injections `u` to `JUDGE_RTOL`; samples that fail on one solver go to the next. From the
    model's initial state, unless it is given another `z0`.

    A damped cell `z + w (f - z)` has the equilibria of f at residuals that are smaller by w: it is solved at its own
    pace, relaxed by 1 / w, and to a tolerance of that, or to what rounding hides. The residual that is returned is of
    the cell itself. Where there is no equilibrium at that pace, the first solver tries the cell itself.
    """
    z0 = model.initial_state(u) if z0 is None else z0
    cell = CellMap(filled_up(model.evaluate), u)
    start = _Start(z0, cell(z0) - z0)
    factor = _relaxation(cell, start)
    index = (factor != 1.0).nonzero()[:, 0]
    if len(index) == 0:
        return _climb(ladder, cell, start)
    relaxed = _Start(z0, start.step * per_sample(factor, z0))
    at_its_pace = _RelaxedMap(cell, factor)
    solution = _climb(ladder, at_its_pace, relaxed)
    is_hidden = (factor != 1.0) & (solution.residual <= factor * torch.finfo(factor.dtype).eps)
    hidden = (is_hidden & (solution.status == Status.MAX_STEPS)).nonzero()[:, 0]
    if len(hidden):
        hidden = hidden[~_has_run_away(at_its_pace.restrict(hidden), relaxed.take(hidden), solution.value[hidden])]
        solution = solution._replace(status=solution.status.index_fill(0, hidden, int(Status.CONVERGED)))
    left = index[~solution.is_converged[index]]
    if len(left):
        again = _climb(ladder[:1], cell.restrict(left), start.take(left))
        solution = _with_rows(solution, left, again, again.is_converged)
    value = solution.value[index]
    _, residual = residual_norms(value, cell.restrict(index)(value))
    return solution._replace(residual=solution.residual.index_copy(0, index, residual))


def _climb(ladder: Sequence[Solve], cell: FixedPointMap, start: _Start) -> Solution:
    """By a ladder of solvers: the first from cold, each of the others from the best state that those before have left
    of what they have not found. One that has run away begins again."""
    solution = _unless_run_away(ladder[0], cell, start, start.z)
    for rung in ladder[1:]:
        index = (~solution.is_converged).nonzero()[:, 0]
        if len(index) == 0:
            break
        part, status = start.take(index), solution.status[index]
        best = torch.where(per_sample(status == Status.DIVERGED, part.z), part.z, solution.value[index])
        again = _unless_run_away(rung, cell.restrict(index), part, best)
        # Keep an equilibrium, else whichever of the two states is nearer to one (NaN residuals never are).
        is_nearer = (again.residual < solution.residual[index]) | torch.isnan(solution.residual[index])
        solution = _with_rows(solution, index, again, again.is_converged | is_nearer)
    return _polished(cell, start, solution)


def _with_rows(solution: Solution, rows: Tensor, other: Solution, wins: Tensor) -> Solution:
    """With its rows `rows` replaced by those of `other` that win."""
    parts, wins = zip(solution[:4], other[:4], strict=True), wins.nonzero()[:, 0]
    return Solution(*(whole.index_copy(0, rows[wins], part[wins]) for whole, part in parts))


class _RelaxedMap(FixedPointMap):
    """`z -> z + factor (f(z) - z)`, a factor a row."""

    def __init__(self, inner: FixedPointMap, factor: Tensor) -> None:
        self.inner, self.factor = inner, factor

    def __call__(self, z: Tensor) -> Tensor:
        return torch.lerp(z, self.inner(z), per_sample(self.factor, z))

    def restrict(self, index: Tensor) -> _RelaxedMap:
        return _RelaxedMap(self.inner.restrict(index), self.factor[index])

    def jvp(self, z: Tensor, tangent: Tensor) -> Tensor:
        return torch.lerp(tangent, self.inner.jvp(z, tangent), per_sample(self.factor, tangent))


def _relaxation(cell: FixedPointMap, start: _Start) -> Tensor:
    """`1 / ||I - J||` near the start, a factor a row; 1 unless it is above `SLOW`.

    From a power iteration by differences, on the rows for which those before have left it possible. They are taken as
    far apart as the steps of the relaxed cell go.
    """
    first = torch.linalg.vector_norm(start.step.flatten(1), dim=1)
    factor, way, rows = torch.ones_like(first), start.step, torch.arange(len(first), device=first.device)
    for _ in range(NUM_DIFFERENCES):
        moved = cell(start.z + way) - (start.z + way) - start.step
        size, length = (torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (moved, way))
        found = length / size
        is_slow = (found > SLOW) & (found < 0.1 / torch.finfo(found.dtype).eps)  # beyond that, it is rounding
        factor = factor.index_copy(0, rows, torch.where(is_slow, found, 1.0))
        left = is_slow.nonzero()[:, 0]
        if len(left) == 0:
            break
        way = (moved * per_sample(found * first / size, moved))[left]
        cell, start, first, rows = cell.restrict(left), start.take(left), first[left], rows[left]
    return factor


def _polished(cell: FixedPointMap, start: _Start, solution: Solution) -> Solution:
    """Rows far from the start solved further, from where they are: what a residual says of the error is amplified by
    how far the equilibrium is from there, in first steps."""
    first, distance = (
        torch.linalg.vector_norm(way.flatten(1), dim=1) for way in (start.step, solution.value - start.z)
    )
    index = (solution.is_converged & (distance > FAR * first)).nonzero()[:, 0]
    if len(index) == 0:
        return solution
    again = FINER.with_(rtol=_finest(start.z))(cell.restrict(index), solution.value[index])
    wins = again.residual < solution.residual[index]
    index = index[wins]
    value = solution.value.index_copy(0, index, again.value[wins])
    return solution._replace(value=value, residual=solution.residual.index_copy(0, index, again.residual[wins]))


def _unless_run_away(rung: Solve, cell: FixedPointMap, start: _Start, z: Tensor) -> Solution:
    """The rung's solution from `z`, but diverged where only the state's size has made the relative residual small.

    A solver may drive the state of a cell without an equilibrium, such as `z + u`, so far out that the step it still
    takes is small beside it, or is lost in rounding; a single component may go so beside an ordinary state. One that
    `_has_run_away` is lost if it still has after a finer solve.
    """
    solution = rung(cell, z)
    index = (solution.is_converged & _is_far(start, solution.value).flatten(1).any(1)).nonzero()[:, 0]
    if len(index) == 0:
        return solution
    index = index[_has_run_away(cell.restrict(index), start.take(index), solution.value[index])]
    if len(index) == 0:
        return solution
    cell, start = cell.restrict(index), start.take(index)
    found = FINER.with_(rtol=_finest(start.z))(cell, solution.value[index]).value
    lost = index[_has_run_away(cell, start, found)]
    return solution._replace(status=solution.status.index_fill(0, lost, int(Status.DIVERGED)))


def _is_far(start: _Start, z: Tensor) -> Tensor:
    """Components of `z` that have gone `RUN_AWAY` first steps and are among the farthest."""
    way = (z - start.z).abs()
    return (way > RUN_AWAY * start.step.abs()) & (way > DOMINANT * per_sample(way.flatten(1).amax(1), way))


def _has_run_away(cell: FixedPointMap, start: _Start, z: Tensor) -> Tensor:
    """Rows with a component that is far out, and still takes a tenth of its first step.

    Such components are put back half of their way: towards an equilibrium they would take far larger steps from there,
    and where one does not, there is none.
    """
    step = _steps(cell, z)
    is_suspect = _is_far(start, z) & (step > 0.1 * start.step.abs())
    step_back = _steps(cell, torch.where(is_suspect, (z + start.z) / 2, z))
    return ((step_back < 2 * step) & is_suspect).flatten(1).any(1)


def _steps(cell: FixedPointMap, z: Tensor) -> Tensor:
    """`|f(z) - z|`, and no less than what rounding hides."""
    return torch.maximum((cell(z) - z).abs(), z.abs() * torch.finfo(z.dtype).eps)


def _finest(z: Tensor) -> float:
    """The smallest tolerance that the numbers of `z` can be solved to."""
    return max(POLISHED_RTOL, 2 * torch.finfo(z.dtype).eps)
