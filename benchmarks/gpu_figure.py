"""The figure of `benchmarks.gpu`: milliseconds of a step, seconds of an attack, images a second of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from robustbench_deq.report.figures.plots import COLOURS, MARKERS, new_figure, save, style, use_log_costs

PANELS = {
    "steps": ("One whole joint step", "ms", "how"),
    "attacks": ("One batch attacked, with robust accuracy (%)", "seconds", "what"),
    "training": ("Training", "images a second", "what"),
}


def draw(rows: list[dict[str, Any]], stem: Path) -> None:
    """`stem.png` and `.svg`: a line a family and precision, a panel a part, those that were measured."""
    kept = [row for row in rows if "seconds" in row and (row["part"] != "steps" or row["what"] == "whole step")]
    places = list(dict.fromkeys((row["family"], row["dtype"]) for row in kept))
    parts = [part for part in PANELS if any(row["part"] == part for row in kept)]
    if not parts:
        return
    with style():
        figure = new_figure(4.6 * len(parts), 1.9 + 0.55 * len(places))
        for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
            draw_panel(axes, part, [row for row in kept if row["part"] == part], places)
    save(figure, stem)


def draw_panel(axes: Axes, part: str, rows: list[dict[str, Any]], places: list[tuple[str, str]]) -> None:
    title, unit, key = PANELS[part]
    labels = list(dict.fromkeys(row[key] for row in rows))
    for index, label in enumerate(labels):
        mine = [row for row in rows if row[key] == label]
        values = [row["images a second"] if part == "training" else row["seconds"] for row in mine]
        across = [1e3 * value for value in values] if part == "steps" else values
        shift = 0.5 * (index / len(labels) - 0.5)
        up = [places.index((row["family"], row["dtype"])) + shift for row in mine]
        axes.plot(across, up, MARKERS[index], color=COLOURS[index], label=label)
        if part == "attacks":
            for row, x, height in zip(mine, across, up, strict=True):
                text = f"{100 * row['robust accuracy']:.1f}"
                axes.annotate(text, (x, height), xytext=(6, -3), textcoords="offset points", fontsize=8)
    use_log_costs(axes)
    axes.margins(x=0.2)
    axes.set_yticks(range(len(places)), [f"{family}\n{dtype}" for family, dtype in places], fontsize=8.5)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_title(title, loc="left")
    axes.set_xlabel(unit)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2, frameon=False, fontsize=8.5)
