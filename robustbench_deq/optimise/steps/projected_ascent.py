"""Projected ascent, with momentum and a schedule:

velocity <- momentum velocity + direction(g),      d <- Project(d + a(progress) radius direction(velocity))
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustbench_deq.optimise.domains import Domain
from robustbench_deq.optimise.steps.base import At, Schedule, Step
from robustbench_deq.solvers.base import State


@dataclass(frozen=True)
class ProjectedAscent(Step):
    """step_size: first step as a fraction of the domain's radius."""

    step_size: float
    schedule: Schedule = Schedule.COSINE
    momentum: float = 0.0

    def init(self, variable: Tensor, domain: Domain) -> State:
        return (variable.new_zeros(variable.shape),) if self.momentum else ()

    def step(self, at: At, domain: Domain, state: State) -> tuple[Tensor, State]:
        ascended = at.gradient
        if self.momentum:
            ascended = self.momentum * state[0] + domain.direction(at.gradient)
            state = (ascended,)
        length = self.step_size * self.length(at.moment.progress) * domain.radius
        return domain.project(domain.steepest(ascended, length, at.variable).add_(at.variable)), state

    def length(self, progress: float) -> float:
        return self.schedule.factor(progress)
