"""Peak memory of the joint attack against its number of steps, each in a process of its own.

    python -m benchmarks.memory

Target: no growth. Measured as the peak resident size of the process above what it was just before the attack.
"""

from __future__ import annotations

import subprocess
import sys

import click

from benchmarks.timing import keep, make_attack
from robustbench_deq.data import load
from robustbench_deq.memory import release_freed_memory
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.peak_memory import peak_memory_mb, reset_peak_memory
from robustbench_deq.threats import Threat

MODEL = "deq-conv.fashion-joint-l2"
COUNTS = (20, 80, 160)


def measure(steps: int, attack: str) -> float:
    """Megabytes above the start, after one attack on 128 images."""
    import torch

    model, data = load_model(MODEL), load("fashion-mnist", limit=128)
    with torch.no_grad():
        model(data.x[:8])
    cpu = torch.device("cpu")
    release_freed_memory()
    reset_peak_memory(cpu)
    before = peak_memory_mb(cpu)
    result = make_attack(attack, Threat(Norm.L2, 1.0), steps=steps)(model, data.x, data.y, num_snapshots=8)
    return result.cost.peak_memory_mb - before


@click.command()
@click.option("--measure", "one", nargs=2, type=(str, int), default=None, hidden=True)
def main(one: tuple[str, int] | None) -> None:
    if one is not None:
        print(measure(one[1], one[0]))
        return
    rows = []
    for attack in ("joint-pgd", "pgd"):
        for steps in COUNTS if attack == "joint-pgd" else COUNTS[:2]:
            answer = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", "--measure", attack, str(steps)],
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append({"attack": attack, "steps": steps, "peak above start (MB)": round(float(answer.stdout), 1)})
    keep("memory", "Peak memory against steps, 128 images", rows, {"model": MODEL})


if __name__ == "__main__":
    main()
