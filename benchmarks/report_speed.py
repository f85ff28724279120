"""How long a report over many records takes, on made-up records with verdicts of single samples and images.

Stage by stage in this process, then as the command in a process of its own, its imports included. Seconds by the clock,
and of CPU time, which other work on the machine disturbs less.

python -m benchmarks.report_speed --records 10000
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from benchmarks.timing import keep
from robustbench_deq.files import write_text
from robustbench_deq.memory import no_collection
from robustbench_deq.records.images import Images, images_path, save_images
from robustbench_deq.records.record import Record, to_json
from robustbench_deq.records.store import RECORDS_FILE, RecordStore, load_records
from robustbench_deq.report.pages.report import write_report
from robustbench_deq.report.supplements import read_supplements

NUM_SAMPLES = 64
NUM_MODELS, EPSILONS, NUM_ATTACKS = 25, (0.25, 0.5, 1.0, 2.0), 20
GOAL_SECONDS = 10.0
SECONDS = ("seconds", "of CPU time")


def make_records(count: int, folder: Path) -> None:
    """Write `count` records with their samples and images: models x radii x attacks, then again with the next seed."""
    grid = list(itertools.product(range(NUM_MODELS), EPSILONS, range(NUM_ATTACKS)))
    rng = np.random.default_rng(0)
    store, records = RecordStore(folder), []
    store.samples_path("any").parent.mkdir(parents=True)
    pictures, classes = rng.random((8, 1, 28, 28), dtype=np.float32), np.arange(8)
    save_images(folder, "any", Images(pictures, 1 - pictures, classes, classes, classes))
    images = images_path(folder, "any").read_bytes()
    for index in range(count):
        model, epsilon, attack = grid[index % len(grid)]
        is_robust = rng.random(NUM_SAMPLES) < 0.7 / (1 + epsilon)
        samples = pd.DataFrame({"sample_id": np.arange(NUM_SAMPLES), "is_clean_correct": True, "is_robust": is_robust})
        samples = samples.assign(is_converged=True, is_failed=False)
        names = f"r{index:06d}", f"deq-conv.model-{model:02d}", f"attack {attack:02d}"
        values = _record(*names, epsilon, seed=index // len(grid))
        accuracy = float(is_robust.mean())
        values |= {"robust_accuracy": accuracy, "robust_accuracy_ci": [max(0, accuracy - 0.1), min(1, accuracy + 0.1)]}
        record = Record(**values)
        samples.to_parquet(store.samples_path(record.record_id), index=False)
        images_path(folder, record.record_id).write_bytes(images)
        records.append(record)
    images_path(folder, "any").unlink()
    write_text(folder / RECORDS_FILE, "".join(json.dumps(to_json(record)) + "\n" for record in records))


def _record(record_id: str, model: str, label: str, epsilon: float, seed: int) -> dict[str, Any]:
    steps = int(label.split()[1]) + 1
    curve = [
        {
            "step": step,
            "cell_evals": step * steps,
            "cell_vjps": step * steps,
            "solver_steps": step * steps,
            "wall_seconds": step,
            "robust_accuracy": 1 / (step + 1),
        }
        for step in range(1, 9)
    ]
    cost = {"cell_evals": 9 * steps, "cell_vjps": 9 * steps, "solver_steps": 9 * steps}
    return {
        "record_id": record_id,
        "created": "2025-01-31T12:00:00+00:00",
        "model": model,
        "model_sha256": "0" * 64,
        "attack": "joint-pgd",
        "label": label,
        "attack_config": {"steps": steps, "objective": "ce-then-margin", "schedule": "cosine"},
        "threat": {"norm": "l2", "epsilon": epsilon},
        "data": {"name": "digits", "split": "test", "num_samples": NUM_SAMPLES, "digest": "feedc0de"},
        "clean_accuracy": 1.0,
        "adversarial_loss": 0.8,
        "num_unconverged": 0,
        "num_failed": 0,
        "max_perturbation": epsilon,
        "cost": cost | {"wall_seconds": 9.0, "peak_memory_mb": 500.0},
        "curve": curve,
        "residuals": [0.5**step for step in range(40)],
        "diagnostics": {},
        "seed": seed,
        "batch_size": 128,
        "environment": {"torch": "2.9.0", "threads": 2},
    }


def stages(folder: Path) -> Iterator[str]:
    """The stages of the command `report`; yields the name of each when it is done."""
    records = load_records(folder)
    yield "read records"
    supplements = read_supplements({folder: records})
    yield "read verdicts"
    write_report(records, folder / "report", supplements=supplements)
    yield "write report"


@click.command()
@click.option("--records", "count", default=10_000, show_default=True)
def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_records(count, folder)
        rows = []
        last = time.perf_counter(), time.process_time()
        with no_collection():  # as the command does
            for stage in stages(folder):
                now = time.perf_counter(), time.process_time()
                rows.append(_row(stage, now[0] - last[0], now[1] - last[1]))
                last = now
        rows.append(_row("the three together", *(sum(row[column] for row in rows) for column in SECONDS)))
        page = (folder / "report" / "leaderboard.html").stat().st_size / 1e6
        start = time.perf_counter()
        words = ["report", str(folder), "--out", str(folder / "again")]
        subprocess.run([sys.executable, "cli.py", *words], check=True, stdout=subprocess.DEVNULL)
        wall, spent = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        rows.append(_row("the command", wall, spent.ru_utime + spent.ru_stime))
    facts = {"records": count, "goal (s)": GOAL_SECONDS, "leaderboard.html (MB)": round(page, 1)}
    keep("report_speed", "A report over many records", rows, facts)


def _row(what: str, *seconds: float) -> dict[str, Any]:
    return {"stage": what} | {column: round(value, 2) for column, value in zip(SECONDS, seconds, strict=True)}


if __name__ == "__main__":
    main()
