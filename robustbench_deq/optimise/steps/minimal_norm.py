"""The smallest perturbation that succeeds: ascent on a ball whose radius adapts, row by row.

    radius <- radius (1 - gamma)   after a success (and at most the norm of the smallest success)
    radius <- radius (1 + gamma)   after a failure of a row that has succeeded before
    radius <- ||d|| + |loss| / ||g||_*   before the first success: where the linearised loss reaches zero
    d      <- Project_radius(d + alpha direction(g))

alpha falls from `step_size` times the domain's radius, gamma from 0.05, both on a cosine. The loss has to be one that
is positive exactly where a row succeeds, such as the margin. No radius exceeds the domain's own.

Source: Pintor, Roli, Brendel, Biggio, "Fast minimum-norm adversarial attacks through adaptive norm constraints",
NeurIPS 2021, Algorithm 1. Departure: the domain bounds the search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.optimise.domains import Ball, Domain
from robustbench_deq.optimise.steps.base import At, Schedule, Step
from robustbench_deq.solvers.base import State


@dataclass(frozen=True)
class MinimalNorm(Step):
    """State: `(radius, norm of the smallest success)`, `(rows,)` each.

    Args:
        step_size: first step as a fraction of the domain's radius.
        gamma: first change of the radius, as a share of it.
        trusted_residual: the largest relative residual of a state whose success counts.
    """

    needs_success = True
    step_size: float = 1.0
    gamma: float = 0.05
    trusted_residual: float = 0.05

    def init(self, variable: Tensor, domain: Domain) -> State:
        unknown = variable.new_full((len(variable),), torch.inf)
        return unknown, unknown

    def step(self, at: At, domain: Domain, state: State) -> tuple[Tensor, State]:
        assert isinstance(domain, Ball) and at.is_success is not None
        radius, smallest = state
        factor = self.length(at.moment.progress)
        gamma = self.gamma * factor
        size = domain.norm.size(at.variable)
        succeeds = at.is_success & (at.residual <= self.trusted_residual)
        smallest = torch.where(succeeds, torch.minimum(size, smallest), smallest)
        has_succeeded = smallest < torch.inf
        slope = domain.norm.dual_size(at.gradient).clamp_min(torch.finfo(size.dtype).tiny)
        estimate = size + at.loss.abs() / slope
        known = torch.where(radius < torch.inf, radius, size)
        after = torch.where(has_succeeded, known * (1 + gamma), estimate)
        radius = torch.where(succeeds, torch.minimum(known * (1 - gamma), smallest), after)
        radius = torch.minimum(radius, torch.as_tensor(domain.radius).to(radius))
        step = domain.steepest(at.gradient, self.step_size * factor * domain.radius, at.variable)
        return domain.with_radius(radius).project(at.variable + step), (radius, smallest)

    def length(self, progress: float) -> float:
        return Schedule.COSINE.factor(progress)
