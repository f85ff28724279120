"""Are DEQs more robust? Every shipped model of a dataset side by side, DEQs and their explicit twins.

    python -m benchmarks.zoo

Each model is attacked under the threat of its card by the default joint PGD, a longer one, and torchattacks.
The union counts a sample as robust only if it survives all of them. `failed` and `unconverged` are the samples on
which the default joint PGD failed, and those whose equilibrium at its result the judge did not find: neither counts as
robust.
"""

from __future__ import annotations

import click
import numpy as np
import pandas as pd

from benchmarks.timing import RESULTS, keep, make_attack, say
from robustbench_deq.attack import Attack
from robustbench_deq.bench.evaluate import evaluate
from robustbench_deq.data import load
from robustbench_deq.models import MODELS, ModelDescription, describe_model, load_model
from robustbench_deq.proportions import wilson_interval
from robustbench_deq.report.plots import COLOURS, new_figure, save, style
from robustbench_deq.threats import Norm, Threat

DEFAULT = "joint"


def attacks_within(threat: Threat) -> dict[str, Attack]:
    foreign = {Norm.L2: "torchattacks-pgdl2", Norm.LINF: "torchattacks-pgd"}[threat.norm]
    return {
        DEFAULT: make_attack("joint-pgd", threat),
        "joint-100": make_attack("joint-pgd", threat, steps=100),
        "torchattacks PGD-20": make_attack(foreign, threat, steps=20),
    }


def examine(described: ModelDescription, limit: int, batch_size: int) -> dict[str, object]:
    """One row of the table, accuracies as fractions."""
    card = described.card
    threat = Threat(Norm.parse(card.evaluation["norm"]), card.evaluation["epsilon"])
    model, data = load_model(described.name), load(card.data, limit=limit)
    survives = np.ones(len(data), dtype=bool)
    row: dict[str, object] = {
        "model": described.name,
        "kind": "explicit" if model.is_explicit else "DEQ",
        "trained against": card.trained_against,
        "attacked within": f"{threat.norm.value} {threat.epsilon:g}",
        "parameters": described.num_parameters,
    }
    for label, attack in attacks_within(threat).items():
        result = evaluate(model, attack, data, label=label, batch_size=batch_size)
        record = result.record
        survives &= result.samples["is_robust"].to_numpy()
        row |= {"clean": record.clean_accuracy, label: record.robust_accuracy}
        if label == DEFAULT:
            row |= {"failed": record.num_failed, "unconverged": record.num_unconverged}
            row |= {"VJPs, joint": record.cost.cell_vjps}
        say(f"{described.name}  {label}: robust {record.robust_accuracy:.1%}, {record.cost.wall_seconds:.1f} s")
    low, high = wilson_interval(int(survives.sum()), len(data))
    row |= {"union": float(survives.mean()), "union, low": low, "union, high": high}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def draw(rows: pd.DataFrame, stem: str) -> None:
    """`results/NAME.png` and `.svg`: a line a model, from its robust accuracy under the union to its clean accuracy."""
    rows = rows.sort_values(["trained against", "union"], kind="stable").reset_index(drop=True)
    with style():
        figure = new_figure(8.0, 1.2 + 0.28 * len(rows))
        axes = figure.subplots()
        for kind, colour, marker in (("DEQ", COLOURS[0], "o"), ("explicit", COLOURS[1], "s")):
            part = rows[rows["kind"] == kind]
            clean, robust = 100 * part["clean"], 100 * part["union"]
            spread = [robust - 100 * part["union, low"], 100 * part["union, high"] - robust]
            look = {"color": colour, "markersize": 6}
            axes.hlines(part.index, robust, clean, color=colour, linewidth=1, alpha=0.4)
            axes.errorbar(robust, part.index, xerr=spread, fmt=marker, elinewidth=1.2, label=f"{kind}, robust", **look)
            axes.plot(clean, part.index, marker, markerfacecolor="none", label=f"{kind}, clean", **look)
        axes.set_yticks(rows.index, rows["model"] + "  (" + rows["attacked within"] + ")")
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("accuracy on test images, % (bars: 95 % interval)")
        figure.legend(loc="outside lower center", ncols=4)
    save(figure, RESULTS / stem)


@click.command()
@click.option("--models", "pattern", default="*.fashion-*", show_default=True)
@click.option("--limit", default=256, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--name", default="zoo", show_default=True, help="of the files in results/")
def main(pattern: str, limit: int, batch_size: int, name: str) -> None:
    described = [describe_model(model) for model in MODELS.list(pattern)]
    rows = [examine(model, limit, batch_size) for model in described if model.card.evaluation]
    frame = pd.DataFrame(rows)
    draw(frame, name)
    facts = {
        "test images": limit,
        "failed under the default": int(frame["failed"].sum()),
        "unconverged under the default": int(frame["unconverged"].sum()),
    }
    keep(name, "DEQs and their explicit twins", rows, facts)


if __name__ == "__main__":
    main()
