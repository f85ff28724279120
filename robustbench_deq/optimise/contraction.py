"""How a cell contracts at an equilibrium, per sample, estimated from a few products with its Jacobian.

    H      A = J^T - I on the Krylov space of the state's own way from its start, m products (Arnoldi)
    ritz   eigenvalues of -H: approximate the outer eigenvalues of I - J
    s      relaxation, max(1, 1 / max |ritz|):    z <- z + s (f(z) - z)    and    mu <- mu + s (J^T mu + dL/dz - mu)
    rate   max |1 - s ritz|: what the slowest of them leaves of an error in one relaxed iteration, in the long run
    left   ||(I + s H)^16||_2: what 16 relaxed iterations leave of the worst error within the space

A damped cell `z + w (f - z)` has the equilibria of f and takes 1 / w times the iterations; relaxation gives them back,
for state and adjoint alike, which share one spectrum. It never damps, and it never exceeds 1 / max |ritz|, half of what
a real spectrum stands: measured, larger relaxations gain nothing on the shipped models and lose some, as the Ritz
values of few products lie inside the spectrum. A cell that is not normal lets errors grow before they fall, which
`left` sees and `rate` does not; where relaxing makes that worse, s is 1.

Source: Saad, "Numerical methods for large eigenvalue problems", 2011, chapter 6 (Ritz values); Young, "On Richardson's
method", 1954 (relaxation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.solvers import Cell
from robustbench_deq.solvers.krylov import arnoldi

NUM_PRODUCTS = 6
HARD = 0.5
"""A sample is hard when 16 relaxed iterations may leave more than this of an error."""


class Contraction(NamedTuple):
    """Per row of the state `(rows,)`; see the module's docstring."""

    relaxation: Tensor
    rate: Tensor
    left: Tensor

    @property
    def is_hard(self) -> Tensor:
        """Rows `(rows,)` on which the joint iteration is not to be believed."""
        return ~(self.left <= HARD)

    def take(self, rows: Tensor) -> Contraction:
        return Contraction(*(part[rows] for part in self))


def estimate_contraction(model: Cell, z: Tensor, u: Tensor, start: Tensor) -> Contraction:
    """The contraction at states `z` `(rows, ...)` with injections `u`; one evaluation and `NUM_PRODUCTS` products.

    Args:
        start: what the Krylov space grows from, like `z`; a row of zeros is taken to contract at once.
    """
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        f = model.evaluate(leaf, u.detach())
    size = z[0].numel()

    def minus_identity(v: Tensor) -> Tensor:
        if not f.requires_grad:  # a cell may ignore its state
            return -v
        products = torch.autograd.grad(f, leaf, v.view_as(z), retain_graph=True, materialize_grads=True)[0]
        return products.flatten(1) - v

    with torch.no_grad():
        krylov_size = min(NUM_PRODUCTS, size)
        _, hessenberg = arnoldi(minus_identity, start.flatten(1), krylov_size)
        square = torch.nan_to_num(hessenberg[:, :krylov_size].double().cpu(), nan=torch.inf)
        is_finite = torch.isfinite(square).all(dim=(1, 2))
        eye = torch.eye(krylov_size, dtype=square.dtype)
        square = torch.where(is_finite[:, None, None], square, eye)
        # A space that is spent before it has all its dimensions leaves columns of zeros, and no error in them.
        inside = torch.diag_embed((square != 0).any(1).to(square))
        fastest = torch.linalg.eigvals(square).abs().amax(1)
        relaxation = (1.0 / fastest.clamp_min(1e-12)).clamp_min(1.0)
        plain, relaxed = (_left(inside + factor * square) for factor in (1.0, relaxation[:, None, None]))
        relaxation = torch.where(relaxed < plain, relaxation, 1.0)
        rate = torch.linalg.eigvals(inside + relaxation[:, None, None] * square).abs().amax(1)
        found = ((relaxation, 1.0), (rate, 1.0), (torch.minimum(plain, relaxed), torch.inf))
        return Contraction(*(torch.where(is_finite, part, otherwise).to(z) for part, otherwise in found))


def _left(iteration: Tensor) -> Tensor:
    """`||M^16||_2` of matrices `(batch, m, m)`, `(batch,)`; infinity where it exceeds all numbers."""
    for _ in range(4):
        iteration = iteration @ iteration
    return torch.where(
        torch.isfinite(iteration).all(dim=(1, 2)),
        torch.linalg.matrix_norm(torch.nan_to_num(iteration, posinf=0.0, neginf=0.0), 2),
        torch.inf,
    )
