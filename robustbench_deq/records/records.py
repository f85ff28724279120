"""Records: what one run of one attack on one model measured, as a typed value and as append-only files.

    DIR/records.jsonl                  one `Record` a line, as JSON
    DIR/samples/<record_id>.parquet    the same run, a row a sample
    DIR/images/<record_id>.npz         a few of its images, where they were kept (see `records.images`)

A record is written once and never changed. Its samples are in place before its line is, so every line that can be read
has its samples. A line counts only once its newline is there: a process that dies while writing leaves a torn last
line, which readers skip and the next writer removes. Numbers that are not finite become null.

Every field is described in `results/README.md`, which `benchmarks.schema` writes from the classes here. A field that
may be null can be added within a schema version: lines without it are read as null. Any other change of the fields, of
their meaning or of their unit is a new version, and lines of another version are refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, Field, JsonValue, ValidationError, ValidationInfo, field_validator, model_validator

from robustbench_deq.configs import Config, validate
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import lock, replacing

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RECORDS_FILE = "records.jsonl"
SAMPLES_FOLDER = "samples"
SHARDS_FOLDER = "shards"

# Strict: neither text nor a truth value is taken for a number.
Number = Annotated[float, Field(strict=True)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Amount = Annotated[float, Field(ge=0.0, strict=True)]


class Fields(BaseModel):
    """Base of a record and its parts. As strict as `Config`, and checked in pydantic's core, since files are long."""

    model_config = Config.model_config


SAMPLE_COLUMNS = {
    "sample_id": "number of the sample in its data set: the same in every record",
    "label": "true class",
    "clean_prediction": "class without an attack, from the judge's equilibrium",
    "clean_loss": "cross-entropy of the true class without an attack",
    "clean_residual": "relative residual of the judge's equilibrium without an attack",
    "adversarial_prediction": "class after the attack, from the judge's equilibrium",
    "adversarial_loss": "cross-entropy of the true class after the attack",
    "adversarial_residual": "relative residual of the judge's equilibrium after the attack",
    "perturbation": "norm of the perturbation, that of the threat, in pixel units",
    "is_clean_correct": "right without an attack, at an equilibrium",
    "is_converged": "the judge found both equilibria",
    "is_failed": "the attack gave no finite perturbation, or one outside the ball",
    "is_robust": "right without an attack and after it, at equilibria, and the attack did not fail",
}
"""Columns of the per-sample rows that `evaluate` writes, and their meaning."""


class ThreatRecord(Fields):
    """The ball of allowed perturbations."""

    norm: str = Field(description='"l2" or "linf"')
    epsilon: Amount = Field(description="radius, in pixel units of [0, 1]")


class DataRecord(Fields):
    """The samples that were attacked."""

    name: str = Field(description="data set")
    split: str = Field(description='"test", "validation", "train", or "all" of an npz file')
    num_samples: Annotated[int, Field(ge=1, strict=True)] = Field(description="how many")
    digest: str = Field(description="of the images and labels themselves")


class CostRecord(Fields):
    """Means per sample, except time and memory, which are those of the whole attack (see `meter.Cost`)."""

    cell_evals: Amount = Field(description="evaluations of the cell, mean per sample")
    cell_vjps: Amount = Field(description="vector-Jacobian products through the cell, mean per sample")
    solver_steps: Amount = Field(description="iterations of all solves, mean per sample")
    wall_seconds: Amount = Field(description="of the attack alone, all samples together")
    peak_memory_mb: Amount | None = Field(description="during the attack: of the device, or of the process on a CPU")
    judge_seconds: Amount | None = Field(None, description="of the judge, all samples and snapshots together")


class CurvePoint(Fields):
    """What stopping after `step` would have given, and cost."""

    step: Count = Field(description="of the attack's own steps")
    cell_evals: Amount = Field(description="until then, mean per sample")
    cell_vjps: Amount = Field(description="until then, mean per sample")
    solver_steps: Amount = Field(description="until then, mean per sample")
    wall_seconds: Amount = Field(description="until then, all samples together")
    robust_accuracy: Fraction = Field(description="as judged after the clock had stopped")


class Record(Fields):
    """One attack on one model under one threat, on one set of samples.

    Accuracies are fractions of all samples. `residuals` holds the mean relative residual of the state after each solver
    step of the attack. Any NaN or infinity that is passed in becomes None, where the field allows it.
    """

    schema_version: Annotated[int, Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION, strict=True)] = Field(
        SCHEMA_VERSION, description="of the fields of this table"
    )
    record_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the name of the samples' file")
    created: str = Field(description="ISO 8601, in UTC; of a suite's record, when its first shard was begun")
    model: str = Field(description="name in the registry, folder, or `file.py:function`")
    model_sha256: str | None = Field(description="of the weights; null for a model without a file of them")
    file_sha256: str | None = Field(None, description="of the file, where the model is a `file.py:function`")
    attack: str = Field(description="name in the registry")
    label: str = Field(description="what tables and plots call the attack")
    attack_config: dict[str, JsonValue] = Field(description="every setting of the attack, and `targeted`")
    threat: ThreatRecord
    data: DataRecord
    clean_accuracy: Fraction = Field(description="share of all samples that are right without an attack")
    robust_accuracy: Fraction = Field(description="share of all samples that are right without it and after it")
    robust_accuracy_ci: tuple[Fraction, Fraction] = Field(description="Wilson's 95 % interval, the lower end first")
    adversarial_loss: Number | None = Field(description="mean cross-entropy at the perturbed images, where finite")
    num_unconverged: Count = Field(description="samples without an equilibrium; never robust")
    num_failed: Count = Field(description="samples on which the attack failed; never robust")
    max_perturbation: Amount | None = Field(description="the largest, in the threat's norm")
    cost: CostRecord
    curve: list[CurvePoint] = Field(description="accuracy against cost, where snapshots were asked for")
    residuals: list[Amount | None] = Field(description="mean relative residual after each solver step of the attack")
    diagnostics: dict[str, Number | None] = Field(description="counts and means of the attack's own")
    seed: Annotated[int, Field(strict=True)] = Field(description="of all randomness of the run")
    batch_size: Annotated[int, Field(ge=1, strict=True)] = Field(description="samples attacked at a time")
    environment: dict[str, str | int | float | None] = Field(description="versions, device, threads, commit")

    @model_validator(mode="before")
    @classmethod
    def _drop_nonfinite(cls, values: Any, info: ValidationInfo) -> Any:
        return values if info.mode == "json" else _finite(values)  # JSON has none, see `_parse`

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

    def samples_table(self, record_id: str, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """The same as an Arrow table of some columns, read in a tenth of a millisecond.

        Raises:
            OSError, pyarrow.ArrowException: when there is no such file, or it is damaged.
        """
        file = pyarrow.parquet.ParquetFile(self.samples_path(record_id), memory_map=True, pre_buffer=False)
        with file:
            return file.read(columns=columns, use_threads=False)


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[int]:
    """A handle for appending that no other writer has at the same time."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        lock(handle)
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
        is_begun = (path.parent / SHARDS_FOLDER).is_dir()
        fix = "go on with bench --resume" if is_begun else "write one with 'robustbench-deq attack MODEL --out DIR'"
        raise UsageError.of(str(folder), expected="a folder of records", got=got, fix=fix)
    records = _read(path)
    if not records:
        raise UsageError.of(
            str(path), expected="records", got="none", fix="write one with 'robustbench-deq attack MODEL --out DIR'"
        )
    return records


def load_folders(folders: Iterable[Path]) -> dict[Path, list[Record]]:
    """All records of several folders.

    Raises:
        UsageError: as `load_records`, and when two folders have the same record, such as two runs of one suite.
    """
    found = {Path(folder): load_records(folder) for folder in folders}
    places: dict[str, Path] = {}
    for folder, records in found.items():
        for record in records:
            if (other := places.setdefault(record.record_id, folder)) != folder:
                raise UsageError.of(
                    f"record {record.record_id}",
                    expected="in one folder only",
                    got=f"in {other} and {folder}",
                    fix="leave one of them out, or compare them with 'robustbench-deq report --compare A B'",
                )
    return found


def _read(path: Path) -> list[Record]:
    *lines, torn = path.read_bytes().split(b"\n")
    if torn:
        logger.warning("%s: line %d is torn and was ignored", path, len(lines) + 1)
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, where: str) -> Record:
    if b"NaN" not in line and b"Infinity" not in line:  # which JSON does not know, but pydantic does
        with contextlib.suppress(ValidationError):
            return Record.model_validate_json(line)
    try:
        values = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:  # malformed JSON or UTF-8
        values = None
    if not isinstance(values, dict):
        raise UsageError.of(where, expected="a record as one JSON object", got=_excerpt(line), fix="remove the line")
    _check_version(values.get("schema_version"), where)
    return validate(Record, values, where)


def _check_version(version: Any, where: str) -> None:
    if type(version) is not int or version != SCHEMA_VERSION:
        is_newer = type(version) is int and version > SCHEMA_VERSION
        raise UsageError.of(
            where,
            expected=f"schema_version {SCHEMA_VERSION}",
            got=repr(version),
            fix="install the newer robustbench-deq that wrote it" if is_newer else "remove the line",
        )


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
