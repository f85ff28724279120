"""`noise`: random points on the boundary of the ball, the sanity floor. Whatever beats it had better be an attack.

The highest loss over `restarts` draws is kept per sample.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.protocol import ATTACKS, Attack, ObjectiveConfig, Proposal, Recorder


class NoiseConfig(ObjectiveConfig):
    restarts: int = Field(10, ge=1, description="draws; the highest loss is kept per sample")
    random_start: Literal[True] = Field(True, description="always true: the draw is the attack")


@ATTACKS.register("noise")
class Noise(Attack[NoiseConfig]):
    name = "noise"
    summary = "random points on the boundary of the ball; the sanity floor"
    config_type = NoiseConfig
    is_gradient_based = False

    def run(
        self,
        model: EquilibriumModel,
        x: Tensor,
        y: Tensor,
        targets: Tensor | None,
        start: Tensor,
        record: Recorder,
    ) -> Proposal:
        record.plan(1)
        delta = self.threat.project(self.threat.epsilon * self.threat.direction(start), x)
        with torch.no_grad():
            loss = self.config.bind(y, targets)(model(x + delta))
        record(1, delta, loss)
        return Proposal(delta, loss)
