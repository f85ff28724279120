"""What the runner itself costs, and what a second worker gains.

    python -m benchmarks.runner_overhead

Overhead is the share of the workers' time that is neither attack nor judge, both of which every shard times by itself:

    1 - (seconds of attack + seconds of judge) / (workers x seconds from the first shard's start to the last record)

It holds loading models and data in every worker, the first gradient on each model, reading, writing and locking
shards, assembling records, and waiting for the other worker at the start and at the end. It does not hold what comes
before the first shard: starting Python, importing torch, planning. Every pass has a process of its own that has loaded
nothing, so that no pass finds the models and data of another in memory.

The speed-up is that of two workers of one thread each over one worker of two threads, without and with the start of
the workers, in which each imports torch. (The one worker is the process itself, which has imported it before.)

Target: an overhead under 3 %.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.timing import keep, say
from robustbench_deq.attacks import build_attack
from robustbench_deq.runner.executors import Processes, Serial
from robustbench_deq.runner.run import run_suite
from robustbench_deq.runner.shards import ShardStore
from robustbench_deq.runner.suite import Run, Shard, cut, plan, read_suite

NUM_WORKERS = 2
GOAL = 0.03


def measure(runs: list[tuple[Run, list[Shard]]], num_workers: int) -> dict[str, float]:
    """Seconds of one pass of a suite in a new folder."""
    torch.set_num_threads(NUM_WORKERS)
    executor = Processes(num_workers, num_threads=1) if num_workers > 1 else Serial()
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.time()
        outcome = run_suite(runs, folder, build_attack, executor)
        end = time.time()
        if outcome.failures:
            raise RuntimeError(f"shards failed: {set(outcome.failures.values())}")
        times = [ShardStore(folder).times(shard) for _, shards in runs for shard in shards]
    attack, judge = sum(shard.attack_seconds for shard in times), sum(shard.judge_seconds for shard in times)
    seconds = end - min(shard.began for shard in times)
    return {
        "seconds": seconds,
        "with start": end - start,
        "attack": attack,
        "judge": judge,
        "overhead": 1 - (attack + judge) / (num_workers * seconds),
    }


def in_new_process(runs: list[tuple[Run, list[Shard]]], num_workers: int) -> dict[str, float]:
    """The same, where no model and no data have been loaded; they are not among what the process is given."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, runs, num_workers).result()


@click.command()
@click.argument("suite", type=click.Path(path_type=Path), default=Path("configs/suites/quick.yaml"))
@click.option("--repeats", default=3, show_default=True)
def main(suite: Path, repeats: int) -> None:
    parsed = read_suite(suite)
    runs = [(run, cut(run, parsed.batches_per_shard)) for run in plan(parsed)]
    torch.set_num_threads(NUM_WORKERS)  # as every pass
    ways = {f"one worker, {NUM_WORKERS} threads": 1, f"{NUM_WORKERS} workers, one thread each": NUM_WORKERS}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(repeats):
        for way, num_workers in ways.items():
            found[way].append(in_new_process(runs, num_workers))
            say(f"round {turn + 1}/{repeats}  {way}: {found[way][-1]}")
    rows = [describe(way, passes) for way, passes in found.items()]
    one, many = found.values()
    facts = {
        "suite": f"{parsed.name}: {len(runs)} records, {sum(len(shards) for _, shards in runs)} shards",
        f"speed-up by {NUM_WORKERS} workers, without their start": ratio(one, many, "seconds"),
        f"speed-up by {NUM_WORKERS} workers, with their start": ratio(one, many, "with start"),
        "goal for the overhead": f"{GOAL:.0%}",
        "rounds": repeats,
    }
    keep("runner_overhead", f"The runner's own share of the suite {parsed.name}", rows, facts)


def describe(way: str, passes: list[dict[str, float]]) -> dict[str, Any]:
    """A row of the table: medians over the rounds."""
    middle = {key: statistics.median(seconds[key] for seconds in passes) for key in passes[0]}
    return {
        "how": way,
        "seconds": round(middle["seconds"], 2),
        "of attack": round(middle["attack"], 2),
        "of judge": round(middle["judge"], 2),
        "overhead": f"{middle['overhead']:.1%}",
        "seconds with the workers' start": round(middle["with start"], 2),
    }


def ratio(slow: list[dict[str, float]], fast: list[dict[str, float]], key: str) -> float:
    return round(statistics.median(a[key] / b[key] for a, b in zip(slow, fast, strict=True)), 2)


if __name__ == "__main__":
    main()
