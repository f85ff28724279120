"""The judge: an attack proposes, this decides.

The equilibrium at the perturbed images is solved again, from the initial state, to a tolerance far below the attack's,
by a ladder of solvers. A sample whose equilibrium no solver finds is *unconverged*; it is counted, shown, and never
robust. A sample is robust when it is classified correctly and has converged at both the clean and the perturbed image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.rows import per_sample
from robustbench_deq.shown import briefly_shown
from robustbench_deq.solvers import Anderson, Broyden, CellMap, NewtonKrylov, Picard, Solution, Solve, Status
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
    Solve(Picard(damping=0.5), rtol=JUDGE_RTOL, max_steps=400),
    Solve(Broyden(history_size=30), rtol=JUDGE_RTOL, max_steps=400),
    Solve(NewtonKrylov(krylov_size=20), rtol=JUDGE_RTOL, max_steps=100),
)


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
def judge(model: EquilibriumModel, x: Tensor, y: Tensor) -> Verdict:
    """Judge images `x` `(batch, channels, height, width)` with classes `y` `(batch,)`. The model's mode is
    respected."""
    return verdict_at(model, tight_solve(model, model.inject(x)), y)


@torch.no_grad()
def verdict_at(model: EquilibriumModel, solution: Solution, y: Tensor) -> Verdict:
    """The verdict on equilibria that have been solved."""
    logits = model.head(solution.value)
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


@torch.no_grad()
def tight_solve(model: EquilibriumModel, u: Tensor) -> Solution:
    """The equilibrium for injections `u` to `JUDGE_RTOL`; samples that fail on one solver go to the next, from cold.

    A damped cell `z + w (f - z)` has the equilibria of f at residuals that are smaller by w: it is solved at its own
    pace, relaxed by 1 / w, and to a tolerance of that. The residual that is returned is of the cell itself.
    """
    z0 = model.initial_state(u)
    cell = CellMap(model.evaluate, u)
    factor = _relaxation(cell, z0)
    index = (factor != 1.0).nonzero()[:, 0]
    if len(index) == 0:
        return _climb(cell, z0)
    solution = _climb(_RelaxedMap(cell, factor), z0)
    left = index[~solution.is_converged[index]]
    if len(left):
        solution = _with_rows(solution, left, _climb(cell.restrict(left), z0[left]))
    value = solution.value[index]
    _, residual = residual_norms(value, cell.restrict(index)(value))
    return solution._replace(residual=solution.residual.index_copy(0, index, residual))


def _climb(cell: FixedPointMap, z0: Tensor) -> Solution:
    """By the ladder of solvers, each from cold on what those before have not found."""
    solution = _unless_run_away(LADDER[0], cell, z0)
    for rung in LADDER[1:]:
        index = (~solution.is_converged).nonzero()[:, 0]
        if len(index) == 0:
            break
        again = _unless_run_away(rung, cell.restrict(index), z0[index])
        # Keep an equilibrium, else whichever of the two states is nearer to one (NaN residuals never are).
        is_nearer = (again.residual < solution.residual[index]) | torch.isnan(solution.residual[index])
        wins = (again.is_converged | is_nearer).nonzero()[:, 0]
        won = Solution(*(part[wins] for part in again[:4]))
        solution = _with_rows(solution, index[wins], won)
    return _polished(cell, z0, solution)


def _with_rows(solution: Solution, rows: Tensor, other: Solution) -> Solution:
    parts = zip(solution[:4], other[:4], strict=True)
    return Solution(*(whole.index_copy(0, rows, part) for whole, part in parts))


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


def _relaxation(cell: FixedPointMap, z0: Tensor) -> Tensor:
    """`1 / ||I - J||` near the start, a factor a row; 1 unless it is above `SLOW`.

    From a power iteration by differences. They are taken as far apart as the steps of the relaxed cell go.
    """
    step = cell(z0) - z0
    way, first = step, torch.linalg.vector_norm(step.flatten(1), dim=1)
    factor = torch.ones_like(first)
    for _ in range(NUM_DIFFERENCES):
        moved = cell(z0 + way) - (z0 + way) - step
        size, length = (torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (moved, way))
        factor = length / size
        way = moved * per_sample(factor * first / size, moved)
    is_slow = (factor > SLOW) & (factor < 0.1 / torch.finfo(factor.dtype).eps)  # beyond that, it is rounding
    return torch.where(is_slow, factor, 1.0)


def _polished(cell: FixedPointMap, z0: Tensor, solution: Solution) -> Solution:
    """Rows far from the start solved further, from where they are: what a residual says of the error is amplified by
    how far the equilibrium is from there, in first steps."""
    first, _ = residual_norms(z0, cell(z0))
    distance = torch.linalg.vector_norm((solution.value - z0).flatten(1), dim=1)
    index = (solution.is_converged & (distance > FAR * first)).nonzero()[:, 0]
    if len(index) == 0:
        return solution
    again = LADDER[0].with_(rtol=_finest(z0))(cell.restrict(index), solution.value[index])
    wins = again.residual < solution.residual[index]
    index = index[wins]
    value = solution.value.index_copy(0, index, again.value[wins])
    return solution._replace(value=value, residual=solution.residual.index_copy(0, index, again.residual[wins]))


def _unless_run_away(rung: Solve, cell: FixedPointMap, z0: Tensor) -> Solution:
    """The rung's solution, but diverged where only the state's size has made the relative residual small.

    A solver may drive the state of a cell without an equilibrium, such as `z + u`, so far out that the step it still
    takes is small beside it, or is lost in rounding; a single component may go so beside an ordinary state. One that
    has gone `RUN_AWAY` first steps and still takes a tenth of them, after a finer solve too, is put back half of its
    way: towards an equilibrium it would take far larger steps from there, and where it does not, there is none.
    """
    solution = rung(cell, z0)
    first = (cell(z0) - z0).abs()
    is_suspect = _takes_first_steps(cell, z0, first, solution.value)
    index = (is_suspect.flatten(1).any(1) & solution.is_converged).nonzero()[:, 0]
    if len(index) == 0:
        return solution
    cell, z0, first = cell.restrict(index), z0[index], first[index]
    found = rung.with_(rtol=_finest(z0))(cell, solution.value[index]).value
    is_suspect = _takes_first_steps(cell, z0, first, found)
    back = torch.where(is_suspect, (found + z0) / 2, found)
    step, step_back = _steps(cell, found), (cell(back) - back).abs()
    lost = index[((step_back < 2 * step) & is_suspect).flatten(1).any(1)]
    return solution._replace(status=solution.status.index_fill(0, lost, int(Status.DIVERGED)))


def _takes_first_steps(cell: FixedPointMap, z0: Tensor, first: Tensor, z: Tensor) -> Tensor:
    """Components of `z` that are far out, in units of their steps `first` at `z0`, and still take such steps."""
    way = (z - z0).abs()
    is_far = (way > RUN_AWAY * first) & (way > DOMINANT * per_sample(way.flatten(1).amax(1), way))
    return is_far & (_steps(cell, z) > 0.1 * first)


def _steps(cell: FixedPointMap, z: Tensor) -> Tensor:
    """`|f(z) - z|`, and no less than what rounding hides."""
    return torch.maximum((cell(z) - z).abs(), z.abs() * torch.finfo(z.dtype).eps)


def _finest(z: Tensor) -> float:
    """The smallest tolerance that the numbers of `z` can be solved to."""
    return max(POLISHED_RTOL, 2 * torch.finfo(z.dtype).eps)
