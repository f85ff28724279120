"""How a model's solves behave on given images: spectral radius of the cell's Jacobian, plain iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from robustbench_deq.adjoints import AdjointMap
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import CellMap, Picard, Solution, Solve


def spectral_radius(model: EquilibriumModel, z: Tensor, u: Tensor, num_iterations: int = 60, seed: int = 0) -> Tensor:
    """Largest modulus of an eigenvalue of `J_z` at `(z, u)`, per sample `(batch,)`.

    Repeated multiplication by `J_z^T`; the mean growth over the second half of the iterations is returned, which
    converges for a complex leading pair too.
    """
    jacobian = AdjointMap(model, z, u, torch.zeros_like(z))
    stream = torch.Generator().manual_seed(seed)
    v = torch.randn(z.shape, generator=stream).to(z)
    log_growth = z.new_zeros(len(z))
    for step in range(num_iterations):
        v = v / per_sample(_norms(v), v)
        v = jacobian.transpose(v)
        if step >= num_iterations // 2:
            log_growth += _norms(v).log()
    return (log_growth / (num_iterations - num_iterations // 2)).exp()


def _norms(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v.flatten(1), dim=1).clamp_min(1e-30)


def picard_solution(model: EquilibriumModel, x: Tensor, rtol: float = 1e-4, max_steps: int = 500) -> Solution:
    """Plain iteration from the initial state: what the cell does without help."""
    with torch.no_grad():
        u = model.inject(x)
        return Solve(Picard(), rtol=rtol, max_steps=max_steps)(CellMap(model.evaluate, u), model.initial_state(u))
