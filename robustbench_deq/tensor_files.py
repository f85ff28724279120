"""Tensors in files of the safetensors format: nothing is unpickled, and a reader never sees half a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from robustbench_deq.files import replacing, sha256_of


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors`, of any device and layout, in place of what is at `path`; the sha256 of the file."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(plain))
        return sha256_of(temporary)
