"""Adam, ascending, projected:

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   d <- Project(d + a m^ / (sqrt(v^) + 1e-8))

with `m^ = m / (1 - b1^t)`, `v^ = v / (1 - b2^t)`, t the moves that the row has made.

Source: Kingma and Ba, ICLR 2015, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.optimise.domains import Domain
from robustbench_deq.optimise.steps.base import At, Schedule, Step
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers.base import State


@dataclass(frozen=True)
class Adam(Step):
    """learning_rate: first one, in units of the variable."""

    learning_rate: float
    schedule: Schedule = Schedule.CONSTANT
    betas: tuple[float, float] = (0.9, 0.999)

    def init(self, variable: Tensor, domain: Domain) -> State:
        zeros = variable.new_zeros(variable.shape)
        return zeros, zeros.clone(), zeros.new_zeros(len(variable))

    def step(self, at: At, domain: Domain, state: State) -> tuple[Tensor, State]:
        mean, square, count = state
        first, second = self.betas
        count = count + 1
        mean = torch.lerp(at.gradient, mean, first)
        square = torch.lerp(at.gradient.square(), square, second)
        corrected = (square / per_sample(1 - second**count, square)).sqrt_().add_(1e-8)
        rate = self.learning_rate * self.length(at.moment.progress) / (1 - first**count)
        return domain.project(at.variable + per_sample(rate, mean) * mean / corrected), (mean, square, count)

    def length(self, progress: float) -> float:
        return self.schedule.factor(progress)
