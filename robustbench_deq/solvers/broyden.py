"""Broyden's good method with limited memory, on the root of `g(z) = f(z) - z`.

The inverse Jacobian of g is kept as `B = -I + sum_i u_i v_i^T` and updated by Sherman-Morrison,

    B <- B + (dz - B dg)(dz^T B) / (dz^T B dg),      z' = z - damping B g.

`B_0 = -I`, so that the first step is a Picard step. When the memory is full, or a sample has stopped improving, B goes
back to `-I`: memory does not grow with the number of steps.

Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 1965; used for
equilibrium models by Bai, Kolter and Koltun, NeurIPS 2019, Eq. 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.solvers.base import FixedPointMap, Solver, State


@dataclass(frozen=True)
class Broyden(Solver):
    """State: `(z_prev, g_prev, U, V, has_prev, column, best, stale)`.

    Args:
        history_size: rank-one terms kept before a restart.
        damping: length of the step, in (0, 1].
        patience: steps without a smaller residual after which a sample restarts.
    """

    history_size: int = 12
    damping: float = 1.0
    patience: int = 8

    def init(self, z: Tensor) -> State:
        flat = z.flatten(1)
        batch, size = flat.shape
        terms = flat.new_zeros(batch, self.history_size, size)
        return (
            flat,
            torch.zeros_like(flat),
            terms,
            terms.clone(),
            torch.zeros(batch, dtype=torch.bool, device=z.device),
            torch.zeros(batch, dtype=torch.int64, device=z.device),
            flat.new_full((batch,), torch.inf),
            torch.zeros(batch, dtype=torch.int32, device=z.device),
        )

    def restart(self, state: State, mask: Tensor) -> State:
        z_prev, g_prev, u, v, has_prev, column, best, stale = state
        keep = (~mask).to(u.dtype)[:, None, None]
        return (
            z_prev,
            g_prev,
            u.mul_(keep),
            v.mul_(keep),
            has_prev & ~mask,
            column.masked_fill(mask, 0),
            best.masked_fill(mask, torch.inf),
            stale.masked_fill(mask, 0),
        )

    def step(self, fn: FixedPointMap, z: Tensor, f: Tensor, state: State) -> tuple[Tensor, State]:
        z_prev, g_prev, u, v, has_prev, column, best, stale = state
        flat = z.flatten(1)
        g = f.flatten(1) - flat
        dz, dg = flat - z_prev, g - g_prev
        inverse_dg = _apply(u, v, dg)
        row = torch.bmm(torch.bmm(u, dz[:, :, None]).mT, v)[:, 0] - dz
        slope = (row * dg).sum(1)
        scale = torch.linalg.vector_norm(row, dim=1) * torch.linalg.vector_norm(dg, dim=1)
        is_usable = has_prev & torch.isfinite(slope) & (slope.abs() > 1e-8 * scale)
        factor = torch.where(is_usable, 1.0 / torch.where(is_usable, slope, 1.0), 0.0)
        batch = torch.arange(len(flat), device=z.device)
        u[batch, column] = torch.where(is_usable[:, None], (dz - inverse_dg) * factor[:, None], 0.0)
        v[batch, column] = torch.where(is_usable[:, None], row, 0.0)
        step = -_apply(u, v, g)

        size = torch.linalg.vector_norm(g, dim=1)
        stale = torch.where(size < best, 0, stale + 1)
        column = column + is_usable
        state = (flat, g, u, v, torch.ones_like(has_prev), column % self.history_size, torch.minimum(size, best), stale)
        is_done = (column >= self.history_size) | (stale >= self.patience)
        if bool(is_done.any()):
            state = self.restart(state, is_done)
        return (flat + self.damping * step).view_as(z), state


def _apply(u: Tensor, v: Tensor, vector: Tensor) -> Tensor:
    """`B vector = -vector + sum_i u_i (v_i . vector)` per sample."""
    return torch.bmm(torch.bmm(v, vector[:, :, None]).mT, u)[:, 0] - vector
