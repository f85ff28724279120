"""`noise`: random points on the boundary of the ball, the sanity floor. Whatever beats it had better be an attack.

The highest loss over `restarts` draws is kept per sample.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.protocol import ATTACKS, Attack, Batch, ObjectiveConfig, Proposal, Recorder


class NoiseConfig(ObjectiveConfig):
    restarts: int = Field(10, ge=1, description="draws; the highest loss is kept per sample")
    heading: None = Field(None, description="always null: a draw heads for no class")
    random_start: Literal[True] = Field(True, description="always true: the draw is the attack")


@ATTACKS.register("noise")
class Noise(Attack[NoiseConfig]):
    name = "noise"
    summary = "random points on the boundary of the ball; the sanity floor"
    config_type = NoiseConfig
    is_gradient_based = False

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        record.plan(1)
        ball = self.threat.ball(batch.images)
        delta = ball.project(ball.radius * ball.direction(batch.start))
        with torch.no_grad():
            solution = model.equilibrium(batch.images + delta)
            logits = model.head(solution.value)
        objective = self.config.bind(batch.labels, batch.targets)
        is_done = objective.is_reached(logits) & solution.is_converged if batch.leaves else None
        return Proposal(delta, objective(logits), is_done)
