"""Damped Picard iteration: `z' = (1 - damping) z + damping f(z)`, damping in (0, 1]; 1 is the plain iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustbench_deq.solvers.base import FixedPointMap, Iterate, Solver, State


@dataclass(frozen=True)
class Picard(Solver):
    damping: float = 1.0

    def __post_init__(self) -> None:
        self._require("damping", 0 < self.damping <= 1, "a number in (0, 1]")

    def init(self, z: Tensor) -> State:
        return ()

    def step(self, fn: FixedPointMap, at: Iterate, state: State) -> tuple[Tensor, State]:
        return (at.f if self.damping == 1.0 else torch.lerp(at.z, at.f, self.damping)), state
