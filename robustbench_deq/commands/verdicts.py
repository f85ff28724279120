"""What is printed of a verdict, for every command that has one."""

from __future__ import annotations

import click
from rich.table import Table

from robustbench_deq.commands.console import plain_console
from robustbench_deq.records.flags import flags
from robustbench_deq.records.record import Record
from robustbench_deq.report.tables.stages import stage_frame

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


def echo_stages(record: Record) -> None:
    """The stages of a standard evaluation as a table; nothing of another attack."""
    frame = stage_frame(record)
    if frame.empty:
        return
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(frame.columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in frame.itertuples(index=False):
        table.add_row(*row)
    click.echo("")
    plain_console(width=120).print(table)
