"""What steps and the loop need of a feasible set. All lengths are in units of the variable, a number a row."""

from __future__ import annotations

import abc
from typing import Self

from torch import Tensor


class Domain(abc.ABC):
    """A feasible set for every row of a variable `(rows, ...)`.

    Attributes:
        radius: the length that a step size of 1 stands for, `(rows,)` or one number.
    """

    radius: Tensor | float

    @abc.abstractmethod
    def project(self, variable: Tensor) -> Tensor:
        """A feasible point near `variable`; the identity on feasible points."""

    @abc.abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """`gradient` `(rows, ...)` brought to unit size, row by row; zero where the gradient is zero."""

    @abc.abstractmethod
    def steepest(self, gradient: Tensor, length: Tensor | float, variable: Tensor) -> Tensor:
        """The displacement of `length` `(rows,)` from `variable` along which the linear function `gradient` rises
        most."""

    @abc.abstractmethod
    def take(self, rows: Tensor) -> Self:
        """The same set for the rows `rows` `(kept,)`."""
