"""What a batch has so far, and snapshots of it on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robustbench_deq.meter import Meter
from robustbench_deq.optimise import Ball
from robustbench_deq.protocol.batch import Proposal
from robustbench_deq.rows import per_sample
from robustbench_deq.shown import briefly_shown


@briefly_shown
@dataclass(frozen=True)
class Snapshot:
    """The perturbation that would be returned after `step`, with what it had cost until then (means per sample)."""

    step: int
    delta: Tensor
    cell_evals: float
    cell_vjps: float
    solver_steps: float
    wall_seconds: float


class Best(NamedTuple):
    """The best perturbation of every sample of the batch so far; a loss of NaN is beaten by any."""

    delta: Tensor
    loss: Tensor

    def merged(self, rows: Tensor | None, delta: Tensor, loss: Tensor, is_done: Tensor | None = None) -> Best:
        """With what a run on `rows` has found, where that is better; None is all rows.

        Samples that are done win: they are fooled, and a higher loss of an earlier run need not mean that.
        """
        mine = self if rows is None else Best(self.delta[rows], self.loss[rows])
        wins = (loss > mine.loss) | torch.isnan(mine.loss)
        wins = wins if is_done is None else wins | is_done
        delta = torch.where(per_sample(wins, delta), delta, mine.delta)
        loss = torch.where(wins, loss, mine.loss)
        if rows is None:
            return Best(delta, loss)
        return Best(self.delta.index_copy(0, rows, delta), self.loss.index_copy(0, rows, loss))


class Recorder:
    """Takes snapshots at a few steps that are fixed beforehand, so that memory does not grow with the steps.

    Args:
        progress: told after each step what share of the work is done, and the stage of a cascade; "" of none.
    """

    def __init__(
        self, meter: Meter, ball: Ball, num_snapshots: int, progress: Callable[[float, str], None] | None = None
    ) -> None:
        self._meter, self._ball, self.num_snapshots, self._progress = meter, ball, num_snapshots, progress
        self._num_steps = 0
        self._before, self._share, self._stage = 0.0, 1.0, ""
        self.snapshots: list[Snapshot] = []
        self._residuals: list[Tensor] = []
        self._wanted: set[int] = set()
        self._last = self._offset = self._seen = 0
        self._rows: Tensor | None = None
        self._best = Best(torch.zeros_like(ball.x), ball.x.new_zeros(len(ball.x)))

    @property
    def residuals(self) -> tuple[float, ...]:
        return tuple(float(value) for value in self._residuals)

    def begin(self, rows: Tensor | None, best: Best) -> None:
        """A run on `rows` of the batch (None: all) begins, beside what is best so far."""
        self._rows, self._best, self._offset = rows, best, self._offset + self._last
        self._wanted, self._last, self._seen = set(), 0, 0

    def within(self, before: float, share: float, stage: str) -> None:
        """The runs to come are those of `stage`: what share of the work is before them, and what share they are."""
        self._before, self._share, self._stage = before, share, stage

    def plan(self, num_steps: int) -> None:
        """Called by the attack: spread the snapshots over the `num_steps` steps of this run."""
        self._num_steps = num_steps
        count = min(self.num_snapshots, num_steps)
        self._wanted = {round(num_steps * (i + 1) / count) for i in range(count)}
        self._last = num_steps if count else 0

    def watch(self, step: int, present: Callable[[], tuple[Tensor, Tensor]], residual: Tensor) -> None:
        """The watcher of `optimise`. The last step is left to the protocol: an attack may still change its result."""
        if self.num_snapshots:
            self._residuals.extend(residual.view(-1, residual.shape[-1]).nanmean(1))
        self._seen = step
        if self._progress is not None and self._num_steps:
            self._progress(self._before + self._share * min(1.0, step / self._num_steps), self._stage)
        if step in self._wanted and step < self._last:
            self._take(step, *present())

    def end(self, proposal: Proposal, is_stopped: bool) -> None:
        """The run has ended with `proposal`, or its budget has ended it after the last step that was seen."""
        if is_stopped:
            self._last = min(self._last, self._seen)
        if self._last and (not self.snapshots or self.snapshots[-1].step < self._last + self._offset):
            self._take(self._last, proposal.delta, proposal.loss, proposal.is_done)

    def _take(self, step: int, delta: Tensor, loss: Tensor, is_done: Tensor | None = None) -> None:
        delta, rows, meter = self._best.merged(self._rows, delta, loss, is_done).delta, len(self._ball.x), self._meter
        self.snapshots.append(
            Snapshot(
                step=step + self._offset,
                delta=self._ball.project(delta),
                cell_evals=meter.eval_rows / rows,
                cell_vjps=meter.vjp_rows / rows,
                solver_steps=meter.num_steps / rows,
                wall_seconds=meter.elapsed_seconds,
            )
        )
