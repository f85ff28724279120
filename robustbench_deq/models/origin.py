"""Where a model comes from, for records: what was loaded, as long as it is still that.

A model that `load_model` returns remembers its name and digest, and a fingerprint of its weights and settings. Once
these change it is a model of one's own, and no record calls it by the old name.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple, TypeVar

import torch

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.trial import Tried

M = TypeVar("M", bound=EquilibriumModel)


class Origin(NamedTuple):
    """What a model was loaded from: its name, and the sha256 of its weights or of its file."""

    name: str
    model_sha256: str | None = None
    file_sha256: str | None = None


def with_origin(model: M, origin: Origin) -> M:
    """`model`, which remembers `origin` from now on."""
    vars(model)["_origin"] = origin, _fingerprint(model)
    return model


def origin_of(model: EquilibriumModel) -> Origin | None:
    """What `model` was loaded from, or None if it was not loaded or has changed since."""
    origin, fingerprint = vars(model).get("_origin", (None, None))
    return origin if origin is not None and fingerprint == _fingerprint(model) else None


@torch.no_grad()
def _fingerprint(model: EquilibriumModel) -> str:
    """Of type, settings, weights and buffers, and of methods that were replaced on the object."""
    replaced = [(name, id(vars(model)[name])) for name in Tried._fields if name in vars(model)]
    digest = hashlib.sha256(repr((type(model), getattr(model, "config", None), replaced)).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
