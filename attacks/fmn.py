"""`fmn`: the smallest perturbation that fools, within epsilon, with a forward and an adjoint solve per gradient step.

As `joint-fmn`, which says what that is good for, without a state that lags. What is kept lies at the boundary, where a
loose solve shows successes that are none: hence a tighter one than elsewhere.

Source: Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints", NeurIPS 2021.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from robustbench_deq.attacks.pgd import SolvedAttack
from robustbench_deq.attacks.settings import SolvedConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import MinimalNorm, SmallestNorm
from robustbench_deq.protocol import ATTACKS, Batch, Proposal, Recorder


class FMNConfig(SolvedConfig):
    objective: Literal["margin"] = Field("margin", description="always margin: positive where a sample is fooled")
    steps: int = Field(100, ge=1, description="gradient steps")
    step_size: float = Field(0.5, gt=0, le=1e6, description="first step as a fraction of the radius")
    tolerance: float = Field(1e-4, gt=0, description="relative residual of the forward solve")


@ATTACKS.register("fmn")
class FMN(SolvedAttack[FMNConfig]):
    name = "fmn"
    summary = "the smallest perturbation that fools, with a forward and an adjoint solve per gradient step"
    config_type = FMNConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config = self.config
        step = MinimalNorm(config.step_size, trusted_residual=config.tolerance)
        keep = SmallestNorm(config.tolerance, last_residual=config.tolerance)
        return self.climb(model, replace(batch, leaves=False), step, record, keep)
