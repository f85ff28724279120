"""Spending: where the time of a set of records went, attack by attack.

Seconds are those of all records together, of the attacks and of the judge, as records keep them. What the runner
spent beside them is not in records. Calls of the cell are means per sample over the records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from robustbench_deq.errors import UsageError
from robustbench_deq.records.record import Record
from robustbench_deq.report.figures.plots import COLOURS, natural_order, new_figure, plain, style

MAX_BARS = 12
BAR_HEIGHT = 0.36
LONGEST_LABEL = 32
_SECONDS = (("attack", "wall_seconds", COLOURS[0], ""), ("judge", "judge_seconds", COLOURS[4], "///"))
_CALLS = (("cell evaluations", "cell_evals", COLOURS[2], ""), ("VJPs", "cell_vjps", COLOURS[3], "..."))


def time_spent(records: Sequence[Record]) -> Figure:
    """Bars of seconds and of calls for each attack, the longest on top; those beyond `MAX_BARS` are one bar, "others".

    Raises:
        UsageError: when there are no records.
    """
    if not records:
        raise UsageError.of("time plot", expected="at least one record", got="none", fix="run an attack first")
    bars = _bars(records)
    labels = [plain(label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…") for label in bars]
    with style():
        figure = new_figure(9.0, 1.5 + BAR_HEIGHT * len(bars))
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, parts, title in (
            (left, _SECONDS, "Seconds, all records together"),
            (right, _CALLS, "Calls per sample"),
        ):
            begin = [0.0] * len(bars)
            for _, cost, colour, hatch in parts:
                widths = [_total(group, cost) for group in bars.values()]
                if cost in ("cell_evals", "cell_vjps"):
                    widths = [width / len(group) for width, group in zip(widths, bars.values(), strict=True)]
                look = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6}
                axes.barh(range(len(bars)), widths, left=begin, height=0.72, **look)
                begin = [a + b for a, b in zip(begin, widths, strict=True)]
            axes.set_xlabel(title)
            axes.grid(axis="y", visible=False)
            axes.margins(x=0.06)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
            handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=name) for name, _, c, h in parts]
            axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        left.set_yticks(range(len(bars)), labels)
        left.invert_yaxis()
        left.tick_params(axis="y", length=0)
        right.tick_params(axis="y", length=0)
    return figure


def _bars(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.label].append(record)
    seconds = {label: sum(_total(group, cost) for _, cost, *_ in _SECONDS) for label, group in groups.items()}
    ordered = sorted(groups, key=lambda label: (-seconds[label], natural_order(label)))
    shown, rest = (ordered, []) if len(ordered) <= MAX_BARS else (ordered[: MAX_BARS - 1], ordered[MAX_BARS - 1 :])
    bars = {label: groups[label] for label in shown}
    if rest:
        bars[f"{len(rest):,} others"] = [record for label in rest for record in groups[label]]
    return bars


def _total(records: Sequence[Record], cost: str) -> float:
    """Over records; those whose judge was not timed count nothing for it."""
    return sum(getattr(record.cost, cost) or 0.0 for record in records)
