"""What the benchmarks share: attacks in turn on one model, medians, and results as JSON and Markdown."""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from scipy.stats import quantile_test

from robustbench_deq.attacks import build_attack
from robustbench_deq.data import Split
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.evaluation import Evaluation, evaluate
from robustbench_deq.files import write_json, write_text
from robustbench_deq.memory import keep_freed_memory
from robustbench_deq.protocol import Attack
from robustbench_deq.records.environment import describe_environment
from robustbench_deq.report.tables.text import markdown_table
from robustbench_deq.threats import Threat

RESULTS = Path("results")

keep_freed_memory()  # every benchmark measures as the command line runs


def make_attack(name: str, threat: Threat, **settings: Any) -> Attack:
    """An attack by its registry name."""
    return build_attack(name, threat, settings)


def say(message: str) -> None:
    """A line of progress on standard error."""
    print(message, file=sys.stderr, flush=True)


def in_turn(
    model: EquilibriumModel, data: Split, attacks: dict[str, Attack], repeats: int, batch_size: int, **options: Any
) -> dict[str, list[Evaluation]]:
    """Evaluate each attack `repeats` times, one after another in every round."""
    results: dict[str, list[Evaluation]] = {label: [] for label in attacks}
    for turn in range(repeats):
        for label, attack in attacks.items():
            result = evaluate(model, attack, data, label=label, batch_size=batch_size, **options)
            results[label].append(result)
            record = result.record
            say(
                f"round {turn + 1}/{repeats}  {label}: robust {record.robust_accuracy:.1%}, "
                f"{record.cost.cell_vjps:.0f} VJPs, {record.cost.wall_seconds:.2f} s"
            )
    return results


def median_seconds(evaluations: list[Evaluation]) -> float:
    return statistics.median(evaluation.record.cost.wall_seconds for evaluation in evaluations)


def ratios(slow: list[Evaluation], fast: list[Evaluation]) -> list[float]:
    """How many times longer `slow` took, round by round."""
    return [a.record.cost.wall_seconds / b.record.cost.wall_seconds for a, b in zip(slow, fast, strict=True)]


def median_ratio(slow: list[Evaluation], fast: list[Evaluation]) -> float:
    return statistics.median(ratios(slow, fast))


class Ratio(NamedTuple):
    """How many times longer one thing took than another: the median over rounds, and where it lies at 95 %.

    The interval is that of the median by order statistics, whatever the distribution; of few rounds it is their range.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """From the seconds of both, round by round."""
        times = [a / b for a, b in zip(slow, fast, strict=True)]
        low, high = quantile_test(times, q=1.0, p=0.5).confidence_interval()
        ends = (min(times) if math.isnan(low) else low, max(times) if math.isnan(high) else high)
        return cls(*(round(float(value), 2) for value in (statistics.median(times), *ends)))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def alternate(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float, Ratio]:
    """Median seconds of both, and the ratio first / second, taken in turn after one warm-up each."""
    first(), second()
    pairs = []
    for _ in range(repeats):
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        pairs.append((middle - start, time.perf_counter() - middle))
    slow, fast = zip(*pairs, strict=True)
    return statistics.median(slow), statistics.median(fast), Ratio.of(slow, fast)


def keep(
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    facts: dict[str, Any],
    *,
    tables: dict[str, list[dict[str, Any]]] | None = None,
    device: torch.device | None = None,
    folder: Path = RESULTS,
) -> None:
    """Write `NAME.json` and `NAME.md` into `folder`, with the command that runs, and print the latter.

    Args:
        tables: what the page shows instead of `rows`, by their headings; an empty heading is left out.
        device: that was measured; None is the CPU.
    """
    module = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    environment = describe_environment(device or torch.device("cpu"))
    write_json(folder / f"{name}.json", {"command": command, "facts": facts, "rows": rows, "environment": environment})
    lines = [f"# {title}", "", f"Made by `{command}` on {environment['num_threads']} threads.", ""]
    for heading, part in ({"": rows} if tables is None else tables).items():
        lines += [f"## {heading}", ""] if heading else []
        lines += [markdown_table(pd.DataFrame(part)), ""]
    lines += [f"- {key}: {json.dumps(value) if isinstance(value, dict) else value}" for key, value in facts.items()]
    write_text(folder / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
