"""Supplements: what lies beside the records of a folder: verdicts of single samples, images, cards, what is missing.

All of it may be missing. A report then says less, and nothing else: verdicts that cannot be read, or that contradict
their record, are left out with a warning in the log.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from robustbench_deq.errors import UsageError
from robustbench_deq.files import is_file, read_json
from robustbench_deq.records.images import images_path, load_images
from robustbench_deq.records.missing import Missing, read_missing
from robustbench_deq.records.record import Record
from robustbench_deq.records.store import RecordStore

logger = logging.getLogger(__name__)

_ANSWERS = ("is_clean_correct", "is_robust", "is_converged", "is_failed")
_SCHEMA = pyarrow.schema([("sample_id", pyarrow.int64()), *((name, pyarrow.bool_()) for name in _ANSWERS)])
MODEL_FILE = "model.json"
_FACTS = {"name": str, "family": str, "config": dict, "sha256": str, "num_parameters": int, "card": dict}

ModelFacts = Mapping[str, Any]
"""The content of a `model.json`: name, family, config, sha256, number of parameters, and the card itself."""


@dataclass(frozen=True, eq=False)
class SampleVerdicts:
    """What was found of each sample of a record, as booleans `(n,)` in the order of the samples' numbers."""

    is_clean: np.ndarray
    is_robust: np.ndarray
    is_converged: np.ndarray
    is_failed: np.ndarray


@dataclass(frozen=True, eq=False)
class GalleryRow:
    """One sample: three arrays of one shape `(channels, height, width)`, its true class and the two predictions.

    Raises:
        UsageError: for another number of channels or axes, or shapes that differ.
    """

    clean: np.ndarray
    perturbation: np.ndarray
    adversarial: np.ndarray
    label: str
    clean_prediction: str
    adversarial_prediction: str

    def __post_init__(self) -> None:
        shapes = {np.shape(image) for image in (self.clean, self.perturbation, self.adversarial)}
        shape = min(shapes)
        if len(shapes) > 1 or len(shape) != 3 or shape[0] not in (1, 3):
            raise UsageError.of(
                "gallery",
                expected="three images of one shape (1 or 3, height, width)",
                got=" and ".join(map(str, sorted(shapes))),
                fix="pass arrays of one sample, channels first",
            )


@dataclass(frozen=True)
class Supplements:
    """By record id: verdicts and a gallery. By model name: the card. By model and attack: what has no record."""

    verdicts: Mapping[str, SampleVerdicts] = field(default_factory=dict)
    galleries: Mapping[str, Sequence[GalleryRow]] = field(default_factory=dict)
    cards: Mapping[str, ModelFacts] = field(default_factory=dict)
    missing: Missing = field(default_factory=lambda: Missing(Counter(), Counter()))

    @property
    def warning(self) -> str:
        """Sentences about the failed shards and the unfinished runs, whose attacks are missing; empty without any."""
        named = [_named(*kind) for kind in zip(self.missing, ("failed shard", "unfinished run"), strict=True)]
        return " ".join([*filter(None, named), "Go on with bench --resume."]) if self.missing else ""


def _named(counts: Mapping[tuple[str, str], int], kind: str) -> str:
    if not counts:
        return ""
    total = sum(counts.values())
    runs = "; ".join(f"{model}, {label} ({number})" for (model, label), number in sorted(counts.items()))
    left = "has left" if total == 1 else "have left"
    return (
        f"{total:,} {kind if total == 1 else f'{kind}s'} {left} no record, so these models met fewer attacks than the "
        f"others: {runs}."
    )


def read_supplements(
    folders: Mapping[Path, Sequence[Record]], cards: Mapping[str, ModelFacts] | None = None
) -> Supplements:
    """What lies in folders beside the records that were read from them.

    Args:
        cards: passed through.
    """
    missing = []
    verdicts: dict[str, SampleVerdicts] = {}
    images: dict[str, Path] = {}
    for folder, records in folders.items():
        verdicts |= _read_verdicts(RecordStore(folder), records)
        images |= {record.record_id: folder for record in records if images_path(folder, record.record_id).is_file()}
        missing.append(read_missing(folder, {record.record_id for record in records}))
    failed, unfinished = (sum((found[i] for found in missing), Counter()) for i in (0, 1))
    return Supplements(verdicts, Galleries(images), cards or {}, Missing(failed, unfinished))


def read_model_facts(models: Iterable[str], weights_folder: Path) -> dict[str, ModelFacts]:
    """What is known of models by their names in records; nothing of those that are files or no longer there.

    Read as plain JSON, since what loads models needs torch, which takes longer to import than a report to be made.

    Args:
        weights_folder: of the registered models, a folder each; any other name is that of a folder.
    """
    found = {}
    for model in sorted(models):
        registered = weights_folder / model / MODEL_FILE
        path = registered if Path(model).name == model and is_file(registered) else Path(model) / MODEL_FILE
        if is_file(path) and (facts := _read_facts(path)) is not None:
            found[model] = facts
    return found


def _read_facts(path: Path) -> ModelFacts | None:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        content = None
    if isinstance(content, dict) and all(isinstance(content.get(key), kind) for key, kind in _FACTS.items()):
        return content
    logger.warning("%s: not the description of a model; its card was left out", path)
    return None


class Galleries(Mapping[str, Sequence[GalleryRow]]):
    """Images of records by their id, read when they are asked for: few of many are shown.

    Args:
        folders: the records that have some, and where they lie.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = folders

    def __getitem__(self, record_id: str) -> Sequence[GalleryRow]:
        """None of them where they cannot be read."""
        return _read_gallery(self._folders[record_id], record_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __len__(self) -> int:
        return len(self._folders)


def _read_verdicts(store: RecordStore, records: Sequence[Record]) -> dict[str, SampleVerdicts]:
    """By record id. Converted to arrays all at once, since records are many and short."""
    known = [(record, table) for record in records if (table := _read_table(store, record)) is not None]
    if not known:
        return {}
    whole = pyarrow.concat_tables(table for _, table in known)
    sample_ids, *answers = (whole.column(name).to_numpy() for name in _SCHEMA.names)
    found = {}
    for (record, table), end in zip(known, itertools.accumulate(len(table) for _, table in known), strict=True):
        rows = slice(end - len(table), end)
        order = np.argsort(sample_ids[rows], kind="stable")
        verdicts = SampleVerdicts(*(answer[rows][order] for answer in answers))
        if _is_of(verdicts, record):
            found[record.record_id] = verdicts
        else:
            path = store.samples_path(record.record_id)
            logger.warning("%s: the verdicts are not those of the record and were left out", path)
    return found


def _read_table(store: RecordStore, record: Record) -> pyarrow.Table | None:
    try:
        table = store.samples_table(record.record_id, _SCHEMA.names).select(_SCHEMA.names)
        if any(column.null_count for column in table.columns):
            raise pyarrow.ArrowInvalid("a verdict is missing")
        return table if table.schema.equals(_SCHEMA) else table.cast(_SCHEMA)
    except (OSError, KeyError, pyarrow.ArrowException):
        logger.warning("%s: no verdicts could be read", store.samples_path(record.record_id))
        return None


def _is_of(verdicts: SampleVerdicts, record: Record) -> bool:
    size = len(verdicts.is_robust)
    return size == record.data.num_samples and np.count_nonzero(verdicts.is_robust) == num_robust(record)


def num_robust(record: Record) -> int:
    """How many samples the record counts as robust."""
    return round(record.robust_accuracy * record.data.num_samples)


def _read_gallery(folder: Path, record_id: str) -> list[GalleryRow]:
    images = load_images(folder, record_id)
    if images is None:
        return []
    try:
        return [
            GalleryRow(clean, adversarial - clean, adversarial, *map(str, names))
            for clean, adversarial, *names in zip(*images, strict=True)
        ]
    except ValueError as error:
        logger.warning("images of record %s: %s", record_id, error)
        return []
