"""Robust accuracy on cells in hard dress: the default joint attack, cold PGD-20 with tight solves, and what it costs.

    python -m benchmarks.cells

Damped copies and other coordinates of shipped models, and linear cells that are not normal (`hard_cells`). Targets: the
joint attack within one point of cold PGD-20 at tolerance 1e-5, at no more than 2 times (damped by 0.1), 4 times (0.01),
3 times (coordinates of condition 10) and 8 times (not normal) the evaluations of the plain model; on plain models the
audit adds at most a tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import pandas as pd

from benchmarks.hard_cells import Coordinates, Damped, nonnormal
from benchmarks.timing import RESULTS, keep, make_attack, say
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import describe_model, load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.report.figures.plots import COLOURS, MARKERS, new_figure, save, style
from robustbench_deq.threats import Threat

MODELS = ("deq-fc.fashion-joint-l2", "mondeq-fc.digits-joint-l2", "deq-conv.digits-standard", "lben.fashion-joint-l2")
NORMS = (0.8, 1.2, 1.4, 1.6)
DRESSES: dict[str, tuple[Callable[[EquilibriumModel], EquilibriumModel], float]] = {
    "damped by 0.1": (lambda model: Damped(model, 0.1), 2.0),
    "damped by 0.01": (lambda model: Damped(model, 0.01), 4.0),
    "coordinates of condition 10": (lambda model: Coordinates(model, 10.0), 3.0),
}


class Case(NamedTuple):
    """A model in a dress; its evaluations are compared with those of the first of its `group`."""

    group: str
    dress: str
    model: EquilibriumModel
    threat: Threat
    data: Split
    most: float


def cases(limit: int) -> Iterator[Case]:
    for name in MODELS:
        card = describe_model(name).card
        data, threat = load(card.data, SplitName.TEST, limit=limit), card.evaluated_under.build()
        yield Case(name, "plain", load_model(name), threat, data, 1.0)
        for dress, (wear, most) in DRESSES.items():
            yield Case(name, dress, wear(load_model(name)), threat, data, most)
    train, data = load("digits", SplitName.TRAIN), load("digits", SplitName.TEST, limit=limit)
    for norm in NORMS:
        most = 1.0 if norm == NORMS[0] else 8.0
        model = nonnormal(norm, train)
        yield Case("linear, spectral radius 0.7", f"norm {norm:g}", model, Threat(Norm.L2, 0.5), data, most)


def row_of(case: Case, plain: float | None) -> dict[str, Any]:
    """One line of the table; `plain`: evaluations of the plain model."""
    joint = evaluate(case.model, make_attack("joint-pgd", case.threat), case.data).record
    bare = evaluate(case.model, make_attack("joint-pgd", case.threat, has_fallback=False), case.data).record
    settings = {"warm_start": False, "tolerance": 1e-5, "max_steps": 400}
    truth = evaluate(case.model, make_attack("pgd", case.threat, **settings), case.data).record
    audit = {key: int(joint.diagnostics.get(key, 0)) for key in ("num_audited", "num_audit_fooled", "num_finished")}
    return {
        "model": case.group,
        "dress": case.dress,
        "cold PGD-20 %": round(100 * truth.robust_accuracy, 1),
        "joint %": round(100 * joint.robust_accuracy, 1),
        "points above": round(100 * (joint.robust_accuracy - truth.robust_accuracy), 1),
        "without relaxation and audit %": round(100 * bare.robust_accuracy, 1),
        "evaluations": round(joint.cost.cell_evals, 1),
        "of them for audit and full solves %": round(100 * (1 - bare.cost.cell_evals / joint.cost.cell_evals), 1),
        "times the plain model's": round(joint.cost.cell_evals / (plain or joint.cost.cell_evals), 2),
        "at most": case.most,
        "evaluations of cold PGD-20": round(truth.cost.cell_evals, 1),
        "audited": audit["num_audited"],
        "fooled by the audit": audit["num_audit_fooled"],
        "finished by full solves": audit["num_finished"],
        "lagging": joint.num_lagging,
    }


def draw(frame: pd.DataFrame) -> None:
    """`results/cells.png` and `.svg`: robust accuracy and evaluations, dress by dress."""
    accuracies = {
        "cold PGD-20 %": "cold PGD-20, tolerance 1e-5",
        "joint %": "joint-pgd",
        "without relaxation and audit %": "joint-pgd without relaxation, audit and full solves",
    }
    costs = {"evaluations of cold PGD-20": "cold PGD-20", "evaluations": "joint-pgd"}
    places = range(len(frame))
    with style():
        figure = new_figure(8.0, 0.26 * len(frame) + 1.4)
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, columns in ((left, accuracies), (right, costs)):
            for number, (column, name) in enumerate(columns.items()):
                axes.scatter(frame[column], places, marker=MARKERS[number], color=COLOURS[number], label=name, s=18)
            axes.grid(axis="y", alpha=0.3)
        left.set_xlabel("Robust accuracy (%)")
        right.set_xlabel("Cell evaluations per image")
        right.set_xscale("log")
        left.set_yticks(list(places), [f"{row.model}, {row.dress}" for row in frame.itertuples()])
        left.invert_yaxis()
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1)
    save(figure, RESULTS / "cells")


@click.command()
@click.option("--limit", default=128, show_default=True, help="test images of each model")
def main(limit: int) -> None:
    rows: list[dict[str, Any]] = []
    plain: dict[str, float] = {}
    for case in cases(limit):
        rows.append(row_of(case, plain.get(case.group)))
        plain.setdefault(case.group, rows[-1]["evaluations"])
        say(f"{case.group}, {case.dress}: joint {rows[-1]['joint %']}, cold {rows[-1]['cold PGD-20 %']}")
    draw(pd.DataFrame(rows))
    keep("cells", f"Cells in hard dress, {limit} test images", rows, {"batch size": 128})


if __name__ == "__main__":
    main()
