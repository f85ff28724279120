"""Anderson acceleration, types I and II, in difference form with limited memory.

With `g = f(z) - z`, and the columns of S and Y the last differences of z and of g,

    z' = z + beta g - (S + beta Y) gamma,     (V^T Y) gamma = V^T g,     V = S (type I)  or  V = Y (type II).

Type II minimises the linearised residual `||g - Y gamma||`; type I is the secant (Galerkin) variant. The small system
is regularised relative to its own scale, per sample; a singular one falls back to regularised least squares. A sample
whose residual has not fallen for `patience` steps forgets its history.

Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 2011, Eqs. 2.2 and 4.1;
Fang and Saad, "Two classes of multisecant methods", 2009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.solvers.base import FixedPointMap, Iterate, Solver, State


@dataclass(frozen=True)
class Anderson(Solver):
    """State: `(z_prev, X, Y, is_empty, is_fresh, best, stale)`, of which a step overwrites all but z_prev.

    X keeps S for type I, and S + beta Y, all that type II needs of S, for type II. Y has one more row, which holds the
    last g. Forgetting marks columns as empty and does not clear them: it touches no history and waits for no device.
    All samples fill the same column, and a fresh one, which has no previous step to fill it with, leaves it empty.

    Args:
        kind: 1 or 2.
        history_size: columns kept.
        damping: beta, the mixing of the residual.
        ridge: regularisation relative to the mean size of the Gram matrix's diagonal.
        patience: steps without a smaller residual after which a sample restarts.

    Raises:
        UsageError: for a setting outside these bounds.
    """

    kind: int = 2
    history_size: int = 5
    damping: float = 1.0
    ridge: float = 1e-6
    patience: int = 10

    def __post_init__(self) -> None:
        self._require("kind", self.kind in (1, 2), "1 or 2")
        self._require("history_size", self.history_size >= 1, "an integer >= 1")
        self._require("damping", self.damping > 0, "a number > 0")
        self._require("ridge", self.ridge >= 0, "a number >= 0")
        self._require("patience", self.patience >= 1, "an integer >= 1")

    def init(self, z: Tensor) -> State:
        flat = z.flatten(1)
        batch, size = flat.shape
        return (
            flat,
            flat.new_zeros(batch, self.history_size, size),
            flat.new_zeros(batch, self.history_size + 1, size),
            torch.ones(batch, self.history_size, dtype=torch.bool, device=z.device),
            torch.ones(batch, dtype=torch.bool, device=z.device),
            flat.new_full((batch,), torch.inf),
            torch.zeros(batch, dtype=torch.int32, device=z.device),
        )

    def restart(self, state: State, mask: Tensor) -> State:
        z_prev, x, y, is_empty, is_fresh, best, stale = state
        return (
            z_prev,
            x,
            y,
            is_empty | mask[:, None],
            is_fresh | mask,
            best.masked_fill(mask, torch.inf),
            stale.masked_fill(mask, 0),
        )

    def step(self, fn: FixedPointMap, at: Iterate, state: State) -> tuple[Tensor, State]:
        z_prev, x, y, is_empty, is_fresh, best, stale = state
        flat, g, column = at.z.flatten(1), at.g, at.num_steps % self.history_size
        last, dz, dg = y.select(1, -1), x.select(1, column), y.select(1, column)
        torch.sub(g, last, out=dg)
        torch.sub(flat, z_prev, out=dz)
        if self.kind == 2:
            dz.add_(dg, alpha=self.damping)
        last.copy_(g)
        is_empty.select(1, column).copy_(is_fresh)

        v = x if self.kind == 1 else y[:, :-1]
        products = torch.bmm(v, y.mT).masked_fill_(is_empty[:, :, None], 0.0)  # V^T Y, and V^T g in the last column
        matrix = products[:, :, :-1].masked_fill(is_empty[:, None, :], 0.0)
        gamma = solve_small(matrix, products[:, :, -1:], self.ridge, sign=-1.0 if self.kind == 1 else 1.0).mT
        mixed = at.f.flatten(1) if self.damping == 1.0 else torch.add(flat, g, alpha=self.damping)
        moved = torch.baddbmm(mixed[:, None], gamma, x, alpha=-1.0)
        if self.kind == 1:
            moved = torch.baddbmm(moved, gamma, y[:, :-1], alpha=-self.damping)

        stale.add_(1).masked_fill_(at.size < best, 0)
        best = torch.minimum(at.size, best)
        is_fresh = stale >= self.patience
        if at.num_steps + 1 >= self.patience:  # before, no sample can have been stale for so long
            best.masked_fill_(is_fresh, torch.inf)
            stale.masked_fill_(is_fresh, 0)
            is_empty.logical_or_(is_fresh[:, None])
        return moved.view_as(at.z), (flat, x, y, is_empty, is_fresh, best, stale)


def solve_small(matrix: Tensor, rhs: Tensor, ridge: float, sign: float) -> Tensor:
    """Solve batched small systems `(batch, m, m)`, regularised by `sign * ridge * scale` on the diagonal.

    Rows of zeros (unused history) give zero coefficients. Where the factorisation fails, the solution of the
    regularised normal equations is taken instead; where that is not finite either, zero. `matrix` is overwritten.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    shift = torch.linalg.vector_norm(diagonal, ord=1, dim=1, keepdim=True)
    diagonal.add_(shift.mul_(sign * ridge / matrix.shape[1]).add_(sign * 1e-30))
    solution = torch.linalg.solve_ex(matrix, rhs)[0]
    if not math.isfinite(float(solution.sum())):  # some failed: a pivot of zero leaves no finite number, or a solution
        is_good = torch.isfinite(solution).all(dim=(1, 2))
        eye = torch.eye(matrix.shape[1], device=matrix.device, dtype=matrix.dtype)
        clean = torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
        normal = clean.mT @ clean
        normal = normal + (1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-30) * eye
        least, info = torch.linalg.solve_ex(normal, clean.mT @ torch.nan_to_num(rhs, nan=0.0, posinf=0.0, neginf=0.0))
        is_usable = ((info == 0) & torch.isfinite(least).all(dim=(1, 2)))[:, None, None]
        solution = torch.where(is_good[:, None, None], solution, torch.where(is_usable, least, 0.0))
    return solution
