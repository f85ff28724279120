"""The interface of a step, and the schedules of step lengths.

    init(variable, domain)   -> state, a tuple of tensors, rows first
    step(at, domain, state)  -> the moved variable, state

A step has no loop and never asks the model.
"""

from __future__ import annotations

import abc
import enum
import math
from typing import NamedTuple

from torch import Tensor

from robustbench_deq.optimise.domains import Domain
from robustbench_deq.optimise.sources.base import Moment
from robustbench_deq.solvers.base import State


class At(NamedTuple):
    """Where a step is taken, and what is known there; rows first.

    variable, gradient   `(rows, ...)`, the gradient of the ascended loss
    loss                 by which iterates are compared, `(rows,)`
    residual             of the state at which both were seen, `(rows,)`
    is_success           asks which rows are where they should be; None of problems that have only a loss
    moment               which step it is, of how many
    keys                 what noise is keyed by: the seed, and a number a row `(rows,)`
    """

    variable: Tensor
    gradient: Tensor
    loss: Tensor
    residual: Tensor
    is_success: Tensor | None
    moment: Moment
    seed: int
    ids: Tensor | None


class Schedule(enum.Enum):
    """Step size over the run, as a factor of the first one."""

    COSINE = "cosine"
    CONSTANT = "constant"
    DROP = "drop"  # a third after 5/8 of the run (JIIO's 0.6 then 0.2)

    def factor(self, progress: float) -> float:
        """`progress` runs from 0 to 1."""
        if self is Schedule.COSINE:
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        if self is Schedule.DROP and progress >= 5 / 8:
            return 1 / 3
        return 1.0


class Step(abc.ABC):
    """See the module's docstring. `needs_success`: whether it asks which rows are successful."""

    needs_success = False

    @abc.abstractmethod
    def init(self, variable: Tensor, domain: Domain) -> State: ...

    @abc.abstractmethod
    def step(self, at: At, domain: Domain, state: State) -> tuple[Tensor, State]: ...

    def length(self, progress: float) -> float:
        """The length of the step at `progress`, as a factor of the first one."""
        return 1.0
