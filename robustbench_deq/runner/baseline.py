"""Baselines: what the gate compares a run with, as one JSON file that is committed.

    tolerances   what may change; edited by hand
    updates      why the baseline is what it is, the oldest first
    entries      one for each record: what it is of, its verdicts a bit a sample, its counts, its share of the seconds
                 that all attacks took on the same model in the same run

It changes only by `update_baseline`, which asks for a reason.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, JsonValue, model_validator

from robustbench_deq.configs import Config, validate
from robustbench_deq.errors import UsageError
from robustbench_deq.files import is_file, read_json, write_json
from robustbench_deq.records.record import Record
from robustbench_deq.records.store import RecordStore, load_records

SCHEMA_VERSION = 2


class Tolerances(Config):
    """What may change between two runs of the same code on other machines, threads and batch sizes.

    The defaults are meant to leave room for that (`benchmarks/gate_alarms.py` counts), and none for a fifth more steps.
    """

    flips: float = Field(0.01, ge=0, le=1, description="share of the samples whose verdict may differ; at least one")
    more_unconverged: int = Field(1, ge=0, description="unconverged samples above the baseline's")
    more_failed: int = Field(0, ge=0, description="failed samples above the baseline's")
    count: float = Field(0.05, ge=0, description="relative change of evaluations and VJPs on the same samples")
    count_elsewhere: float = Field(0.15, ge=0, description="the same on other samples, of which some are harder")
    seconds: float = Field(3.0, ge=1, description="factor on an attack's seconds beside the others', median of records")


Runs = Sequence[tuple[Record, pd.DataFrame]]
"""Records, each with its samples."""

HexBits = Annotated[str, Field(pattern="^([0-9a-f]{2})*$", description="a bit a sample, by sample id, hexadecimal")]


class BaselineEntry(Config):
    """One record as a baseline keeps it: what it is of, and what it says."""

    model: str
    model_sha256: str | None = Field(None, description="of the weights; null for a model without a file of them")
    attack: str
    label: str
    norm: str
    epsilon: float = Field(ge=0)
    data: str
    split: str
    seed: int
    settings: dict[str, JsonValue]
    digest: str = Field(description="of the samples")
    num_samples: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    is_clean: HexBits
    is_robust: HexBits
    num_unconverged: int = Field(ge=0)
    num_failed: int = Field(ge=0)
    cell_evals: float = Field(ge=0)
    cell_vjps: float = Field(ge=0)
    seconds: float = Field(ge=0, le=1, description="share of all attacks' on one model in one run; 0: unknown")

    @model_validator(mode="after")
    def _check_verdicts(self) -> BaselineEntry:
        digits = 2 * -(-self.num_samples // 8)
        if not len(self.is_clean) == len(self.is_robust) == digits:
            raise ValueError(f"verdicts of {self.num_samples} samples as {digits} digits")
        return self

    @property
    def identity(self) -> tuple[str | float, ...]:
        """What two records of a pair share."""
        return self.model, self.attack, self.label, self.norm, self.epsilon, self.data, self.split, self.seed

    @property
    def place(self) -> tuple[str | float, ...]:
        """What attacks share that are compared in seconds: all but themselves."""
        return self.model, self.norm, self.epsilon, self.data, self.split, self.seed

    @property
    def title(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.model}, {self.label}, {self.norm} {self.epsilon:g}{seed}"


class Update(Config):
    date: str
    reason: str
    commit: str | None = None


class Baseline(Config):
    schema_version: Literal[2] = SCHEMA_VERSION
    tolerances: Tolerances = Tolerances()
    updates: list[Update] = Field(min_length=1, description="why it is what it is, the oldest first")
    entries: list[BaselineEntry]


def to_entries(runs: Runs) -> list[BaselineEntry]:
    """Records with their samples, as a baseline keeps them.

    Raises:
        UsageError: for two records that nothing tells apart.
    """
    found = [(_to_entry(record, samples), record.cost.wall_seconds) for record, samples in runs]
    whole: Counter[tuple[str | float, ...]] = Counter()
    for entry, seconds in found:
        whole[entry.place] += seconds
    entries = [
        entry.model_copy(update={"seconds": seconds / whole[entry.place] if seconds else 0.0})
        for entry, seconds in found
    ]
    known = set()
    for entry in entries:
        if entry.identity in known:
            raise UsageError.of(
                "records", expected="one of each", got=f"two of {entry.title}", fix="give the attacks labels"
            )
        known.add(entry.identity)
    return entries


def _to_entry(record: Record, samples: pd.DataFrame) -> BaselineEntry:
    """Without its seconds, which depend on the other records."""
    ordered = samples.sort_values("sample_id")
    return BaselineEntry(
        model=record.model,
        model_sha256=record.model_sha256,
        attack=record.attack,
        label=record.label,
        norm=record.threat.norm,
        epsilon=record.threat.epsilon,
        data=record.data.name,
        split=record.data.split,
        seed=record.seed,
        settings=record.attack_config,
        digest=record.data.digest,
        num_samples=record.data.num_samples,
        batch_size=record.batch_size,
        is_clean=to_hex(ordered["is_clean_correct"]),
        is_robust=to_hex(ordered["is_robust"]),
        num_unconverged=record.num_unconverged,
        num_failed=record.num_failed,
        cell_evals=record.cost.cell_evals,
        cell_vjps=record.cost.cell_vjps,
        seconds=0.0,
    )


def read_baseline(path: Path) -> Baseline:
    """Raises `UsageError` for a missing or malformed file."""
    try:
        content = read_json(path)
    except OSError:
        raise UsageError.of(
            str(path), expected="a baseline", got="no file that can be read", fix="write one with --update REASON"
        ) from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError.of(str(path), expected="a baseline", got="not one JSON object", fix="restore the file")
    return validate(Baseline, content, str(path))


def read_run(folder: Path) -> list[tuple[Record, pd.DataFrame]]:
    """The records of a folder, each with its samples. Raises `UsageError` where there are none."""
    store = RecordStore(folder)
    return [(record, store.load_samples(record.record_id)) for record in load_records(folder)]


def update_baseline(path: Path, runs: Runs, reason: str) -> Baseline:
    """Rewrite the baseline from records with their samples; reasons and tolerances that the file holds stay.

    Raises:
        UsageError: without a reason, or for a malformed file.
    """
    if not reason.strip():
        raise UsageError.of("--update", expected="a reason", got="none", fix="say why the baseline changes")
    old = read_baseline(path) if is_file(path) else None
    commits = [record.environment.get("commit") for record, _ in runs]
    update = Update(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        reason=" ".join(reason.split()),
        commit=str(commits[-1]) if commits[-1] else None,
    )
    baseline = Baseline(
        tolerances=old.tolerances if old else Tolerances(),
        updates=[*(old.updates if old else []), update],
        entries=to_entries(runs),
    )
    write_json(path, baseline.model_dump(mode="json"))
    return baseline


def to_hex(bits: Any) -> str:
    """Truth values `(samples,)`, eight to a byte, in hexadecimal."""
    return np.packbits(np.asarray(bits, dtype=bool)).tobytes().hex()


def from_hex(text: str, count: int) -> np.ndarray:
    """The first `count` of them."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)
