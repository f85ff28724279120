"""Figures say what they show, hide nothing, and come out the same from the same records."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from robustbench_deq.errors import UsageError
from robustbench_deq.report.figures import plots

COST_PLOTS = [
    (plots.accuracy_against_solver_steps, "Solver steps per sample", 82.0),
    (plots.accuracy_against_cell_evals, "Cell evaluations per sample", 41.0),
    (plots.accuracy_against_wall_clock, "Wall-clock of the attack (s)", 4.1),
]
ALL_PLOTS = [plots.accuracy_against_cell_evals, plots.accuracy_against_wall_clock, plots.residual_against_step]


@pytest.mark.parametrize(("draw", "x_label", "end"), COST_PLOTS)
def test_accuracy_plots_show_curve_end_interval_and_clean_accuracy(make_record, draw, x_label: str, end: float) -> None:
    (axes,) = draw([make_record()]).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (x_label, "Robust accuracy (%)")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    clean, curve = axes.lines[:2]
    assert clean.get_linestyle() == "--"
    assert set(clean.get_ydata()) == {87.5}
    assert curve.get_xdata() == pytest.approx([end / 4, end / 2, 3 * end / 4, end])
    assert curve.get_ydata() == pytest.approx([74.75, 72.75, 70.75, 68.75])
    (interval,) = axes.containers
    ((bottom, top),) = interval.lines[2][0].get_segments()
    assert bottom == pytest.approx([end, 63.75])
    assert top == pytest.approx([end, 73.75])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9, 1100, [1, 10, 100, 1000]),
        (14, 330, [30, 100, 300]),
        (15, 250, [20, 50, 100, 200]),
        (107, 260, [150, 200, 250]),
        (2e-4, 2, [1e-3, 1e-2, 1e-1, 1]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_enough(low: float, high: float, ticks: list[float]) -> None:
    assert plots.log_ticks(low, high) == pytest.approx(ticks)


def test_residuals_are_drawn_by_step_with_gaps(make_record) -> None:
    (axes,) = plots.residual_against_step([make_record()]).axes
    assert axes.get_xlabel() == "Solver step of the attack"
    assert axes.get_ylabel() == "Mean relative residual of the state"
    assert axes.get_yscale() == "log"
    np.testing.assert_equal(axes.lines[0].get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_equal(axes.lines[0].get_ydata(), [0.5, 0.1, np.nan, np.nan, 0.001])


def test_residuals_of_unlike_steps_are_not_drawn(make_record) -> None:
    """Of several batches, the curve is drawn only where each attack step has one solver step, as `curve` has four."""
    joint = make_record("joint", residuals=[0.5, 0.4, 0.3, 0.2, 0.1])
    cold = {"residuals": [0.5, 0.1] * 20}
    in_batches, at_once = make_record("cold", **cold), make_record("cold at once", **cold, batch_size=256)
    unknown = make_record("no curve", curve=[])
    drawn = plots.residual_against_step([joint, in_batches, at_once, unknown])
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["cold at once", "joint"]
    assert len(drawn.axes[0].lines) == 2
    assert drawn.axes[0].get_xscale() == "log"
    with pytest.raises(UsageError, match="records with residuals"):
        plots.residual_against_step([in_batches])


def test_an_attack_looks_the_same_in_every_facet_and_figure(make_record) -> None:
    records = [
        make_record("first", "a", residuals=[]),
        make_record("second", "a"),
        make_record("second", "b"),
    ]
    figure = plots.accuracy_against_cell_evals(records)
    first, second = figure.axes
    assert first.get_title(loc="left") == "a\nL2, ε = 1 · digits test, n = 256"
    assert second.get_title(loc="left") == "b\nL2, ε = 1 · digits test, n = 256"
    colours = {line.get_color() for line in second.lines[1:]}
    residuals = plots.residual_against_step(records)
    assert colours == {residuals.axes[0].lines[0].get_color()} == {plots.COLOURS[1]}
    assert [text.get_text() for text in residuals.legends[0].get_texts()] == ["second"]


def test_attacks_differ_in_colour_or_dash_and_in_marker(make_record) -> None:
    records = [make_record(f"attack {number}") for number in range(20)]
    handles = plots.accuracy_against_cell_evals(records).legends[0].get_lines()[1:]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in handles}
    assert len(looks) == 20
    assert len({line.get_marker() for line in handles[:10]}) == 10


@pytest.mark.parametrize("draw", ALL_PLOTS)
@pytest.mark.parametrize("count", [1, 12])
def test_legend_is_outside_all_axes_and_inside_the_figure(make_record, draw, count: int) -> None:
    figure = draw([make_record(f"an attack with a long name {i}", m) for i in range(count) for m in "ab"])
    figure.canvas.draw()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0
    assert legend.x1 <= figure.bbox.x1
    for axes in figure.axes:
        assert not legend.overlaps(axes.get_tightbbox())
        assert axes.bbox.height > 150


@pytest.mark.parametrize("draw", ALL_PLOTS)
def test_files_are_written_and_do_not_change(make_record, tmp_path: Path, draw) -> None:
    records = [make_record(), make_record("warm PGD-20", robust=0.7, cell_evals=160.0)]
    once = plots.save(draw(records), tmp_path / "once" / "figure")
    again = plots.save(draw(records[::-1]), tmp_path / "again" / "figure")
    assert [path.name for path in once] == ["figure.png", "figure.svg"]
    assert once[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in once[1].read_bytes()
    assert b"<dc:date>" not in once[1].read_bytes()
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_names_are_not_read_as_mathematics(make_record, tmp_path: Path) -> None:
    records = [make_record(r"$\frac{1$ <&>", "model_$a^$" * 9), make_record("_hidden")]
    figure = plots.accuracy_against_cell_evals(records)
    plots.save(figure, tmp_path / "figure")
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["clean accuracy", r"\$\frac{1\$ <&>", "_hidden"]


def test_points_without_cost_are_left_out_of_a_logarithmic_axis(make_record, tmp_path: Path) -> None:
    free = {"cell_evals": 0, "cell_vjps": 0, "solver_steps": 0, "wall_seconds": 0, "peak_memory_mb": None}
    figure = plots.accuracy_against_cell_evals([make_record(cost=free, curve=[])])
    assert len(figure.axes[0].lines) == 1
    plots.save(figure, tmp_path / "figure")


def test_global_state_is_untouched(make_record, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plots.save(plots.residual_against_step([make_record()]), tmp_path / "figure")
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_nothing_to_draw_is_refused(make_record) -> None:
    for draw in ALL_PLOTS:
        with pytest.raises(UsageError, match="got none"):
            draw([])
    with pytest.raises(UsageError, match="records with residuals"):
        plots.residual_against_step([make_record(residuals=[None, 0.0])])
