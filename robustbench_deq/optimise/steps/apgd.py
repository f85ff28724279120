"""APGD: projected ascent with momentum whose step length is halved, row by row, when it brings too little.

    y = Project(d + eta s(g)),      d' = Project(d + 0.75 (y - d) + 0.25 (d - d_prev)),      s: a step of length radius

At the checkpoints `w_j = ceil(p_j N)`, `p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)`, eta is halved and
the row goes back to its best point (with the gradient seen there) when either

    1. fewer than 0.75 of the steps since the last checkpoint raised the loss, or
    2. eta was not halved at the last checkpoint, and the highest loss has not risen since.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020, Algorithm 1. Departures: a row that goes back has no momentum in its next step; the best point is
one that was seen at a state of small residual, as the highest loss of a state on its way means nothing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.optimise.domains import Domain
from robustbench_deq.optimise.problem import where_rows
from robustbench_deq.optimise.steps.base import At, Step
from robustbench_deq.solvers.base import State

SHARE_OF_RISES = 0.75
PULL = 0.75


@dataclass(frozen=True)
class APGD(Step):
    """State: `(previous, best, gradient at best, best loss, last loss, eta, rises, best loss at the last checkpoint,
    whether it was halved there)`.

    Args:
        step_size: first step as a fraction of the domain's radius.
        trusted_residual: the largest relative residual of a state whose loss counts for the best point.
    """

    step_size: float = 2.0
    trusted_residual: float = 0.05

    def init(self, variable: Tensor, domain: Domain) -> State:
        low = variable.new_full((len(variable),), -torch.inf)
        eta = low.new_full((len(variable),), self.step_size) * domain.radius
        is_halved = torch.ones(len(variable), dtype=torch.bool, device=variable.device)
        return variable, variable, torch.zeros_like(variable), low, low, eta, torch.zeros_like(low), low, is_halved

    def step(self, at: At, domain: Domain, state: State) -> tuple[Tensor, State]:
        previous, best, best_gradient, best_loss, last_loss, eta, rises, checked, is_halved = state
        count, num_steps = at.moment.number, at.moment.num_steps
        rises = rises + (at.loss > last_loss)
        is_better = (at.loss > best_loss) & (at.residual <= self.trusted_residual)
        best = where_rows(is_better, at.variable, best)
        best_gradient = where_rows(is_better, at.gradient, best_gradient)
        best_loss = torch.where(is_better, at.loss, best_loss)
        variable, gradient, last_loss = at.variable, at.gradient, at.loss
        marks = checkpoints(num_steps)
        if count in marks:
            since = count - max((mark for mark in marks if mark < count), default=0)
            is_slow = rises < SHARE_OF_RISES * since
            is_stuck = ~is_halved & (best_loss <= checked)
            goes_back = (is_slow | is_stuck) & (best_loss > -torch.inf)
            eta = torch.where(is_slow | is_stuck, eta / 2, eta)
            variable = where_rows(goes_back, best, variable)
            gradient = where_rows(goes_back, best_gradient, gradient)
            previous = where_rows(goes_back, best, previous)
            last_loss = torch.where(goes_back, best_loss, last_loss)
            rises, checked, is_halved = torch.zeros_like(rises), best_loss, is_slow | is_stuck
        moved = domain.project(variable + domain.steepest(gradient, eta, variable))
        if count:
            moved = domain.project(variable + PULL * (moved - variable) + (1 - PULL) * (variable - previous))
        return moved, (variable, best, best_gradient, best_loss, last_loss, eta, rises, checked, is_halved)


@functools.lru_cache(maxsize=64)
def checkpoints(num_steps: int) -> tuple[int, ...]:
    """The steps before which a run of `num_steps` is looked at."""
    before, share, marks = 0.0, 0.22, []
    while share < 1.0:
        marks.append(math.ceil(share * num_steps))
        before, share = share, share + max(share - before - 0.03, 0.06)
    return tuple(dict.fromkeys(mark for mark in marks if 0 < mark < num_steps))
