"""Standings: the leaderboard as one figure.

A row a model: what all attacks together leave of its accuracy, with the interval, and the clean accuracy; a panel a
board, best first, coloured by how the model was trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustbench_deq.report.figures.plots import COLOURS, add_legend, new_figure, plain, style
from robustbench_deq.report.tables.leaderboard import UNKNOWN, Entry
from robustbench_deq.report.tables.standings import by_board

MAX_ROWS = 60
MAX_PANELS = 8
ROW_HEIGHT = 0.21
LONGEST_NAME = 44
TRAININGS = {
    "adversarial": {"color": COLOURS[0], "marker": "o"},
    "standard": {"color": COLOURS[1], "marker": "s"},
    UNKNOWN: {"color": "#777777", "marker": "D"},
}
_CLEAN = {"color": "#444444", "marker": "|", "markersize": 8, "markeredgewidth": 1.6, "linestyle": "none"}


def choose_ranked(entries: Sequence[Entry]) -> tuple[list[Entry], str]:
    """Those that the figure has room for, and a sentence that says which they are; empty where they are all.

    They are the best of each board; of too many boards, those with the most models.
    """
    boards = by_board(entries)
    kept = sorted(boards, key=lambda board: -len(boards[board]))[:MAX_PANELS]
    room = MAX_ROWS if len(entries) <= MAX_ROWS else MAX_ROWS // len(kept)
    ranked = [entry for board, group in boards.items() if board in kept for entry in group[:room]]
    if len(ranked) == len(entries):
        return ranked, ""
    return ranked, f"Drawn are {len(ranked):,} of {len(entries):,} rows, the best of each threat; the tables hold all."


def draw_standings(entries: Sequence[Entry]) -> Figure:
    """The figure, of entries that are there and in order."""
    boards = list(by_board(entries).values())
    heights = [len(group) + 0.2 for group in boards]  # as the axes are cut below
    with style():
        figure = new_figure(8.0, 0.6 + ROW_HEIGHT * sum(heights) + 0.5 * len(boards))
        panels = figure.subplots(len(boards), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, group in zip(panels, boards, strict=True):
            _draw_board(axes, group)
        panels[-1].set_xlabel("Accuracy (%)")
        panels[-1].set_xlim(0, 100)
        trainings = [name for name in TRAININGS if any(entry.training == name for entry in entries)]
        handles = [
            Line2D([], [], **TRAININGS[name], linewidth=1.3, label=f"robust, {name} training") for name in trainings
        ]
        add_legend(figure, [*handles, Line2D([], [], **_CLEAN, label="clean")])
    return figure


def _draw_board(axes: Axes, group: Sequence[Entry]) -> None:
    for name, look in TRAININGS.items():
        rows = [row for row, entry in enumerate(group) if entry.training == name]
        if rows:
            values = [100 * group[row].robust_accuracy for row in rows]
            ends = [group[row].robust_accuracy_ci for row in rows]
            below = [max(0.0, value - 100 * low) for value, (low, _) in zip(values, ends, strict=True)]
            above = [max(0.0, 100 * high - value) for value, (_, high) in zip(values, ends, strict=True)]
            bars = {"markersize": 5.5, "capsize": 2.5, "elinewidth": 1.3, "linestyle": "none"}
            axes.errorbar(values, rows, xerr=[below, above], **look, **bars)
    axes.plot([100 * entry.clean_accuracy for entry in group], range(len(group)), **_CLEAN)
    axes.set_yticks(range(len(group)), [_name(entry) for entry in group], fontsize=8.5)
    axes.set_ylim(len(group) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    first = group[0]
    by = f" · {first.protocol}" if first.protocol else ""
    title = f"{first.names.threat} · {first.names.data}, n = {first.setting.num_samples:,}{by}"
    axes.set_title(plain(title), loc="left")


def _name(entry: Entry) -> str:
    name = entry.names.model
    shown = name if len(name) <= LONGEST_NAME else f"…{name[1 - LONGEST_NAME :]}"
    return plain(f"{shown} (unreliable)" if entry.is_unreliable else shown)
