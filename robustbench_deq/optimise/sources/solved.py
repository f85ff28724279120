"""`Solved`: a forward and an adjoint solve for every gradient; the baseline.

    z_t  = solve(f(., u(d_t)))       from the last state (warm) or from the initial state (cold)
    g_t  = gradient of the loss through z_t, by the chosen adjoint; the implicit one may start from the last mu

Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, on a DEQ (Bai et al.,
2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.adjoints import Adjoint, AdjointTrace, Implicit
from robustbench_deq.optimise.problem import Problem
from robustbench_deq.optimise.sources.base import Look, Moment, Settled, Source
from robustbench_deq.solvers import Solution, Solve


class SolvedState(NamedTuple):
    """z, mu        the last state and adjoint; None before the first solve
    num_forward  forward solves of each row of the variable that did not converge
    num_adjoint  the same of its adjoint solves
    """

    z: Tensor | None
    mu: Tensor | None
    num_forward: Tensor
    num_adjoint: Tensor


@dataclass(frozen=True)
class Solved(Source):
    """A solve for every gradient.

    Args:
        forward: the equilibrium solve.
        adjoint: how the gradient passes the equilibrium.
        is_warm: start each solve from the last state and adjoint, and the first one from a known equilibrium.
    """

    forward: Solve
    adjoint: Adjoint
    is_warm: bool = True

    def start(self, problem: Problem, variable: Tensor, settled: Settled | None) -> SolvedState:
        z, mu = (settled.z, settled.mu) if settled is not None and self.is_warm else (None, None)
        none = torch.zeros(len(variable), dtype=torch.int32, device=variable.device)
        return SolvedState(z, mu, none, none)

    def look(self, problem: Problem, state: SolvedState, variable: Tensor, moment: Moment) -> tuple[Look, SolvedState]:
        trace = AdjointTrace()
        with torch.enable_grad():
            leaf = variable.detach().requires_grad_()
            solution, output = self._solve(problem, state, leaf, trace)
            losses = problem.losses(output, leaf, moment.progress)
            gradient = torch.autograd.grad(losses.ascended.sum(), leaf)[0]
        num_adjoint = state.num_adjoint
        if trace.solution is not None:
            num_adjoint = num_adjoint + _missed(problem, trace.solution)
        mu = trace.mu if self.is_warm else None
        state = SolvedState(solution.value.detach(), mu, state.num_forward + _missed(problem, solution), num_adjoint)
        return _look(problem, solution, output, losses.compared, gradient), state

    def close(self, problem: Problem, state: SolvedState, variable: Tensor) -> tuple[Look, SolvedState]:
        with torch.no_grad():
            solution, output = self._solve(problem, state, variable, None)
            loss = problem.losses(output, variable, 1.0).compared
        state = state._replace(z=solution.value, num_forward=state.num_forward + _missed(problem, solution))
        return _look(problem, solution, output, loss, None), state

    def take(self, problem: Problem, state: SolvedState, rows: Tensor) -> SolvedState:
        kept = problem.state_rows(rows)
        z, mu = (None if part is None else part[kept] for part in (state.z, state.mu))
        return SolvedState(z, mu, state.num_forward[rows], state.num_adjoint[rows])

    def tally(self, problem: Problem, state: SolvedState) -> dict[str, Tensor]:
        return {
            "unconverged_forward_solves": state.num_forward,
            "unconverged_adjoint_solves": state.num_adjoint,
        }

    def _solve(
        self, problem: Problem, state: SolvedState, variable: Tensor, trace: AdjointTrace | None
    ) -> tuple[Solution, Tensor]:
        adjoint, z0 = self.adjoint, state.z if self.is_warm else None
        if self.is_warm and isinstance(adjoint, Implicit):
            adjoint = adjoint.warm_started(state.mu)
        u = problem.inject(variable)
        solution = problem.model.settle(u, z0, solve=self.forward, adjoint=adjoint, trace=trace)
        return solution, problem.model.head(solution.value)


def _look(problem: Problem, solution: Solution, output: Tensor, loss: Tensor, gradient: Tensor | None) -> Look:
    trace = solution.trace
    if trace is not None:
        trace = torch.stack([problem.worst(row) for row in trace])
    return Look(loss.detach(), problem.worst(solution.residual), output.detach(), gradient, trace=trace)


def _missed(problem: Problem, solution: Solution) -> Tensor:
    """Rows of the variable whose solve did not converge, `(rows,)`."""
    return problem.worst((~solution.is_converged).to(solution.residual.dtype)) > 0
