"""Raised flags in tables and on pages, see `records.flags`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from robustbench_deq.records.flags import FLAGS, Flag, flags
from robustbench_deq.records.record import Record
from robustbench_deq.report.tables.text import MISSING

COLUMN = "Flags"
COLUMN_MEANING = "what the sanity panel found to doubt; – where it has not looked"


class Doubt(NamedTuple):
    """A flag, and the records that raise it."""

    flag: Flag
    records: Sequence[Record]

    @property
    def title(self) -> str:
        return f"{self.flag.name} (unreliable)" if self.flag.is_red else self.flag.name

    @property
    def text(self) -> str:
        """What it means and when it is raised, in one sentence."""
        return f"{self.flag.meaning}. Raised when {self.flag.raised_when}."


def has_panel(records: Iterable[Record]) -> bool:
    return any(record.probes is not None for record in records)


def find_doubts(records: Iterable[Record]) -> list[Doubt]:
    """The flags that any of the records raise, in the order of `FLAGS`."""
    raisers: dict[str, list[Record]] = {}
    for record in records:
        for flag in flags(record):
            raisers.setdefault(flag.name, []).append(record)
    return [Doubt(flag, raisers[flag.name]) for flag in FLAGS if flag.name in raisers]


def names_text(records: Sequence[Record]) -> str:
    """The names of the flags that any of the records raise."""
    if not has_panel(records):
        return MISSING
    return ", ".join(doubt.flag.name for doubt in find_doubts(records)) or "none"
