"""Plots: robust accuracy against cost, and the state's residual against solver steps.

One facet for each setting (model, threat, samples), one colour and marker for each attack, the same in all facets and
figures. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart. Figures are built with
matplotlib's objects, never through pyplot, and saved without dates, so the same records give the same bytes.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from robustbench_deq.errors import UsageError
from robustbench_deq.files import replacing
from robustbench_deq.records.record import Record
from robustbench_deq.report.settings import Setting, SettingNames, group_by_setting, setting_names

PNG_DPI = 200
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">", "h", "*")
DASHES = ("-", "--", "-.", ":")
MAX_COLUMNS = 3
LEGEND_ROW = 0.22
MIN_TICKS = 3
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.5,
    "axes.titley": 1.0,  # nothing is drawn above the axes that a title would have to avoid, and looking is slow
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 7,
    "svg.hashsalt": "robustbench-deq",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}

Look = dict[str, object]
Facet = tuple[Axes, list[Record]]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The style of every figure of the project, for the length of a block."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, not known to pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem.png` and `stem.svg`; returns the two paths."""
    with style():
        if (engine := figure.get_layout_engine()) is not None:  # once: with an engine, every file would be drawn twice
            engine.execute(figure)
            figure.set_layout_engine(None)
    paths = []
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        path = stem.with_name(f"{stem.name}.{kind}")
        with replacing(path) as temporary, style():
            figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)
        paths.append(path)
    return paths


def plain(text: str) -> str:
    """`text` such that matplotlib does not read mathematics into it."""
    return text.replace("$", r"\$")


def accuracy_against_cell_evals(records: Sequence[Record]) -> Figure:
    """Robust accuracy against cell evaluations per sample. Raises `UsageError` when there are no records."""
    return _accuracy(records, "Cell evaluations per sample", "cell_evals")


def accuracy_against_solver_steps(records: Sequence[Record]) -> Figure:
    """Robust accuracy against solver steps per sample. Raises `UsageError` when there are no records."""
    return _accuracy(records, "Solver steps per sample", "solver_steps")


def accuracy_against_wall_clock(records: Sequence[Record]) -> Figure:
    """Robust accuracy against the attack's wall-clock. Raises `UsageError` when there are no records."""
    return _accuracy(records, "Wall-clock of the attack (s)", "wall_seconds")


def residual_against_step(records: Sequence[Record]) -> Figure:
    """Mean relative residual of the state after each solver step, of records that have a meaning for it.

    Raises:
        UsageError: when no record has residuals.
    """
    followed = [record for record in records if has_residuals(record)]
    if not followed:
        raise UsageError.of(
            "residual plot",
            expected="records with residuals",
            got="none",
            fix="plot an attack that follows its state",
        )
    with style():
        figure, facets = facet_figure(followed)
        looks = looks_of(records)
        for axes, group in facets:
            for record in group:
                _draw_residuals(axes, record, looks[record.label])
            use_log_costs(axes)
            _log_residuals(axes)
        label_axes(figure, facets, "Solver step of the attack", "Mean relative residual of the state")
        drawn = {record.label for record in followed}
        add_legend(figure, [handle_of(label, look) for label, look in looks.items() if label in drawn])
    return figure


def has_residuals(record: Record) -> bool:
    """Whether the record has residuals whose mean over its samples, solver step by solver step, means something.

    One batch steps together, and so do all where the state is advanced once for each step of the attack. An attack that
    solves again at each of its steps takes a different number of solver steps in every batch: what stands at the same
    place belongs to different steps of it.
    """
    is_one_batch = record.data.num_samples <= record.batch_size
    is_one_a_step = bool(record.curve) and len(record.residuals) <= record.curve[-1].step + 1
    return (is_one_batch or is_one_a_step) and any(record.residuals)


def _accuracy(records: Sequence[Record], x_label: str, cost: str) -> Figure:
    with style():
        figure, facets = facet_figure(records)
        looks = looks_of(records)
        for axes, group in facets:
            for clean in sorted({record.clean_accuracy for record in group}):
                axes.axhline(100 * clean, color="#444444", linestyle="--", linewidth=1.2, zorder=1)
            for record in group:
                _draw_accuracy(axes, record, cost, looks[record.label])
            use_log_costs(axes)
        label_axes(figure, facets, x_label, "Robust accuracy (%)")
        clean_line = Line2D([], [], color="#444444", linestyle="--", linewidth=1.2, label="clean accuracy")
        add_legend(figure, [clean_line, *(handle_of(label, look) for label, look in looks.items())])
    return figure


def _draw_accuracy(axes: Axes, record: Record, cost: str, look: Look) -> None:
    """The curve with a small marker at each judged step; the end with the large marker and the interval."""
    end = (getattr(record.cost, cost), 100 * record.robust_accuracy)
    points = [(getattr(point, cost), 100 * point.robust_accuracy) for point in record.curve]
    points = sorted((x, y) for x, y in points if 0 < x < end[0])
    if end[0] <= 0:
        return
    axes.plot(*zip(*points, end, strict=True), **{**look, "markersize": 3.5, "markeredgewidth": 0}, zorder=2)
    draw_results(axes, [(end[0], record)], look)


def draw_results(axes: Axes, points: Sequence[tuple[float, Record]], look: Look) -> None:
    """Robust accuracy in percent at each `x`, as a marker with the interval."""
    places = [x for x, _ in points]
    heights = [100 * record.robust_accuracy for _, record in points]
    ends = [(100 * low, 100 * high) for low, high in (record.robust_accuracy_ci for _, record in points)]
    below = [max(0.0, height - low) for height, (low, _) in zip(heights, ends, strict=True)]
    above = [max(0.0, high - height) for height, (_, high) in zip(heights, ends, strict=True)]
    look = {**look, "linestyle": "none"}
    axes.errorbar(places, heights, yerr=[below, above], **look, capsize=3.5, capthick=1.3, elinewidth=1.3, zorder=3)


def _draw_residuals(axes: Axes, record: Record, look: Look) -> None:
    values = [value or math.nan for value in record.residuals]
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, **look, markevery=max(1, math.ceil(len(values) / 8)), alpha=0.9)


def facet_figure(records: Sequence[Record]) -> tuple[Figure, list[Facet]]:
    """A figure with one set of axes for each setting."""
    groups = group_by_setting(records)
    names = setting_names(groups)
    width = 44 if len(groups) > 1 else 80
    return lay_out([(_title(setting, names[setting], width), group) for setting, group in groups.items()])


def lay_out(groups: Sequence[tuple[str, list[Record]]]) -> tuple[Figure, list[Facet]]:
    """A figure with one set of axes for each title and its records."""
    columns = math.ceil(len(groups) / math.ceil(len(groups) / MAX_COLUMNS))
    rows = math.ceil(len(groups) / columns)
    figure = new_figure(*((7.2, 4.4) if len(groups) == 1 else (4.2 * columns, 3.5 * rows)))
    facets = []
    for index, (title, group) in enumerate(groups, start=1):
        axes = figure.add_subplot(rows, columns, index)
        axes.set_title(title, loc="left")
        facets.append((axes, group))
    return figure, facets


def _title(setting: Setting, names: SettingNames, width: int) -> str:
    return facet_title(names.model, f"{names.threat} · {names.data}, n = {setting.num_samples:,}", width)


def facet_title(model: str, where: str, width: int) -> str:
    """Two lines; a model's name that is longer than `width` keeps its end."""
    model = model if len(model) <= width else f"…{model[-width:]}"
    return plain(f"{model}\n{where}")


def looks_of(records: Sequence[Record]) -> dict[str, Look]:
    """By label. Follows from all labels of the report, so that an attack looks the same in every figure."""
    labels = sorted({record.label for record in records}, key=natural_order)
    return {
        label: {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
        }
        for index, label in enumerate(labels)
    }


def natural_order(label: str) -> list[str | int]:
    """Sorts PGD-40 before PGD-100."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", label)]


def handle_of(label: str, look: Look) -> Line2D:
    return Line2D([], [], label=plain(label), **look)


def label_axes(figure: Figure, facets: Sequence[Facet], x_label: str, y_label: str) -> None:
    for axes, _ in facets:
        spec = axes.get_subplotspec()
        axes.set_xlabel(x_label)
        if spec.is_first_col():
            axes.set_ylabel(y_label)


def add_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Below the axes, so that it covers no data; as many columns as fit, on a figure that grows with the rows."""
    width, height = figure.get_size_inches()
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, int(width / (0.075 * widest + 0.75))))
    figure.set_size_inches(width, height + LEGEND_ROW * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def use_log_costs(axes: Axes) -> None:
    """A logarithmic axis whose ticks read 20, 50, 100 rather than powers."""
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.08)
    axes.xaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_xlim())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _log_residuals(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(FuncFormatter(_scientific))
    axes.yaxis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis, the roundest that give three or more."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    candidates = [
        [factor * 10.0**decade for decade in (*decades, decades.stop) for factor in factors]
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7))
    ]
    for ticks in (*candidates, MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)):
        inside = [float(tick) for tick in ticks if low <= tick <= high]
        if len(inside) >= MIN_TICKS:
            break
    return inside


def _scientific(value: float, _: object) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    factor = "" if mantissa == "1" else rf"{mantissa}\times "
    return f"${factor}10^{{{int(exponent)}}}$"
