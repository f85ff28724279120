"""The headline: joint PGD against cold PGD-20 and torchattacks' PGDL2-20 on the adversarially trained conv DEQ.

    python -m benchmarks.headline

Target: a robust accuracy at most 0.5 points above theirs at 10 times less wall-clock and 8 times fewer VJPs.
"""

from __future__ import annotations

import statistics

import click

from benchmarks.timing import in_turn, keep, make_attack, median_seconds, ratios
from robustbench_deq.data import load
from robustbench_deq.evaluate.evaluation import Evaluation, evaluate
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.threats import Threat

MODEL, DATA, EPSILON, LIMIT = "deq-conv.fashion-joint-l2", "fashion-mnist", 1.0, 512
DEFAULT = "joint-pgd (default)"


def describe(label: str, evaluations: list[Evaluation], ours: list[Evaluation]) -> dict[str, object]:
    """A row of the table: `evaluations` beside those of the default in the same rounds."""
    record, own = evaluations[0].record, ours[0].record
    times = ratios(evaluations, ours)
    return {
        "attack": label,
        "robust accuracy": round(record.robust_accuracy, 4),
        "adversarial loss": round(record.adversarial_loss, 4),
        "cell evals": round(record.cost.cell_evals, 1),
        "cell VJPs": round(record.cost.cell_vjps, 1),
        "seconds": round(median_seconds(evaluations), 3),
        "times the seconds of joint-pgd": round(statistics.median(times), 2),
        "in single rounds": f"{min(times):.1f} to {max(times):.1f}",
        "times its VJPs": round(record.cost.cell_vjps / own.cost.cell_vjps, 2),
        "points below joint-pgd": round(100 * (own.robust_accuracy - record.robust_accuracy), 2),
    }


@click.command()
@click.option("--repeats", default=5, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
def main(repeats: int, batch_size: int) -> None:
    model, data, threat = load_model(MODEL), load(DATA, limit=LIMIT), Threat(Norm.L2, EPSILON)
    default = make_attack("joint-pgd", threat)
    rivals = {
        "joint-pgd, inner_steps=2": make_attack("joint-pgd", threat, inner_steps=2),
        "joint-pgd, preset jiio-2021": make_attack("joint-pgd", threat, preset="jiio-2021"),
        "cold PGD-20": make_attack("pgd", threat, warm_start=False, tolerance=1e-3, objective="cross-entropy"),
        "cold PGD-20, ce-then-margin": make_attack("pgd", threat, warm_start=False, tolerance=1e-3),
        "torchattacks PGDL2-20": make_attack("torchattacks-pgdl2", threat),
    }
    evaluate(model, default, data, batch_size=batch_size)  # warms up
    # The default runs again before each rival, so that both see the machine in the same mood.
    results = {
        label: in_turn(model, data, {DEFAULT: default, label: rival}, repeats, batch_size)
        for label, rival in rivals.items()
    }
    ours = [evaluation for pair in results.values() for evaluation in pair[DEFAULT]]
    rows = [describe(DEFAULT, ours, ours)]
    rows += [describe(label, pair[label], pair[DEFAULT]) for label, pair in results.items()]
    keep(
        "headline",
        f"{MODEL}, L2 epsilon {EPSILON}, {LIMIT} test images",
        rows,
        {"clean accuracy": ours[0].record.clean_accuracy, "rounds": repeats, "batch size": batch_size},
    )


if __name__ == "__main__":
    main()
