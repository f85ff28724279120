"""Which iterate of the variable is returned.

    init(variable)                                                -> Kept
    offer(kept, problem, domain, variable, look, count, is_last)  -> Kept

A state on its way may show a loss that its equilibrium does not have: a loss counts only where the residual is small.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from robustbench_deq.optimise.domains import Ball, Domain
from robustbench_deq.optimise.problem import Problem, where_rows
from robustbench_deq.optimise.sources.base import Look
from robustbench_deq.optimise.steps.minimal_norm import SLACK
from robustbench_deq.shown import briefly_shown
from robustbench_deq.solvers.base import residual_norms


@briefly_shown
class Kept(NamedTuple):
    """The variable that would be returned, its loss (minus infinity: none was trusted), and what else the rule compares
    by; rows first."""

    variable: Tensor
    loss: Tensor
    score: Tensor

    def take(self, rows: Tensor) -> Kept:
        return Kept(*(part[rows] for part in self))


class Keep(abc.ABC):
    """A rule; see the module's docstring. `sees_last`: whether the last variable, looked at without a gradient, is
    offered too."""

    sees_last: ClassVar[bool] = True

    def init(self, variable: Tensor) -> Kept:
        low = variable.new_full((len(variable),), -torch.inf)
        return Kept(variable, low, -low)

    @abc.abstractmethod
    def offer(
        self, kept: Kept, problem: Problem, domain: Domain, variable: Tensor, look: Look, count: int, is_last: bool
    ) -> Kept: ...


@dataclass(frozen=True)
class Last(Keep):
    """The newest."""

    def offer(
        self, kept: Kept, problem: Problem, domain: Domain, variable: Tensor, look: Look, count: int, is_last: bool
    ) -> Kept:
        return Kept(variable, look.loss, kept.score)


@dataclass(frozen=True)
class HighestLoss(Keep):
    """The highest loss among those whose state follows its equilibrium.

    Until a row has one it keeps the newest variable with a finite residual, so that something is returned, at a loss of
    minus infinity.

    Args:
        trusted_residual: the largest relative residual at which a loss counts.
        last_residual: the same for the last iterate, whose state has settled most.
    """

    trusted_residual: float
    last_residual: float

    def offer(
        self, kept: Kept, problem: Problem, domain: Domain, variable: Tensor, look: Look, count: int, is_last: bool
    ) -> Kept:
        is_trusted = look.residual <= (self.last_residual if is_last else self.trusted_residual)
        loss = torch.where(is_trusted, look.loss, -torch.inf)
        takes = (loss >= kept.loss) & (look.residual < torch.inf)
        return Kept(where_rows(takes, variable, kept.variable), torch.where(takes, loss, kept.loss), kept.score)


@dataclass(frozen=True)
class JIIORule(Keep):
    """The published rule: always for the first 10 steps; then when the joint residual of state and adjoint falls, or
    when the loss rises while that residual is below 1.3 times the best. It knows no look at the last variable."""

    sees_last: ClassVar[bool] = False

    def offer(
        self, kept: Kept, problem: Problem, domain: Domain, variable: Tensor, look: Look, count: int, is_last: bool
    ) -> Kept:
        assert look.mu is not None and look.g is not None
        joint = look.residual + problem.worst(residual_norms(look.mu, look.g)[1])
        takes = (joint < kept.score) | ((look.loss > kept.loss) & (joint < 1.3 * kept.score))
        takes = takes | (count < 10)
        score = torch.where(takes, joint, kept.score)
        takes = takes & (look.residual < torch.inf)
        variable = where_rows(takes, variable, kept.variable)
        return Kept(variable, torch.where(takes, look.loss, kept.loss), score)


@dataclass(frozen=True)
class SmallestNorm(Keep):
    """The success of the smallest norm; a row that has none keeps its highest trusted loss.

    The smallest of many norms is one that lies on the boundary as a state on its way shows it, and often on the wrong
    side of the true one. A success therefore counts when it is beyond the linearised boundary by a share of its norm,
    `loss >= slack ||d|| ||g||_*`; looks without a gradient show none.

    Args:
        trusted_residual, last_residual: as those of `HighestLoss`.
        slack: the share.
    """

    trusted_residual: float
    last_residual: float
    slack: float = SLACK

    def offer(
        self, kept: Kept, problem: Problem, domain: Domain, variable: Tensor, look: Look, count: int, is_last: bool
    ) -> Kept:
        assert isinstance(domain, Ball)
        is_trusted = look.residual <= (self.last_residual if is_last else self.trusted_residual)
        size = torch.full_like(look.loss, torch.inf)
        if look.gradient is not None:
            own = domain.norm.size(variable)
            is_beyond = look.loss >= self.slack * own * domain.norm.dual_size(look.gradient)
            size = torch.where(problem.is_success(look.output) & is_trusted & is_beyond, own, size)
        loss = torch.where(is_trusted, look.loss, -torch.inf)
        has_none = torch.isinf(kept.score)
        takes = (size < kept.score) | (has_none & (loss >= kept.loss) & (look.residual < torch.inf))
        return Kept(
            where_rows(takes, variable, kept.variable),
            torch.where(takes, loss, kept.loss),
            torch.minimum(size, kept.score),
        )
