"""The command line that makes a record again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from robustbench_deq.records.record import Record


def command_of(record: Record) -> str:
    """The command line that makes the run again; the data digest tells whether it was on the same samples."""
    config = dict(record.attack_config)
    if record.protocol is not None:
        words = ["robustbench-deq", "evaluate", record.model, "--version", record.attack]
        words += ["--norm", record.threat.norm, "--epsilon", repr(record.threat.epsilon)]
        words += ["--data", record.data.name, "--split", record.data.split, "--limit", str(record.data.num_samples)]
        return shlex.join(words)
    if record.is_external:
        words = ["robustbench-deq", "judge", record.model, str(config.get("file") or "FILE.npz")]
    else:
        words = ["robustbench-deq", "attack", record.model, "--attack", record.attack]
    words += ["--norm", record.threat.norm, "--epsilon", repr(record.threat.epsilon)]
    words += ["--data", record.data.name, "--split", record.data.split, "--limit", str(record.data.num_samples)]
    words += ["--batch-size", str(record.batch_size)]
    if record.is_external:
        return shlex.join([*words, "--label", record.label])
    words += ["--seed", str(record.seed), "--label", record.label]
    if config.pop("targeted", False):
        words.append("--targeted")
    for key, value in flatten(config).items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
