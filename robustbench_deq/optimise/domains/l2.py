"""The Euclidean norm. A ball's projection rescales, then clips to the pixel box."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from robustbench_deq.optimise.domains.norm import TINY, Norm, add_norm, into_box
from robustbench_deq.rows import per_sample


@add_norm
class L2(Norm):
    name = "l2"

    def size(self, delta: Tensor) -> Tensor:
        return _wide_size(delta).to(delta.dtype)

    def dual_size(self, gradient: Tensor) -> Tensor:
        return self.size(gradient)

    def l2_reach(self, count: int) -> float:
        return 1.0

    def project(self, delta: Tensor, radius: Tensor | float, x: Tensor) -> Tensor:
        factor = (radius / _wide_size(delta).clamp_min(TINY)).clamp_max(1.0).to(delta.dtype)
        return into_box(delta * per_sample(factor, delta), x)

    def direction(self, gradient: Tensor) -> Tensor:
        size = self.size(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
        return gradient / per_sample(size, gradient)

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray:
        direction = stream.standard_normal(count)
        radius = stream.random() ** (1.0 / count)
        return radius * direction / max(float(np.linalg.norm(direction)), TINY)


def _wide_size(delta: Tensor) -> Tensor:
    """The norm in float64: the squares of float32 overflow from 1e19 on, and those of a confident classifier's tiny
    gradients are lost."""
    return torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64)
