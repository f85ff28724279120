"""Settings that attacks have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor

from robustbench_deq.configs import Config, named_in
from robustbench_deq.optimise import OBJECTIVES, Objective, Targeted, Toward


class RunConfig(Config):
    """What every call of an attack is told besides its samples."""

    seed: int = Field(0, ge=0, description="of all randomness, which is keyed by the samples' ids too")
    num_snapshots: int = Field(0, ge=0, description="points of the accuracy-against-cost curve")


class AttackConfig(Config):
    """Settings that every attack has."""

    restarts: int = Field(1, ge=1, description="runs; the highest loss is kept per sample")
    random_start: bool = Field(False, description="start in a random point of the ball (later restarts always do)")
    stop_at_success: bool = Field(
        True,
        description="fooled samples leave, misclassified ones stay out; false: all go for the highest loss",
    )
    max_evaluations: float | None = Field(
        None, gt=0, description="cell evaluations per sample, mean of the batch; the best within is returned"
    )
    max_seconds: float | None = Field(
        None, gt=0, description="seconds per sample, likewise; what comes out depends on the machine"
    )


class ObjectiveConfig(AttackConfig):
    """Settings of attacks that maximise a loss."""

    objective: Annotated[str, named_in(OBJECTIVES)] = Field(
        "ce-then-margin", description="cross-entropy, margin, dlr or ce-then-margin"
    )
    heading: int | None = Field(
        None, ge=1, description="raise the lead of this wrong class, ranked by the clean logits from 1; null: of any"
    )

    @model_validator(mode="after")
    def _check_heading(self) -> ObjectiveConfig:
        if self.heading is not None and self.objective != type(self).model_fields["objective"].default:
            raise ValueError(f"no objective with heading={self.heading}, which does not use it")
        return self

    def bind(self, labels: Tensor, targets: Tensor | None, headings: Tensor | None = None) -> Objective:
        """The objective for the true classes, or for reaching `targets` where they are given; with `headings` the lead
        of those classes, whatever the objective."""
        if headings is not None and targets is None:
            return Toward(labels, headings)
        kind = OBJECTIVES.get(self.objective)
        return kind(labels) if targets is None else Targeted(kind(targets))
