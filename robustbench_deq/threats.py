"""Threat models: a norm ball of radius epsilon around an image, cut by the pixel box [0, 1].

S(x) = { x + delta : ||delta||_p <= epsilon  and  0 <= x + delta <= 1 }
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.configs import plain_number
from robustbench_deq.errors import UsageError
from robustbench_deq.optimise.domains import Ball, Norm

SLACK = 1e-5
"""What rounding may add to a norm, in pixel units and as a share; a step of an 8-bit image is 400 times as much."""


@dataclass(frozen=True)
class Threat:
    """A norm and a radius in pixel units of [0, 1].

    Args:
        norm: such as `Norm.L2`, or its name or order.
        epsilon: the radius, a number of any kind or text such as `8/255`.

    Raises:
        UsageError: for an unknown norm, and a negative or non-finite radius.
    """

    norm: Norm
    epsilon: float

    def __init__(self, norm: Norm | str | float, epsilon: float | str) -> None:
        object.__setattr__(self, "norm", Norm.parse(norm))
        radius = plain_number(epsilon, "epsilon")
        is_number = isinstance(radius, numbers.Real) and not isinstance(radius, bool)
        try:
            number = float(radius) if is_number else math.nan  # type: ignore[arg-type]  # it is one
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number >= 0):
            raise UsageError.of(
                "epsilon",
                expected="a finite number >= 0 in pixel units of [0, 1]",
                got=repr(epsilon),
                fix="pass for example --epsilon 1.0 or --epsilon 8/255",
            )
        object.__setattr__(self, "epsilon", number)

    def ball(self, x: Tensor) -> Ball:
        """The feasible perturbations of images `(batch, channels, height, width)`.

        No radius is larger than that of the pixel box: a larger one allows no more, and steps are shares of it.
        """
        return Ball(self.norm, min(self.epsilon, self._box_radius(x[0].numel())), x)

    def doubt(self, num_pixels: int) -> str | None:
        """What is odd about the radius for images of `num_pixels` numbers, in one line; None: nothing."""
        most = self._box_radius(num_pixels)
        if self.epsilon < most or not self.epsilon:
            return None
        return (
            f"epsilon {self.epsilon:g} in {self.norm.name} lets an attack turn any image into any other: pixels are in "
            f"[0, 1], and {most:g} covers them all; write for example 8/255 for 8 of 255 levels"
        )

    def _box_radius(self, num_pixels: int) -> float:
        """The largest norm of a perturbation within the pixel box."""
        return float(self.norm.size(torch.ones(1, num_pixels, dtype=torch.float64)))

    def allows(self, size: Tensor) -> Tensor:
        """Whether perturbations of these norms `(batch,)` lie in the ball, but for what rounding adds; NaN does not."""
        return size <= self._most

    def l2_radius(self, num_pixels: int) -> float | None:
        """Of an L2 ball that holds all that `allows` for images of `num_pixels` numbers; None: unknown for the norm."""
        reach = self.norm.l2_reach(num_pixels)
        return None if reach is None else self._most * reach

    @property
    def _most(self) -> float:
        return self.epsilon * (1 + SLACK) + SLACK
