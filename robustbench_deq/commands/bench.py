"""`bench`: a suite of models, attacks and threats, run to records."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import click
from rich.table import Table

from robustbench_deq.commands.console import plain_console
from robustbench_deq.commands.shared import tell_split
from robustbench_deq.commands.suite_run import Where, check_target, run_in, tell_doubts
from robustbench_deq.configs import merge, parse_assignments, read_yaml, validate
from robustbench_deq.files import is_file
from robustbench_deq.records.record import Record
from robustbench_deq.records.store import RECORDS_FILE
from robustbench_deq.runner.progress import EarlierPaces
from robustbench_deq.runner.run import check_models, missing_shards
from robustbench_deq.runner.suite import Run, Shard, SuiteConfig, cut, plan


def bench(
    suite: Path,
    assignments: tuple[str, ...],
    out: Path | None,
    resume: bool,
    workers: int | None,
    kind: str,
    address: str | None,
    is_dry: bool,
    device: str | None,
) -> None:
    """Run SUITE, a YAML file of models, attacks and threats, and leave a folder of records."""
    parsed = validate(SuiteConfig, merge(read_yaml(suite), parse_assignments(assignments)), str(suite))
    runs = [(run, cut(run, parsed.batches_per_shard)) for run in plan(parsed)]
    tell_doubts(runs)
    for data in dict.fromkeys(run.data for run, _ in runs):
        tell_split(data, parsed.split, "split: all with limit: {} takes all")
    target = out or Path("results/runs") / parsed.name
    where = Where(workers, kind, address, device).checked()
    if resume or not is_dry:
        check_target(parsed, runs, target, resume)
    if address is None:  # what a cluster runs need not run here
        check_models([run for run, _ in runs])
    if is_dry:
        missing = missing_shards(runs, target) if resume else [shard for _, shards in runs for shard in shards]
        _echo_plan(runs, missing, EarlierPaces(_earlier_records(target), where.device), workers or 1)
        return
    run_in(parsed, runs, target, resume, where, lambda records: _echo_records(records, target, len(runs)))


def _echo_records(records: list[Record], target: Path, num_runs: int) -> None:
    """How many records there are, and which of them are doubtful."""
    shown = f"; 'robustbench-deq report {target}' shows them" if records else ""
    click.echo(f"{len(records)} of {num_runs} records in {target}{shown}")
    doubtful = [record for record in records if record.zero_gradient]
    if doubtful:
        worst = max(doubtful, key=lambda record: (record.num_zero_gradient or 0) / record.data.num_samples)
        click.echo(
            f"{len(doubtful)} of {len(records)} robust accuracies may be too high: {worst.label} on {worst.model} "
            f"met a {worst.zero_gradient}{' (and others)' if len(doubtful) > 1 else ''}",
            err=True,
        )


def _earlier_records(target: Path) -> list[Path]:
    """Folders that may hold some. An output folder of another kind is not searched: it may be the root of a disk."""
    return [Path("results"), *([target] if is_file(target / RECORDS_FILE) else [])]


def _echo_plan(
    runs: list[tuple[Run, list[Shard]]], missing: list[Shard], paces: EarlierPaces, num_workers: int
) -> None:
    """The runs of a suite, with the seconds that earlier records let expect for what is missing."""
    samples = collections.Counter[str]()
    for shard in missing:
        samples[shard.run.key] += shard.end - shard.begin
    table = Table(box=None, pad_edge=False)
    columns = ("model", "attack", "threat", "data", "samples", "shards", "to do", "expected (s)", "threads", "as in")
    for column in columns:
        table.add_column(column, overflow="fold")
    whole, num_unknown = 0.0, 0
    for run, shards in runs:
        pace, num_samples = paces.of(run), samples[run.key]
        whole += (pace.seconds if pace else 0.0) * num_samples
        num_unknown += pace is None and num_samples > 0
        expected = ("-", "-", "-")
        if pace is not None:
            expected = (f"{pace.seconds * num_samples:.1f}", str(pace.num_threads or "-"), str(pace.source))
        counts = (str(run.num_samples), str(len(shards)), str(num_samples))
        table.add_row(run.model, run.label, f"{run.norm} {run.epsilon:g}", run.data, *counts, *expected)
    plain_console(width=None if sys.stdout.isatty() else 240).print(table)
    click.echo(f"{len(runs)} runs, {sum(len(shards) for _, shards in runs)} shards, {len(missing)} of them to do")
    num_to_do = sum(count > 0 for count in samples.values())
    if num_to_do and num_unknown == num_to_do:
        click.echo("expected: unknown, since no earlier record below results/ is of these models and attacks")
        return
    shared = f" ({whole / num_workers:.0f} s if {num_workers} workers did {num_workers} times as much)"
    click.echo(
        f"expected: {whole:.0f} s of attack and judge with one worker{shared if num_workers > 1 else ''}, "
        f"with the device and threads of the earlier records; {num_unknown} of {num_to_do} runs to do have none"
    )
