"""Failures: the shards of a folder that have failed, and so the records that it lacks.

A shard that fails leaves a file with its reason, which goes when a later try succeeds (see `bench.shards`). Until then
its run has no record, and whoever reads records alone does not see that an attack is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from robustbench_deq.bench.records import SHARDS_FOLDER

UNKNOWN = ("unknown", "unknown")


def read_failures(folder: Path) -> Counter[tuple[str, str]]:
    """How many shards of each model and attack, by its label, have failed; files that cannot be read are `UNKNOWN`."""
    return Counter(_run_of(path) for path in sorted((Path(folder) / SHARDS_FOLDER).glob("*.failed.json")))


def _run_of(path: Path) -> tuple[str, str]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))["shard"]["run"]
        return run["model"], run["label"]
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN
