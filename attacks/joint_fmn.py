"""`joint-fmn`: the smallest perturbation that fools, searched for inside the augmented iteration and within epsilon.

A sample that is fooled by less than epsilon is as little robust as one that takes all of it; what this adds is by how
much, in the column `perturbation` of the records' samples. Samples therefore do not leave when they are fooled. Near
the boundary a state that lags shows successes that are none, and the smallest norm picks just these: hence three inner
iterations, and less trust than elsewhere.

Source: Pintor et al., NeurIPS 2021 (the step); Gurumurthy et al., NeurIPS 2021 (the iteration).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from robustbench_deq.attacks.joint import JointAttack
from robustbench_deq.attacks.settings import JointConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import MinimalNorm, SmallestNorm
from robustbench_deq.protocol import ATTACKS, Batch, Proposal, Recorder


class JointFMNConfig(JointConfig):
    objective: Literal["margin"] = Field("margin", description="always margin: positive where a sample is fooled")
    steps: int = Field(100, ge=1, description="augmented iterations")
    inner_steps: int | None = Field(3, ge=1, description="iterations of (z, mu) per perturbation step; null adapts")
    step_size: float = Field(0.5, gt=0, le=1e6, description="first step as a fraction of the radius")
    keep_residual: float = Field(0.001, gt=0, description="residual up to which a success is trusted")


@ATTACKS.register("joint-fmn")
class JointFMN(JointAttack[JointFMNConfig]):
    name = "joint-fmn"
    summary = "the smallest perturbation that fools, inside the augmented iteration"
    config_type = JointFMNConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config = self.config
        step = MinimalNorm(config.step_size, trusted_residual=config.keep_residual)
        keep = SmallestNorm(config.keep_residual, config.failure_residual)
        return self.climb(model, replace(batch, leaves=False), step, keep, record, step)
