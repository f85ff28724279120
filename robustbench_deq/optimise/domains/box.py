"""Variables that are no perturbations: between two limits, or anywhere. Directions are those of the L2 norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from robustbench_deq.optimise.domains.base import Domain
from robustbench_deq.optimise.domains.norm import Norm, scaled


@dataclass(frozen=True)
class Free(Domain):
    """All of space; a step size is a length."""

    radius = 1.0

    def project(self, variable: Tensor) -> Tensor:
        return variable

    def direction(self, gradient: Tensor) -> Tensor:
        return Norm.L2.direction(gradient)

    def steepest(self, gradient: Tensor, length: Tensor | float, variable: Tensor) -> Tensor:
        return scaled(self.direction(gradient), length)

    def take(self, rows: Tensor) -> Self:
        return self


@dataclass(frozen=True)
class Box(Free):
    """Every entry between `low` and `high`."""

    low: float = 0.0
    high: float = 1.0

    def project(self, variable: Tensor) -> Tensor:
        return variable.clamp(self.low, self.high)
