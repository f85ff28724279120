"""`joint-apgd`: APGD inside the augmented iteration: steps that halve themselves, momentum, returns to the best point.

Source: Croce and Hein, ICML 2020 (the step); Gurumurthy et al., NeurIPS 2021 (the iteration).
"""

from __future__ import annotations

from pydantic import Field

from robustbench_deq.attacks.joint import JointAttack
from robustbench_deq.attacks.settings import JointConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import APGD
from robustbench_deq.protocol import ATTACKS, Batch, Proposal, Recorder


class JointAPGDConfig(JointConfig):
    steps: int = Field(64, ge=1, description="augmented iterations of the first run")
    rounds: int = Field(1, ge=1, description="runs, each twice as long, of samples on their way to being fooled")


@ATTACKS.register("joint-apgd")
class JointAPGD(JointAttack[JointAPGDConfig]):
    name = "joint-apgd"
    summary = "APGD inside the augmented fixed-point iteration"
    config_type = JointAPGDConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        step = APGD(self.config.step_size)
        return self.climb(model, batch, step, self.config.highest_loss(), record, step)
