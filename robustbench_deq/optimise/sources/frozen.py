"""`Frozen`: a forward and an adjoint solve once in n looks; between them state and adjoint stand still.

    look 0 of n    z = solve(f(., u(d))),  mu = J_z^T mu + dL/dz     the gradient of `Solved`
    the others     gradient of <mu, f(z, u(d))> with respect to d, with this z and mu: one evaluation, one product

The first factor of the gradient, mu, is kept and the second, df/dd, is that of the present variable: it differs from
look to look unless the cell is linear in the injection and the injection in the variable.

Source: Zhang, Zhang, Lu, Zhu, Dong, "You only propagate once", NeurIPS 2019, whose first layer is here the cell's
dependence on the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.optimise.problem import Problem
from robustbench_deq.optimise.sources.base import Look, Moment, Settled, Source
from robustbench_deq.optimise.sources.solved import Solved, SolvedState
from robustbench_deq.solvers import Solve
from robustbench_deq.solvers.base import residual_norms


@dataclass(frozen=True)
class Frozen(Source):
    """A solve for every few gradients. Its state is that of `Solved`.

    Args:
        forward: the equilibrium solve.
        backward: the adjoint solve.
        num_looks: n, looks a solve; at least 1.
    """

    forward: Solve
    backward: Solve
    num_looks: int

    @property
    def _solved(self) -> Solved:
        return Solved(self.forward, Implicit(self.backward))

    def start(self, problem: Problem, variable: Tensor, settled: Settled | None) -> SolvedState:
        return self._solved.start(problem, variable, settled)

    def look(self, problem: Problem, state: SolvedState, variable: Tensor, moment: Moment) -> tuple[Look, SolvedState]:
        if moment.number % self.num_looks == 0:
            return self._solved.look(problem, state, variable, moment)
        model, z, mu = problem.model, state.z, state.mu
        assert z is not None and mu is not None
        with torch.enable_grad():
            leaf = variable.detach().requires_grad_()
            f = model.evaluate(z, problem.inject(leaf))
            gradient = torch.autograd.grad(f, leaf, mu)[0]
            with torch.no_grad():
                output = model.head(f)
            losses = problem.losses(output, leaf, moment.progress)
            if losses.ascended.requires_grad:  # it may depend on the variable itself
                gradient = gradient + torch.autograd.grad(losses.ascended.sum(), leaf)[0]
        model.count_steps(len(f))
        residual = problem.worst(residual_norms(z, f.detach())[1])
        return Look(losses.compared.detach(), residual, output, gradient), state

    def close(self, problem: Problem, state: SolvedState, variable: Tensor) -> tuple[Look, SolvedState]:
        return self._solved.close(problem, state, variable)

    def take(self, problem: Problem, state: SolvedState, rows: Tensor) -> SolvedState:
        return self._solved.take(problem, state, rows)

    def tally(self, problem: Problem, state: SolvedState) -> dict[str, Tensor]:
        return self._solved.tally(problem, state)
