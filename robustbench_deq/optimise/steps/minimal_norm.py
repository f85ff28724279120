"""The smallest perturbation that succeeds: ascent on a ball whose radius adapts, row by row.

    radius <- the domain's own     before the first success: ascent as of PGD
    radius <- to ||d|| - loss / ||g||_*, where the linearised loss is zero, but between radius (1 - 4 gamma) and
              radius (1 - gamma), and at most the norm of the smallest success      after a success
    radius <- radius (1 + gamma)   after a failure of a row that has succeeded before
    d      <- Project_radius(d + alpha radius direction(g))

A row that has succeeded, or seems to succeed now, waits until its state has settled (`trusted_residual`), for at most
`MOST_WAITS` looks: a state on its way shows successes that are none, and the smallest norm would pick just these.

alpha falls from `step_size`, gamma from 0.05, both on a cosine. The loss has to be one that is positive exactly where a
row succeeds, such as the margin. No radius exceeds the domain's own.

Source: Pintor, Roli, Brendel, Biggio, "Fast minimum-norm adversarial attacks through adaptive norm constraints",
NeurIPS 2021, Algorithm 1. Departures: the domain bounds the search. Before its first success a row has the whole ball:
there the published radius, up to the linearised boundary, stops short of it where the model is nearly linear or the
state lags, and such rows would look robust. After a success the linearised loss may shrink the radius faster than
`1 - gamma`; steps are a share of the row's radius, not of the first one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.optimise.domains import Ball, Domain
from robustbench_deq.optimise.problem import where_rows
from robustbench_deq.optimise.steps.base import At, Schedule, Step
from robustbench_deq.solvers.base import State

SLACK = 0.015
"""A success is one by this share of its norm beyond the linearised boundary."""
MOST_WAITS = 20
FASTEST = 4.0
"""Times gamma: the most that a success shrinks the radius."""


@dataclass(frozen=True)
class MinimalNorm(Step):
    """State: `(radius, norm of the smallest success, looks that the row has waited)`, `(rows,)` each.

    Args:
        step_size: first step as a fraction of the radius.
        gamma: first change of the radius, as a share of it.
        trusted_residual: the largest relative residual of a state whose success counts.
        slack: the share of its norm by which a success has to be beyond the linearised boundary.
    """

    needs_success = True
    step_size: float = 1.0
    gamma: float = 0.05
    trusted_residual: float = 0.001
    slack: float = SLACK

    def init(self, variable: Tensor, domain: Domain) -> State:
        unknown = variable.new_full((len(variable),), torch.inf)
        return torch.zeros_like(unknown) + domain.radius, unknown, torch.zeros_like(unknown)

    def step(self, at: At, domain: Domain, state: State) -> tuple[Tensor, State]:
        assert isinstance(domain, Ball) and at.is_success is not None
        radius, smallest, waited = state
        factor = self.length(at.moment.progress)
        gamma = self.gamma * factor
        size = domain.norm.size(at.variable)
        slope = domain.norm.dual_size(at.gradient).clamp_min(torch.finfo(size.dtype).tiny)
        beyond = at.loss / slope
        is_settled = at.residual <= self.trusted_residual
        waits = ~is_settled & (at.is_success | (smallest < torch.inf)) & (waited < MOST_WAITS)
        waited = torch.where(waits, waited + 1, 0.0)
        succeeds = is_settled & at.is_success & (beyond >= self.slack * size)
        smallest = torch.where(succeeds, torch.minimum(size, smallest), smallest)
        boundary = (size - beyond) / (1 - self.slack)
        shrunk = torch.clamp(boundary, radius * (1 - FASTEST * gamma), radius * (1 - gamma))
        grown = torch.where(smallest < torch.inf, radius * (1 + gamma), radius)
        adapted = torch.where(succeeds, torch.minimum(shrunk, smallest), grown)
        adapted = torch.minimum(adapted, torch.as_tensor(domain.radius).to(radius))
        radius = torch.where(waits, radius, adapted)
        step = domain.steepest(at.gradient, self.step_size * factor * radius, at.variable)
        moved = domain.with_radius(radius).project(at.variable + step)
        return where_rows(waits, at.variable, moved), (radius, smallest, waited)

    def length(self, progress: float) -> float:
        return Schedule.COSINE.factor(progress)
