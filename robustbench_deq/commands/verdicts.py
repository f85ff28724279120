"""What is printed of a verdict, for every command that has one."""

from __future__ import annotations

from robustbench_deq.records.flags import flags
from robustbench_deq.records.record import Record

WIDTH = 18
"""Of what stands before a value."""


def flag_lines(record: Record) -> list[str]:
    """A line for each flag that the record raises, and one if it raises none; none where no panel has looked."""
    if record.probes is None:
        return []
    raised = flags(record)
    lines = [f"{'red flag' if flag.is_red else 'flag':<{WIDTH}}{flag.name}: {flag.meaning}" for flag in raised]
    if any(flag.is_red for flag in raised):
        lines.append(f"{'':<{WIDTH}}a red flag makes the robust accuracy unreliable: it is not ranked")
    return lines or [f"{'flags':<{WIDTH}}none raised"]
