"""Accuracy against cost: the joint family and warm-started PGD, both over a grid, on every shipped model.

    python -m benchmarks.pareto

Every point is run on the same images and judged. Then the cheapest points of both families that come within half a
point of what both can reach are timed again in turn, and the medians of their ratios say who is faster at equal robust
accuracy; the default of joint-pgd is compared in the same way with the warm-started PGD that comes within half a point
of it (or, where none does, with the strongest). Written: the points (CSV), the summary (JSON, Markdown), the Pareto
plot.
"""

from __future__ import annotations

import itertools
from typing import Any

import click
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter

from benchmarks.timing import RESULTS, in_turn, keep, make_attack, median_ratio, median_seconds, say
from robustbench_deq.data import SplitName, load
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.files import replacing
from robustbench_deq.models import MODELS, describe_model, load_model
from robustbench_deq.protocol import Attack
from robustbench_deq.report.figures.plots import COLOURS, MARKERS, new_figure, save, style
from robustbench_deq.threats import Threat

MARGIN = 0.005
"""Equal robust accuracy: within half a point."""
FINALISTS = 2
DEFAULT = "joint-pgd (default)"
STEP_RULES = {"cosine": 0.5, "constant": 0.25}
"""Schedules with their first step, beside the default of both attacks: cosine from one epsilon."""


def warm_grid(threat: Threat) -> dict[str, Attack]:
    """Warm-started PGD: steps, tolerances, solvers, step sizes."""
    points = {}

    def add(steps: int, tolerance: float, solver: str, **more: Any) -> None:
        rule = "".join(f" {key}={value}" for key, value in more.items())
        name = f"PGD-{steps} tol {tolerance:g} {solver}{rule}"
        points[name] = make_attack("pgd", threat, steps=steps, tolerance=tolerance, solver=solver, **more)

    for steps, tolerance, solver in itertools.product((5, 10, 20, 40), (1e-2, 5e-2, 2e-1), ("picard", "anderson")):
        if (steps, tolerance) != (40, 1e-2):  # the most expensive by far, for accuracies that 20 steps reach
            add(steps, tolerance, solver)
    for steps, tolerance in itertools.product((10, 20), (5e-2, 2e-1)):
        add(steps, tolerance, "broyden")
    for steps, (schedule, size) in itertools.product((10, 20), STEP_RULES.items()):
        add(steps, 5e-2, "picard", schedule=schedule, step_size=size)
    for steps, solver in itertools.product((10, 20), ("picard", "anderson")):
        add(steps, 5e-2, solver, step_size=2.0)
    for steps in (10, 20):
        add(steps, 5e-2, "picard", momentum=0.75)
    return points


def joint_grid(threat: Threat) -> dict[str, Attack]:
    """The joint family: steps, inner iterations (fixed or adaptive), plain or accelerated, step sizes."""
    points = {DEFAULT: make_attack("joint-pgd", threat)}

    def add(steps: int, inner: int | None, **more: Any) -> None:
        rule = "".join(f" {key}={value}" for key, value in more.items())
        name = f"joint-{steps} k={inner or 'adaptive'}{rule}"
        points[name] = make_attack("joint-pgd", threat, steps=steps, inner_steps=inner, **more)

    for steps, (inner, more) in itertools.product(
        (8, 12, 16, 24, 32, 64), ((1, {}), (2, {}), (None, {}), (2, {"accelerator": "anderson", "history_size": 3}))
    ):
        add(steps, inner, **more)
    for steps in (12, 24):
        add(steps, 1, momentum=0.75)
        for schedule, size in STEP_RULES.items():
            add(steps, 1, schedule=schedule, step_size=size)
    return points


def cheapest(points: list[dict[str, Any]], goal: float) -> list[str]:
    """The quickest points whose robust accuracy is at most `goal`; where there is none, the strongest."""
    good = [point for point in points if point["robust_accuracy"] <= goal + 1e-9]
    if not good:
        return [min(points, key=lambda point: point["robust_accuracy"])["attack"]]
    return [point["attack"] for point in sorted(good, key=lambda point: point["wall_seconds"])[:FINALISTS]]


def run_model(
    name: str, split: SplitName, limit: int, batch_size: int, repeats: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All points of one model, and the row of its summary."""
    card = describe_model(name).card
    threat = card.evaluated_under.build()
    model, data = load_model(name), load(card.data, split, limit=limit)
    evaluate(model, make_attack("joint-pgd", threat, steps=2), data, batch_size=batch_size)  # warms up
    families = {"warm PGD": warm_grid(threat), "joint": joint_grid(threat)}
    points: dict[str, list[dict[str, Any]]] = {}
    for family, attacks in families.items():
        points[family] = []
        for label, attack in attacks.items():
            record = evaluate(model, attack, data, label=label, batch_size=batch_size).record
            points[family].append(
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
    strongest = {family: min(point["robust_accuracy"] for point in rows) for family, rows in points.items()}
    goal = max(strongest.values()) + MARGIN
    default_goal = points["joint"][0]["robust_accuracy"] + MARGIN
    finalists = {family: cheapest(rows, goal) for family, rows in points.items()}
    rivals = cheapest(points["warm PGD"], default_goal)
    chosen = dict.fromkeys([*finalists["warm PGD"], *rivals, *finalists["joint"], DEFAULT])
    attacks = families["warm PGD"] | families["joint"]
    timed = in_turn(model, data, {label: attacks[label] for label in chosen}, repeats, batch_size)
    seconds = {label: median_seconds(evaluations) for label, evaluations in timed.items()}
    warm, joint, rival = (min(names, key=seconds.get) for names in (*finalists.values(), rivals))
    accuracy = {label: evaluations[0].record.robust_accuracy for label, evaluations in timed.items()}
    row = {
        "model": name,
        "threat": f"{threat.norm.name} {threat.epsilon:g}",
        "clean": round(timed[DEFAULT][0].record.clean_accuracy, 4),
        "strongest PGD": round(strongest["warm PGD"], 4),
        "strongest joint": round(strongest["joint"], 4),
    }
    for title, label in (("warm PGD", warm), ("joint", joint)):
        row |= {
            f"best {title} at equal accuracy": label,
            f"accuracy of {title}": round(accuracy[label], 4),
            f"VJPs of {title}": round(timed[label][0].record.cost.cell_vjps, 1),
            f"s of {title}": round(seconds[label], 3),
        }
    row |= {
        "warm / joint (s)": round(median_ratio(timed[warm], timed[joint]), 2),
        "accuracy of the default": round(accuracy[DEFAULT], 4),
        "warm PGD at the default's accuracy": rival + ("" if accuracy[rival] <= default_goal else " (less accurate)"),
        "its accuracy": round(accuracy[rival], 4),
        "warm / default (s)": round(median_ratio(timed[rival], timed[DEFAULT]), 2),
    }
    return [point for rows in points.values() for point in rows], row


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
                    default = part[part["attack"] == DEFAULT]
                    axes.plot(default[cost], default["robust_accuracy"], "*", color=colour, markersize=11, mec="black")
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
        star = Line2D([], [], color=COLOURS[1], marker="*", markersize=11, mec="black", linestyle="", label=DEFAULT)
        figure.legend(handles=[*handles, star], loc="outside lower center", ncols=min(3, len(names)))
    save(figure, RESULTS / stem)


def pareto_front(points: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The points that no cheaper point matches."""
    ordered = points.sort_values([cost, "robust_accuracy"])
    return ordered[ordered["robust_accuracy"] < ordered["robust_accuracy"].cummin().shift(fill_value=2.0)]


@click.command()
@click.option("--models", "pattern", default="*-*.*-*", show_default=True, help="which registered models")
@click.option("--split", default="test", type=click.Choice([name.value for name in SplitName]), show_default=True)
@click.option("--limit", default=512, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="rounds for the finalists")
@click.option("--name", default="pareto", show_default=True, help="of the files in results/")
def main(pattern: str, split: str, limit: int, batch_size: int, repeats: int, name: str) -> None:
    stem = name
    points, rows = [], []
    for name in [name for name in MODELS.list(pattern) if not name.startswith("test-")]:
        more, row = run_model(name, SplitName(split), limit, batch_size, repeats)
        points += more
        rows.append(row)
        frame = pd.DataFrame(points)
        with replacing(RESULTS / f"{stem}.csv") as temporary:
            frame.to_csv(temporary, index=False, float_format="%.6g")
        draw(frame, {row["model"]: row["clean"] for row in rows}, stem)
        keep(
            stem,
            f"Joint family against warm-started PGD, {limit} {split} images",
            rows,
            {
                "equal accuracy": f"within {MARGIN:.1%} of the weaker family's strongest point",
                "rounds": repeats,
                "batch size": batch_size,
            },
        )


if __name__ == "__main__":
    main()
