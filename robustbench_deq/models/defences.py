"""Test-time defences: wrappers around a trained DEQ that are attacked like any other model.

    EarlyState          reads out the n-th iterate of the plain iteration instead of the equilibrium
    StateEnsemble       reads out the mean of the iterates first, first + 1, ..., last
    EntropyReduction    moves the image to lower the entropy of the prediction before it is injected

The first two do not wait for an equilibrium: their state does not depend on the state they start from, so one cell
evaluation of the wrapper, which is `last` of the model's own, reaches it, and every gradient passes through all the
iterates that the prediction uses.

Departure: the third moves the image once, before the solve; the paper interleaves its moves with the solver's steps.

Source: Yang, Pang, Liu, "A closer look at the adversarial robustness of deep equilibrium models", NeurIPS 2022 (early
states, ensemble); Yang, Li, Pang, Liu, "Improving adversarial robustness of deep equilibrium models with explicit
regulations along the neural dynamics", ICML 2023 (input entropy reduction). BPDA: Athalye, Carlini, Wagner, ICML 2018.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.models.base import iterates
from robustbench_deq.optimise import (
    Ball,
    Intermediate,
    Last,
    Losses,
    Norm,
    Problem,
    ProjectedAscent,
    Schedule,
    optimise,
)


class Wrapped(EquilibriumModel):
    """A model that hands everything on to `model`; wrappers override a part of it."""

    def __init__(self, model: EquilibriumModel) -> None:
        super().__init__()
        self.model = model
        self.input_shape, self.num_classes = model.input_shape, model.num_classes
        self.solve, self.adjoint = model.solve, model.adjoint
        self.train(model.training)

    def inject(self, x: Tensor) -> Tensor:
        return self.model.inject(x)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return self.model.cell(z, u)

    def head(self, z: Tensor) -> Tensor:
        return self.model.head(z)

    def initial_state(self, u: Tensor) -> Tensor:
        return self.model.initial_state(u)


class StateEnsemble(Wrapped):
    """State as the model's: the mean of the iterates `first` to `last`, counted from 1.

    Raises:
        UsageError: unless `1 <= first <= last`.
    """

    is_explicit = True

    def __init__(self, model: EquilibriumModel, first: int, last: int) -> None:
        super().__init__(model)
        if not 1 <= first <= last:
            raise UsageError.of(
                "iterates", expected="1 <= first <= last", got=f"{first} and {last}", fix="count them from 1"
            )
        self.first, self.last = first, last

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        kept = list(iterates(self.model, u, self.last))[self.first - 1 :]
        return torch.stack(kept).mean(0)


class EarlyState(StateEnsemble):
    """An ensemble of one: the iterate `num_steps`."""

    def __init__(self, model: EquilibriumModel, num_steps: int) -> None:
        super().__init__(model, num_steps, num_steps)


class EntropyReduction(Wrapped):
    """`x <- x - step_size * sign(dH/dx)` within `radius` (Linf) and the pixel box, `num_steps` times, then the model.

    H is the entropy of the softmax at the iterate `num_states` of the plain iteration. Every injection costs
    `num_steps * num_states` evaluations of the cell and as many VJPs, which are counted.

    **Attacks see this defence by BPDA only.** The sign has no derivative, so the gradient with respect to the image is
    taken to be that at the moved image (BPDA with the identity). It ignores how the move depends on the image, and
    robust accuracy measured with it is an upper bound that an attack made for the defence may lower.

    Raises:
        UsageError: for steps or states below 1, or a step size or radius that is not positive.
    """

    def __init__(
        self,
        model: EquilibriumModel,
        num_steps: int = 5,
        step_size: float = 2 / 255,
        radius: float = 8 / 255,
        num_states: int = 8,
    ) -> None:
        super().__init__(model)
        if min(num_steps, num_states) < 1 or not min(step_size, radius) > 0:
            raise UsageError.of(
                "entropy reduction",
                expected="positive num_steps, num_states, step_size and radius",
                got=f"{num_steps}, {num_states}, {step_size:g} and {radius:g}",
                fix="correct them",
            )
        self.num_steps, self.step_size, self.radius, self.num_states = num_steps, step_size, radius, num_states

    def inject(self, x: Tensor) -> Tensor:
        return self.model.inject(x + (self._reduce(x.detach()) - x).detach())

    def _reduce(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False):  # the defence needs gradients whatever the caller does
            x = x.clone()
            found = optimise(
                _LowEntropy(self, x),
                Intermediate(self.num_states),
                Ball(Norm.LINF, self.radius, x),
                ProjectedAscent(self.step_size / self.radius, Schedule.CONSTANT),
                Last(),
                torch.zeros_like(x),
                num_steps=self.num_steps,
                settles=False,
            )
            return x + found.variable


@dataclass(frozen=True)
class _LowEntropy(Problem):
    """A shift of the images `x` that makes the prediction of the defended model more certain."""

    model: EntropyReduction
    x: Tensor

    def inject(self, variable: Tensor) -> Tensor:
        return self.model.model.inject(self.x + variable)

    def losses(self, output: Tensor, variable: Tensor, progress: float) -> Losses:
        log_p = output.log_softmax(1)
        log_p = log_p.masked_fill(log_p.isneginf(), 0.0)  # a masked class has no share in the entropy
        certainty = (log_p.exp() * log_p).sum(1)
        return Losses(certainty, certainty)

    def take(self, rows: Tensor) -> _LowEntropy:
        return replace(self, x=self.x[rows])
