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
from robustbench_deq.solvers import Anderson, Broyden, CellMap, NewtonKrylov, Picard, Solution, Solve, Status
from robustbench_deq.solvers.base import residual_norms

JUDGE_RTOL = 1e-5
RUN_AWAY = 1e3
LADDER = (
    Solve(Anderson(ridge=1e-8), rtol=JUDGE_RTOL, max_steps=200),
    Solve(Picard(damping=0.5), rtol=JUDGE_RTOL, max_steps=400),
    Solve(Broyden(history_size=30), rtol=JUDGE_RTOL, max_steps=400),
    Solve(NewtonKrylov(krylov_size=20), rtol=JUDGE_RTOL, max_steps=100),
)


@dataclass(frozen=True)
class Verdict:
    """Per sample, on the CPU, `(batch,)`.

    prediction     class with the largest logit
    loss           cross-entropy of the true class
    residual       relative residual of the state that was read
    is_converged   whether that is below the judge's tolerance
    is_correct     converged, finite, and classified as labelled
    """

    prediction: Tensor
    loss: Tensor
    residual: Tensor
    is_converged: Tensor
    is_correct: Tensor

    def take(self, rows: Tensor) -> Verdict:
        """On the samples `rows`."""
        return Verdict(*(part[rows] for part in self.parts()))

    def put(self, rows: Tensor, other: Verdict) -> Verdict:
        """With that on the samples `rows` replaced by `other`."""
        return Verdict(*(mine.index_copy(0, rows, its) for mine, its in zip(self.parts(), other.parts(), strict=True)))

    def parts(self) -> tuple[Tensor, ...]:
        return self.prediction, self.loss, self.residual, self.is_converged, self.is_correct


@torch.no_grad()
def judge(model: EquilibriumModel, x: Tensor, y: Tensor) -> Verdict:
    """Judge images `x` `(batch, channels, height, width)` with classes `y` `(batch,)`. The model's mode is
    respected."""
    return verdict_at(model, tight_solve(model, model.inject(x)), y)


@torch.no_grad()
def verdict_at(model: EquilibriumModel, solution: Solution, y: Tensor) -> Verdict:
    """The verdict on equilibria that have been solved."""
    logits = model.head(solution.value)
    is_finite = torch.isfinite(logits).all(1)
    prediction = logits.argmax(1)
    loss = torch.where(is_finite, F.cross_entropy(torch.nan_to_num(logits), y, reduction="none"), torch.nan)
    is_correct = solution.is_converged & is_finite & (prediction == y)
    parts = (prediction, loss, solution.residual, solution.is_converged & is_finite, is_correct)
    return Verdict(*(part.cpu() for part in parts))


@torch.no_grad()
def tight_solve(model: EquilibriumModel, u: Tensor) -> Solution:
    """The equilibrium for injections `u` to `JUDGE_RTOL`; samples that fail on one solver go to the next, from cold."""
    z0 = model.initial_state(u)
    solution = _unless_run_away(LADDER[0], model, u, z0)
    for rung in LADDER[1:]:
        index = (~solution.is_converged).nonzero()[:, 0]
        if len(index) == 0:
            break
        again = _unless_run_away(rung, model, u[index], z0[index])
        # Keep an equilibrium, else whichever of the two states is nearer to one (NaN residuals never are).
        is_nearer = (again.residual < solution.residual[index]) | torch.isnan(solution.residual[index])
        wins = again.is_converged | is_nearer
        index, won = index[wins], [part[wins] for part in again[:4]]
        solution = Solution(*(whole.index_copy(0, index, part) for whole, part in zip(solution[:4], won, strict=True)))
    return solution


def _unless_run_away(rung: Solve, model: EquilibriumModel, u: Tensor, z0: Tensor) -> Solution:
    """The rung's solution, but diverged where only the state's size has made the relative residual small.

    A solver may drive the state of a cell without an equilibrium, such as `z + u`, so far out that the step it still
    takes is small beside it. There the state is more than `RUN_AWAY` times as large as after the first evaluation, and
    the step has not come down to a tenth of the first one.
    """
    solution = rung(CellMap(model.evaluate, u), z0)
    f0 = model.evaluate(z0, u)
    first, _ = residual_norms(z0, f0)
    size, size_at_start = (torch.linalg.vector_norm(state.flatten(1), dim=1) for state in (solution.value, f0))
    step = size * solution.residual.clamp_min(torch.finfo(size.dtype).eps)  # rounding hides what is smaller
    is_lost = (size > RUN_AWAY * size_at_start) & (step > 0.1 * first)
    status = torch.where(is_lost & solution.is_converged, int(Status.DIVERGED), solution.status)
    return solution._replace(status=status.to(solution.status.dtype))
