"""Figures over many records: robust accuracy against the radius, and which attacks are worth their cost.

Also, which records a figure has room for: a report of thousands of them draws some, and its tables hold all.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from robustbench_deq.errors import UsageError
from robustbench_deq.records.record import Record
from robustbench_deq.report.figures.plots import (
    Look,
    add_legend,
    draw_results,
    facet_figure,
    facet_title,
    handle_of,
    label_axes,
    lay_out,
    looks_of,
    natural_order,
    style,
    use_log_costs,
)
from robustbench_deq.report.settings import Setting, format_norm, group_by_setting, setting_names
from robustbench_deq.report.tables.leaderboard import Board

MAX_SETTINGS = 24
NUM_EXAMPLES = 3
MAX_ATTACKS = 10
MAX_POINTS = 1000
MIN_ATTACKS = 3

Grouping = Callable[[Sequence[Record]], dict[Setting, list[Record]]]


class Drawn(NamedTuple):
    """Records that a figure has room for, and a sentence that says which they are; empty where they are all."""

    records: list[Record]
    note: str


def choose_drawn(records: Sequence[Record], num_attacks: int, group_by: Grouping = group_by_setting) -> Drawn:
    """All groups, or of too many three examples, with `num_attacks` attacks each.

    Examples are the most, the middle and the least robust under their strongest attack, on the threat and samples that
    most groups have. Attacks that occur in more of the groups come first, then the stronger ones. One record stands for
    several of an attack: that with the lowest robust accuracy.
    """
    settings = group_by(records)
    groups = _examples(settings) if len(settings) > MAX_SETTINGS else list(settings.values())
    strongest = [
        {(record.label, record.threat.epsilon): record for record in reversed(group)}.values() for group in groups
    ]
    count = Counter(label for group in strongest for label in {record.label for record in group})
    best: dict[str, float] = {}
    for record in itertools.chain.from_iterable(strongest):
        best[record.label] = min(best.get(record.label, 1.0), record.robust_accuracy)
    ranked = sorted(count, key=lambda label: (-count[label], best[label], natural_order(label)))
    kept = set(ranked[:num_attacks])
    drawn = [record for group in strongest for record in group if record.label in kept]
    if len(drawn) == len(records):
        return Drawn(drawn, "")
    rule = " of the most, the middle and the least robust model" if len(groups) < len(settings) else ""
    return Drawn(drawn, f"Drawn are {len(drawn):,} of {len(records):,} records{rule}; the table holds all.")


def _examples(settings: Mapping[Setting, list[Record]]) -> list[list[Record]]:
    board, _ = Counter(map(Board.of, settings)).most_common(1)[0]
    groups = [group for setting, group in settings.items() if Board.of(setting) == board]
    groups.sort(key=lambda group: -min(record.robust_accuracy for record in group))
    places = {round(k * (len(groups) - 1) / (NUM_EXAMPLES - 1)) for k in range(NUM_EXAMPLES)}
    return [groups[place] for place in sorted(places)]


def has_several_epsilons(records: Sequence[Record]) -> bool:
    return any(len({record.threat.epsilon for record in group}) > 1 for group in by_radius(records).values())


def accuracy_against_epsilon(records: Sequence[Record]) -> Figure:
    """Robust accuracy against the radius of the ball, for each model, norm and samples with more than one radius.

    Raises:
        UsageError: when there are none of these.
    """
    groups = {setting: group for setting, group in by_radius(records).items() if _num_radii(group) > 1}
    if not groups:
        raise UsageError.of("epsilon plot", expected="several radii", got="none", fix="run attacks with other epsilons")
    names = setting_names(groups)
    width = 44 if len(groups) > 1 else 80
    titled = []
    for setting, group in groups.items():
        where = f"{format_norm(setting.norm)} · {names[setting].data}, n = {setting.num_samples:,}"
        titled.append((facet_title(names[setting].model, where, width), group))
    with style():
        figure, facets = lay_out(titled)
        looks = looks_of(records)
        for axes, group in facets:
            axes.axhline(100 * group[0].clean_accuracy, **_CLEAN)
            for label in dict.fromkeys(record.label for record in group):
                _draw_radii(axes, [record for record in group if record.label == label], looks[label])
            axes.set_xlim(left=0.0)
        label_axes(figure, facets, "Radius ε of the ball (pixel units)", "Robust accuracy (%)")
        drawn = {record.label for group in groups.values() for record in group}
        handles = [handle_of(label, look) for label, look in looks.items() if label in drawn]
        add_legend(figure, [Line2D([], [], **_CLEAN, label="clean accuracy"), *handles])
    return figure


_CLEAN = {"color": "#444444", "linestyle": "--", "linewidth": 1.2, "zorder": 1}


def by_radius(records: Sequence[Record]) -> dict[Setting, list[Record]]:
    """Records by setting but for the radius, in the order of the radii; the strongest of each radius first."""
    groups: dict[Setting, list[Record]] = defaultdict(list)
    for setting, group in group_by_setting(records).items():
        groups[setting._replace(epsilon=0.0)] += group
    return groups


def _num_radii(records: Sequence[Record]) -> int:
    return len({record.threat.epsilon for record in records})


def _draw_radii(axes: Axes, records: Sequence[Record], look: Look) -> None:
    """One attack; where it has several records with one radius, the strongest."""
    points = {record.threat.epsilon: record for record in reversed(records)}
    ordered = [points[epsilon] for epsilon in sorted(points)]
    axes.plot(
        [record.threat.epsilon for record in ordered],
        [100 * record.robust_accuracy for record in ordered],
        **{**look, "marker": "none"},
        zorder=2,
    )
    draw_results(axes, [(record.threat.epsilon, record) for record in ordered], look)


def has_choice(records: Sequence[Record]) -> bool:
    """Whether a setting has enough attacks to choose among."""
    return any(len(group) >= MIN_ATTACKS for group in group_by_setting(records).values())


def pareto_plot(records: Sequence[Record]) -> Figure:
    """Robust accuracy against cost, each record a point, and with intervals the front that no cheaper record reaches.

    Of more than `MAX_ATTACKS` attacks, those that are on no front are grey.

    Raises:
        UsageError: when there are no records.
    """
    with style():
        figure, facets = facet_figure(records)
        fronts = [pareto_front(group) for _, group in facets]
        named = {record.label for record in records}
        if len(named) > MAX_ATTACKS:
            named = {record.label for front in fronts for record in front}
        looks = looks_of([record for record in records if record.label in named])
        for (axes, group), front in zip(facets, fronts, strict=True):
            costs = [_cost(record) for record in front] + [max(map(_cost, group))]
            values = [100 * record.robust_accuracy for record in [*front, *front[-1:]]]
            axes.step(costs[: len(values)], values, where="post", **_FRONT)
            on_front = set(map(id, front))
            others = [record for record in group if id(record) not in on_front and _cost(record) > 0]
            for record in front:
                draw_results(axes, [(_cost(record), record)], looks[record.label])
            for label, look in looks.items():
                places = [(_cost(record), 100 * record.robust_accuracy) for record in others if record.label == label]
                if places:
                    axes.plot(*zip(*places, strict=True), **{**look, "linestyle": "none"})
            grey = [(_cost(record), 100 * record.robust_accuracy) for record in others if record.label not in named]
            if grey:
                axes.plot(*zip(*grey, strict=True), **_OTHERS)
            use_log_costs(axes)
        label_axes(figure, facets, "Cell evaluations and VJPs per sample", "Robust accuracy (%)")
        handles = [handle_of(label, {**look, "linestyle": "none"}) for label, look in looks.items()]
        if len(named) < len({record.label for record in records}):
            handles.append(Line2D([], [], **_OTHERS, label="other attacks"))
        add_legend(figure, [Line2D([], [], **_FRONT, label="Pareto front"), *handles])
    return figure


_FRONT = {"color": "#888888", "linewidth": 1.4, "zorder": 1}
_OTHERS = {"color": "#AAAAAA", "linestyle": "none", "marker": ".", "markersize": 5, "zorder": 1}


def pareto_front(records: Sequence[Record]) -> list[Record]:
    """Records with a cost that no cheaper record matches in strength; cheapest first."""
    front: list[Record] = []
    for record in sorted(records, key=lambda record: (_cost(record), record.robust_accuracy, record.record_id)):
        if _cost(record) > 0 and (not front or record.robust_accuracy < front[-1].robust_accuracy):
            front.append(record)
    return front


def _cost(record: Record) -> float:
    return record.cost.cell_evals + record.cost.cell_vjps
