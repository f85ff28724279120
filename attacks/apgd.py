"""`apgd`: projected ascent whose steps halve themselves, with a forward and an adjoint solve per gradient step.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020, Algorithm 1.
"""

from __future__ import annotations

from pydantic import Field

from robustbench_deq.attacks.pgd import SolvedAttack
from robustbench_deq.attacks.settings import SolvedConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import APGD as APGDStep
from robustbench_deq.protocol import ATTACKS, Batch, Proposal, Recorder


class SolvedAPGDConfig(SolvedConfig):
    """Settings of `apgd`; the first step is two radii long, as published."""

    steps: int = Field(100, ge=1, description="gradient steps")
    step_size: float = Field(2.0, gt=0, le=1e6, description="first step as a fraction of epsilon")


@ATTACKS.register("apgd")
class SolvedAPGD(SolvedAttack[SolvedAPGDConfig]):
    name = "apgd"
    summary = "APGD with a forward and an adjoint solve per gradient step"
    config_type = SolvedAPGDConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        return self.climb(model, batch, APGDStep(self.config.step_size), record)
