"""Threat models: a norm ball of radius epsilon around an image, cut by the pixel box [0, 1].

    S(x) = { x + delta : ||delta||_p <= epsilon  and  0 <= x + delta <= 1 },   p in {2, inf}

`Threat.project` maps onto S(x): first onto the ball, then onto the box. Since x lies in the box, clipping to the box
moves every coordinate of delta towards zero, so the result stays in the ball. Inside S(x) the map is the identity.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustbench_deq.errors import UsageError
from robustbench_deq.rows import per_sample

TINY = 1e-12
SLACK = 1e-5
"""What rounding may add to a norm, in pixel units and as a share; a step of an 8-bit image is 400 times as much."""


class Norm(enum.Enum):
    L2 = "l2"
    LINF = "linf"

    @classmethod
    def parse(cls, name: str) -> Norm:
        try:
            return cls(name.lower())
        except ValueError:
            raise UsageError.of(
                "norm", expected="l2 or linf", got=repr(name), fix="pass --norm l2 or --norm linf"
            ) from None


def norm_of(delta: Tensor, norm: Norm) -> Tensor:
    """Per-sample norm of `(batch, ...)`; returns `(batch,)`."""
    flat = delta.flatten(1)
    if norm is Norm.LINF:
        return flat.abs().amax(1)  # on a CPU ten times faster than vector_norm of order infinity
    return torch.linalg.vector_norm(flat, dim=1)


@dataclass(frozen=True)
class Threat:
    """A norm and a radius in pixel units of [0, 1].

    Raises:
        UsageError: for a negative or non-finite radius.
    """

    norm: Norm
    epsilon: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise UsageError.of(
                "epsilon",
                expected="a finite number >= 0 in pixel units of [0, 1]",
                got=self.epsilon,
                fix="pass for example --epsilon 1.0 or --epsilon 8/255",
            )

    def project(self, delta: Tensor, x: Tensor) -> Tensor:
        """The perturbation `(batch, ...)` moved into the ball and the pixel box around `x`."""
        if self.norm is Norm.L2:
            size = norm_of(delta, Norm.L2)
            delta = delta * per_sample((self.epsilon / size.clamp_min(TINY)).clamp_max(1.0), delta)
        else:
            delta = delta.clamp(-self.epsilon, self.epsilon)
        return (x + delta).clamp_(0.0, 1.0).sub_(x)

    def allows(self, size: Tensor) -> Tensor:
        """Whether perturbations of these norms `(batch,)` lie in the ball, but for what rounding adds; NaN does not."""
        return size <= self.epsilon * (1 + SLACK) + SLACK

    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent for this norm: `g / ||g||_2` for L2, `sign(g)` for Linf; zero where the gradient is zero."""
        if self.norm is Norm.L2:
            # By the largest entry first: the squares of a confident classifier's tiny gradients would underflow.
            largest = norm_of(gradient, Norm.LINF).clamp_min(torch.finfo(gradient.dtype).tiny)
            gradient = gradient / per_sample(largest, gradient)
            return gradient.div_(per_sample(norm_of(gradient, Norm.L2).clamp_min(TINY), gradient))
        return gradient.sign()

    def random_start(self, x: Tensor, seed: int, sample_ids: Tensor, restart: int = 0) -> Tensor:
        """A point drawn uniformly from the ball (then cut by the box), one stream per `(seed, restart, sample id)`.

        The draw of a sample does not depend on the batch it is in.
        """
        count = x[0].numel()
        rows = np.empty((len(x), count), dtype=np.float64)
        for row, sample_id in enumerate(sample_ids.tolist()):
            stream = np.random.Generator(np.random.Philox(key=[_stream_key(seed, restart), sample_id]))
            if self.norm is Norm.L2:
                direction = stream.standard_normal(count)
                radius = self.epsilon * stream.random() ** (1.0 / count)
                rows[row] = radius * direction / max(float(np.linalg.norm(direction)), TINY)
            else:
                rows[row] = stream.uniform(-self.epsilon, self.epsilon, count)
        delta = torch.from_numpy(rows).to(device=x.device, dtype=x.dtype).view_as(x)
        return self.project(delta, x)


def _stream_key(seed: int, restart: int) -> int:
    return int(np.random.SeedSequence([seed, restart]).generate_state(1, np.uint64)[0])
