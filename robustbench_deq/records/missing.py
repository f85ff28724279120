"""What a suite's folder lacks: runs that have no record, because a shard has failed or because they were not finished.

    DIR/plan.json   the runs of the suite: record identifier, model and label of each

A shard that fails leaves a file with its reason, which goes when a later try succeeds (see `runner.shards`). Whoever
reads records alone does not see that an attack is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from robustbench_deq.files import read_json, write_json
from robustbench_deq.records.store import SHARDS_FOLDER

PLAN_FILE = "plan.json"
UNKNOWN = ("unknown", "unknown")

Attacked = tuple[str, str]
"""A model and the label of an attack on it."""


class Missing(NamedTuple):
    """What has no record, by model and attack: shards that have failed, and runs that nobody has finished."""

    failed: Counter[Attacked]
    unfinished: Counter[Attacked]

    def __bool__(self) -> bool:
        return bool(self.failed or self.unfinished)


def write_plan(folder: Path, planned: Mapping[str, Attacked]) -> None:
    """Write down what a suite is going to do, by the identifiers that its records will have."""
    runs = [{"record_id": record_id, "model": model, "label": label} for record_id, (model, label) in planned.items()]
    write_json(folder / PLAN_FILE, {"schema_version": 1, "runs": runs})


def read_missing(folder: Path, known: Collection[str]) -> Missing:
    """What a folder lacks beside the records that are `known`, by their identifiers.

    Where there is a plan, only what it names; without one no run is unfinished. A failed shard of a model that was
    changed and done since is in no plan any more. One whose file cannot be read is of `UNKNOWN`.
    """
    planned = _read_plan(Path(folder) / PLAN_FILE)
    failed = [_read_failure(path) for path in sorted((Path(folder) / SHARDS_FOLDER).glob("*.failed.json"))]
    open_ids = None if planned is None else planned.keys() - known
    counted = [
        (record_id, attacked)
        for record_id, attacked in failed
        if not record_id or (record_id not in known if open_ids is None else record_id in open_ids)
    ]
    unfinished = (open_ids or set()) - {record_id for record_id, _ in counted}
    return Missing(
        Counter(attacked for _, attacked in counted),
        Counter(attacked for record_id, attacked in (planned or {}).items() if record_id in unfinished),
    )


def _read_plan(path: Path) -> dict[str, Attacked] | None:
    """Model and label by record identifier; None where there is no plan."""
    try:
        return {run["record_id"]: (run["model"], run["label"]) for run in read_json(path)["runs"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_failure(path: Path) -> tuple[str, Attacked]:
    """Record identifier, empty where it is not known, model and label of the run."""
    try:
        content = read_json(path)
        return content.get("record_id", ""), (content["shard"]["run"]["model"], content["shard"]["run"]["label"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "", UNKNOWN
