"""The standard evaluation and AutoAttack on the same samples: who breaks more, and at what cost.

    python -m benchmarks.standard --models 'deq-fc.*' --models 'mondeq-fc.*' --limit 256

AutoAttack is torchattacks' standard version as it is, through forward and autograd, judged as any attack. Per model:
samples that either breaks alone, with McNemar's exact test, evaluations of the cell and VJPs together, and seconds of
the attack. A model that is done is not done again: rows are added to `results/standard.json`. Targets: never more than
0.2 points above AutoAttack, at an eighth of its cost; `fast` within 0.5 points of `standard` at a fiftieth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pandas as pd
from scipy.stats import binomtest

from benchmarks.timing import RESULTS, keep, make_attack, say
from robustbench_deq.benchmark import benchmark
from robustbench_deq.data import load
from robustbench_deq.evaluate.evaluation import Evaluation, evaluate
from robustbench_deq.models import MODELS, describe_model, load_model
from robustbench_deq.records.flags import flags
from robustbench_deq.threats import Threat

NAME = "standard"


def work(evaluation: Evaluation) -> float:
    """Evaluations of the cell and VJPs, mean per sample."""
    return evaluation.record.cost.cell_evals + evaluation.record.cost.cell_vjps


def row_of(name: str, limit: int) -> dict[str, Any]:
    card = describe_model(name).card
    threat, model = card.evaluated_under.build(), load_model(name)
    data = load(card.data, limit=limit)
    fast, standard = (
        benchmark(model, data, threat.norm, threat.epsilon, version=version) for version in ("fast", "standard")
    )
    auto = auto_attack(name, limit, threat)
    ours, theirs = (found.samples["is_robust"].to_numpy(dtype=bool) for found in (standard, auto))
    only_ours, only_theirs = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    num_apart = only_ours + only_theirs
    count = len(data)
    record = standard.record
    return {
        "model": name,
        "threat": f"{threat.norm.name} {threat.epsilon:g}",
        "images": count,
        "clean %": round(100 * record.clean_accuracy, 2),
        "fast %": round(100 * fast.record.robust_accuracy, 2),
        "standard %": round(100 * record.robust_accuracy, 2),
        "AutoAttack %": round(100 * auto.record.robust_accuracy, 2),
        "standard alone breaks": only_ours,
        "AutoAttack alone breaks": only_theirs,
        "McNemar p": round(float(binomtest(only_ours, num_apart).pvalue), 3) if num_apart else 1.0,
        "AutoAttack's work": round(work(auto)),
        "over standard's": round(work(auto) / work(standard), 1),
        "over fast's": round(work(auto) / work(fast), 1),
        "AutoAttack's seconds": round(auto.record.cost.wall_seconds, 1),
        "seconds over standard's": round(auto.record.cost.wall_seconds / record.cost.wall_seconds, 1),
        "seconds over fast's": round(auto.record.cost.wall_seconds / fast.record.cost.wall_seconds, 1),
        "flags": ", ".join(flag.name for flag in flags(record)) or "none",
    }


def auto_attack(name: str, limit: int, threat: Threat) -> Evaluation:
    data = load(describe_model(name).card.data, limit=limit)
    return evaluate(load_model(name), make_attack("torchattacks:AutoAttack", threat), data, label="AutoAttack")


@click.command()
@click.option("--models", "patterns", multiple=True, default=("*",), show_default=True)
@click.option("--limit", default=256, show_default=True, help="test images of each model")
def main(patterns: tuple[str, ...], limit: int) -> None:
    path = RESULTS / f"{NAME}.json"
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"] if path.exists() else []
    for name in dict.fromkeys(name for pattern in patterns for name in MODELS.list(pattern)):
        if any(row["model"] == name and row["images"] >= limit for row in rows) or name.startswith("test"):
            continue
        rows = [row for row in rows if row["model"] != name] + [row_of(name, limit)]
        rows.sort(key=lambda row: row["model"])
        say(str(rows[[row["model"] for row in rows].index(name)]))
        frame = pd.DataFrame(rows)
        facts = {
            "standard above AutoAttack, points, at most": round((frame["standard %"] - frame["AutoAttack %"]).max(), 2),
            "fast above standard, points, at most": round((frame["fast %"] - frame["standard %"]).max(), 2),
            "AutoAttack's work over standard's, median": float(frame["over standard's"].median()),
            "AutoAttack's work over fast's, median": float(frame["over fast's"].median()),
            "work": "evaluations of the cell and VJPs, mean per image",
        }
        keep(NAME, "The standard evaluation and AutoAttack on the same test images", rows, facts)


if __name__ == "__main__":
    main()
