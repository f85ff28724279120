"""APGD: projected ascent with momentum whose step length is halved, row by row, when it brings too little.

    y = Project(d + eta s(g)),      d' = Project(d + 0.75 (y - d) + 0.25 (d - d_prev)),      s: a step of length radius

At the checkpoints `w_j = ceil(p_j N)`, `p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)` (or, where a row
waits at one of them, in its next step), eta is halved and the row goes back to its best point (with the gradient seen
there) when either

    1. fewer than 0.75 of the steps since the last checkpoint raised the loss, or
    2. eta was not halved at the last checkpoint, and the highest loss has not risen since.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020, Algorithm 1. Departures: a row that goes back has no momentum in its next step; the best point is
one that was seen at a state of small residual, as the highest loss of a state on its way means nothing.
"""

from __future__ import annotations

import bisect
import functools
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
    """State: `(previous, best, gradient at best, best loss, last loss, eta, steps and rises since the last checkpoint,
    checkpoints passed, best loss at the last one, whether eta was halved there)`.

    Args:
        step_size: first step as a fraction of the domain's radius.
        trusted_residual: the largest relative residual of a state whose loss counts for the best point.
    """

    step_size: float = 2.0
    trusted_residual: float = 0.05

    def init(self, variable: Tensor, domain: Domain) -> State:
        low = variable.new_full((len(variable),), -torch.inf)
        none = torch.zeros_like(low)
        eta = low.new_full((len(variable),), self.step_size) * domain.radius
        is_halved = torch.ones(len(variable), dtype=torch.bool, device=variable.device)
        nothing = torch.zeros_like(variable)
        return variable, variable, nothing, low, low, eta, none, none, none, low, is_halved

    def step(self, at: At, domain: Domain, state: State) -> tuple[Tensor, State]:
        previous, best, best_gradient, best_loss, last_loss, eta, steps, rises, passed, checked, is_halved = state
        is_first = torch.isneginf(last_loss)
        steps, rises = steps + ~is_first, rises + (~is_first & (at.loss > last_loss))
        is_better = (at.loss > best_loss) & (at.residual <= self.trusted_residual)
        best = where_rows(is_better, at.variable, best)
        best_gradient = where_rows(is_better, at.gradient, best_gradient)
        best_loss = torch.where(is_better, at.loss, best_loss)
        variable, gradient, last_loss = at.variable, at.gradient, at.loss
        num_due = bisect.bisect_right(checkpoints(at.moment.num_steps), at.moment.number)
        if num_due:
            is_due = passed < num_due
            is_slow = rises < SHARE_OF_RISES * steps
            is_stuck = ~is_halved & (best_loss <= checked)
            halves = is_due & (is_slow | is_stuck)
            goes_back = halves & (best_loss > -torch.inf)
            eta = torch.where(halves, eta / 2, eta)
            variable = where_rows(goes_back, best, variable)
            gradient = where_rows(goes_back, best_gradient, gradient)
            previous = where_rows(goes_back, best, previous)
            last_loss = torch.where(goes_back, best_loss, last_loss)
            steps, rises = steps.masked_fill(is_due, 0.0), rises.masked_fill(is_due, 0.0)
            checked, is_halved = torch.where(is_due, best_loss, checked), torch.where(is_due, halves, is_halved)
            passed = passed.masked_fill(is_due, num_due)
        moved = domain.project(variable + domain.steepest(gradient, eta, variable))
        pulled = domain.project(variable + PULL * (moved - variable) + (1 - PULL) * (variable - previous))
        moved = where_rows(is_first, moved, pulled)
        after = (variable, best, best_gradient, best_loss, last_loss, eta, steps, rises, passed, checked, is_halved)
        return moved, after


@functools.lru_cache(maxsize=64)
def checkpoints(num_steps: int) -> tuple[int, ...]:
    """The steps before which a run of `num_steps` is looked at."""
    before, percent, marks = 0, 22, []  # whole percents: 0.41 + 0.16 is above 0.57
    while percent < 100:
        marks.append(-(-percent * num_steps // 100))
        before, percent = percent, percent + max(percent - before - 3, 6)
    return tuple(dict.fromkeys(mark for mark in marks if 0 < mark < num_steps))
