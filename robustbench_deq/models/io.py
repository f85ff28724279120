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
from safetensors.torch import load_file

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError, kind_of
from robustbench_deq.files import is_folder, sha256_of, write_json
from robustbench_deq.models.base import Family, FamilyModel
from robustbench_deq.models.cards import (
    DESCRIPTION_NAME,
    Card,
    ModelDescription,
    describe,
    list_models,
    names_function,
    registered,
)
from robustbench_deq.models.families import FAMILIES
from robustbench_deq.models.origin import Origin, with_origin
from robustbench_deq.models.user_file import digest_of_file, model_from_file
from robustbench_deq.models.zoo import MODELS
from robustbench_deq.optimise import NORMS, Norm
from robustbench_deq.tensor_files import write_tensors

WEIGHTS_NAME = "model.safetensors"
NEXT_WEIGHTS_NAME = "model.next.safetensors"


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
    digest = write_tensors(waiting, model.state_dict())
    description = ModelDescription(
        name=name,
        family=model.family,
        config=model.config.model_dump(mode="json"),
        sha256=digest,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        card=card or Card(),
    )
    write_json(folder / DESCRIPTION_NAME, description.model_dump(mode="json"))
    os.replace(waiting, weights)
    return description


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
    model_name: str | os.PathLike[str], dataset: str | None = None, threat_model: Norm | str | None = None
) -> EquilibriumModel:
    """The model behind `model_name`: a registry name, a folder, or `file.py:function`.

    The modules that lie beside such a file can be imported while it is run and the function called, not later; what
    these print goes to standard error. The global random state is left as it was, even where the function seeds it.

    With `dataset` or `threat_model` it is RobustBench's call, and looks among the registered models only. A family
    (`deq-conv`) or a wildcard means the models of that dataset trained against that threat; a model of standard
    training, which belongs to every threat, is named in full.

    Args:
        dataset: as on the model's card.
        threat_model: `L2` or `Linf`, or such a `Norm`.

    Raises:
        UsageError: for an unknown name, none or several that fit dataset and threat, a damaged folder, or a file that
            does not build an `EquilibriumModel`.
    """
    if not isinstance(model_name, str | os.PathLike):
        raise UsageError.of(
            "model",
            expected="a registered name, a folder with a saved model, or file.py:function",
            got=kind_of(model_name),
            fix="list the names with 'robustbench-deq models'",
        )
    name = os.fspath(model_name)
    if dataset is not None or threat_model is not None:
        name = _name_within(name, dataset, threat_model)
    if name not in MODELS:
        if names_function(name):
            model = model_from_file(name)
            return with_origin(model, Origin(name, file_sha256=digest_of_file(Path(name.rpartition(":")[0]))))
        if is_folder(name):
            return load_folder(Path(name))
    entry = registered(name)
    if entry.folder is not None:
        return load_folder(entry.folder)
    return with_origin(_build(FAMILIES.get(entry.family), entry.config, name).eval(), Origin(name))


def _name_within(model_name: str, dataset: str | None, threat_model: Norm | str | None) -> str:
    """The one registered name that RobustBench's three words mean."""
    threat = threat_model.name if isinstance(threat_model, Norm) else threat_model and str(threat_model).lower()
    if threat not in (None, *NORMS):
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
