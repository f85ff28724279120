"""Figures over many records, and which records figures have room for."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustbench_deq.errors import UsageError
from robustbench_deq.report.figures import overview, plots
from robustbench_deq.report.pages.report import write_report


def ball(epsilon: float, norm: str = "l2") -> dict[str, object]:
    return {"norm": norm, "epsilon": epsilon}


def test_accuracy_is_drawn_against_the_radius(make_record) -> None:
    records = [make_record("PGD", robust=0.9 - epsilon, threat=ball(epsilon)) for epsilon in (0.5, 0.25, 0.1)]
    records += [make_record("PGD", robust=0.8, threat=ball(0.25), seed=1), make_record("x", threat=ball(1, "linf"))]
    assert overview.has_several_epsilons(records)
    (axes,) = overview.accuracy_against_epsilon(records).axes
    assert axes.get_title(loc="left") == "deq-conv\nL2 · digits test, n = 256"
    assert axes.get_xlabel() == "Radius ε of the ball (pixel units)"
    clean, line = axes.lines[:2]
    assert set(clean.get_ydata()) == {87.5}
    assert list(line.get_xdata()) == [0.1, 0.25, 0.5]
    assert list(line.get_ydata()) == pytest.approx([80.0, 65.0, 40.0])
    ((*_, (intervals,)),) = axes.containers
    assert len(intervals.get_segments()) == 3
    assert axes.get_xlim()[0] == 0.0


def test_one_radius_is_no_figure(make_record) -> None:
    records = [make_record("a"), make_record("b", model="other", threat=ball(0.5))]
    assert not overview.has_several_epsilons(records)
    with pytest.raises(UsageError, match="several radii"):
        overview.accuracy_against_epsilon(records)


def test_front_is_what_no_cheaper_attack_matches(make_record) -> None:
    points = {"dear": (0.5, 100.0), "dominated": (0.7, 60.0), "middle": (0.6, 50.0), "cheap": (0.8, 10.0)}
    points["as strong as middle"] = (0.6, 55.0)
    records = [make_record(label, robust=robust, cell_evals=cost) for label, (robust, cost) in points.items()]
    assert [record.label for record in overview.pareto_front(records)] == ["cheap", "middle", "dear"]
    assert overview.pareto_front([]) == []


def test_pareto_plot_shows_every_record_and_the_front(make_record) -> None:
    records = [make_record("a", robust=0.8, cell_evals=10.5), make_record("b", robust=0.9, cell_evals=100.5)]
    assert not overview.has_choice(records)
    (axes,) = overview.pareto_plot(records).axes
    assert list(axes.lines[0].get_xdata()) == [20.0, 200.0]
    assert list(axes.lines[0].get_ydata()) == [80.0, 80.0]
    assert len(axes.containers) == 1
    assert [list(line.get_xdata()) for line in axes.lines[-1:]] == [[200.0]]
    free = {"cell_evals": 0, "cell_vjps": 0, "solver_steps": 0, "wall_seconds": 0, "peak_memory_mb": None}
    (axes,) = overview.pareto_plot([make_record("free", cost=free)]).axes
    assert len(axes.containers) == 0


def test_many_attacks_that_are_on_no_front_are_grey(make_record) -> None:
    dear = [make_record(f"dear {k}", robust=0.9, cell_evals=50.0 + k) for k in range(overview.MAX_ATTACKS)]
    figure = overview.pareto_plot([make_record("best", robust=0.5, cell_evals=10.0), *dear])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["Pareto front", "best", "other attacks"]
    (grey,) = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    assert len(grey.get_xdata()) == overview.MAX_ATTACKS


def test_figures_are_the_same_from_the_same_records(make_record, tmp_path: Path) -> None:
    records = [make_record(label, threat=ball(epsilon)) for label in "abc" for epsilon in (0.5, 1.0)]
    for draw in (overview.accuracy_against_epsilon, overview.pareto_plot):
        once = plots.save(draw(records), tmp_path / "once")
        again = plots.save(draw(records[::-1]), tmp_path / "again")
        assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_all_is_drawn_while_there_is_room(make_record) -> None:
    records = [make_record(f"attack {k}", model) for k in range(overview.MAX_ATTACKS) for model in "abc"]
    drawn, note = overview.choose_drawn(records, overview.MAX_ATTACKS)
    assert (len(drawn), note) == (len(records), "")


def test_radii_of_one_model_are_one_facet_and_all_drawn(make_record) -> None:
    radii = [k / 10 for k in range(1, 2 * overview.MAX_SETTINGS)]
    records = [make_record(label, model, threat=ball(radius)) for radius in radii for label in "xy" for model in "ab"]
    assert len(overview.choose_drawn(records, 2, overview.by_radius).records) == len(records)
    drawn, note = overview.choose_drawn(records[::-1], 2)
    assert len(drawn) == 2 * 2 and {record.threat.epsilon for record in drawn} == {radii[0]}  # a board has two models
    shown = f"Drawn are 4 of {len(records)} records"
    assert note == f"{shown} of the most, the middle and the least robust model; the table holds all."
    assert len(overview.accuracy_against_epsilon(records).axes) == 2


def test_the_strongest_and_most_common_are_drawn_where_room_ends(make_record) -> None:
    settings = range(overview.MAX_SETTINGS + 3)
    everywhere = [
        make_record("everywhere", f"model {k:02}", robust=0.8 - k / 1000, seed=seed)
        for k in settings
        for seed in (0, 1)
    ]
    stronger = [make_record("everywhere", "model 00", robust=0.7)]
    once = [make_record(f"once {k:02}", "model 00", robust=0.2 + k / 100) for k in range(overview.MAX_ATTACKS)]
    elsewhere = [make_record("everywhere", "model 99", robust=0.9, threat=ball(0.1))]
    drawn, _ = overview.choose_drawn(everywhere + stronger + once + elsewhere, overview.MAX_ATTACKS)
    assert {record.model for record in drawn} == {"model 00", "model 01", "model 14"}  # least, most, middle
    labels = {record.label for record in drawn}
    assert labels == {"everywhere", *(f"once {k:02}" for k in range(overview.MAX_ATTACKS - 1))}
    assert [r.robust_accuracy for r in drawn if (r.label, r.model) == ("everywhere", "model 00")] == [0.7]


def test_report_has_the_figures_its_records_allow_and_says_what_it_left_out(make_record, tmp_path: Path) -> None:
    records = [make_record(label, residuals=[], threat=ball(epsilon)) for label in "abc" for epsilon in (0.5, 1.0)]
    write_report([*records, make_record("a", residuals=[], threat=ball(0.5), seed=1)], tmp_path)
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {
        "accuracy_against_solver_steps",
        "accuracy_against_cell_evals",
        "accuracy_against_wall_clock",
        "accuracy_against_epsilon",
        "pareto_front",
        "time_spent",
        "standings",
    }
    assert "Drawn are 6 of 7 records; the table holds all." in (tmp_path / "report.md").read_text()
