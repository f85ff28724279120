"""Are DEQs more robust? Every DEQ of the suite `fashion` beside its explicit twins, on the same images.

    python -m benchmarks.twins

Reads the suite's records and their verdicts of single samples; attacks nothing. A DEQ's twins are the explicit models
of the same training and within 2 % of as many parameters: its own cell unrolled, and a residual network. Robust is what
no attack of the suite broke. Whether two models differ is McNemar's exact test of the images that only one of them
kept, and the p-values of one training are adjusted for their number (Benjamini and Hochberg).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from benchmarks.timing import RESULTS, keep
from robustbench_deq.models import ModelDescription, describe_model
from robustbench_deq.proportions import mcnemar_p_value, wilson_interval
from robustbench_deq.records.store import load_records
from robustbench_deq.report.figures.plots import COLOURS, add_legend, new_figure, save, style
from robustbench_deq.report.settings import format_norm
from robustbench_deq.report.supplements import read_supplements

EXPLICIT = ("unrolled", "resnet")
PARAMETERS_APART = 0.02
"""The most by which twins' numbers of parameters differ, relatively."""


class Contender(NamedTuple):
    """A model and, for each sample, whether it kept it: without an attack, and under all attacks of the suite."""

    described: ModelDescription
    is_clean: np.ndarray
    is_robust: np.ndarray


def read_contenders(folder: Path) -> dict[str, Contender]:
    """By name, the models of a folder of records."""
    records = load_records(folder)
    verdicts = read_supplements({folder: records}).verdicts
    contenders = {}
    for name in dict.fromkeys(record.model for record in records):
        found = [verdicts[record.record_id] for record in records if record.model == name]
        clean, robust = (
            np.logical_and.reduce([getattr(part, kind) for part in found]) for kind in ("is_clean", "is_robust")
        )
        contenders[name] = Contender(describe_model(name), clean, robust)
    return contenders


def twins_of(name: str, contenders: Mapping[str, Contender]) -> list[str]:
    """The explicit models that a DEQ is to be compared with."""
    own = contenders[name].described
    return [
        other
        for other, (described, _, _) in contenders.items()
        if described.family in EXPLICIT
        and described.config.get("cell", own.family) == own.family
        and described.card.threat == own.card.threat
        and abs(described.num_parameters / own.num_parameters - 1) <= PARAMETERS_APART
    ]


def compare(name: str, twin: str, contenders: Mapping[str, Contender]) -> dict[str, Any]:
    own, other = contenders[name], contenders[twin]
    num_lost = int((own.is_robust & ~other.is_robust).sum())
    num_gained = int((~own.is_robust & other.is_robust).sum())
    return {
        "training": own.described.card.trained_against,
        "DEQ": name,
        "twin": twin,
        "parameters": own.described.num_parameters,
        "DEQ clean %": percent(own.is_clean),
        "twin clean %": percent(other.is_clean),
        "DEQ robust %": percent(own.is_robust),
        "twin robust %": percent(other.is_robust),
        "twin - DEQ": round(100 * (num_gained - num_lost) / len(own.is_robust), 1),
        "only DEQ": num_lost,
        "only twin": num_gained,
        "p": mcnemar_p_value(num_lost, num_gained),
    }


def percent(kept: np.ndarray) -> str:
    low, high = wilson_interval(int(kept.sum()), len(kept))
    return f"{100 * kept.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def draw(rows: list[dict[str, Any]], contenders: Mapping[str, Contender]) -> None:
    """`results/twins.png` and `.svg`: a row a pair, a panel a training."""
    trainings = list(dict.fromkeys(row["training"] for row in rows))
    groups = [[row for row in rows if row["training"] == training] for training in trainings]
    looks = {"DEQ": (COLOURS[0], "o", -0.14), "twin": (COLOURS[1], "s", 0.14)}
    with style():
        figure = new_figure(8.0, 0.8 + sum(0.4 * len(group) + 0.6 for group in groups))
        panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(group) for group in groups])[:, 0]
        handles = []
        for axes, training, group in zip(panels, trainings, groups, strict=True):
            handles = []
            for side, (colour, marker, shift) in looks.items():
                kept = [contenders[row[side]].is_robust for row in group]
                shares = np.array([100 * part.mean() for part in kept])
                ends = 100 * np.array([wilson_interval(int(part.sum()), len(part)) for part in kept])
                spread = np.abs(ends.T - shares)
                places = np.arange(len(group)) + shift
                handles.append(
                    axes.errorbar(
                        shares, places, xerr=spread, fmt=marker, color=colour, capsize=2.5, markersize=5.5, label=side
                    )
                )
            axes.set_yticks(range(len(group)), [f"{row['DEQ']}\n{row['twin']}" for row in group], fontsize=8.5)
            axes.set_ylim(len(group) - 0.5, -0.5)
            axes.set_title(
                "standard training" if training == "none" else f"trained against {format_norm(training)}", loc="left"
            )
        panels[-1].set_xlabel("Robust accuracy (%), all attacks of the suite together")
        add_legend(figure, handles)
    save(figure, RESULTS / "twins")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=RESULTS / "fashion")
def main(folder: Path) -> None:
    contenders = read_contenders(folder)
    deqs = [name for name, contender in contenders.items() if contender.described.family not in EXPLICIT]
    rows = [compare(name, twin, contenders) for name in deqs for twin in twins_of(name, contenders)]
    rows.sort(key=lambda row: row["training"])
    for training in dict.fromkeys(row["training"] for row in rows):
        group = [row for row in rows if row["training"] == training]
        for row, adjusted in zip(group, false_discovery_control([row["p"] for row in group]), strict=True):
            row["adjusted p"] = round(float(adjusted), 3)
            row["p"] = round(row["p"], 3)
    draw(rows, contenders)
    frame = pd.DataFrame(rows)
    facts = {
        "test images": len(next(iter(contenders.values())).is_robust),
        "records": str(folder),
        "pairs in which the twin keeps more, as many, fewer": [
            int((np.sign(frame["twin - DEQ"]) == sign).sum()) for sign in (1, 0, -1)
        ],
        "pairs that differ at 5 %, adjusted": [
            f"{row['DEQ']} and {row['twin']}: {row['twin - DEQ']:+.1f} points"
            for row in rows
            if row["adjusted p"] < 0.05
        ],
    }
    keep("twins", "DEQs and their explicit twins, pair by pair", rows, facts)


if __name__ == "__main__":
    main()
