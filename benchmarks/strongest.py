"""Robust accuracy under the strongest attack there is: the per-sample union of many, on 1000 test images.

    python -m benchmarks.strongest

A sample is robust only if it survives every attack of the ensemble, each judged by its own tight re-solve.
"""

from __future__ import annotations

import click
import numpy as np

from benchmarks.timing import keep, make_attack, say
from robustbench_deq.data import load
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import MODELS, describe_model, load_model
from robustbench_deq.proportions import wilson_interval
from robustbench_deq.protocol import Attack
from robustbench_deq.threats import Threat


def ensemble(threat: Threat) -> dict[str, Attack]:
    """Joint and sequential, three losses, deterministic and random starts, exact and approximate gradients."""
    return {
        "joint-100": make_attack("joint-pgd", threat, steps=100),
        "joint-100 margin": make_attack("joint-pgd", threat, steps=100, objective="margin"),
        "joint-100 dlr": make_attack("joint-pgd", threat, steps=100, objective="dlr"),
        "joint-100 margin, random start": make_attack(
            "joint-pgd", threat, steps=100, objective="margin", random_start=True
        ),
        "PGD-20 tight": make_attack("pgd", threat, steps=20, tolerance=1e-3, schedule="cosine", step_size=1.0),
        "PGD-20 margin tight": make_attack(
            "pgd", threat, steps=20, tolerance=1e-3, schedule="cosine", step_size=1.0, objective="margin"
        ),
        "PGD-20 phantom": make_attack("pgd", threat, steps=20, tolerance=1e-3, adjoint="phantom"),
    }


@click.command()
@click.option("--models", "pattern", default="*.fashion-*", show_default=True)
@click.option("--limit", default=1000, show_default=True)
@click.option("--batch-size", default=250, show_default=True)
def main(pattern: str, limit: int, batch_size: int) -> None:
    rows = []
    for name in MODELS.list(pattern):
        card = describe_model(name).card
        threat = card.evaluated_under.build()
        model, data = load_model(name), load(card.data, limit=limit)
        survives = np.ones(len(data), dtype=bool)
        row: dict[str, object] = {"model": name, "threat": f"{threat.norm.name} {threat.epsilon:g}"}
        for label, attack in ensemble(threat).items():
            result = evaluate(model, attack, data, label=label, batch_size=batch_size)
            survives &= result.samples["is_robust"].to_numpy()
            row |= {"clean": result.record.clean_accuracy, label: result.record.robust_accuracy}
            say(f"{name}  {label}: {result.record.robust_accuracy:.1%}, union {survives.mean():.1%}")
        low, high = wilson_interval(int(survives.sum()), len(data))
        row["union of all"] = f"{survives.mean():.4f} [{low:.3f}, {high:.3f}]"
        rows.append(row)
        keep(
            "strongest",
            f"Robust accuracy under the strongest ensemble, {limit} test images",
            rows,
            {"images": limit},
        )


if __name__ == "__main__":
    main()
