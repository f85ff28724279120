"""The typed schema of a training run: what `configs/training/*.yaml` may hold."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from robustbench_deq.configs import Config
from robustbench_deq.specs import AttackSpec, SolveSpec


class ModelSpec(Config):
    family: str = Field(description="a registered model family")
    config: dict[str, Any] = Field(default_factory=dict, description="the family's own settings")


class TrainingSolveSpec(SolveSpec):
    """Looser than a model's own."""

    tolerance: float = Field(1e-3, gt=0, description="relative residual at which a sample is done")
    max_steps: int = Field(40, ge=1, description="most steps of a solve")


class ValidationSpec(Config):
    limit: int = Field(512, ge=1, description="validation images, looked at after every epoch")
    attack: AttackSpec | None = Field(None, description="null: the attack of the training, or none")


class EvaluationSpec(Config):
    limit: int = Field(1000, ge=1, description="test images, looked at once, for the model card")
    attack: AttackSpec | None = Field(None, description="null: the attack of the validation or the training, or none")


class TrainingConfig(Config):
    """One training run. The Jacobian term estimates `||J_z||_F^2 / state size` (Hutchinson; Bai et al., ICML 2021)."""

    name: str = Field(max_length=100, description="of the model, and of the default output folder")
    model: ModelSpec = Field(description="family and its settings; with `initial`, those it must have")
    data: str = Field("digits", description="a dataset or npz:FILE")
    seed: int = Field(
        0, ge=0, description="of the weights, the order, the shifts and flips, the probes and the attacks"
    )
    initial: str | None = Field(None, description="a saved model or registry name to start from; null: from the seed")
    epochs: int = Field(10, ge=1, description="passes over the training images")
    batch_size: int = Field(128, ge=1, description="images a step; what is left over in an epoch is dropped")
    train_limit: int | None = Field(None, ge=1, description="use the first training images only; null: all")
    learning_rate: float = Field(2e-3, gt=0, description="of AdamW, at its peak; falls on a cosine to zero")
    weight_decay: float = Field(1e-4, ge=0, description="of AdamW")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate grows")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="of the averaged weights, which are saved; 0 is off")
    random_shift: int = Field(0, ge=0, description="largest shift in pixels, zeros moving in")
    random_flip: bool = Field(False, description="mirror half of the images, left to right")
    jacobian_weight: float = Field(0.0, ge=0, description="factor of the Jacobian term")
    jacobian_frequency: float = Field(0.25, gt=0, le=1, description="share of the batches that pay it")
    jacobian_rows: float = Field(0.5, gt=0, le=1, description="share of a batch that its estimate uses")
    forward: TrainingSolveSpec = Field(TrainingSolveSpec(), description="how training finds equilibria")
    backward: TrainingSolveSpec = Field(TrainingSolveSpec(), description="how training solves the adjoint")
    attack: AttackSpec | None = Field(None, description="the adversary; null is standard training")
    attack_warmup_epochs: float = Field(0.0, ge=0, description="epochs in which the adversary's radius grows from zero")
    validation: ValidationSpec = Field(ValidationSpec(), description="after every epoch")
    evaluation: EvaluationSpec = Field(EvaluationSpec(), description="after the last")
