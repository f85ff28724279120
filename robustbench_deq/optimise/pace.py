"""When the adaptive mode of the joint iteration lets a row's variable move.

A step of the variable leaves the state behind its equilibrium. The residual seen right after the first step, over that
step's length, tells how far one step throws the state off. From then on the variable waits until the residual is at
most what `max_lag` steps of the present length would leave: a fast cell is never held back (k = 1), a slow one gets the
inner iterations it needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class PaceState(NamedTuple):
    """Per row `(rows,)`: residual a unit of step length (NaN: not known yet), looks since the last move, and whether
    it has ever moved; and the length of the last step, a factor of the first one."""

    per_length: Tensor
    num_looks: Tensor
    has_moved: Tensor
    last_length: float


@dataclass(frozen=True)
class AdaptivePace:
    """max_lag: steps of the variable that the state may be behind. max_inner_steps: the longest a row waits."""

    max_lag: float = 4.0
    max_inner_steps: int = 20

    def init(self, rows: int, like: Tensor) -> PaceState:
        return PaceState(
            like.new_full((rows,), torch.nan),
            torch.zeros(rows, dtype=torch.int32, device=like.device),
            torch.zeros(rows, dtype=torch.bool, device=like.device),
            1.0,
        )

    def decide(self, state: PaceState, residual: Tensor, length: float) -> tuple[Tensor, PaceState]:
        """Rows that may move now, given the absolute residuals `(rows,)` and the length of the step to come."""
        fresh = residual / state.last_length
        per_length = torch.where(state.has_moved & torch.isnan(state.per_length), fresh, state.per_length)
        num_looks = state.num_looks + 1
        ready = (residual <= self.max_lag * per_length * length) | (num_looks >= self.max_inner_steps)
        ready = ready | torch.isnan(per_length)  # nothing has moved yet
        return ready, PaceState(per_length, torch.where(ready, 0, num_looks), state.has_moved, length)

    def note(self, state: PaceState, displacement: Tensor) -> PaceState:
        """Take note of how far the rows `(rows, ...)` have just moved."""
        return state._replace(has_moved=state.has_moved | (displacement.flatten(1) != 0).any(1))
