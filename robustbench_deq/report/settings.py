"""Settings: the model, threat and samples that rows must share to be compared, and how they are called in print.

Robust accuracies are comparable only between records of the same weights, the same ball and the same samples, so every
table, plot and page groups by `Setting`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from robustbench_deq.errors import UsageError
from robustbench_deq.records.record import Record

_NORMS = {"l1": "L1", "l2": "L2", "linf": "L∞"}


class Setting(NamedTuple):
    """What makes records comparable. Sorts by model, then threat, then data.

    `sha256` is that of the weights, or of the file of a `file.py:function`; empty where neither is known.
    """

    model: str
    norm: str
    epsilon: float
    data: str
    split: str
    num_samples: int
    digest: str
    sha256: str

    @classmethod
    def of(cls, record: Record) -> Setting:
        threat, data = record.threat, record.data
        return cls(
            model=record.model,
            norm=threat.norm,
            epsilon=threat.epsilon,
            data=data.name,
            split=data.split,
            num_samples=data.num_samples,
            digest=data.digest,
            sha256=record.model_sha256 or record.file_sha256 or "",
        )


class SettingNames(NamedTuple):
    """A setting in words."""

    model: str
    threat: str
    data: str


def group_by_setting(records: Sequence[Record]) -> dict[Setting, list[Record]]:
    """Records by setting, settings in order; within one, the lowest robust accuracy first, then the lowest cost.

    Raises:
        UsageError: when there are no records.
    """
    if not records:
        raise UsageError.of("report", expected="at least one record", got="none", fix="run an attack first")
    groups: dict[Setting, list[Record]] = defaultdict(list)
    for record in sorted(records, key=_rank):
        groups[Setting.of(record)].append(record)
    return {setting: groups[setting] for setting in sorted(groups)}


def _rank(record: Record) -> tuple[float, float, str, int, str]:
    """The last three only make the order independent of that of the records."""
    cost = record.cost.cell_evals + record.cost.cell_vjps
    return record.robust_accuracy, cost, record.label, record.seed, record.record_id


def setting_names(settings: Iterable[Setting]) -> dict[Setting, SettingNames]:
    """What to call each setting. Digests appear only where the names would not tell two settings apart."""
    distinct = sorted(set(settings))
    weights = _ambiguous((s.model, s.sha256) for s in distinct)
    samples = _ambiguous((f"{s.data} {s.split}, {s.num_samples}", s.digest) for s in distinct)
    return {
        s: SettingNames(
            model=f"{s.model} ({s.sha256[:8] or 'no digest'})" if s.model in weights else s.model,
            threat=format_threat(s.norm, s.epsilon),
            data=f"{s.data} {s.split}"
            + (f" ({s.digest[:8]})" if f"{s.data} {s.split}, {s.num_samples}" in samples else ""),
        )
        for s in distinct
    }


def _ambiguous(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """Names that stand for more than one digest."""
    counts = Counter(name for name, _ in set(pairs))
    return {name for name, count in counts.items() if count > 1}


def format_threat(norm: str, epsilon: float) -> str:
    """A ball as it is written in papers: "L2, ε = 0.5", "L∞, ε = 8/255"."""
    return f"{format_norm(norm)}, ε = {_format_epsilon(epsilon)}"


def format_norm(norm: str) -> str:
    """ "L1", "L2", "L∞", or another norm's own name."""
    return _NORMS.get(norm, norm)


def _format_epsilon(epsilon: float) -> str:
    short, levels = f"{epsilon:g}", epsilon * 255
    if math.isclose(float(short), epsilon, rel_tol=1e-9) or not math.isclose(levels, round(levels), rel_tol=1e-6):
        return short
    return f"{round(levels)}/255"
