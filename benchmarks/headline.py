"""The headline: joint PGD against cold PGD-20 and torchattacks' PGDL2-20 on the adversarially trained conv DEQ.

    python -m benchmarks.headline

Target: a robust accuracy at most 0.5 points above theirs at 10 times less wall-clock and 8 times fewer VJPs.
"""

from __future__ import annotations

import click

from benchmarks.timing import in_turn, keep, make_attack, median_ratio, median_seconds
from robustbench_deq.data import load
from robustbench_deq.models import load_model
from robustbench_deq.threats import Norm, Threat

MODEL, DATA, EPSILON, LIMIT = "deq-conv.fashion-joint-l2", "fashion-mnist", 1.0, 512


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
def main(repeats: int, batch_size: int) -> None:
    model, data, threat = load_model(MODEL), load(DATA, limit=LIMIT), Threat(Norm.L2, EPSILON)
    attacks = {
        "joint-pgd (default)": make_attack("joint-pgd", threat),
        "joint-pgd, inner_steps=2": make_attack("joint-pgd", threat, inner_steps=2),
        "joint-pgd, preset jiio-2021": make_attack("joint-pgd", threat, preset="jiio-2021"),
        "cold PGD-20": make_attack("pgd", threat, warm_start=False, tolerance=1e-3, objective="cross-entropy"),
        "cold PGD-20, ce-then-margin": make_attack("pgd", threat, warm_start=False, tolerance=1e-3),
        "torchattacks PGDL2-20": make_attack("torchattacks-pgdl2", threat),
    }
    results = in_turn(model, data, attacks, repeats, batch_size)
    ours = results["joint-pgd (default)"]
    rows = []
    for label, evaluations in results.items():
        record = evaluations[0].record
        rows.append(
            {
                "attack": label,
                "robust accuracy": round(record.robust_accuracy, 4),
                "adversarial loss": round(record.adversarial_loss, 4),
                "cell evals": round(record.cost.cell_evals, 1),
                "cell VJPs": round(record.cost.cell_vjps, 1),
                "seconds": round(median_seconds(evaluations), 3),
                "times the seconds of joint-pgd": round(median_ratio(evaluations, ours), 2),
                "times its VJPs": round(record.cost.cell_vjps / ours[0].record.cost.cell_vjps, 2),
                "points below joint-pgd": round(100 * (ours[0].record.robust_accuracy - record.robust_accuracy), 2),
            }
        )
    keep(
        "headline",
        f"{MODEL}, L2 epsilon {EPSILON}, {LIMIT} test images",
        rows,
        {"clean accuracy": ours[0].record.clean_accuracy, "rounds": repeats, "batch size": batch_size},
    )


if __name__ == "__main__":
    main()
