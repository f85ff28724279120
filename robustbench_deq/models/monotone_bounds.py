"""How far the logits of a monotone network can move when its image does, from its weights.

    z* = relu(W z* + U x + b),   logits = V z* + c,   S = sym(I - W) > 0

Two equilibria that differ by `dz` for images that differ by `dx` satisfy `dz^T S dz <= dz^T U dx`, since the normal
cone of the positive orthant is monotone. With `s = S^(1/2) dz`, `B = S^(-1/2) U` and `a = S^(-1/2) (v_y - v_j)` this
puts s into the ball with the diameter from 0 to `B dx`, so that for `||dx||_2 <= 1`

    |(v_y - v_j)^T dz|  =  |a^T s|  <=  (||B^T a|| + ||a|| ||B||) / 2  =:  gain[y, j]

That is at most `||v_y - v_j|| ||U|| / m` with `m = lambda_min(S)`, the bound of Pabbaraju, Winston, Kolter, "Estimating
Lipschitz constants of monotone deep equilibrium models", ICLR 2021, Theorem 1. A sample keeps its class wherever the L2
norm of its perturbation is below `min_j (h_y - h_j) / gain[y, j]`.

What is judged are states near an equilibrium, not the equilibrium. The same monotonicity bounds the error of a state by
the residual r of its splitting's step of length a,

    forward-backward     ||z - z*|| <= (1 + ||I / a - (I - W)|| / m) ||r||
    Peaceman-Rachford    ||relu(v) - z*|| <= ||I / a + (I - W)|| / (2 m) ||r||

and the radius is what is left of it after such errors at both images. Rounding is allowed for, not bounded: in the
operator, the step's matrix and the logits, as multiples of the machine's precision or of that error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1.1e-5
"""Relative residual of the states that are judged: the judge's 1e-5, and a little more, since that is relative to f(z)
and not to z."""


class MonotoneBounds(NamedTuple):
    """In float64.

    gain      of the difference of two logits by the image's L2 change, `(classes, classes)`
    readout   `||v_y|| + ||v_j||`, `(classes, classes)`: of the same difference by the error of a state
    error     of a judged state, relative to its norm
    drift     of the iterated state by the image's L2 change
    """

    gain: Tensor
    readout: Tensor
    error: Tensor
    drift: Tensor

    def radii(self, logits: Tensor, sizes: Tensor, y: Tensor) -> Tensor:
        """L2 radii `(batch,)` around images within which no state to `TOLERANCE` has a logit as large as that of `y`.

        Args:
            logits: `(batch, classes)`, float64.
            sizes: L2 norms of the iterated states, `(batch,)`.
            y: classes `(batch,)`.

        Returns:
            0 where another logit is as large, or where a number is not finite.
        """
        error = self.readout[y] * self.error
        left = logits.gather(1, y[:, None]) - logits - 2 * error * sizes[:, None]
        radii = left / (self.gain[y] + error * self.drift)
        nearest = radii.scatter(1, y[:, None], torch.inf).amin(1)
        return torch.where(torch.isfinite(nearest), nearest, 0.0).clamp_min(0.0)


def measure_bounds(
    gap: Tensor,
    multiply: Callable[[Tensor, Tensor], Tensor],
    injection: Tensor,
    readout: Tensor,
    step: float,
    is_reflected: bool,
    rounding: float,
) -> MonotoneBounds:
    """The bounds of a network.

    Args:
        gap: I - W `(..., n, n)`, float64 or complex128.
        multiply: applies such a matrix to states `(batch, ...)`.
        injection: U, the state's change by each pixel `(pixels, ...)`, float64.
        readout: V, as states `(classes, ...)`, float64.
        step: a, of the splitting.
        is_reflected: Peaceman-Rachford, whose state is v.
        rounding: relative, of the numbers that the network computes with.
    """
    eye = torch.eye(gap.shape[-1], device=gap.device, dtype=gap.dtype)
    values, vectors = torch.linalg.eigh((gap + gap.mH) / 2)
    values = (values - 8 * rounding * _norm(gap)).clamp_min(0.0)  # 0: no bound, all radii are 0
    margin = values.min()
    root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mH
    columns, rows = (multiply(root, part).flatten(1) for part in (injection, readout))  # B^T, and S^(-1/2) V^T
    width = _norm(columns)
    gain = (_distances(rows @ columns.mT) + _distances(rows) * width) / 2
    drift, error = width / margin.sqrt(), 1 + _norm(eye / step - gap) / margin
    if is_reflected:
        drift = step * (_norm(eye / step - gap) * drift + _norm(injection.flatten(1)))
        error = 1 + _norm(eye / step + gap) / (2 * margin)
    sizes = torch.linalg.vector_norm(readout.flatten(1), dim=1)
    tolerance = TOLERANCE + 4 * rounding * (1 + step * _norm(gap))  # of its inverse or its products
    return MonotoneBounds(gain, sizes[:, None] + sizes, tolerance * error, drift)


def _norm(matrix: Tensor) -> Tensor:
    """The largest spectral norm of matrices `(..., n, m)`, by the smaller of their Gram matrices."""
    matrix = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mH
    return torch.linalg.eigvalsh(matrix @ matrix.mH).max().clamp_min(0.0).sqrt()


def _distances(rows: Tensor) -> Tensor:
    """Between all pairs of `rows` `(classes, n)`."""
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
