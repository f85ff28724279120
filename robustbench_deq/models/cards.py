"""What is known of saved and registered models without loading them: `model.json`, read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from robustbench_deq.configs import Config, validate
from robustbench_deq.errors import UsageError
from robustbench_deq.files import is_folder, read_json
from robustbench_deq.models.zoo import MODELS, ModelEntry
from robustbench_deq.registry import closest
from robustbench_deq.threat_spec import ThreatSpec

DESCRIPTION_NAME = "model.json"
SCHEMA_VERSION = 1
"""Of `model.json`; rises when a reader of this version would misread the file."""


class Card(Config):
    """What a reader should know of the weights. Accuracies are fractions on the test split, judged."""

    data: str = ""
    threat: ThreatSpec | None = Field(None, description="the threat trained against; null is standard training")
    command: str = ""
    seed: int = 0
    train_minutes: float | None = None
    device: str = Field("cpu", description="what they were trained on: cpu, or the name of the GPU")
    test_samples: int | None = None
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    robust_accuracy_ci: tuple[float, float] | None = None
    evaluation: dict[str, Any] = Field(default_factory=dict, description="the threat and attack behind robust_accuracy")
    spectral_radius: float | None = Field(None, description="largest modulus of an eigenvalue of J_z, mean over images")
    mean_solver_steps: float | None = Field(None, description="Picard steps to a relative residual of 1e-4")
    monotonicity: float | None = Field(None, description="smallest eigenvalue of sym(I - W), of monotone operators")
    lipschitz: float | None = Field(None, description="bound on the logits' L2 change by the image's")
    num_unconverged: int | None = Field(None, description="samples whose equilibrium the judge does not find")
    num_failed: int | None = Field(None, description="samples on which the attack of the evaluation failed")

    @property
    def trained_against(self) -> str:
        """The norm of the threat trained against, or "none"."""
        return self.threat.norm if self.threat else "none"

    @property
    def evaluated_under(self) -> ThreatSpec | None:
        """The threat behind `robust_accuracy`; None where the card has none."""
        known = {key: self.evaluation[key] for key in ThreatSpec.model_fields if key in self.evaluation}
        return validate(ThreatSpec, known, "the card's evaluation") if "epsilon" in known else None


class ModelDescription(Config):
    """The content of `model.json`."""

    schema_version: int = Field(SCHEMA_VERSION, ge=1)
    name: str
    family: str
    config: dict[str, Any]
    sha256: str
    num_parameters: int
    card: Card = Card()


def describe(folder: Path) -> ModelDescription:
    """Read `model.json`. Raises `UsageError` when it is missing, malformed, or of a newer schema."""
    path = folder / DESCRIPTION_NAME
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        got = "no such file" if isinstance(error, FileNotFoundError) else "an unreadable file"
        raise UsageError.of(str(path), expected="a model description", got=got, fix="save the model again") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UsageError.of(
            str(path),
            expected=f"schema version {SCHEMA_VERSION} at most",
            got=version,
            fix="read it with the newer robustbench-deq that wrote it",
        )
    return validate(ModelDescription, content, str(path))


def list_models(
    pattern: str = "*", *, family: str | None = None, data: str | None = None, threat: str | None = None
) -> list[ModelDescription]:
    """The registered models whose name matches a shell wildcard, in the order of registration.

    Args:
        family, data: as on their cards; None is any.
        threat: "l2", "linf" or "none": the norm of the threat trained against; None is any.
    """
    return [
        described
        for described in map(describe_model, MODELS.list(pattern))
        if family in (None, described.family)
        and data in (None, described.card.data)
        and threat in (None, described.card.trained_against)
    ]


def describe_model(source: str) -> ModelDescription:
    """Name, family, config and card of a registry name or a folder, without loading the weights."""
    if source not in MODELS and is_folder(source):
        return describe(Path(source))
    entry = registered(source)
    if entry.folder is not None:
        return describe(entry.folder)
    return ModelDescription(
        name=entry.name,
        family=entry.family,
        config=entry.config,
        sha256="",
        num_parameters=entry.num_parameters,
    )


def names_function(model: str) -> bool:
    """Whether a model is given as `file.py:function`."""
    return ".py:" in model


def registered(name: str) -> ModelEntry:
    """The entry of a name. Raises `UsageError` that says what else a model may be."""
    if name in MODELS:
        return MODELS.get(name)
    if name.endswith(".py"):
        raise UsageError.of(
            f"model {name}", expected="file.py:function", got="no function", fix=f"write {name}:FUNCTION"
        )
    close = ", ".join(closest(name, MODELS))
    listed = "list the names with 'robustbench-deq models', or check the path"
    raise UsageError.of(
        "unknown model",
        expected=f"a registered name{f' such as {close}' if close else ''}, a folder with a saved model, "
        "or file.py:function",
        got=f"{name!r}, which is none of them",
        fix="check the path, or train the model that is to lie there" if "/" in name else listed,
    )
