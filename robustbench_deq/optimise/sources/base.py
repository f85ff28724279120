"""The interface of a source: it owns the state of the equilibrium, and looks at the problem once a step.

    start(problem, variable, settled)                       -> state
    look(problem, state, variable, moment)                  -> Look, state
    advance(problem, domain, state, look, variable, moved)  -> state, variable     once the step has moved the variable
    close(problem, state, variable)                         -> Look, state         the last variable, without a gradient
    take(problem, state, rows)                              -> state               of the rows that are left

A state is a NamedTuple of tensors, among them `z` and `mu` (None where the source has none); those of the equilibrium
have the rows of the state first, others the rows of the variable.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from robustbench_deq.optimise.contraction import Contraction
from robustbench_deq.optimise.domains import Domain
from robustbench_deq.optimise.problem import Problem
from robustbench_deq.shown import briefly_shown


class Moment(NamedTuple):
    """A step of a run: how many were before it, and how many there are. `length`: factor of the first step's length
    that the step to come has, where it follows a schedule."""

    number: int
    num_steps: int
    length: float = 1.0

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.number / self.num_steps


@briefly_shown
class Settled(NamedTuple):
    """An equilibrium that is known already, at the clean images; rows of the state first.

    z              the state
    mu             the adjoint of the loss that is ascended first; None where nobody has solved it
    amplification  the error of a state a unit of its residual, as seen from where a cold solve starts, one a row
    size           what residuals are relative to, one a row: the distance from where a cold solve starts, which does
                   not change with the origin of the coordinates; None: the size of the state itself
    contraction    of the cell there; None where nobody has estimated it
    """

    z: Tensor
    mu: Tensor | None
    amplification: Tensor
    size: Tensor | None = None
    contraction: Contraction | None = None

    def take(self, rows: Tensor) -> Settled:
        z, mu, amplification, size = (None if part is None else part[rows] for part in self[:4])
        assert z is not None and amplification is not None
        return Settled(z, mu, amplification, size, self.contraction and self.contraction.take(rows))


@briefly_shown
class Look(NamedTuple):
    """What a source sees at a variable; `output`, `f`, `mu` and `g` have the rows of the state, all else those of the
    variable.

    loss       by which iterates are compared, `(rows,)`
    residual   relative residual of the state, the worst where a row has several states, `(rows,)`
    output     readout of the state
    gradient   of the ascended loss with respect to the variable; None: the variable stays where it is
    is_moving  rows that may move, `(rows,)`; None: all
    trace      relative residuals on the way, `(steps, rows)`; None: `residual` alone
    f, mu, g   the next state, the adjoint and the next adjoint, of sources that keep them apart
    """

    loss: Tensor
    residual: Tensor
    output: Tensor
    gradient: Tensor | None = None
    is_moving: Tensor | None = None
    trace: Tensor | None = None
    f: Tensor | None = None
    mu: Tensor | None = None
    g: Tensor | None = None

    def take(self, problem: Problem, rows: Tensor) -> Look:
        """The same for the rows `rows` of the variable of `problem`, which is of all of them; without the trace."""
        kept = problem.state_rows(rows)
        gradient, is_moving = (None if part is None else part[rows] for part in (self.gradient, self.is_moving))
        f, mu, g = (None if part is None else part[kept] for part in (self.f, self.mu, self.g))
        return Look(self.loss[rows], self.residual[rows], self.output[kept], gradient, is_moving, None, f=f, mu=mu, g=g)


class Source(abc.ABC):
    """See the module's docstring. `check_every`: steps between looks at which rows are done; each waits for the
    device."""

    check_every: ClassVar[int] = 1

    @abc.abstractmethod
    def start(self, problem: Problem, variable: Tensor, settled: Settled | None) -> Any: ...

    @abc.abstractmethod
    def look(self, problem: Problem, state: Any, variable: Tensor, moment: Moment) -> tuple[Look, Any]: ...

    def advance(
        self, problem: Problem, domain: Domain, state: Any, look: Look, variable: Tensor, moved: Tensor
    ) -> tuple[Any, Tensor]:
        return state, moved

    @abc.abstractmethod
    def close(self, problem: Problem, state: Any, variable: Tensor) -> tuple[Look, Any]: ...

    @abc.abstractmethod
    def take(self, problem: Problem, state: Any, rows: Tensor) -> Any: ...

    def tally(self, problem: Problem, state: Any) -> dict[str, Tensor]:
        """Counts to be reported, `(rows of the variable,)` each."""
        return {}
