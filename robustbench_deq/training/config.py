"""The typed schema of a training run: what `configs/training/*.yaml` may hold."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from robustbench_deq.configs import Config, named_in, parse_fraction
from robustbench_deq.solvers import SOLVERS, Solve


class ModelSpec(Config):
    family: str = Field(description="a registered model family")
    config: dict[str, Any] = Field(default_factory=dict, description="the family's own settings")


class ThreatSpec(Config):
    norm: str = "l2"
    epsilon: float = Field(1.0, ge=0)

    @field_validator("epsilon", mode="before")
    @classmethod
    def _fraction(cls, value: object) -> object:
        return parse_fraction(value) if isinstance(value, str) else value


class AttackSpec(Config):
    """An attack by name, with its own settings."""

    name: str = "joint-pgd"
    threat: ThreatSpec = ThreatSpec()
    config: dict[str, Any] = Field(default_factory=dict)


class SolveSpec(Config):
    solver: Annotated[str, named_in(SOLVERS)] = "anderson"
    tolerance: float = Field(1e-3, gt=0)
    max_steps: int = Field(40, ge=1)

    def build(self) -> Solve:
        return Solve(SOLVERS.get(self.solver)(), rtol=self.tolerance, max_steps=self.max_steps)


class ValidationSpec(Config):
    limit: int = Field(512, ge=1, description="validation images, looked at after every epoch")
    attack: AttackSpec | None = Field(None, description="null: the attack of the training, or none")


class EvaluationSpec(Config):
    limit: int = Field(1000, ge=1, description="test images, looked at once, for the model card")
    attack: AttackSpec | None = Field(None, description="null: the attack of the validation or the training, or none")


class TrainingConfig(Config):
    """One training run.

    Attributes:
        initial: weights to start from instead of the seed's.
        attack: null for standard training; else the adversary, and the loss is taken at its images.
        attack_warmup_epochs: epochs over which the adversary's radius grows from zero.
        jacobian_weight: factor of the Hutchinson estimate of `||J_z||_F^2 / state size` (Bai et al., ICML 2021).
        jacobian_frequency: share of the batches that pay it.
        jacobian_rows: share of a batch that the estimate uses.
        ema_decay: of the averaged weights, which are the ones validated and saved; 0 is off.
        random_shift: largest shift in pixels, zeros moving in.
    """

    name: str
    model: ModelSpec
    data: str = "digits"
    seed: int = Field(0, ge=0)
    initial: str | None = Field(None, description="a saved model or registry name to start from; null: from the seed")
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=1)
    train_limit: int | None = Field(None, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    gradient_clip: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    random_shift: int = Field(0, ge=0)
    jacobian_weight: float = Field(0.0, ge=0)
    jacobian_frequency: float = Field(0.25, gt=0, le=1)
    jacobian_rows: float = Field(0.5, gt=0, le=1)
    forward: SolveSpec = SolveSpec()
    backward: SolveSpec = SolveSpec()
    attack: AttackSpec | None = None
    attack_warmup_epochs: float = Field(0.0, ge=0)
    validation: ValidationSpec = ValidationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
