"""Krylov spaces per sample: an orthonormal basis by Arnoldi's method, and GMRES over it.

    K = span{b, A b, ..., A^(m-1) b},      A V = [V, v_next] H        classical Gram-Schmidt, done twice

Source: Arnoldi, 1951; Saad and Schultz, "GMRES: a generalized minimal residual algorithm", SIAM J. Sci. Stat. Comput.
1986.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustbench_deq.solvers.anderson import solve_small


def arnoldi(operator: Callable[[Tensor], Tensor], start: Tensor, krylov_size: int) -> tuple[Tensor, Tensor]:
    """Basis `(batch, m + 1, n)` and Hessenberg matrix `(batch, m + 1, m)` of the Krylov spaces of `start` `(batch, n)`.

    Where a space is invariant before it has m dimensions, the rest of its basis and of its matrix is zero.
    """
    batch, size = start.shape
    norm = torch.linalg.vector_norm(start, dim=1)
    basis = start.new_zeros(batch, krylov_size + 1, size)
    hessenberg = start.new_zeros(batch, krylov_size + 1, krylov_size)
    basis[:, 0] = start / norm.clamp_min(1e-30)[:, None]
    for column in range(krylov_size):
        w = operator(basis[:, column])
        known = basis[:, : column + 1]
        scale = torch.linalg.vector_norm(w, dim=1)
        for _ in range(2):
            overlap = torch.bmm(known, w[:, :, None])
            hessenberg[:, : column + 1, column] += overlap[:, :, 0]
            w = w - torch.bmm(overlap.mT, known)[:, 0]
        length = torch.linalg.vector_norm(w, dim=1)
        is_spent = length <= 1e-6 * scale  # the space is invariant: the exact solution lies in it
        length = torch.where(is_spent, 0.0, length)
        hessenberg[:, column + 1, column] = length
        basis[:, column + 1] = torch.where(is_spent[:, None], 0.0, w / length.clamp_min(1e-30)[:, None])
    return basis, hessenberg


def gmres(operator: Callable[[Tensor], Tensor], rhs: Tensor, krylov_size: int) -> Tensor:
    """Approximate solution of `operator(s) = rhs` per sample, `(batch, n)`, from a Krylov space of the given size."""
    krylov_size = min(krylov_size, rhs.shape[1])
    basis, hessenberg = arnoldi(operator, rhs, krylov_size)
    wide = hessenberg.double()
    target = wide.new_zeros(len(rhs), krylov_size + 1, 1)
    target[:, 0, 0] = torch.linalg.vector_norm(rhs, dim=1).double()
    coefficients = solve_small(wide.mT @ wide, wide.mT @ target, ridge=1e-12, sign=1.0)
    return torch.bmm(coefficients.mT.to(rhs.dtype), basis[:, :krylov_size])[:, 0]
