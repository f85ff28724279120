"""Records: what one run of one attack on one model measured, as a typed value.

Numbers that are not finite become null. Every field is described in `results/README.md`, which `benchmarks.schema`
writes from the classes here. A field that may be null can be added within a schema version: lines without it are read
as null. Any other change of the fields, of their meaning or of their unit is a new version.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, ValidationInfo, field_validator, model_validator

from robustbench_deq.configs import Config

SCHEMA_VERSION = 1
EXTERNAL = "external"
"""In place of an attack's name: images that somebody else made, see `evaluate.external`."""

# Strict: neither text nor a truth value is taken for a number.
Number = Annotated[float, Field(strict=True)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Amount = Annotated[float, Field(ge=0.0, strict=True)]


class Fields(BaseModel):
    """Base of a record and its parts. As strict as `Config`, and checked in pydantic's core, since files are long."""

    model_config = Config.model_config


SAMPLE_COLUMNS = {
    "sample_id": "number of the sample in its data set: the same in every record",
    "label": "true class",
    "clean_prediction": "class without an attack, from the judge's equilibrium",
    "clean_loss": "cross-entropy of the true class without an attack",
    "clean_residual": "relative residual of the judge's equilibrium without an attack",
    "adversarial_prediction": "class after the attack, from the judge's equilibrium",
    "adversarial_loss": "cross-entropy of the true class after the attack",
    "adversarial_residual": "relative residual of the judge's equilibrium after the attack",
    "perturbation": "norm of the perturbation, that of the threat, in pixel units",
    "is_clean_correct": "right without an attack, at an equilibrium",
    "is_attacked": "the attack tried; it leaves alone what is wrong without one, unless it goes for the loss",
    "is_converged": "the judge found both equilibria",
    "is_readable": "both logits name a class: no NaN, the largest finite (-infinity masks a class)",
    "is_failed": "the attack gave no finite perturbation, or one outside the ball",
    "is_robust": "right without an attack and after it, at equilibria, and the attack did not fail",
}
"""Columns of the per-sample rows that `evaluate` writes, and their meaning."""

STANDARD_COLUMNS = {
    "broken_by": "the stage of the standard evaluation that broke it; empty: none",
    "is_certified": "a certificate shows it robust; where the model has one",
}
"""More columns, of standard evaluations."""


class ThreatRecord(Fields):
    """The ball of allowed perturbations."""

    norm: str = Field(description='"l1", "l2" or "linf"')
    epsilon: Amount = Field(description="radius, in pixel units of [0, 1]")


class DataRecord(Fields):
    """The samples that were attacked."""

    name: str = Field(description="data set")
    split: str = Field(description='"test", "validation", "train", or "all" of an npz file')
    num_samples: Annotated[int, Field(ge=1, strict=True)] = Field(description="how many")
    digest: str = Field(description="of the images and labels themselves")


class CostRecord(Fields):
    """Means per sample, except time and memory, which are those of the whole attack (see `meter.Cost`)."""

    cell_evals: Amount = Field(description="evaluations of the cell, mean per sample")
    cell_vjps: Amount = Field(description="vector-Jacobian products through the cell, mean per sample")
    solver_steps: Amount = Field(description="iterations of all solves, mean per sample")
    wall_seconds: Amount = Field(description="of the attack alone, all samples together")
    peak_memory_mb: Amount | None = Field(description="during the attack: of the device, or of the process on a CPU")
    judge_seconds: Amount | None = Field(None, description="of the judge, all samples and snapshots together")


class CurvePoint(Fields):
    """What stopping after `step` would have given, and cost."""

    step: Count = Field(description="of the attack's own steps")
    cell_evals: Amount = Field(description="until then, mean per sample")
    cell_vjps: Amount = Field(description="until then, mean per sample")
    solver_steps: Amount = Field(description="until then, mean per sample")
    wall_seconds: Amount = Field(description="until then, all samples together")
    robust_accuracy: Fraction = Field(
        description="share of all samples not broken by then; robust at the end is robust before"
    )


class StageRecord(Fields):
    """A stage of a standard evaluation: one attack on the samples that those before have left robust."""

    name: str = Field(description="of the stage, see `docs/standard.md`")
    num_attacked: Count = Field(description="samples that were left to it")
    num_broken: Count = Field(description="of them, those that the judge confirmed broken")
    cell_evals: Amount = Field(description="evaluations of the cell, mean per sample of the record")
    cell_vjps: Amount = Field(description="vector-Jacobian products through the cell, mean per sample of the record")
    wall_seconds: Amount = Field(description="of the stage, all samples together")


class Record(Fields):
    """One attack on one model under one threat, on one set of samples.

    Accuracies are fractions of all samples. `residuals` holds the mean relative residual of the state after each solver
    step of the attack. Any NaN or infinity that is passed in becomes None, where the field allows it.
    """

    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION, strict=True)] = Field(
        SCHEMA_VERSION, description="of the fields of this table"
    )
    record_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the name of the samples' file")
    created: str = Field(description="ISO 8601, in UTC; of a suite's record, when its first shard was begun")
    model: str = Field(description="name in the registry, folder, or `file.py:function`")
    model_sha256: str | None = Field(description="of the weights; null for a model without a file of them")
    file_sha256: str | None = Field(None, description="of a `file.py:function` and what it imports from beside it")
    attack: str = Field(description='name in the registry; "external": images that somebody else made')
    label: str = Field(description="what tables and plots call the attack")
    attack_config: dict[str, JsonValue] = Field(
        description="every setting of the attack, and `targeted`; of external images, what is known of them"
    )
    threat: ThreatRecord
    data: DataRecord
    clean_accuracy: Fraction = Field(description="share of all samples that are right without an attack")
    robust_accuracy: Fraction = Field(description="share of all samples that are right without it and after it")
    robust_accuracy_ci: tuple[Fraction, Fraction] = Field(description="Wilson's 95 % interval, the lower end first")
    num_attacked: Count | None = Field(None, description="samples that the attack tried; null: all")
    adversarial_loss: Number | None = Field(
        description="mean cross-entropy of the attacked samples at their perturbed images, where finite"
    )
    num_unconverged: Count = Field(description="samples without an equilibrium; never robust")
    judge_max_steps: Count | None = Field(
        None,
        description="solver steps, 200 more on a slow cell, after which the judge calls an image unconverged",
    )
    num_failed: Count = Field(description="samples on which the attack failed; never robust")
    num_nonfinite: Count | None = Field(
        None, description="samples with NaN or infinite logits, unless masked; never robust; null: not counted"
    )
    num_lagging: Count | None = Field(
        None, description="samples whose state the attack has left behind its equilibrium; null: not looked at"
    )
    num_zero_gradient: Count | None = Field(
        None, description="samples on which the attack has met only gradients of zero or NaN; null: not looked at"
    )
    finished_by: Literal["joint", "sequential"] | None = Field(
        None, description="which source of gradients had the last word on some sample; null: the attack has one only"
    )
    max_perturbation: Amount | None = Field(description="the largest, in the threat's norm")
    cost: CostRecord = Field(description="of external images unknown: zeros, but for the judge")
    curve: list[CurvePoint] = Field(description="accuracy against cost, where snapshots were asked for")
    residuals: list[Amount | None] = Field(description="mean relative residual after each solver step of the attack")
    diagnostics: dict[str, Number | None] = Field(description="counts and means of the attack's own")
    protocol: str | None = Field(
        None, description='version and kind of the standard evaluation, such as "v1 standard"; null: of none'
    )
    stages: list[StageRecord] | None = Field(
        None, description="of a standard evaluation, in their order; null: another attack"
    )
    num_certified: Count | None = Field(
        None, description="samples that a certificate shows robust; few are attacked; null: there is none"
    )
    probes: dict[str, Number] | None = Field(
        None, description="what the sanity panel measured, see `records.flags`; null: no panel"
    )
    seed: Annotated[int, Field(strict=True)] = Field(description="of all randomness of the run")
    batch_size: Annotated[int, Field(ge=1, strict=True)] = Field(description="samples attacked at a time")
    environment: dict[str, str | int | float | None] = Field(description="versions, device, threads, commit")

    @property
    def is_external(self) -> bool:
        """Whether somebody else made the images, so that what they cost is unknown."""
        return self.attack == EXTERNAL

    @property
    def zero_gradient(self) -> str | None:
        """On how many attacked samples there was nothing to climb, in words; None: on none, or nobody has looked."""
        if not self.num_zero_gradient:
            return None
        num_attacked = self.data.num_samples if self.num_attacked is None else self.num_attacked
        return f"zero gradient on {self.num_zero_gradient} of {num_attacked} attacked samples"

    def __repr__(self) -> str:
        about = f"{self.model}, {self.label}, {self.threat.norm} {self.threat.epsilon:g}, {self.data.name}"
        found = f"clean {self.clean_accuracy:.1%}, robust {self.robust_accuracy:.1%} of {self.data.num_samples}"
        return f"Record({self.record_id}: {about}: {found})"

    __str__ = __repr__

    @model_validator(mode="before")
    @classmethod
    def _drop_nonfinite(cls, values: Any, info: ValidationInfo) -> Any:
        return values if info.mode == "json" else _finite(values)  # JSON has none, see `store._parse`

    @field_validator("created")
    @classmethod
    def _check_created(cls, text: str) -> str:
        try:
            offset = datetime.fromisoformat(text).utcoffset()
        except ValueError:
            offset = None
        if offset != timedelta(0):
            raise ValueError("an ISO 8601 time in UTC such as 2025-01-31T12:00:00+00:00")
        return text

    @field_validator("robust_accuracy_ci")
    @classmethod
    def _check_interval(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if interval[0] > interval[1]:
            raise ValueError("the lower end of the interval first")
        return interval


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def to_json(record: Record) -> dict[str, Any]:
    """The record as plain dictionaries, lists, strings and finite numbers."""
    return record.model_dump(mode="json")
