"""The cost meter: what an attack spends, counted where it is spent.

A metered model counts the rows (samples) of every cell evaluation and of every backward pass through a cell, whoever
asked for them: our own solvers, `autograd`, or a foreign attack. A batch that shrinks therefore costs less. Counting
reads shapes only; it never waits for the device.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from robustbench_deq.peak_memory import peak_memory_mb, reset_peak_memory
from robustbench_deq.solvers import Solution


class Metered(Protocol):
    """A model that tells the meter it holds of all that it does. `EquilibriumModel` is one."""

    meter: Meter | None

    def parameters(self) -> Iterator[Tensor]: ...

    def buffers(self) -> Iterator[Tensor]: ...


class BudgetSpent(Exception):
    """Refuses the evaluation of the cell that would go beyond a meter's budget."""


@dataclass(frozen=True)
class Cost:
    """Means per sample, except time and memory, which are those of the whole call.

    cell_evals, cell_vjps   evaluations of the cell and vector-Jacobian products through it
    solver_steps            iterations of all solves (forward, adjoint, joint)
    wall_seconds            of the attack alone
    peak_memory_mb          on the device; on the CPU the peak resident size of the process during the attack
    """

    cell_evals: float
    cell_vjps: float
    solver_steps: float
    wall_seconds: float
    peak_memory_mb: float

    def since(self, before: Cost) -> Cost:
        """What has been spent since, of the same samples; the peak is that of all."""
        return Cost(
            cell_evals=self.cell_evals - before.cell_evals,
            cell_vjps=self.cell_vjps - before.cell_vjps,
            solver_steps=self.solver_steps - before.solver_steps,
            wall_seconds=self.wall_seconds - before.wall_seconds,
            peak_memory_mb=self.peak_memory_mb,
        )


@dataclass
class Meter:
    """Context manager that counts while it is open: `with Meter(model) as meter: ...`. Meters nest.

    Args:
        model: asks it before every evaluation of its cell, and tells it of everything.
        max_rows: rows that the cell may be evaluated on; None: any number.
        max_seconds: that it may be open, pauses excluded.

    Attributes:
        is_spent: whether the budget has refused an evaluation.
    """

    model: Metered
    max_rows: float | None = None
    max_seconds: float | None = None
    eval_rows: int = 0
    vjp_rows: int = 0
    _step_counts: list[Tensor | int] = field(default_factory=list)
    _start: float = 0.0
    is_spent: bool = False
    _paused: float = 0.0
    _seconds: float | None = None

    def __enter__(self) -> Meter:
        self._outer = self.model.meter
        self.model.meter = self
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        self._device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        if self._outer is None:
            reset_peak_memory(self._device)
        self._start = self.now()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._seconds = self.elapsed_seconds
        self.model.meter = self._outer

    def now(self) -> float:
        """Seconds on a monotonic clock, once the device has caught up."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @property
    def elapsed_seconds(self) -> float:
        """Since the meter was opened, until it was closed. For snapshots, which are few; waits for the device."""
        return self.now() - self._start - self._paused if self._seconds is None else self._seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is not counted and takes no time, here; an outer meter counts it."""
        began, self.model.meter = self.now(), self._outer
        try:
            yield
        finally:
            self.model.meter = self
            self._paused += self.now() - began

    def admit(self, rows: int) -> None:
        """Called by the model before every evaluation of its cell on `rows` rows.

        Raises:
            BudgetSpent: when it would exceed the budget; nothing of it has been counted then.
        """
        beyond = self.max_rows is not None and self.eval_rows + rows > self.max_rows
        if beyond or (self.max_seconds is not None and self._elapsed_on_the_host() > self.max_seconds):
            self.is_spent = True
            raise BudgetSpent
        if self._outer is not None:
            self._outer.admit(rows)

    @property
    def has_budget(self) -> bool:
        return self.max_rows is not None or self.max_seconds is not None

    @property
    def num_steps(self) -> int:
        """Iterations of all solves up to now, summed over samples. Waits for the device."""
        total = sum(int(count) for count in self._step_counts)
        self._step_counts = [total]
        return total

    def _elapsed_on_the_host(self) -> float:
        """Without waiting for the device."""
        return time.perf_counter() - self._start - self._paused

    def count_cell(self, output: Tensor) -> None:
        """Called by the model for every evaluation of its cell."""
        self.eval_rows += len(output)
        if output.requires_grad:
            output.register_hook(self._count_vjp)  # type: ignore[no-untyped-call]  # torch has no type for it
        if self._outer is not None:
            self._outer.count_cell(output)

    def _count_vjp(self, gradient: Tensor) -> None:
        self.vjp_rows += len(gradient)

    def count_solve(self, solution: Solution) -> None:
        """Called by the model for every finished solve."""
        self._step_counts.append(solution.num_steps.sum())
        if self._outer is not None:
            self._outer.count_solve(solution)

    def count_steps(self, rows: int) -> None:
        """Iterations that are not a `Solve`: the joint iteration adds `batch` a step."""
        self._step_counts.append(rows)
        if self._outer is not None:
            self._outer.count_steps(rows)

    def cost(self, num_samples: int) -> Cost:
        """Totals over `num_samples` samples, so far where the meter is still open."""
        return Cost(
            cell_evals=self.eval_rows / num_samples,
            cell_vjps=self.vjp_rows / num_samples,
            solver_steps=self.num_steps / num_samples,
            wall_seconds=self.elapsed_seconds,
            peak_memory_mb=peak_memory_mb(self._device),
        )
