"""The store: records as append-only files in a folder.

    DIR/records.jsonl                  one `Record` a line, as JSON
    DIR/samples/<record_id>.parquet    the same run, a row a sample
    DIR/images/<record_id>.npz         a few of its images, where they were kept (see `records.images`)

A record is written once and never changed. Its samples are in place before its line is, so every line that can be read
has its samples. A line counts only once its newline is there: a process that dies while writing leaves a torn last
line, which readers skip and the next writer removes. Lines of another schema version are refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
from pydantic import ValidationError

from robustbench_deq.configs import validate
from robustbench_deq.errors import UsageError, excerpt
from robustbench_deq.files import is_disk_full, is_file, is_folder, lock, open_own, own_path, replacing
from robustbench_deq.records.record import SCHEMA_VERSION, Record, to_json

logger = logging.getLogger(__name__)

RECORDS_FILE = "records.jsonl"
SAMPLES_FOLDER = "samples"
SHARDS_FOLDER = "shards"


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
            UsageError: when the number of rows is wrong, the identifier is taken, or the folder cannot be written or
                leads elsewhere by a symbolic link.
            OSError: when the disk is full; nothing of the record is kept.
        """
        if len(samples) != record.data.num_samples:
            raise UsageError.of(
                f"samples of record {record.record_id}",
                expected=f"{record.data.num_samples} rows",
                got=len(samples),
                fix="pass one row for every sample of the record",
            )
        line = json.dumps(to_json(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        own_path(self.folder / SAMPLES_FOLDER)
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
            if is_disk_full(error):
                raise
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
        if is_file(path) and path.stat().st_size == 0:
            path.unlink()
            if is_folder(samples) and not any(samples.iterdir()):
                samples.rmdir()

    def _catch_up(self, handle: int) -> None:
        """Cut a torn last line off and note the identifiers of the lines that are new since the last call."""
        size = os.fstat(handle).st_size
        if self._seen_bytes > size:  # somebody replaced the file
            self._seen, self._seen_bytes = set(), 0
        *lines, torn = os.pread(handle, size - self._seen_bytes, self._seen_bytes).split(b"\n")
        os.ftruncate(handle, size - len(torn))
        where = f"{self.folder / RECORDS_FILE}, a line"
        self._seen |= {_parse(line, where).record_id for line in lines}
        self._seen_bytes = size - len(torn)

    def identifiers(self) -> set[str]:
        """Of all records that are there."""
        path = self.folder / RECORDS_FILE
        return {record.record_id for record in _read(path)} if is_file(path) else set()

    def load_samples(self, record_id: str) -> pd.DataFrame:
        """The per-sample rows of a record. Raises `UsageError` when there are none, or they cannot be read."""
        path = self.samples_path(record_id)
        if not is_file(path):
            raise UsageError.of(str(path), expected="the samples of a record", got="no file", fix="check the record_id")
        try:
            return pd.read_parquet(path)
        except Exception as error:  # whatever the readers of Arrow and pandas raise for a damaged file
            raise UsageError.of(
                str(path), expected="the samples of a record", got="a damaged file", fix="restore it, or run again"
            ) from error

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
    handle = open_own(path, os.O_APPEND)
    try:
        lock(handle)
        yield handle
    finally:
        os.close(handle)


def _write_line(handle: int, line: bytes) -> None:
    start = os.fstat(handle).st_size
    try:
        while line:
            line = line[os.write(handle, line) :]
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, start)
        raise


def load_records(folder: Path) -> list[Record]:
    """All records of a folder, in the order in which they were written.

    Raises:
        UsageError: for a folder without records, or the first line that is not a record of this schema version.
    """
    path = Path(folder) / RECORDS_FILE
    if not is_file(path):
        got = f"no {RECORDS_FILE} in it" if is_folder(path.parent) else "no such folder"
        is_begun = is_folder(path.parent / SHARDS_FOLDER)
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
        json.dumps(values, ensure_ascii=False).encode()  # escapes can stand for halves of letters
    except (ValueError, RecursionError):  # malformed JSON or UTF-8, or nested too deeply
        values = None
    if not isinstance(values, dict):
        got = excerpt(line.decode(errors="replace"))
        raise UsageError.of(where, expected="a record as one JSON object", got=got, fix="remove the line")
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
