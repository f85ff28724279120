"""How a gradient passes an equilibrium `z* = f(z*, u)`: an object handed to the solve, not a flag in it.

For a loss L of z*, with `v = dL/dz*` and `J = df/dz` at z*, every kind returns `mu^T df/d(u, parameters)` for its own
mu:

    Implicit      mu = J^T mu + v, solved to a tolerance of its own (implicit function theorem)
    Neumann(k)    mu = sum_{i<k} (J^T)^i v
    Phantom(k)    backpropagation through k damped steps from z*; `JacobianFree` is k = 1 without damping: mu = v
    Unrolled(k)   backpropagation through all k steps from where the solve starts; the reference for tests

Sign convention, here and in `joint`: mu is the plain derivative of the loss by a shift of the equilibrium equation's
right-hand side, so `dL/du = (df/du)^T mu` without a minus.

Sources: Bai, Kolter, Koltun, NeurIPS 2019, Theorem 1 (implicit); Geng, Zhang, Bai, Wang, Lin, NeurIPS 2021 (phantom,
Neumann); Fung et al., AAAI 2022 (Jacobian-free).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from robustbench_deq.registry import Registry
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import Anderson, Cell, CellMap, FixedPointMap, Picard, Solution, Solve

DEFAULT_ADJOINT_SOLVE = Solve(Anderson(), rtol=1e-4, max_steps=100)


@dataclass
class AdjointTrace:
    """Filled in by the backward pass: the adjoint `mu` `(batch, ...)` and the solve that found it (None if none
    ran)."""

    mu: Tensor | None = None
    solution: Solution | None = None


class AdjointMap(FixedPointMap):
    """`mu -> J^T mu + v` on one graph of the cell at `(z, u)`; one vector-Jacobian product a call."""

    def __init__(
        self, model: Cell, z: Tensor, u: Tensor, v: Tensor, graph: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.model, self.z, self.u, self.v = model, z, u, v
        if graph is None:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                graph = (model.evaluate(leaf, u.detach()), leaf)
        self.f, self.leaf = graph

    def transpose(self, mu: Tensor) -> Tensor:
        """`J^T mu`."""
        if not self.f.requires_grad:  # a cell may ignore its state
            return torch.zeros_like(mu)
        return torch.autograd.grad(self.f, self.leaf, mu, retain_graph=True, materialize_grads=True)[0]

    def __call__(self, mu: Tensor) -> Tensor:
        return self.transpose(mu) + self.v

    def restrict(self, index: Tensor) -> AdjointMap:
        z, u, v = (part.index_select(0, index) for part in (self.z, self.u, self.v))
        return AdjointMap(self.model, z, u, v)

    def jvp(self, z: Tensor, tangent: Tensor) -> Tensor:
        return self.transpose(tangent)


class _AttachAdjoint(torch.autograd.Function):
    """Identity on `f(z*, u)` whose backward replaces the incoming `v` by the adjoint `mu`."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, adjoint_of: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint_of = adjoint_of
        return f.view_as(f)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        return ctx.adjoint_of(v), None


class Adjoint(abc.ABC):
    """A way to differentiate an equilibrium."""

    def solve(self, model: Cell, u: Tensor, z0: Tensor, forward: Solve, trace: AdjointTrace) -> tuple[Solution, Tensor]:
        """Solve from `z0` and return the solution and a state that carries gradients to `u` and the parameters."""
        solution = forward(CellMap(model.evaluate, u.detach()), z0)
        model.report(solution)
        return solution, self.attach(model, solution.value, u, trace)

    @abc.abstractmethod
    def attach(self, model: Cell, z: Tensor, u: Tensor, trace: AdjointTrace) -> Tensor:
        """A state that carries gradients to `u` and the parameters: the value of one more evaluation at `z`, or, of
        `Phantom` and `Unrolled`, that of their steps from `z`."""


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Implicit differentiation.

    Args:
        backward: solver and stopping rule of the adjoint solve.
        mu0: where the adjoint starts, `(batch, ...)`; None starts at `v`, so that even the first iterate is the
            Jacobian-free gradient and a failed solve never returns zero.
        fits_start: `mu0` belongs to another loss, whose gradient may be larger or smaller: it is multiplied, row by
            row, by what leaves the least residual. Costs one product, and saves several solver steps.
    """

    backward: Solve = DEFAULT_ADJOINT_SOLVE
    mu0: Tensor | None = field(default=None, repr=False, compare=False)
    fits_start: bool = False

    def warm_started(self, mu0: Tensor | None) -> Implicit:
        return replace(self, mu0=mu0)

    def attach(self, model: Cell, z: Tensor, u: Tensor, trace: AdjointTrace) -> Tensor:
        leaf = z.detach().requires_grad_()
        f = model.evaluate(leaf, u)

        def adjoint_of(v: Tensor) -> Tensor:
            scale = per_sample(seed_scale(v), v)
            step = AdjointMap(model, leaf, u, v / scale, graph=(f, leaf))
            solution = self.backward(step, self._start(step, scale))
            solution = solution._replace(value=solution.value * scale)
            model.report(solution)
            trace.mu, trace.solution = solution.value, solution
            return solution.value

        return _AttachAdjoint.apply(f, adjoint_of)

    def _start(self, step: AdjointMap, scale: Tensor) -> Tensor:
        """Of the equation of `step`, which is that of `v / scale`."""
        if self.mu0 is None:
            return step.v
        mu0 = self.mu0 / scale
        if not self.fits_start:
            return mu0
        image = mu0 - step.transpose(mu0)
        factor = (step.v * image).flatten(1).sum(1) / image.square().flatten(1).sum(1)
        factor = per_sample(factor, step.v)
        return torch.where(torch.isfinite(factor), factor * mu0, step.v)


def seed_scale(v: Tensor) -> Tensor:
    """Powers of two `(batch,)` by which rows of ordinary size come: 1 for these, so that no bit of them changes. The
    squares of others would overflow, and residuals below 1e-8 count as none."""
    exponent = torch.frexp(v.detach().flatten(1).abs().amax(1)).exponent.clamp(-100, 100)
    return torch.exp2((exponent - exponent.clamp(-20, 40)).to(v.dtype))


@dataclass(frozen=True)
class Neumann(Adjoint):
    """`num_terms` terms of the Neumann series: `num_terms - 1` Picard steps of the adjoint equation from `mu = v`."""

    num_terms: int = 10

    def attach(self, model: Cell, z: Tensor, u: Tensor, trace: AdjointTrace) -> Tensor:
        leaf = z.detach().requires_grad_()
        f = model.evaluate(leaf, u)

        def adjoint_of(v: Tensor) -> Tensor:
            step, mu = AdjointMap(model, leaf, u, v, graph=(f, leaf)), v
            for _ in range(self.num_terms - 1):
                mu = step(mu)
            trace.mu = mu
            return mu

        return _AttachAdjoint.apply(f, adjoint_of)


@dataclass(frozen=True)
class Phantom(Adjoint):
    """`num_steps` damped steps `w <- (1 - damping) w + damping f(w, u)` from z*, backpropagated."""

    num_steps: int = 5
    damping: float = 0.5

    def attach(self, model: Cell, z: Tensor, u: Tensor, trace: AdjointTrace) -> Tensor:
        w = z.detach()
        for _ in range(self.num_steps):
            f = model.evaluate(w, u)
            w = f if self.damping == 1.0 else torch.lerp(w, f, self.damping)
        return w


def jacobian_free() -> Phantom:
    return Phantom(num_steps=1, damping=1.0)


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagation through `num_steps` damped steps, which take the place of the solve and start where it would.
    Memory grows with the steps."""

    num_steps: int = 50
    damping: float = 1.0

    def solve(self, model: Cell, u: Tensor, z0: Tensor, forward: Solve, trace: AdjointTrace) -> tuple[Solution, Tensor]:
        z = Phantom(self.num_steps, self.damping).attach(model, z0, u, trace)
        check = Solve(Picard(), rtol=forward.rtol, max_steps=1)(CellMap(model.evaluate, u.detach()), z.detach())
        model.report(check._replace(num_steps=check.num_steps + self.num_steps))
        return check._replace(num_steps=torch.full_like(check.num_steps, self.num_steps)), z

    def attach(self, model: Cell, z: Tensor, u: Tensor, trace: AdjointTrace) -> Tensor:
        return Phantom(self.num_steps, self.damping).attach(model, z, u, trace)


ADJOINTS: Registry[Callable[..., Adjoint]] = Registry("adjoint")
"""Names to functions of the adjoint's own `Solve`, which only the implicit kind uses; of the number of terms or steps,
which only neumann, phantom and unrolled use; and of the damping, which only the last two use (None is their
default)."""
ADJOINTS.register("implicit")(lambda backward, num_steps=None, damping=None: Implicit(backward))
ADJOINTS.register("neumann")(lambda backward, num_steps=None, damping=None: Neumann(num_steps or Neumann.num_terms))
ADJOINTS.register("phantom")(
    lambda backward, num_steps=None, damping=None: Phantom(num_steps or Phantom.num_steps, damping or Phantom.damping)
)
ADJOINTS.register("jacobian-free")(lambda backward, num_steps=None, damping=None: jacobian_free())
ADJOINTS.register("unrolled")(
    lambda backward, num_steps=None, damping=None: Unrolled(
        num_steps or Unrolled.num_steps, damping or Unrolled.damping
    )
)
