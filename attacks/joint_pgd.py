"""`joint-pgd`: PGD whose perturbation steps run inside the augmented fixed-point iteration.

The state, the adjoint and the perturbation advance together (`optimise.Joint`); a step costs one evaluation of the cell
and one vector-Jacobian product, where PGD solves two fixed points.

Source: Gurumurthy, Bai, Manchester, Kolter, NeurIPS 2021. Departures: projection after mixing, the pixel box,
per-sample acceptance, the adjoint's start, and the ladder.
"""

from __future__ import annotations

import enum
from typing import Any

from pydantic import Field, model_validator

from robustbench_deq.attacks.joint import JointAttack, full_ascent
from robustbench_deq.attacks.settings import AdjointStart, JointConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.optimise import JIIORule, Keep, Last, Mixing, ProjectedAscent, Schedule
from robustbench_deq.protocol import ATTACKS, Batch, Proposal, Recorder


class Preset(enum.Enum):
    DEFAULT = "default"
    JIIO_2021 = "jiio-2021"


class KeepRule(enum.Enum):
    """Which iterate is returned; see `optimise.keep`."""

    LOSS = "loss"
    JIIO = "jiio"
    LAST = "last"


JIIO_2021 = {
    "objective": "cross-entropy",
    "steps": 80,
    "rounds": 1,
    "inner_steps": 1,
    "step_size": 0.6,
    "schedule": Schedule.DROP,
    "damping_z": 0.8,
    "damping_mu": 0.6,
    "accelerator": "anderson-1",
    "history_size": 20,
    "mixing": Mixing.ALL,
    "keep": KeepRule.JIIO,
    "warmup_steps": 0,
    "adjoint_start": AdjointStart.ZERO,
}
"""The published settings for MNIST: `step_size` 0.6 falls to 0.2 after 5/8 of the steps; all variables start at 0."""


class JointPGDConfig(JointConfig):
    """Settings of `joint-pgd`; `preset=jiio-2021` gives the published ones, and other keys override it."""

    preset: Preset = Field(Preset.DEFAULT, description="default or jiio-2021")
    schedule: Schedule = Field(Schedule.COSINE, description="cosine, constant or drop")
    momentum: float = Field(0.0, ge=0, lt=1, description="of the perturbation's direction")
    keep: KeepRule = Field(KeepRule.LOSS, description="which iterate is returned: loss, jiio or last")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("preset") in (Preset.JIIO_2021, Preset.JIIO_2021.value):
            return {**JIIO_2021, **values}
        return values

    def defaults(self) -> dict[str, Any]:
        return super().defaults() | (JIIO_2021 if self.preset is Preset.JIIO_2021 else {})

    def unused(self) -> dict[str, tuple[str, ...]]:
        names = ("keep_residual",) if self.keep is not KeepRule.LOSS else ()
        return super().unused() | {f"keep={self.keep.value}": names}

    def rule(self) -> Keep:
        return {KeepRule.LOSS: self.highest_loss, KeepRule.JIIO: JIIORule, KeepRule.LAST: Last}[self.keep]()


@ATTACKS.register("joint-pgd")
class JointPGD(JointAttack[JointPGDConfig]):
    name = "joint-pgd"
    summary = "PGD inside the augmented fixed-point iteration (JIIO)"
    config_type = JointPGDConfig

    def run(self, model: EquilibriumModel, batch: Batch, record: Recorder) -> Proposal:
        config = self.config
        step = ProjectedAscent(config.step_size, config.schedule, config.momentum)
        return self.climb(model, batch, step, config.rule(), record, full_ascent())
