"""Fixed-point solvers, and the one loop that drives them.

A solver looks for `z* = f(z*)`. It is a step-wise object without a loop of its own:

    init(z)                    -> state        a tuple of tensors, batch first (empty for a memoryless method)
    step(fn, at, state)        -> (z', state)  from the iterate `at`, where the loop has evaluated fn
    restart(state, mask)       -> state        forget the history of the samples in `mask`

`Solve` owns everything else: it evaluates the map once a step, measures the relative residual

    r = ||f(z) - z||_2 / (||f(z)||_2 + 1e-8)

of every sample, freezes a sample that has converged, diverged or left the finite numbers, keeps the best iterate, drops
finished samples from the batch and counts steps. What a sample returns does not depend on its batch mates. Failure is
data (`Status`), not an exception.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.rows import per_sample
from robustbench_deq.shown import briefly_shown

DIVERGENCE_FACTOR = 1e6
"""A sample has diverged when `||f(z) - z||` exceeds its first value by this factor."""

State = tuple[Tensor, ...]


class Status(enum.IntEnum):
    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2
    NONFINITE = 3


class FixedPointMap(abc.ABC):
    """A map `z -> f(z)` over a batch that can be restricted to some of its samples."""

    @abc.abstractmethod
    def __call__(self, z: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def restrict(self, index: Tensor) -> FixedPointMap:
        """The same map for the samples `index` `(kept,)` of the batch."""

    @abc.abstractmethod
    def jvp(self, z: Tensor, tangent: Tensor) -> Tensor:
        """Jacobian-vector product `J_f(z) tangent`, same shape as `z`."""


class CellMap(FixedPointMap):
    """`z -> cell(z, u)` for an injection `u` that is fixed during the solve. Evaluated without a graph.

    Args:
        has_forward_mode: False where the cell is known to lack forward-mode derivatives; the first product finds out.
    """

    def __init__(self, cell: Callable[[Tensor, Tensor], Tensor], u: Tensor, has_forward_mode: bool = True) -> None:
        self.cell, self.u, self.has_forward_mode = cell, u, has_forward_mode

    def __call__(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self.cell(z, self.u)

    def restrict(self, index: Tensor) -> CellMap:
        return CellMap(self.cell, self.u.index_select(0, index), self.has_forward_mode)

    def jvp(self, z: Tensor, tangent: Tensor) -> Tensor:
        """By forward-mode differentiation, or, for a cell with operations that lack it, by central differences."""
        if self.has_forward_mode:
            try:
                with torch.no_grad():
                    return torch.func.jvp(lambda state: self.cell(state, self.u), (z,), (tangent,))[1]
            except RuntimeError:  # torch's NotImplementedError too; any other cause raises again below
                self.has_forward_mode = False
        return self._difference(z, tangent)

    def _difference(self, z: Tensor, tangent: Tensor) -> Tensor:
        """`(f(z + h v) - f(z - h v)) / (2 h)` along the unit vector v of each row, with the h that balances rounding
        against curvature."""
        size, length = (torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (z, tangent))
        h = torch.finfo(z.dtype).eps ** (1 / 3) * torch.where(size > 0, size, 1.0)
        step = tangent / per_sample(length.clamp_min(torch.finfo(z.dtype).tiny), z) * per_sample(h, z)
        return (self(z + step) - self(z - step)) * per_sample(length / (2 * h), z)


@briefly_shown
class Iterate(NamedTuple):
    """Where a solver takes a step, and how many it has taken.

    z, f        the state and its image, `(batch, ...)`
    g           f - z, `(batch, n)`
    size        `||g||_2`, `(batch,)`
    num_steps   steps before this one, the same for all samples
    """

    z: Tensor
    f: Tensor
    g: Tensor
    size: Tensor
    num_steps: int

    @classmethod
    def measure(cls, z: Tensor, f: Tensor, num_steps: int) -> Iterate:
        g = (f - z).flatten(1)
        return cls(z, f, g, torch.linalg.vector_norm(g, dim=1), num_steps)

    def relative_residual(self) -> Tensor:
        """`||f - z|| / (||f|| + 1e-8)`, `(batch,)`."""
        return self.size / (torch.linalg.vector_norm(self.f.flatten(1), dim=1) + 1e-8)

    def restrict(self, index: Tensor) -> Iterate:
        z, f, g, size = (part.index_select(0, index) for part in (self.z, self.f, self.g, self.size))
        return Iterate(z, f, g, size, self.num_steps)


@briefly_shown
class Solution(NamedTuple):
    """What a solve returns; all but `value` and `trace` are `(batch,)`.

    value       the iterate with the smallest residual, `(batch, ...)`
    status      a `Status` per sample
    residual    relative residual of `value`
    num_steps   map evaluations that the sample took part in until it was frozen
    trace       relative residual per step, `(steps, batch)`, NaN once frozen; None unless asked for
    """

    value: Tensor
    status: Tensor
    residual: Tensor
    num_steps: Tensor
    trace: Tensor | None = None

    @property
    def is_converged(self) -> Tensor:
        return self.status == Status.CONVERGED

    def require_converged(self) -> Solution:
        """This solution. Raises `RunError` unless every sample has converged."""
        failed = ~self.is_converged
        if bool(failed.any()):
            raise RunError(
                f"{int(failed.sum())} of {len(failed)} samples have no equilibrium "
                f"(largest relative residual {float(self.residual.max()):.2g})"
            )
        return self


class Solver(abc.ABC):
    """One step of a fixed-point method; see the module's docstring."""

    needs_jvp: ClassVar[bool] = False  # whether `step` asks the map for Jacobian-vector products

    @abc.abstractmethod
    def init(self, z: Tensor) -> State: ...

    @abc.abstractmethod
    def step(self, fn: FixedPointMap, at: Iterate, state: State) -> tuple[Tensor, State]: ...

    def restart(self, state: State, mask: Tensor) -> State:
        return state

    def _require(self, setting: str, is_good: bool, expected: str) -> None:
        """Raise `UsageError` unless a setting is good."""
        if not is_good:
            got = repr(getattr(self, setting))
            where = f"{type(self).__name__}({setting}=...)"
            raise UsageError.of(where, expected=expected, got=got, fix="leave it out for the default")


def residual_norms(z: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute and relative residual `||f - z||` and `||f - z|| / (||f|| + 1e-8)` per sample."""
    at = Iterate.measure(z, f, 0)
    return at.size, at.relative_residual()


@dataclass(frozen=True)
class Solve:
    """A solver with its stopping rule: call it as `solve(fn, z0)`.

    Args:
        solver: the step-wise method.
        rtol: a sample has converged when its relative residual is at most this.
        max_steps: map evaluations a sample may use.
        compact_below: the batch is compacted when at most this fraction of it is still active.
        check_every: steps between looks at whether anything is left to do (each look waits for the device).
        has_trace: record the residuals of every step.

    Raises:
        UsageError: for a tolerance or a number of steps that is not positive.
    """

    solver: Solver
    rtol: float = 1e-4
    max_steps: int = 100
    compact_below: float = 0.75
    check_every: int = 1
    has_trace: bool = False

    def __post_init__(self) -> None:
        if not self.rtol > 0:
            raise UsageError.of("tolerance", expected="a number > 0", got=self.rtol, fix="try 1e-3")
        if self.max_steps < 1:
            raise UsageError.of("max_steps", expected="an integer >= 1", got=self.max_steps, fix="try 50")

    def with_(self, **changes: Any) -> Solve:
        return replace(self, **changes)

    def __call__(self, fn: FixedPointMap, z0: Tensor) -> Solution:
        """Solve from `z0` `(batch, ...)`. One evaluation of `fn` a step."""
        batch, device = z0.shape[0], z0.device
        rows: Tensor | None = None  # rows of the full batch that the working batch holds; None: all of them
        full: tuple[Tensor, ...] = ()
        z, state = z0, self.solver.init(z0)
        best = z0
        best_residual = last_residual = torch.full((batch,), torch.inf, device=device, dtype=z0.dtype)
        steps = torch.zeros(batch, device=device, dtype=torch.int32)
        is_active = torch.ones(batch, device=device, dtype=torch.bool)
        is_whole = True  # whether all of the working batch is known to be active
        limit = None
        trace: list[Tensor] = []

        for count in range(1, self.max_steps + 1):
            at = Iterate.measure(z, fn(z), count - 1)
            residual = at.relative_residual()
            limit = DIVERGENCE_FACTOR * at.size + 1e-6 if limit is None else limit
            if self.has_trace:
                trace.append(_scatter_row(torch.where(is_active, residual, torch.nan), rows, batch))
            steps.masked_fill_(is_active, count)
            is_improved = residual < best_residual
            was_active, is_active = is_active, (residual > self.rtol) & (at.size < limit)  # a NaN compares false
            if not is_whole:
                is_improved, is_active = is_improved & was_active, is_active & was_active
            num_improved, num_active = -1, batch + 1  # unless one looks
            if count % self.check_every == 0:
                num_improved, num_active = torch.stack((is_improved, is_active)).sum(1).tolist()
            is_whole = num_active == len(z)
            if num_improved == len(z):
                best_residual = last_residual = residual
                best = z if z is not z0 else z0.clone()  # z0 is the caller's and is not handed back
            else:
                best_residual = torch.where(is_improved, residual, best_residual)
                last_residual = torch.where(was_active, residual, last_residual)
                best = torch.where(per_sample(is_improved, z), z, best)
            if count == self.max_steps or num_active == 0:
                break
            if num_active <= self.compact_below * len(z):
                full = _scatter(full, (best, best_residual, last_residual, steps, is_active), rows)
                keep = is_active.nonzero()[:, 0]
                rows = keep if rows is None else rows.index_select(0, keep)
                fn, at = fn.restrict(keep), at.restrict(keep)
                kept = (limit, best, best_residual, last_residual, steps, is_active, *state)
                limit, best, best_residual, last_residual, steps, is_active, *kept_state = (
                    part.index_select(0, keep) for part in kept
                )
                state, is_whole = tuple(kept_state), True
            z, state = self.solver.step(fn, at, state)

        if rows is not None:
            found = (best, best_residual, last_residual, steps, is_active)
            best, best_residual, last_residual, steps, is_active = _scatter(full, found, rows)
        status = self._status(is_active, last_residual)
        return Solution(best, status, best_residual, steps, torch.stack(trace) if trace else None)

    def _status(self, is_active: Tensor, last_residual: Tensor) -> Tensor:
        """A `Status` per sample, from the residual at which it was frozen."""
        failed = torch.where(last_residual < torch.inf, Status.DIVERGED, Status.NONFINITE)
        status = torch.where(last_residual <= self.rtol, Status.CONVERGED, failed)
        return torch.where(is_active, Status.MAX_STEPS, status).to(torch.int8)


def _scatter(full: tuple[Tensor, ...], found: tuple[Tensor, ...], rows: Tensor | None) -> tuple[Tensor, ...]:
    """`full` with its rows `rows` overwritten by `found`; a copy of `found` where it is all of them."""
    if rows is None:
        return tuple(part.clone() for part in found)
    return tuple(whole.index_copy_(0, rows, part) for whole, part in zip(full, found, strict=True))


def _scatter_row(row: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    if rows is None:
        return row
    return row.new_full((batch,), torch.nan).index_copy(0, rows, row)
