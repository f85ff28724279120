"""Records: what one run of one attack on one model measured, as a typed value and as append-only files.

    DIR/records.jsonl                  one `Record` a line, as JSON
    DIR/samples/<record_id>.parquet    the same run, a row a sample
    DIR/images/<record_id>.npz         a few of its images, where they were kept (see `bench.images`)

A record is written once and never changed. Its samples are in place before its line is, so every line that can be read
has its samples. A line counts only once its newline is there: a process that dies while writing leaves a torn last
line, which readers skip and the next writer removes. Numbers that are not finite become null.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field, JsonValue, field_validator, model_validator

from robustbench_deq.configs import Config, validate
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import replacing

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RECORDS_FILE = "records.jsonl"
SAMPLES_FOLDER = "samples"

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0.0)]


class ThreatRecord(Config):
    """The ball: its norm ("l2", "linf") and its radius in pixel units of [0, 1]."""

    norm: str
    epsilon: Amount


class DataRecord(Config):
    """The samples that were attacked; `digest` is of the images and labels themselves."""

    name: str
    split: str
    num_samples: int = Field(ge=1)
    digest: str


class CostRecord(Config):
    """Means per sample, except time and memory, which are those of the whole attack (see `meter.Cost`).

    `wall_seconds` leaves out the judge, whose seconds are `judge_seconds`; null in records from before it was timed.
    """

    cell_evals: Amount
    cell_vjps: Amount
    solver_steps: Amount
    wall_seconds: Amount
    peak_memory_mb: Amount | None
    judge_seconds: Amount | None = None


class CurvePoint(Config):
    """What stopping after `step` would have given, and cost."""

    step: Count
    cell_evals: Amount
    cell_vjps: Amount
    wall_seconds: Amount
    robust_accuracy: Fraction


class Record(Config):
    """One attack on one model under one threat, on one set of samples.

    Accuracies are fractions of all samples. `residuals` holds the mean relative residual of the state after each solver
    step of the attack. Any NaN or infinity that is passed in becomes None, where the field allows it.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    record_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the name of the samples' file")
    created: str = Field(description="ISO 8601, in UTC")
    model: str
    model_sha256: str | None
    attack: str
    label: str = Field(description="what tables and plots call the attack")
    attack_config: dict[str, JsonValue]
    threat: ThreatRecord
    data: DataRecord
    clean_accuracy: Fraction
    robust_accuracy: Fraction
    robust_accuracy_ci: tuple[Fraction, Fraction]
    adversarial_loss: float | None
    num_unconverged: Count
    num_failed: Count
    max_perturbation: Amount | None
    cost: CostRecord
    curve: list[CurvePoint]
    residuals: list[Amount | None]
    diagnostics: dict[str, float | None]
    seed: int
    batch_size: int = Field(ge=1)
    environment: dict[str, str | int | float | None]

    @model_validator(mode="before")
    @classmethod
    def _drop_nonfinite(cls, values: Any) -> Any:
        return _finite(values)

    @field_validator("created")
    @classmethod
    def _check_created(cls, text: str) -> str:
        try:
            offset = datetime.fromisoformat(text).utcoffset()
        except ValueError:
            offset = None
        if offset != timedelta(0):
            raise ValueError("an ISO 8601 time in UTC such as 2025-01-31T12:00:00+00:00")
        return text

    @field_validator("robust_accuracy_ci")
    @classmethod
    def _check_interval(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if interval[0] > interval[1]:
            raise ValueError("the lower end of the interval first")
        return interval


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def to_json(record: Record) -> dict[str, Any]:
    """The record as plain dictionaries, lists, strings and finite numbers."""
    return record.model_dump(mode="json")


def without_circumstances(record: Record) -> dict[str, Any]:
    """As `to_json`, without what differs between two runs of the same thing: times, memory, and where it was."""
    values = to_json(record)
    del values["created"], values["environment"]
    for part in (values["cost"], *values["curve"]):
        for key in ("wall_seconds", "judge_seconds", "peak_memory_mb"):
            part.pop(key, None)
    return values


class RecordStore:
    """Appends records to a folder, which is made when the first one comes. Several processes may share the folder.

    An append reads only what the file has gained since this store's last one, so n records cost n reads of a line.

    Args:
        folder: holds `records.jsonl` and `samples/`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._seen: set[str] = set()
        self._seen_bytes = 0

    def samples_path(self, record_id: str) -> Path:
        return self.folder / SAMPLES_FOLDER / f"{record_id}.parquet"

    def append(self, record: Record, samples: pd.DataFrame) -> None:
        """Store a record with its per-sample rows.

        Args:
            samples: one row a sample, `record.data.num_samples` of them.

        Raises:
            UsageError: when the number of rows is wrong, the identifier is taken or the folder cannot be written.
            RunError: when the disk takes only a part of the line; nothing of it is kept.
        """
        if len(samples) != record.data.num_samples:
            raise UsageError.of(
                f"samples of record {record.record_id}",
                expected=f"{record.data.num_samples} rows",
                got=len(samples),
                fix="pass one row for every sample of the record",
            )
        line = json.dumps(to_json(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _appending(self.folder / RECORDS_FILE) as handle:
                self._catch_up(handle)
                if record.record_id in self._seen:
                    raise UsageError.of(
                        "record_id", expected="a new identifier", got=repr(record.record_id), fix="records never change"
                    )
                with replacing(self.samples_path(record.record_id)) as temporary:
                    samples.to_parquet(temporary, index=False)
                _write_line(handle, line)
        except OSError as error:
            raise UsageError.of(
                f"folder {self.folder}",
                expected="one that can be written",
                got=error.strerror or error,
                fix="name another",
            ) from None
        finally:
            self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        """Leave nothing behind when the first append failed."""
        path, samples = self.folder / RECORDS_FILE, self.folder / SAMPLES_FOLDER
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
            if samples.is_dir() and not any(samples.iterdir()):
                samples.rmdir()

    def _catch_up(self, handle: int) -> None:
        """Cut a torn last line off and note the identifiers of the lines that are new since the last call."""
        size = os.fstat(handle).st_size
        if self._seen_bytes > size:  # somebody began the file anew
            self._seen, self._seen_bytes = set(), 0
        *lines, torn = os.pread(handle, size - self._seen_bytes, self._seen_bytes).split(b"\n")
        os.ftruncate(handle, size - len(torn))
        where = f"{self.folder / RECORDS_FILE}, a line"
        self._seen |= {_parse(line, where).record_id for line in lines}
        self._seen_bytes = size - len(torn)

    def identifiers(self) -> set[str]:
        """Of all records that are there."""
        path = self.folder / RECORDS_FILE
        return {record.record_id for record in _read(path)} if path.is_file() else set()

    def load_samples(self, record_id: str) -> pd.DataFrame:
        """The per-sample rows of a record. Raises `UsageError` when there are none."""
        path = self.samples_path(record_id)
        if not path.is_file():
            raise UsageError.of(str(path), expected="the samples of a record", got="no file", fix="check the record_id")
        return pd.read_parquet(path)


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[int]:
    """A handle for appending that no other writer has at the same time."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _write_line(handle: int, line: bytes) -> None:
    start = os.fstat(handle).st_size
    written = os.write(handle, line)
    if written != len(line):
        os.ftruncate(handle, start)
        raise RunError(f"records: only {written} of {len(line)} bytes could be written, the record was not kept")
    os.fsync(handle)


def load_records(folder: Path) -> list[Record]:
    """All records of a folder, in the order in which they were written.

    Raises:
        UsageError: for a folder without records, or the first line that is not a record of this schema version.
    """
    path = Path(folder) / RECORDS_FILE
    if not path.is_file():
        got = f"no {RECORDS_FILE} in it" if path.parent.is_dir() else "no such folder"
        raise UsageError.of(
            str(folder),
            expected="a folder of records",
            got=got,
            fix="write one with 'robustbench-deq attack MODEL --out DIR'",
        )
    records = _read(path)
    if not records:
        raise UsageError.of(
            str(path), expected="records", got="none", fix="write one with 'robustbench-deq attack MODEL --out DIR'"
        )
    return records


def _read(path: Path) -> list[Record]:
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        logger.warning("%s: line %d is torn and was ignored", path, len(lines) + 1)
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, where: str) -> Record:
    try:
        values = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:  # malformed JSON or UTF-8
        values = None
    if not isinstance(values, dict):
        raise UsageError.of(where, expected="a record as one JSON object", got=_excerpt(line), fix="remove the line")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError.of(
            where,
            expected=f"schema_version {SCHEMA_VERSION}",
            got=repr(version),
            fix="read it with the version of robustbench-deq that wrote it",
        )
    return validate(Record, values, where)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 40 else text[:37] + "...")


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record; nested fields get dotted names such as `cost.cell_evals`. Curves and residuals are left out."""
    rows = []
    for record in records:
        row = to_json(record)
        row["robust_accuracy_low"], row["robust_accuracy_high"] = row.pop("robust_accuracy_ci")
        del row["curve"], row["residuals"]
        rows.append({key: value for key, value in row.items() if value != {}})
    return pd.json_normalize(rows)
