"""What a suite's folder lacks: runs that have no record, because a shard has failed or because they were not finished.

    DIR/plan.json   the runs of the suite: record identifier, model and label of each

A shard that fails leaves a file with its reason, which goes when a later try succeeds (see `bench.shards`). Whoever
reads records alone does not see that an attack is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from robustbench_deq.bench.records import SHARDS_FOLDER
from robustbench_deq.files import write_json

if TYPE_CHECKING:
    from robustbench_deq.bench.suite import Run

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


def write_plan(folder: Path, runs: Sequence[Run]) -> None:
    planned = [{"record_id": run.key, "model": run.model, "label": run.label} for run in runs]
    write_json(folder / PLAN_FILE, {"schema_version": 1, "runs": planned})


def read_missing(folder: Path, known: Collection[str]) -> Missing:
    """What a folder lacks beside the records that are `known`, by their identifiers. Without a plan none is unfinished.

    A failed shard whose file cannot be read is one of `UNKNOWN`.
    """
    failed = Counter(map(_failed_of, sorted((Path(folder) / SHARDS_FOLDER).glob("*.failed.json"))))
    try:
        planned = [
            (run["model"], run["label"])
            for run in _read(Path(folder) / PLAN_FILE)["runs"]
            if run["record_id"] not in known
        ]
    except (OSError, ValueError, KeyError, TypeError):
        planned = []
    return Missing(failed, Counter(attacked for attacked in planned if attacked not in failed))


def _failed_of(path: Path) -> Attacked:
    try:
        run = _read(path)["shard"]["run"]
        return run["model"], run["label"]
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
