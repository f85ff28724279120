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

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.solvers.base import FixedPointMap, Solver, State


@dataclass(frozen=True)
class Anderson(Solver):
    """State: `(z_prev, g_prev, S, Y, has_prev, column, best, stale)`.

    Args:
        kind: 1 or 2.
        history_size: columns kept.
        damping: beta, the mixing of the residual.
        ridge: regularisation relative to the mean size of the Gram matrix's diagonal.
        patience: steps without a smaller residual after which a sample restarts.
    """

    kind: int = 2
    history_size: int = 5
    damping: float = 1.0
    ridge: float = 1e-6
    patience: int = 10

    def init(self, z: Tensor) -> State:
        flat = z.flatten(1)
        batch, size = flat.shape
        history = flat.new_zeros(batch, self.history_size, size)
        return (
            flat,
            torch.zeros_like(flat),
            history,
            history.clone(),
            torch.zeros(batch, dtype=torch.bool, device=z.device),
            torch.zeros(batch, dtype=torch.int64, device=z.device),
            flat.new_full((batch,), torch.inf),
            torch.zeros(batch, dtype=torch.int32, device=z.device),
        )

    def restart(self, state: State, mask: Tensor) -> State:
        z_prev, g_prev, s, y, has_prev, column, best, stale = state
        keep = (~mask).to(s.dtype)[:, None, None]
        return (
            z_prev,
            g_prev,
            s.mul_(keep),
            y.mul_(keep),
            has_prev & ~mask,
            column,
            best.masked_fill(mask, torch.inf),
            stale.masked_fill(mask, 0),
        )

    def step(self, fn: FixedPointMap, z: Tensor, f: Tensor, state: State) -> tuple[Tensor, State]:
        z_prev, g_prev, s, y, has_prev, column, best, stale = state
        flat = z.flatten(1)
        g = f.flatten(1) - flat
        batch = torch.arange(len(flat), device=z.device)
        valid = has_prev[:, None].to(flat.dtype)
        s[batch, column] = (flat - z_prev) * valid
        y[batch, column] = (g - g_prev) * valid

        v = s if self.kind == 1 else y
        matrix = torch.bmm(v, y.mT)
        rhs = torch.bmm(v, g[:, :, None])
        gamma = solve_small(matrix, rhs, self.ridge, sign=-1.0 if self.kind == 1 else 1.0)
        mixed = flat + self.damping * g - torch.bmm(gamma.mT, s)[:, 0]
        mixed = torch.sub(mixed, torch.bmm(gamma.mT, y)[:, 0], alpha=self.damping)

        size = torch.linalg.vector_norm(g, dim=1)
        has_fallen = size < best
        stale = torch.where(has_fallen, 0, stale + 1)
        best = torch.minimum(size, best)
        state = (flat, g, s, y, torch.ones_like(has_prev), (column + 1) % self.history_size, best, stale)
        is_stale = stale >= self.patience
        return mixed.view_as(z), self._restart_stale(state, is_stale)

    def _restart_stale(self, state: State, is_stale: Tensor) -> State:
        # Clearing touches the whole history, so it waits until some sample asks for it.
        return self.restart(state, is_stale) if bool(is_stale.any()) else state


def solve_small(matrix: Tensor, rhs: Tensor, ridge: float, sign: float) -> Tensor:
    """Solve batched small systems `(batch, m, m)`, regularised by `sign * ridge * scale` on the diagonal.

    Rows of zeros (unused history) give zero coefficients. Where the factorisation fails, the solution of the
    regularised normal equations is taken instead; where that is not finite either, zero.
    """
    size = matrix.shape[1]
    eye = torch.eye(size, device=matrix.device, dtype=matrix.dtype)
    scale = matrix.diagonal(dim1=1, dim2=2).abs().mean(1)[:, None, None]
    solution, info = torch.linalg.solve_ex(matrix + (sign * (ridge * scale + 1e-30)) * eye, rhs)
    is_bad = (info != 0) | ~torch.isfinite(solution).all(dim=(1, 2))
    if bool(is_bad.any()):
        clean = torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
        normal = clean.mT @ clean
        normal = normal + (1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-30) * eye
        least, info = torch.linalg.solve_ex(normal, clean.mT @ torch.nan_to_num(rhs, nan=0.0, posinf=0.0, neginf=0.0))
        is_usable = ((info == 0) & torch.isfinite(least).all(dim=(1, 2)))[:, None, None]
        solution = torch.where(is_bad[:, None, None], torch.where(is_usable, least, 0.0), solution)
    return solution
