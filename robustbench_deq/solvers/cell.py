"""What solvers and adjoints need of a model: its cell, counted, and somebody to tell of a finished solve."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from robustbench_deq.solvers.base import Solution


class Cell(Protocol):
    """The cell of a model. `EquilibriumModel` is one."""

    def evaluate(self, z: Tensor, u: Tensor) -> Tensor:
        """One application `f(z, u)`, same shape as `z`."""
        ...

    def report(self, solution: Solution) -> None:
        """Take note of a finished solve."""
        ...
