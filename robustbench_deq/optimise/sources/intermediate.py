"""`Intermediate`: gradients of states that the plain iteration passes on its way, by automatic differentiation.

    z_0 = initial_state(u(d)),   z_{i+1} = f(z_i, u(d));   from z_i:   w_0 = z_i,   w_{j+1} = (1-s) w_j + s f(w_j, u(d))

The gradient is that of the sum over the states i of the loss at the readout of `w_K`; z_i for i > 0 is taken to be
fixed. With the one state i = 0 and s = 1 it is exact for the network that stops after K evaluations, and nears that of
the equilibrium as K grows.

Source: Yang, Pang, Liu, "A closer look at the adversarial robustness of deep equilibrium models", NeurIPS 2022, section
4 (unrolled intermediates, and their ensemble). Departures: w_0 is z_i itself, so that K counts all evaluations that the
gradient passes; the losses are summed, not the readouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.optimise.problem import Problem
from robustbench_deq.optimise.sources.base import Look, Moment, Settled, Source
from robustbench_deq.solvers import CellMap, Solve
from robustbench_deq.solvers.base import residual_norms


class IntermediateState(NamedTuple):
    """z: the last state, None where nothing is known. mu: no adjoint is kept."""

    z: Tensor | None = None
    mu: None = None


@dataclass(frozen=True)
class Intermediate(Source):
    """The gradient of one state, or of several.

    Args:
        num_steps: K, evaluations of the cell that the gradient passes, from every state; at least 1.
        states: i, whose losses are summed; none twice.
        damping: s of these evaluations, above 0 and at most 1.
        forward: solves for the equilibrium from the last one, and the loss that is compared, the readout and the
            residual are those of the equilibrium. None: they are those of the last w_K, and nothing is solved.
    """

    num_steps: int
    states: tuple[int, ...] = (0,)
    damping: float = 1.0
    forward: Solve | None = None

    def start(self, problem: Problem, variable: Tensor, settled: Settled | None) -> IntermediateState:
        return IntermediateState(None if settled is None or self.forward is None else settled.z)

    def look(
        self, problem: Problem, state: IntermediateState, variable: Tensor, moment: Moment
    ) -> tuple[Look, IntermediateState]:
        with torch.enable_grad():
            leaf = variable.detach().requires_grad_()
            u, gradient = problem.inject(leaf), torch.zeros_like(leaf)
            look, last = None, None
            for z in self._reached(problem, u):
                look, last, loss = self._unrolled(problem, z, u, leaf, moment.progress)
                gradient = gradient + torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0]
        assert look is not None and last is not None
        if self.forward is not None:
            look, last = self._settled(problem, self.forward, state, u.detach(), variable)
        return look._replace(gradient=gradient), IntermediateState(last)

    @torch.no_grad()
    def close(self, problem: Problem, state: IntermediateState, variable: Tensor) -> tuple[Look, IntermediateState]:
        u = problem.inject(variable)
        if self.forward is not None:
            look, last = self._settled(problem, self.forward, state, u, variable)
        else:
            *_, z = self._reached(problem, u)
            look, last, _ = self._unrolled(problem, z, u, variable, 1.0)
        return look, IntermediateState(last)

    def take(self, problem: Problem, state: IntermediateState, rows: Tensor) -> IntermediateState:
        return state if state.z is None else IntermediateState(state.z[problem.state_rows(rows)])

    def _reached(self, problem: Problem, u: Tensor) -> list[Tensor]:
        """The states in their order; only the initial one has a graph."""
        model = problem.model
        reached = [model.initial_state(u)]
        with torch.no_grad():
            for _ in range(max(self.states)):
                reached.append(model.evaluate(reached[-1].detach(), u.detach()))
        model.count_steps(max(self.states) * len(u))
        return [reached[number] for number in sorted(self.states)]

    def _unrolled(
        self, problem: Problem, z: Tensor, u: Tensor, variable: Tensor, progress: float
    ) -> tuple[Look, Tensor, Tensor]:
        """The look at the last state after `z`, that state, and the losses that are ascended."""
        model, before, w = problem.model, z, z
        for _ in range(self.num_steps):
            before, f = w, model.evaluate(w, u)
            w = f if self.damping == 1.0 else torch.lerp(w, f, self.damping)
        model.count_steps(self.num_steps * len(w))
        output = model.head(w)
        losses = problem.losses(output, variable, progress)
        residual = problem.worst(residual_norms(before.detach(), f.detach())[1])
        return Look(losses.compared.detach(), residual, output.detach()), w.detach(), losses.ascended

    @staticmethod
    @torch.no_grad()
    def _settled(
        problem: Problem, forward: Solve, state: IntermediateState, u: Tensor, variable: Tensor
    ) -> tuple[Look, Tensor]:
        model = problem.model
        solution = forward(CellMap(model.evaluate, u), model.initial_state(u) if state.z is None else state.z)
        model.report(solution)
        output = model.head(solution.value)
        loss = problem.losses(output, variable, 1.0).compared
        return Look(loss, problem.worst(solution.residual), output), solution.value
