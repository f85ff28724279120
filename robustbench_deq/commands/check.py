"""`check`: the gate."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.table import Table

from robustbench_deq.commands.console import plain_console
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import is_file, write_text, writing
from robustbench_deq.records.missing import read_missing
from robustbench_deq.runner.baseline import Runs, read_baseline, read_run, to_entries, update_baseline
from robustbench_deq.runner.gate import Check, compare, to_junit


def check(baseline: Path, folder: Path, reason: str | None, is_json: bool, junit: Path | None) -> None:
    """Compare the records in FOLDER with a baseline."""
    if reason is not None and (is_json or junit):
        raise UsageError.of("check", expected="--update or --json, --junit", got="both", fix="check after the update")
    runs = read_run(folder)
    if reason is not None:
        _update(baseline, folder, runs, reason)
        return
    checks = compare(read_baseline(baseline), to_entries(runs))
    if junit is not None:
        with writing(junit):
            write_text(junit, to_junit(checks))
    bad = [row for row in checks if not row.is_good]
    if is_json:
        rows = [row._asdict() for row in checks]
        click.echo(json.dumps({"schema_version": 1, "is_good": not bad, "checks": rows}))
    else:
        _echo_checks(checks)
    if bad:
        raise RunError(f"{len(bad)} of {len(checks)} checks failed: {bad[0].record}, {bad[0].field} first")


def _update(baseline: Path, folder: Path, runs: Runs, reason: str) -> None:
    """Of a whole run only, and what leaves the baseline is named: an attack must not leave the gate unseen."""
    missing = read_missing(folder, {record.record_id for record, _ in runs})
    if missing:
        got = f"{missing.failed.total()} failed shards and {missing.unfinished.total()} unfinished runs"
        raise UsageError.of(str(folder), expected="a whole run", got=got, fix="go on with bench --resume")
    before = read_baseline(baseline).entries if is_file(baseline) else []
    with writing(baseline):
        updated = update_baseline(baseline, runs, reason)
    kept = {entry.identity for entry in updated.entries}
    for entry in before:
        if entry.identity not in kept:
            click.echo(f"no longer in it: {entry.title}")
    click.echo(f"{len(updated.entries)} records written to {baseline}, update {len(updated.updates)}")


def _echo_checks(checks: list[Check]) -> None:
    """A row a check; what failed comes last, where a log ends."""
    table = Table(box=None, pad_edge=False)
    for column in ("record", "field", "baseline", "now", "tolerance", "verdict"):
        table.add_column(column, overflow="fold")
    for row in sorted(checks, key=lambda row: not row.is_good):
        table.add_row(*row[:5], "good" if row.is_good else "BAD")
    plain_console(width=None if sys.stdout.isatty() else 200).print(table)
    click.echo(f"{sum(row.is_good for row in checks)} of {len(checks)} checks are good")
