"""`bench`: a suite of models, attacks and threats, run to records."""

from __future__ import annotations

import collections
import sys
import time
from pathlib import Path

import click
from rich.table import Table

from robustbench_deq.attacks import build_attack
from robustbench_deq.commands.console import plain_console
from robustbench_deq.commands.display import suite_display
from robustbench_deq.commands.shared import tell_split
from robustbench_deq.configs import merge, parse_assignments, read_yaml, validate
from robustbench_deq.data import SplitName, load
from robustbench_deq.devices import choose_device, named_device
from robustbench_deq.errors import RunError, UsageError
from robustbench_deq.files import is_file, needing_space, output_folder
from robustbench_deq.records.store import RECORDS_FILE, load_records
from robustbench_deq.runner.executors import Executor, Processes, Ray, Serial
from robustbench_deq.runner.progress import EarlierPaces, SuiteProgress
from robustbench_deq.runner.run import SUITE_FILE, check_folder, check_models, claim_folder, missing_shards, run_suite
from robustbench_deq.runner.suite import Run, Shard, SuiteConfig, cut, plan
from robustbench_deq.threat_spec import ThreatSpec


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
    for doubt in _doubts([run for run, _ in runs]):
        click.echo(doubt, err=True)
    for data in dict.fromkeys(run.data for run, _ in runs):
        tell_split(data, parsed.split, "split: all with limit: {} takes all")
    target = out or Path("results/runs") / parsed.name
    _check_executor(kind, address, workers)
    if device is not None:  # of another machine, perhaps; without a name every worker looks for itself
        device = str(choose_device(device, "--device") if address is None else named_device(device, "--device"))
    if resume:
        check_folder(target, parsed, [run for run, _ in runs])
    elif not is_dry and is_file(target / SUITE_FILE):
        raise UsageError.of(
            f"output folder {target}", expected="a new one", got="that of a suite", fix="add --resume, or name another"
        )
    if address is None:  # what a cluster runs need not run here
        check_models([run for run, _ in runs])
    if is_dry:
        missing = missing_shards(runs, target) if resume else [shard for _, shards in runs for shard in shards]
        _echo_plan(runs, missing, EarlierPaces(_earlier_records(target), device), workers or 1)
        return
    advice = "finished shards are kept: make room, and go on with --resume"
    with output_folder(target, resume) as folder, needing_space(advice):
        executor = _make_executor(parsed, kind, address, workers, device)
        claim_folder(folder, parsed, [run for run, _ in runs])
        progress, start = SuiteProgress(runs, folder), time.monotonic()
        with suite_display(parsed.name, progress) as watch:
            try:
                outcome = run_suite(runs, folder, build_attack, executor, device, watch)
            except KeyboardInterrupt:
                raise RunError("interrupted; finished shards are kept, go on with --resume") from None
        seconds = time.monotonic() - start
        if not is_file(folder / SUITE_FILE):  # somebody has removed it; without it there is no going on
            claim_folder(folder, parsed, [run for run, _ in runs])
    records = load_records(target) if is_file(target / RECORDS_FILE) else []
    shown = f"; 'robustbench-deq report {target}' shows them" if records else ""
    click.echo(f"{len(records)} of {len(runs)} records in {target}{shown}")
    doubtful = [record for record in records if record.zero_gradient]
    if doubtful:
        worst = max(doubtful, key=lambda record: (record.num_zero_gradient or 0) / record.data.num_samples)
        click.echo(
            f"{len(doubtful)} of {len(records)} robust accuracies may be too high: {worst.label} on {worst.model} "
            f"met a {worst.zero_gradient}{' (and others)' if len(doubtful) > 1 else ''}",
            err=True,
        )
    click.echo(f"{seconds:.0f} s; attack and judge took {outcome.busy_seconds:.0f} s, all workers together", err=True)
    if outcome.failures:
        reasons = collections.Counter(outcome.failures.values()).most_common(3)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise RunError(
            f"{len(outcome.failures)} of {progress.num_shards} shards failed: {listed}; try them again with --resume"
        )
    if len(records) < len(runs):
        raise RunError(
            f"{len(runs) - len(records)} of {len(runs)} records are missing: files were removed from {target} while "
            "the suite ran; go on with --resume"
        )


def _doubts(runs: list[Run]) -> list[str]:
    """What is odd about the radii of a suite, each once."""
    sources = dict.fromkeys((run.data, run.split) for run in runs)
    num_pixels = {data: load(data, SplitName(split), 1).x[0].numel() for data, split in sources}
    asked = dict.fromkeys((run.norm, run.epsilon, num_pixels[run.data]) for run in runs)
    found = (ThreatSpec(norm=norm, epsilon=epsilon).build().doubt(size) for norm, epsilon, size in asked)
    return list(dict.fromkeys(filter(None, found)))


def _earlier_records(target: Path) -> list[Path]:
    """Folders that may hold some. An output folder of another kind is not searched: it may be the root of a disk."""
    return [Path("results"), *([target] if is_file(target / RECORDS_FILE) else [])]


def _check_executor(kind: str, address: str | None, workers: int | None) -> None:
    if address is not None and kind != "ray":
        raise UsageError.of("--address", expected="--executor ray", got=f"--executor {kind}", fix="add or drop it")
    if address is not None and workers is not None:
        raise UsageError.of("--workers", expected="none with --address", got=workers, fix="set resources in the suite")


def _make_executor(
    suite: SuiteConfig, kind: str, address: str | None, workers: int | None, device: str | None
) -> Executor:
    if kind == "ray":
        return Ray(address, workers, suite.resources, device)
    return Processes(workers) if workers is not None and workers > 1 else Serial()


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
