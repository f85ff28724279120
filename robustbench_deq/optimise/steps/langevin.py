"""Proximal Langevin dynamics:

    d <- Project(d + rate clip(g, -clip, clip) + noise xi),      xi ~ N(0, I), keyed by (seed, row's number, step)

With `noise = 0` it is ascent; with `clip = inf` the raw gradient is taken.

Source: Yang and Ji, "JEM++: improved techniques for training JEM", ICCV 2021, Eqs. 6-8 (proximal SGLD).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.optimise.domains import Domain
from robustbench_deq.optimise.steps.base import At, Step
from robustbench_deq.randomness import keyed_normal
from robustbench_deq.solvers.base import State


@dataclass(frozen=True)
class Langevin(Step):
    """rate, noise: in units of the variable; clip: largest entry of the gradient that counts."""

    rate: float
    noise: float = 0.0
    clip: float = math.inf

    def init(self, variable: Tensor, domain: Domain) -> State:
        return ()

    def step(self, at: At, domain: Domain, state: State) -> tuple[Tensor, State]:
        gradient = at.gradient if math.isinf(self.clip) else at.gradient.clamp(-self.clip, self.clip)
        moved = torch.add(at.variable, gradient, alpha=self.rate)
        if self.noise:
            ids = torch.arange(len(moved), device=moved.device) if at.ids is None else at.ids
            moved.add_(keyed_normal(moved, at.seed, ids, at.moment.number), alpha=self.noise)
        return domain.project(moved), state
