"""Frames: folders of records as pandas frames in long form, to filter, group and plot.

    from robustbench_deq.records import read_frames

    frames = read_frames("results/runs/quick")
    frames.records.groupby("label")["robust_accuracy"].mean()
    frames.curve.merge(frames.records[["record_id", "model", "label"]], on="record_id")

In all of them `folder` and `record_id` say which record a row is of. `results/README.md` tells what the columns mean.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow

from robustbench_deq.errors import UsageError
from robustbench_deq.records.record import CurvePoint, Record, to_json
from robustbench_deq.records.store import RecordStore, load_records
from robustbench_deq.shown import briefly_shown

logger = logging.getLogger(__name__)

KEYS = ["folder", "record_id"]


@briefly_shown
class Frames(NamedTuple):
    """Long frames of one or more folders.

    Attributes:
        records: a row a record; nested fields have dotted names such as `cost.cell_evals`.
        curve: a row a judged snapshot, with the fields of `CurvePoint`.
        residuals: a row a solver step of an attack: `step`, counted from 1, and `residual`.
        samples: a row a sample of a record, with the columns of `SAMPLE_COLUMNS`.
    """

    records: pd.DataFrame
    curve: pd.DataFrame
    residuals: pd.DataFrame
    samples: pd.DataFrame


def read_frames(*folders: Path | str) -> Frames:
    """The records of folders that `attack --out` or `bench` wrote, in the order in which they were written.

    A record whose samples are missing or unreadable has no rows in `samples`, which the log says.

    Raises:
        UsageError: when no folder is named, for a folder without records, and for a damaged line.
    """
    if not folders:
        raise UsageError.of("read_frames", expected="a folder of records", got="none", fix="name one")
    stores = [RecordStore(Path(folder)) for folder in folders]
    found = [(store, record) for store in stores for record in load_records(store.folder)]
    records = to_frame([record for _, record in found])
    records.insert(0, "folder", [str(store.folder) for store, _ in found])
    keyed = [((str(store.folder), record.record_id), record) for store, record in found]
    curve = [(*key, *vars(point).values()) for key, record in keyed for point in record.curve]
    residuals = [(*key, *pair) for key, record in keyed for pair in enumerate(record.residuals, start=1)]
    return Frames(
        records,
        pd.DataFrame(curve, columns=[*KEYS, *CurvePoint.model_fields]),
        pd.DataFrame(residuals, columns=[*KEYS, "step", "residual"]).astype({"residual": float}),
        _samples(found),
    )


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row a record; nested fields get dotted names such as `cost.cell_evals`. Curves and residuals are left out."""
    rows = []
    for record in records:
        row = to_json(record)
        row["robust_accuracy_low"], row["robust_accuracy_high"] = row.pop("robust_accuracy_ci")
        del row["curve"], row["residuals"]
        rows.append({key: value for key, value in row.items() if value != {}})
    return pd.json_normalize(rows)


def _samples(found: Iterable[tuple[RecordStore, Record]]) -> pd.DataFrame:
    tables, keys = [], []
    for store, record in found:
        try:
            tables.append(store.samples_table(record.record_id))
            keys.append((str(store.folder), record.record_id))
        except (OSError, pyarrow.ArrowException) as error:
            logger.warning("samples of record %s were left out: %s", record.record_id, error)
    if not tables:
        return pd.DataFrame(columns=KEYS)
    frame = pyarrow.concat_tables(tables, promote_options="default").to_pandas()
    rows = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    for place, name in enumerate(KEYS):
        values, codes = np.unique([key[place] for key in keys], return_inverse=True)
        frame.insert(place, name, pd.Categorical.from_codes(codes[rows], values))
    return frame
