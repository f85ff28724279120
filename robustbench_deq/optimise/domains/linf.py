"""The maximum norm. A ball cut by the pixel box is a box itself: its projection clips, and is exact."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from robustbench_deq.optimise.domains.norm import Norm, add_norm, into_box
from robustbench_deq.rows import per_sample


@add_norm
class LInf(Norm):
    name = "linf"

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().amax(1)  # on a CPU ten times faster than vector_norm of order infinity

    def dual_size(self, gradient: Tensor) -> Tensor:
        return torch.linalg.vector_norm(gradient.flatten(1), ord=1, dim=1)

    def l2_reach(self, count: int) -> float:
        return math.sqrt(count)

    def project(self, delta: Tensor, radius: Tensor | float, x: Tensor) -> Tensor:
        if isinstance(radius, Tensor):
            limit = per_sample(radius, delta)
            return into_box(torch.clamp(delta, -limit, limit), x)
        return into_box(delta.clamp(-radius, radius), x)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def draw(self, stream: np.random.Generator, count: int) -> np.ndarray:
        return stream.uniform(-1.0, 1.0, count)
