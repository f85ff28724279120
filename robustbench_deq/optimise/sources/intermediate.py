"""`Intermediate`: the gradient of an intermediate state, by automatic differentiation through the plain iteration.

    z_0 = initial_state(u(d)),    z_{i+1} = f(z_i, u(d)),    gradient of the loss of z_k by the chain rule

It is exact for the network that stops after k evaluations, and nears that of the equilibrium as k grows.

Source: Yang, Pang, Liu, "A closer look at the adversarial robustness of deep equilibrium models", NeurIPS 2022, which
attacks intermediate states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.optimise.problem import Problem
from robustbench_deq.optimise.sources.base import Look, Moment, Settled, Source
from robustbench_deq.solvers.base import residual_norms


class IntermediateState(NamedTuple):
    """z: the last state, None before the first look. mu: no adjoint is kept."""

    z: Tensor | None = None
    mu: None = None


@dataclass(frozen=True)
class Intermediate(Source):
    """num_states: k, evaluations of the cell for every look, from the initial state; at least 1."""

    num_states: int

    def start(self, problem: Problem, variable: Tensor, settled: Settled | None) -> IntermediateState:
        return IntermediateState()

    def look(
        self, problem: Problem, state: IntermediateState, variable: Tensor, moment: Moment
    ) -> tuple[Look, IntermediateState]:
        with torch.enable_grad():
            leaf = variable.detach().requires_grad_()
            look, state, loss = self._unrolled(problem, leaf, moment.progress)
            gradient = torch.autograd.grad(loss.sum(), leaf)[0]
        return look._replace(gradient=gradient), state

    def close(self, problem: Problem, state: IntermediateState, variable: Tensor) -> tuple[Look, IntermediateState]:
        with torch.no_grad():
            look, state, _ = self._unrolled(problem, variable, 1.0)
        return look, state

    def take(self, problem: Problem, state: IntermediateState, rows: Tensor) -> IntermediateState:
        return state if state.z is None else IntermediateState(state.z[problem.state_rows(rows)])

    def _unrolled(self, problem: Problem, variable: Tensor, progress: float) -> tuple[Look, IntermediateState, Tensor]:
        model = problem.model
        u = problem.inject(variable)
        z = f = model.initial_state(u)
        for _ in range(self.num_states):
            z, f = f, model.evaluate(f, u)
        model.count_steps(self.num_states * len(f))
        output = model.head(f)
        losses = problem.losses(output, variable, progress)
        residual = problem.worst(residual_norms(z.detach(), f.detach())[1])
        return Look(losses.compared.detach(), residual, output.detach()), IntermediateState(f.detach()), losses.ascended
