"""Accuracy against cost: the joint family and warm-started PGD, both over a grid, on every shipped model.

    python -m benchmarks.pareto

Every point is run on the same test images and judged. Then the cheapest points that come within half a point of the
strongest (or, where a family has none, its own strongest) are timed again in turn, and the medians of their ratios say
who is faster at equal robust accuracy. Both grids have 24 points. Written: the points (CSV), the summary (JSON,
Markdown), the Pareto plot.
"""

from __future__ import annotations

import itertools
from typing import Any

import click
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter

from benchmarks.timing import RESULTS, in_turn, keep, make_attack, median_ratio, median_seconds, say
from robustbench_deq.attack import Attack
from robustbench_deq.bench.evaluate import evaluate
from robustbench_deq.data import load
from robustbench_deq.files import replacing
from robustbench_deq.models import MODELS, describe_model, load_model
from robustbench_deq.report.plots import COLOURS, MARKERS, new_figure, save, style
from robustbench_deq.threats import Norm, Threat

MARGIN = 0.005
"""Equal robust accuracy: within half a point."""
FINALISTS = 2


def warm_grid(threat: Threat) -> dict[str, Attack]:
    """Warm-started PGD: steps, tolerances, solvers; cosine steps from one epsilon, which beat constant ones."""
    grid = itertools.product((3, 5, 8, 12), (1e-2, 5e-2, 2e-1), ("picard", "anderson"))
    return {
        f"PGD-{steps} tol {tolerance:g} {solver}": make_attack(
            "pgd", threat, steps=steps, schedule="cosine", step_size=1.0, tolerance=tolerance, solver=solver
        )
        for steps, tolerance, solver in grid
    }


def joint_grid(threat: Threat) -> dict[str, Attack]:
    """The joint family: steps, inner iterations (fixed or adaptive), plain or accelerated; the same cosine steps."""
    grid = itertools.product((6, 8, 12, 16, 24, 32), ((1, None), (2, None), (None, None), (2, "anderson")))
    points = {}
    for steps, (inner, accelerator) in grid:
        name = f"joint-{steps} k={inner or 'adaptive'}{' anderson' if accelerator else ''}"
        points[name] = make_attack(
            "joint-pgd", threat, steps=steps, inner_steps=inner, accelerator=accelerator, history_size=3
        )
    points["joint-pgd (default)"] = make_attack("joint-pgd", threat)
    return points


def run_model(name: str, limit: int, batch_size: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All points of one model, and the row of its summary."""
    card = describe_model(name).card
    threat = Threat(Norm.parse(card.evaluation["norm"]), card.evaluation["epsilon"])
    model, data = load_model(name), load(card.data, limit=limit)
    evaluate(model, make_attack("joint-pgd", threat, steps=2), data, batch_size=batch_size)  # warms up
    families = {"warm PGD": warm_grid(threat), "joint": joint_grid(threat)}
    points = []
    for family, attacks in families.items():
        for label, attack in attacks.items():
            record = evaluate(model, attack, data, label=label, batch_size=batch_size).record
            points.append(
                {
                    "model": name,
                    "family": family,
                    "attack": label,
                    "robust_accuracy": record.robust_accuracy,
                    "adversarial_loss": record.adversarial_loss,
                    "cell_evals": record.cost.cell_evals,
                    "cell_vjps": record.cost.cell_vjps,
                    "wall_seconds": record.cost.wall_seconds,
                    "num_unconverged": record.num_unconverged,
                }
            )
        say(f"{name}: {family}, {len(attacks)} points")
    best = min(point["robust_accuracy"] for point in points)
    finalists: dict[str, Attack] = {}
    for family, attacks in families.items():
        mine = [point for point in points if point["family"] == family]
        goal = max(best + MARGIN, min(point["robust_accuracy"] for point in mine)) + 1e-9  # or the best it reaches
        good = [point for point in mine if point["robust_accuracy"] <= goal]
        for point in sorted(good, key=lambda p: p["wall_seconds"])[:FINALISTS]:
            finalists[point["attack"]] = attacks[point["attack"]]
    finalists["joint-pgd (default)"] = families["joint"]["joint-pgd (default)"]
    timed = in_turn(model, data, finalists, repeats, batch_size)
    seconds = {label: median_seconds(evaluations) for label, evaluations in timed.items()}
    warm = min((label for label in seconds if label.startswith("PGD")), key=seconds.get)
    joint = min((label for label in seconds if label.startswith("joint-")), key=seconds.get)
    default = "joint-pgd (default)"
    row = {
        "model": name,
        "threat": f"{threat.norm.value} {threat.epsilon:g}",
        "clean": round(timed[default][0].record.clean_accuracy, 4),
        "strongest": round(best, 4),
        "best warm PGD": warm,
        "its accuracy": round(timed[warm][0].record.robust_accuracy, 4),
        "its VJPs": round(timed[warm][0].record.cost.cell_vjps, 1),
        "its s": round(seconds[warm], 3),
        "best joint": joint,
        "joint accuracy": round(timed[joint][0].record.robust_accuracy, 4),
        "joint VJPs": round(timed[joint][0].record.cost.cell_vjps, 1),
        "joint s": round(seconds[joint], 3),
        "warm / joint (s)": round(median_ratio(timed[warm], timed[joint]), 2),
        "default accuracy": round(timed[default][0].record.robust_accuracy, 4),
        "warm / default (s)": round(median_ratio(timed[warm], timed[default]), 2),
    }
    return points, row


def draw(points: pd.DataFrame, clean: dict[str, float], stem: str) -> None:
    """`results/NAME.png` and `.svg`: every point, and each family's Pareto front, a row of facets a cost."""
    names = list(points["model"].unique())
    looks = dict(zip(("warm PGD", "joint"), zip(COLOURS, MARKERS, strict=False), strict=False))
    with style():
        figure = new_figure(3.4 * len(names), 6.4)
        table = figure.subplots(2, len(names), squeeze=False)
        for column, name in enumerate(names):
            for row, (cost, label) in enumerate(
                (("cell_vjps", "Cell VJPs per image"), ("wall_seconds", "Wall-clock of the attack (s)"))
            ):
                axes = table[row][column]
                for family, (colour, marker) in looks.items():
                    part = points[(points["model"] == name) & (points["family"] == family)]
                    axes.scatter(part[cost], part["robust_accuracy"], s=10, alpha=0.3, color=colour, marker=marker)
                    front = pareto_front(part, cost)
                    axes.step(
                        front[cost], front["robust_accuracy"], where="post", color=colour, marker=marker, markersize=4
                    )
                here = points.loc[points["model"] == name, "robust_accuracy"]
                axes.set_ylim(here.min() - 0.005, here.min() + 0.06)
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.set_xlabel(label)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
                if row == 0:
                    axes.set_title(f"{name}\nclean {clean[name]:.1%}")
            table[0][0].set_ylabel("Robust accuracy")
            table[1][0].set_ylabel("Robust accuracy")
        handles = [
            Line2D([], [], color=colour, marker=marker, label=f"{family}: points and Pareto front")
            for family, (colour, marker) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    save(figure, RESULTS / stem)


def pareto_front(points: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The points that no cheaper point matches."""
    ordered = points.sort_values([cost, "robust_accuracy"])
    return ordered[ordered["robust_accuracy"] < ordered["robust_accuracy"].cummin().shift(fill_value=2.0)]


@click.command()
@click.option("--models", "pattern", default="*-*.*-*", show_default=True, help="which registered models")
@click.option("--limit", default=128, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="rounds for the finalists")
@click.option("--name", default="pareto", show_default=True, help="of the files in results/")
def main(pattern: str, limit: int, batch_size: int, repeats: int, name: str) -> None:
    stem = name
    points, rows = [], []
    for name in [name for name in MODELS.list(pattern) if not name.startswith("test-")]:
        more, row = run_model(name, limit, batch_size, repeats)
        points += more
        rows.append(row)
        frame = pd.DataFrame(points)
        with replacing(RESULTS / f"{stem}.csv") as temporary:
            frame.to_csv(temporary, index=False, float_format="%.6g")
        draw(frame, {row["model"]: row["clean"] for row in rows}, stem)
        keep(
            stem,
            f"Joint family against warm-started PGD, {limit} test images",
            rows,
            {
                "equal accuracy": f"within {MARGIN:.1%} of the strongest point",
                "rounds": repeats,
                "batch size": batch_size,
            },
        )


if __name__ == "__main__":
    main()
