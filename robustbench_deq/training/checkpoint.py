"""Checkpoints without pickle: one safetensors file with weights, averaged weights and optimiser state, and one JSON
file.

The JSON file carries a digest of itself and one of the safetensors file it belongs to, and is written last; a
checkpoint whose two files do not match, or of which a bit has changed, is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.files import read_sealed, sha256_of, write_sealed
from robustbench_deq.tensor_files import write_tensors


class Checkpoint:
    """The last checkpoint of a training folder."""

    def __init__(self, folder: Path) -> None:
        self.meta_path = folder / "checkpoint.json"
        self.folder = folder

    def save(
        self,
        model: EquilibriumModel,
        average: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        meta: dict[str, Any],
    ) -> None:
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in average.items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        # Two names in turn: the old pair stays whole until the new JSON file points at the new tensors.
        old = self._meta().get("tensors") if self.meta_path.exists() else None
        name = "checkpoint-b.safetensors" if old == "checkpoint-a.safetensors" else "checkpoint-a.safetensors"
        digest = write_tensors(self.folder / name, tensors)
        write_sealed(self.meta_path, {**meta, "tensors": name, "tensors_sha256": digest})
        if old is not None:
            (self.folder / old).unlink(missing_ok=True)

    def load(
        self, model: EquilibriumModel, average: dict[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Fill model, averaged weights and optimiser. Raises `UsageError` for a missing or damaged checkpoint."""
        meta = self._meta()
        path = self.folder / str(meta.get("tensors"))
        if not path.is_file() or sha256_of(path) != meta.get("tensors_sha256"):
            raise UsageError.of(
                f"checkpoint {path}", expected="the file its JSON describes", got="another file", fix="start a new run"
            )
        try:
            tensors = load_file(path)
            model.load_state_dict(_below(tensors, "model."))
            average.update({name: value.to(average[name]) for name, value in _below(tensors, "average.").items()})
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in _below(tensors, "optimizer.").items():
                index, _, name = key.partition(".")
                state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        except (safetensors.SafetensorError, RuntimeError, KeyError) as error:
            raise UsageError.of(
                f"checkpoint {path}",
                expected="this config's model",
                got=str(error).splitlines()[0],
                fix="use its config",
            ) from None
        return meta

    def _meta(self) -> dict[str, Any]:
        try:
            meta = read_sealed(self.meta_path)
        except OSError:
            raise UsageError.of(
                f"folder {self.folder}", expected="checkpoint.json of an earlier run", got="none", fix="drop --resume"
            ) from None
        if meta is None:
            raise UsageError.of(
                str(self.meta_path), expected="a checkpoint", got="a damaged one", fix="start a new run"
            )
        return meta


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
