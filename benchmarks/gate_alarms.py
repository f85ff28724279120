"""Does the gate raise false alarms? Repetitions of a suite with other batch sizes, threads and workers, each checked.

    python -m benchmarks.gate_alarms

Nothing in the code changes between the repetitions, so that every alarm is a false one. What came closest to one is
reported as well: whether the tolerances have room.

The gate compares seconds only at the batch size of the baseline, which therefore is that of every other repetition.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from benchmarks.timing import RESULTS, keep, say
from robustbench_deq.attacks import build_attack
from robustbench_deq.files import replacing
from robustbench_deq.runner.baseline import Baseline, BaselineEntry, read_baseline, read_run, to_entries
from robustbench_deq.runner.executors import Executor, Processes, Serial
from robustbench_deq.runner.gate import compare, seconds_by_attack
from robustbench_deq.runner.run import run_suite
from robustbench_deq.runner.suite import SuiteConfig, cut, plan, read_suite

OTHER_BATCH_SIZES = (32, 256, 100, 64, 16, 48)
PLACES = ((2, 1), (1, 1), (1, 2))
"""Workers, and threads of each; several workers share the cores as they do in `bench`."""


def turns(batch_size: int) -> Iterator[tuple[int, int, int]]:
    """Batch size, workers and threads of all repetitions, without end: each place meets each size within 36."""
    for shift in itertools.count():
        for number, other in enumerate(OTHER_BATCH_SIZES):
            where = PLACES[(number + shift) % len(PLACES)]
            yield batch_size, *where
            yield other, *where


@contextlib.contextmanager
def place(workers: int, threads: int) -> Iterator[Executor]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield Processes(workers) if workers > 1 else Serial()
    finally:
        torch.set_num_threads(before)


def repeat(suite: SuiteConfig, workers: int, threads: int) -> list[BaselineEntry]:
    """What one run of the suite gives, as a baseline would keep it."""
    runs = [(run, cut(run, suite.batches_per_shard)) for run in plan(suite)]
    with tempfile.TemporaryDirectory() as name, place(workers, threads) as executor:
        run_suite(runs, Path(name), build_attack, executor)
        return to_entries(read_run(Path(name)))


def measure(baseline: Baseline, entries: list[BaselineEntry]) -> tuple[dict[str, Any], list[str]]:
    """How far the entries are from the baseline, and the alarms."""
    known = {entry.identity: entry for entry in entries}
    pairs = [(old, known[old.identity]) for old in baseline.entries if old.identity in known]
    by_attack = seconds_by_attack(pairs).values()
    factors = [away(statistics.median_low(found)) for found in by_attack]
    of_one = [away(factor) for found in by_attack for factor in found]
    flips = [max(differing(old.is_clean, new.is_clean), differing(old.is_robust, new.is_robust)) for old, new in pairs]
    bad = [check for check in compare(baseline, entries) if not check.is_good]
    row = {
        "alarms": len(bad),
        "verdicts that differ, most": max(flips),
        "evaluations, most": max(change(old.cell_evals, new.cell_evals) for old, new in pairs),
        "VJPs, most": max(change(old.cell_vjps, new.cell_vjps) for old, new in pairs),
        "seconds, largest factor": round(max(factors), 2) if factors else "",
        "of one record, not judged": round(max(of_one), 2) if of_one else "",
    }
    return row, [f"{check.record}: {check.field} {check.baseline}, now {check.now}" for check in bad]


def differing(before: str, after: str) -> int:
    """Samples whose verdict is another one."""
    return (int(before, 16) ^ int(after, 16)).bit_count()


def away(factor: float) -> float:
    """From 1, up or down."""
    return max(factor, 1 / factor)


def change(before: float, after: float) -> float:
    return round(abs(after / before - 1), 4) if before else float(after > 0)


@click.command()
@click.option("--suite", "path", type=click.Path(path_type=Path), default=Path("configs/suites/quick.yaml"))
@click.option("--baseline", "kept", type=click.Path(path_type=Path), default=RESULTS / "baselines" / "quick.json")
@click.option("--models", default="*", show_default=True, help="of the suite, by a wildcard")
@click.option("--repeats", default=50, show_default=True)
@click.option("--name", default="gate_alarms", show_default=True, help="of the files in results/")
def main(path: Path, kept: Path, models: str, repeats: int, name: str) -> None:
    suite, baseline = read_suite(path), read_baseline(kept)
    known = [entry for entry in baseline.entries if fnmatch.fnmatch(entry.model, models)]
    baseline = baseline.model_copy(update={"entries": known})
    suite = suite.model_copy(update={"models": list(dict.fromkeys(entry.model for entry in known))})
    rows, alarms = [], []
    taken = itertools.islice(turns(known[0].batch_size), repeats)
    for turn, (batch_size, workers, threads) in enumerate(taken, start=1):
        start = time.monotonic()
        entries = repeat(suite.model_copy(update={"batch_size": batch_size}), workers, threads)
        row, found = measure(baseline, entries)
        seconds = round(time.monotonic() - start)
        rows.append({"batch size": batch_size, "workers": workers, "threads": threads, **row, "wall (s)": seconds})
        alarms += found
        place_text = f"batch size {batch_size}, {workers} x {threads} threads"
        say(f"{turn}/{repeats}  {place_text}: {len(found)} alarms, {seconds} s")
        with replacing(RESULTS / f"{name}.csv") as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)
    frame = pd.DataFrame(rows)
    facts = {
        "repetitions": len(rows),
        "that compared seconds": int((frame["seconds, largest factor"] != "").sum()),
        "with an alarm": int((frame["alarms"] > 0).sum()),
        "alarms": alarms,
        "tolerances": baseline.tolerances.model_dump(),
    }
    keep(name, "False alarms of the gate", rows, facts)


if __name__ == "__main__":
    main()
