"""The clean equilibria of a batch: solved once by the judge, and where every attack on it starts.

z*             to the judge's tolerance, with its verdict
amplification  ||z* - z0|| / ||f(z0) - z0||: the error a unit of residual, on the way of a cold solve
size           ||z* - z0||: what residuals are relative to
contraction    of the cell at z* (`optimise.contraction`), estimated when an attack with a gradient first asks
mu             (I - J^T) mu = dL/dz*, for each loss that an attack ascends first, solved when one first asks for it
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustbench_deq.adjoints import AdjointMap, seed_scale
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.judge import Verdict, filled_up, tight_solve, verdict_at
from robustbench_deq.optimise import Contraction, Objective, Settled, estimate_contraction
from robustbench_deq.protocol import Clean
from robustbench_deq.rows import per_sample
from robustbench_deq.shown import briefly_shown
from robustbench_deq.solvers import Anderson, Solution, Solve

ADJOINT_SOLVE = Solve(Anderson(), rtol=1e-3, max_steps=100)
FINER_RTOL = 1e-6
RUN_AWAY = 0.1
"""The share of `||dL/dz||` that an adjoint may be short of its equation by; one that has run away is short of all."""


@briefly_shown
@dataclass
class CleanBatch:
    """What the judge has found at the clean images; on the device of the images but for the verdict.

    verdict        of the clean images
    z              equilibria; rows first
    distance       z* - z0, the way from where a cold solve starts, like z
    first          ||f(z0) - z0|| `(batch,)`
    contraction    None where no attack has asked for it
    adjoints       by the name of the loss
    seconds        that all of it took here; 0 of what was read
    """

    verdict: Verdict
    z: Tensor
    distance: Tensor
    first: Tensor
    contraction: Contraction | None = None
    adjoints: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    def known(self, model: EquilibriumModel, x: Tensor, objective: Objective | None) -> Clean:
        """What is handed to an attack that ascends `objective` first; None is one that has no use for an adjoint."""
        mu = None
        size = torch.linalg.vector_norm(self.distance.flatten(1), dim=1)
        amplification = size / self.first.clamp_min(torch.finfo(size.dtype).tiny)
        if objective is not None:
            if self.contraction is None:
                start = time.perf_counter()
                model.check_gradient(x)
                self.contraction = estimate_contraction(model, self.z, model.inject(x).detach(), self.distance)
                self.seconds += time.perf_counter() - start
            amplification = amplification / self.contraction.relaxation
            if objective.title not in self.adjoints:
                start = time.perf_counter()
                self.adjoints[objective.title] = solve_adjoint(model, x, self.z, objective)
                self.seconds += time.perf_counter() - start
            mu = self.adjoints[objective.title]
        # A start that is an equilibrium already says nothing of sizes: there the state's own is taken.
        own = torch.linalg.vector_norm(self.z.flatten(1), dim=1)
        size = torch.where(size > 1e-3 * own, size, own).clamp_min(torch.finfo(size.dtype).tiny)
        settled = Settled(self.z, mu, amplification.clamp_min(1.0), size, self.contraction)
        return Clean(settled, self.verdict.is_correct.to(x.device))


@torch.no_grad()
def judge_clean(model: EquilibriumModel, x: Tensor, y: Tensor) -> CleanBatch:
    """Judge clean images `x` `(batch, channels, height, width)` of classes `y`, and keep what was solved."""
    start = time.perf_counter()
    u = filled_up(model.inject)(x)
    solution = tight_solve(model, u)
    z0 = model.initial_state(u)
    first = torch.linalg.vector_norm((model.evaluate(z0, u) - z0).flatten(1), dim=1)
    is_finite = torch.isfinite(solution.value.flatten(1)).all(1)  # without an equilibrium there is still a start
    z = torch.where(per_sample(is_finite, z0), solution.value, z0)
    clean = CleanBatch(verdict_at(model, solution, y), z, z - z0, first)
    clean.seconds = time.perf_counter() - start
    return clean


@torch.no_grad()
def solve_adjoint(model: EquilibriumModel, x: Tensor, z: Tensor, objective: Objective) -> Tensor:
    """The adjoint of the loss at equilibria `z` of images `x`; the loss's own gradient where no solve finds it.

    Where there is none, a solver may drive it so far out that what is missing is small beside it. One that is short of
    much of `dL/dz` is solved further, and is not found if it still is.

    Raises:
        UsageError: for a model without a gradient.
    """
    model.check_gradient(x)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        v = torch.autograd.grad(objective(model.head(leaf)).sum(), leaf, materialize_grads=True)[0]
    scale = per_sample(seed_scale(v), v)
    v = v / scale
    equation = AdjointMap(model, z, model.inject(x), v)
    solution = ADJOINT_SOLVE(equation, v)
    mu, is_found = solution.value, solution.is_converged
    index = (is_found & _is_short(solution, v)).nonzero()[:, 0]
    if len(index):
        again = ADJOINT_SOLVE.with_(rtol=FINER_RTOL)(equation.restrict(index), mu[index])
        mu = mu.index_copy(0, index, again.value)
        is_found = is_found.index_put((index,), ~_is_short(again, v[index]))
    return torch.where(per_sample(is_found, v), mu, v) * scale


def _is_short(solution: Solution, v: Tensor) -> Tensor:
    """Rows whose adjoint is short of its equation by much of `v`; no number is nearer to it than rounding is."""
    size, seed_size = (torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (solution.value, v))
    return ~(solution.residual.clamp_min(torch.finfo(size.dtype).eps) * size <= RUN_AWAY * seed_size)
