"""The clean equilibria of a suite's folder: solved once a batch of a model, whichever attack or worker comes first.

    DIR/clean/KEY.safetensors   what the judge has found on a batch (`evaluate.clean`), with what attacks have asked for
    DIR/clean/KEY.sha256        its digest
    DIR/clean/KEY.lock          while a process solves, others that need the same batch wait for it

The folder goes when all shards are done. A file that is missing or damaged is solved again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file

from robustbench_deq.evaluate.clean import CleanBatch
from robustbench_deq.evaluate.judge import Verdict
from robustbench_deq.files import lock, open_own, sha256_of, write_text
from robustbench_deq.optimise import Contraction
from robustbench_deq.runner.suite import Run
from robustbench_deq.tensor_files import write_tensors

FOLDER = "clean"


class CleanStore:
    """Clean batches of a suite's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder) / FOLDER

    @contextlib.contextmanager
    def batch(
        self, run: Run, rows: slice, device: torch.device, solve: Callable[[], CleanBatch]
    ) -> Iterator[CleanBatch]:
        """The clean batch of the samples `rows` of a run, from `solve` if nobody has solved it. Adjoints that it gains
        in the block are kept, and the contraction that comes with the first."""
        content = json.dumps([run.model_digest, run.digest, rows.start, rows.stop, device.type])
        path = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"
        with self._alone(path):
            clean = _read(path, device)
            if clean is None:
                clean = solve()
                _write(path, clean)
        known = set(clean.adjoints)
        yield clean
        if set(clean.adjoints) - known:
            with self._alone(path):
                others = _read(path, device)
                if others is not None:
                    clean.adjoints = {**clean.adjoints, **others.adjoints}
                    clean.contraction = clean.contraction or others.contraction
                _write(path, clean)

    def clear(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Waits until no other process has the batch."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_own(path.with_suffix(".lock"))
        try:
            lock(handle)
            yield
        finally:
            os.close(handle)


def _write(path: Path, clean: CleanBatch) -> None:
    tensors = {"z": clean.z, "distance": clean.distance, "first": clean.first}
    if clean.contraction is not None:
        tensors |= {f"contraction.{name}": part for name, part in clean.contraction._asdict().items()}
    tensors |= {f"verdict.{field.name}": getattr(clean.verdict, field.name) for field in fields(Verdict)}
    tensors |= {f"adjoint.{name}": mu for name, mu in clean.adjoints.items()}
    write_text(path.with_suffix(".sha256"), write_tensors(path, tensors))


def _read(path: Path, device: torch.device) -> CleanBatch | None:
    """None where there is none, or a damaged one."""
    try:
        if path.with_suffix(".sha256").read_text(encoding="utf-8") != sha256_of(path):
            return None
        # Copied: within the file they lie where arithmetic rounds otherwise than on tensors of torch's own.
        found = {name: tensor.clone() for name, tensor in load_file(path).items()}
        verdict = Verdict(*(found[f"verdict.{field.name}"] for field in fields(Verdict)))
        adjoints = {
            name.removeprefix("adjoint."): mu.to(device) for name, mu in found.items() if name.startswith("adjoint.")
        }
        z, distance, first = (found[name].to(device) for name in ("z", "distance", "first"))
        names = [f"contraction.{name}" for name in Contraction._fields]
        contraction = Contraction(*(found[name].to(device) for name in names)) if names[0] in found else None
        return CleanBatch(verdict, z, distance, first, contraction, adjoints)
    except (OSError, ValueError, safetensors.SafetensorError, KeyError):
        return None
