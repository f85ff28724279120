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

from robustbench_deq.solvers.base import FixedPointMap, Iterate, Solver, State


@dataclass(frozen=True)
class Broyden(Solver):
    """State: `(z_prev, g_prev, step_prev, U, V, is_empty, has_prev, column, best, stale)`; step_prev is `-B g_prev`.

    Forgetting marks terms as empty and does not clear them: it touches no history and waits for no device.

    Args:
        history_size: rank-one terms kept before a restart.
        damping: length of the step, in (0, 1].
        patience: steps without a smaller residual after which a sample restarts.

    Raises:
        UsageError: for a setting outside these bounds.
    """

    history_size: int = 30
    damping: float = 1.0
    patience: int = 8

    def __post_init__(self) -> None:
        self._require("history_size", self.history_size >= 1, "an integer >= 1")
        self._require("damping", 0 < self.damping <= 1, "a number in (0, 1]")
        self._require("patience", self.patience >= 1, "an integer >= 1")

    def init(self, z: Tensor) -> State:
        flat = z.flatten(1)
        batch, size = flat.shape
        terms = flat.new_zeros(batch, self.history_size, size)
        return (
            flat,
            torch.zeros_like(flat),
            torch.zeros_like(flat),
            terms,
            terms.clone(),
            torch.ones(batch, self.history_size, dtype=torch.bool, device=z.device),
            torch.zeros(batch, dtype=torch.bool, device=z.device),
            torch.zeros(batch, dtype=torch.int64, device=z.device),
            flat.new_full((batch,), torch.inf),
            torch.zeros(batch, dtype=torch.int32, device=z.device),
        )

    def restart(self, state: State, mask: Tensor) -> State:
        z_prev, g_prev, step_prev, u, v, is_empty, has_prev, column, best, stale = state
        return (
            z_prev,
            g_prev,
            step_prev,
            u,
            v,
            is_empty | mask[:, None],
            has_prev & ~mask,
            column.masked_fill(mask, 0),
            best.masked_fill(mask, torch.inf),
            stale.masked_fill(mask, 0),
        )

    def step(self, fn: FixedPointMap, at: Iterate, state: State) -> tuple[Tensor, State]:
        z_prev, g_prev, step_prev, u, v, is_empty, has_prev, column, best, stale = state
        flat, g = at.z.flatten(1), at.g
        dz, dg = flat - z_prev, g - g_prev
        num_used = min(at.num_steps, self.history_size)
        used = (u[:, :num_used], v[:, :num_used], is_empty[:, :num_used])
        step = g - _sum_of_terms(*used, g)  # -B g before the update, so that B dg = step_prev - step
        row = _sum_of_terms(used[1], used[0], used[2], dz).sub_(dz)  # dz^T B
        slope = torch.linalg.vecdot(row, dg)
        scale = torch.linalg.vector_norm(row, dim=1) * torch.linalg.vector_norm(dg, dim=1)
        is_usable = has_prev & (slope.abs() > 1e-8 * scale) & (slope.abs() < torch.inf)
        factor = torch.where(is_usable, slope.reciprocal(), 0.0)
        batch = torch.arange(len(flat), device=flat.device)
        left = torch.where(is_usable[:, None], (dz - step_prev).add_(step).mul_(factor[:, None]), 0.0)
        row = torch.where(is_usable[:, None], row, 0.0)
        u[batch, column] = left
        v[batch, column] = row
        is_empty = is_empty.index_put((batch, column), ~is_usable)
        step = torch.addcmul(step, left, torch.linalg.vecdot(row, g)[:, None], value=-1.0)

        stale = (stale + 1).masked_fill_(at.size < best, 0)
        column = column + is_usable
        is_done = (column >= self.history_size) | (stale >= self.patience)
        state = (
            flat,
            g,
            step,
            u,
            v,
            is_empty,
            torch.ones_like(has_prev),
            column % self.history_size,
            torch.minimum(at.size, best),
            stale,
        )
        return torch.add(flat, step, alpha=self.damping).view_as(at.z), self.restart(state, is_done)


def _sum_of_terms(left: Tensor, right: Tensor, is_empty: Tensor, vector: Tensor) -> Tensor:
    """`sum_i left_i (right_i . vector)` per sample, over the terms that are not empty."""
    weights = torch.bmm(right, vector[:, :, None]).masked_fill_(is_empty[:, :, None], 0.0)
    return torch.bmm(weights.mT, left)[:, 0]
