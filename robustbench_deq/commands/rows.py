"""Rows on standard output, as listings print them."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.table import Table

from robustbench_deq.commands.console import plain_console


def echo_listing(
    rows: list[dict[str, Any]], kind: str, is_json: bool, names: Mapping[str, Sequence[str]] | None = None
) -> None:
    """A line a row, or one JSON object. On a terminal too narrow for that, a paragraph a row.

    Args:
        names: of other kinds, which have a line each, below the rows.
    """
    if is_json:
        click.echo(json.dumps({"schema_version": 1, kind: rows, **(names or {})}))
        return
    _echo_rows(rows)
    for other, listed in (names or {}).items():
        click.echo(f"\n{other}: {', '.join(listed)}")


def _echo_rows(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else ["name"]:
        table.add_column(column.replace("_", " "), no_wrap=True)
    for row in rows:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    unlimited = plain_console(width=1000)
    if not sys.stdout.isatty() or unlimited.measure(table).maximum <= shutil.get_terminal_size().columns:
        unlimited.print(table)
        return
    wrapper = textwrap.TextWrapper(shutil.get_terminal_size().columns, initial_indent="  ", subsequent_indent="  ")
    for (_, name), *facts in (row.items() for row in rows):
        click.echo(name)
        known = (f"{key.replace('_', ' ')} {value}" for key, value in facts if value is not None)
        click.echo(wrapper.fill("; ".join(known)))
