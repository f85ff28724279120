"""Saved models: a folder with `model.json` (family, config, digest, card) and `model.safetensors`. Nothing is
unpickled.

`load_model` takes a registry name, such a folder, or `file.py:function` that builds an `EquilibriumModel`.

At every moment of a save the folder holds one whole model. The new weights are written beside the old ones, under a
name of their own; then `model.json` with their digest takes the place of the old one, which makes them the model's;
last they take the place of the old weights. A reader takes the file that has the digest.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import Field
from safetensors.torch import load_file, save

from robustbench_deq.configs import Config, validate
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.files import is_folder, read_json, replacing, sha256_of, write_json
from robustbench_deq.models.base import FAMILIES, Family, FamilyModel
from robustbench_deq.models.origin import Origin, with_origin
from robustbench_deq.models.user_file import digest_of_file, model_from_file
from robustbench_deq.models.zoo import MODELS, ModelEntry
from robustbench_deq.optimise import NORMS, Norm
from robustbench_deq.specs import ThreatSpec

DESCRIPTION_NAME = "model.json"
WEIGHTS_NAME = "model.safetensors"
NEXT_WEIGHTS_NAME = "model.next.safetensors"
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


def save_model(model: EquilibriumModel, folder: str | Path, name: str, card: Card | None = None) -> ModelDescription:
    """Write `model` of a registered family to `folder`. A save that is interrupted leaves the old model or the new one.

    What is written is the config and the weights. Whatever else was changed on the object is not: another `model.solve`
    or `model.adjoint` is lost, unless the config names it.

    Raises:
        UsageError: for a model that no registered family could build again, a subclass of a family's among them.
    """
    if model.family not in FAMILIES:
        raise UsageError.of(
            "saving a model",
            expected="one of a registered family",
            got=f"one of the family {model.family!r}",
            fix="register its class with @add_family, or keep it as file.py:function",
        )
    family_type = FAMILIES.get(model.family).build
    if type(model) is not family_type:
        raise UsageError.of(
            "saving a model",
            expected=f"a {family_type.__name__} itself, as it would be loaded as one",
            got=f"its subclass {type(model).__name__}",
            fix="register the subclass with @add_family, or keep it as file.py:function",
        )
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in model.state_dict().values()):
        raise UsageError.of("saving a model", expected="one in float32", got="another", fix="call model.float() before")
    folder = Path(folder)
    weights, waiting = folder / WEIGHTS_NAME, folder / NEXT_WEIGHTS_NAME
    if waiting.exists():  # an earlier save was interrupted; if its weights are the model's, take its last step
        with contextlib.suppress(UsageError):
            os.replace(_weights_of(folder, describe(folder).sha256), weights)
    with replacing(waiting) as temporary:
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        temporary.write_bytes(save(tensors))
    description = ModelDescription(
        name=name,
        family=model.family,
        config=model.config.model_dump(mode="json"),
        sha256=sha256_of(waiting),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        card=card or Card(),
    )
    write_json(folder / DESCRIPTION_NAME, description.model_dump(mode="json"))
    os.replace(waiting, weights)
    return description


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


def load_folder(folder: Path) -> EquilibriumModel:
    """Rebuild the model saved in `folder`, in evaluation mode. The global random state is left as it was.

    Raises:
        UsageError: for a wrong digest, missing, surplus or misshapen tensors, or a config that its family refuses.
    """
    description = describe(folder)
    family = FAMILIES.get(description.family)
    where = f"{folder / DESCRIPTION_NAME} (family {family.name})"
    model = _build(family, description.config, where)
    path = _weights_of(folder, description.sha256)
    try:
        tensors = load_file(path if path.exists() else folder / WEIGHTS_NAME)  # a writer may just have renamed it
    except safetensors.SafetensorError as error:
        raise _wrong_tensors(path, " ".join(str(error).split())[:160]) from None
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise _wrong_tensors(path, f"no {name!r}")
        if name not in expected:
            raise _wrong_tensors(path, f"a surplus {name!r}")
        if tensors[name].shape != expected[name].shape:
            shapes = tuple(tensors[name].shape), tuple(expected[name].shape)
            raise _wrong_tensors(path, "{!r} of shape {} instead of {}".format(name, *shapes))
        if tensors[name].dtype != expected[name].dtype:
            raise _wrong_tensors(path, f"{name!r} as {tensors[name].dtype} instead of {expected[name].dtype}")
    model.load_state_dict(tensors)
    is_registered = folder.name in MODELS and MODELS.get(folder.name).folder == folder
    return with_origin(model.eval(), Origin(folder.name if is_registered else str(folder), description.sha256))


def _build(family: Family, config: dict[str, Any], where: str) -> FamilyModel:
    """Initial weights are drawn in a fork of the global random state, and take gradients whatever mode we are in."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        return family.make(config, where)


def _wrong_tensors(path: Path, got: str) -> UsageError:
    return UsageError.of(f"weights {path}", expected="this family's tensors", got=got, fix="save the model again")


def _weights_of(folder: Path, sha256: str) -> Path:
    """The file in `folder` whose digest is `sha256`. Raises `UsageError` when there is none."""
    path, waiting = folder / WEIGHTS_NAME, folder / NEXT_WEIGHTS_NAME
    if waiting.is_file() and sha256_of(waiting) == sha256:  # a save was interrupted before its last step
        return waiting
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise UsageError.of(str(path), expected="the weights", got=error.strerror, fix="save the model again") from None
    if digest != sha256:
        raise UsageError.of(
            f"weights {path}",
            expected=f"sha256 {sha256[:12]}...",
            got=f"{digest[:12]}...",
            fix="the file is damaged or another; restore it",
        )
    return path


def load_model(
    model_name: str | os.PathLike[str], dataset: str | None = None, threat_model: str | Norm | None = None
) -> EquilibriumModel:
    """The model behind `model_name`: a registry name, a folder, or `file.py:function`.

    The modules that lie beside such a file can be imported while it is run and the function called, not later; what
    these print goes to standard error. The global random state is left as it was, even where the function seeds it.

    With `dataset` or `threat_model` it is RobustBench's call, and looks among the registered models only. A family
    (`deq-conv`) or a wildcard means the models of that dataset trained against that threat; a model of standard
    training, which belongs to every threat, is named in full.

    Args:
        dataset: as on the model's card.
        threat_model: `L2` or `Linf`, or the norm itself.

    Raises:
        UsageError: for an unknown name, none or several that fit dataset and threat, a damaged folder, or a file that
            does not build an `EquilibriumModel`.
    """
    if not isinstance(model_name, str | os.PathLike):
        raise UsageError.of(
            "model", expected="a name or path", got=type(model_name).__name__, fix="list the names with list_models()"
        )
    name = os.fspath(model_name)
    if dataset is not None or threat_model is not None:
        name = _name_within(name, dataset, threat_model)
    if name not in MODELS:
        if ".py:" in name:
            model = model_from_file(name)
            return with_origin(model, Origin(name, file_sha256=digest_of_file(Path(name.rpartition(":")[0]))))
        if is_folder(name):
            return load_folder(Path(name))
    entry = _registered(name)
    if entry.folder is not None:
        return load_folder(entry.folder)
    return with_origin(_build(FAMILIES.get(entry.family), entry.config, name).eval(), Origin(name))


def _registered(name: str) -> ModelEntry:
    """The entry of a name. Raises `UsageError` that says what else a model may be."""
    if name in MODELS:
        return MODELS.get(name)
    if name.endswith(".py"):
        raise UsageError.of(
            f"model {name}", expected="file.py:function", got="no function", fix=f"write {name}:FUNCTION"
        )
    close = ", ".join(MODELS.closest(name))
    listed = "list the names with 'robustbench-deq models', or check the path"
    raise UsageError.of(
        "unknown model",
        expected=f"a registered name{f' such as {close}' if close else ''}, a folder with a saved model, "
        "or file.py:function",
        got=f"{name!r}, which is none of them",
        fix="check the path, or train the model that is to lie there" if "/" in name else listed,
    )


def _name_within(model_name: str, dataset: str | None, threat_model: str | Norm | None) -> str:
    """The one registered name that RobustBench's three words mean."""
    threat = getattr(threat_model, "name", threat_model)
    threat = threat.lower() if isinstance(threat, str) else threat
    if threat is not None and threat not in list(NORMS):
        raise UsageError.of(
            "threat_model",
            expected="L2 or Linf",
            got=repr(threat_model),
            fix="no registered model is trained against another",
        )

    def is_meant(described: ModelDescription) -> bool:
        against = described.card.trained_against
        if described.name == model_name:
            return threat is None or against in (threat, "none")
        is_named = described.family == model_name or fnmatch.fnmatchcase(described.name, model_name)
        return is_named and threat in (None, against)

    found = [described.name for described in list_models(data=dataset) if is_meant(described)]
    if len(found) != 1:
        raise UsageError.of(
            f"model {model_name!r} for dataset {dataset}, threat_model {threat_model}",
            expected="one registered model",
            got=", ".join(found) or "none",
            fix="name one of them" if found else "list them with 'robustbench-deq models'",
        )
    return found[0]


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
    if source in MODELS or not is_folder(source):
        entry = _registered(source)
        if entry.folder is not None:
            return describe(entry.folder)
        model = load_model(source)
        return ModelDescription(
            name=entry.name,
            family=entry.family,
            config=model.config.model_dump(mode="json"),
            sha256="",
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )
    return describe(Path(source))
