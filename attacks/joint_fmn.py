"""`joint-fmn`: the smallest perturbation that fools, searched for inside the augmented iteration and within epsilon.

A sample that is fooled by less than epsilon is as little robust as one that takes all of it; what this adds is by how
much, in the column `perturbation` of the records' samples. Samples therefore do not leave when they are fooled.

Source: Pintor et al., NeurIPS 2021 (the step); Gurumurthy et al., NeurIPS 2021 (the iteration).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from robustbench_deq.attacks.ladder import JointAttack
from robustbench_deq.attacks.settings import JointConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import MinimalNorm, SmallestNorm
from robustbench_deq.protocol import ATTACKS, Batch, Proposal, Recorder


class JointFMNConfig(JointConfig):
    objective: Literal["margin"] = Field("margin", description="always margin: positive where a sample is fooled")
    steps: int = Field(100, ge=1, description="augmented iterations")
    step_size: float = Field(1.0, gt=0, description="first step as a fraction of epsilon")


@ATTACKS.register("joint-fmn")
class JointFMN(JointAttack[JointFMNConfig]):
    name = "joint-fmn"
    summary = "the smallest perturbation that fools, inside the augmented iteration"
    config_type = JointFMNConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config = self.config
        step, keep = MinimalNorm(config.step_size), SmallestNorm(config.keep_residual, config.failure_residual)
        return self.climb(model, replace(batch, leaves=False), step, keep, record, step)
