"""The figure of where the time went adds up to the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustbench_deq.errors import UsageError
from robustbench_deq.report.figures import plots, spending


def cost(seconds: float, judge: float | None, evals: float = 10.0, vjps: float = 5.0) -> dict[str, float | None]:
    counts = {"cell_evals": evals, "cell_vjps": vjps, "solver_steps": 1.0}
    return counts | {"wall_seconds": seconds, "peak_memory_mb": None, "judge_seconds": judge}


def bars(axes) -> list[list[tuple[float, float]]]:
    """For each kind of bar, where it begins and how long it is, from the top."""
    return [[(bar.get_x(), bar.get_width()) for bar in container] for container in axes.containers]


def test_seconds_add_up_and_calls_are_means(make_record) -> None:
    records = [
        make_record("short", cost=cost(1.0, 2.0, 4.0, 0.0)),
        make_record("long", "a", cost=cost(5.0, 3.0, 10.0, 6.0)),
        make_record("long", "b", cost=cost(7.0, 1.0, 30.0, 8.0)),
    ]
    left, right = spending.time_spent(records).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["long", "short"]
    assert left.yaxis_inverted()
    assert bars(left) == [[(0, 12), (0, 1)], [(12, 4), (1, 2)]]
    assert bars(right) == [[(0, 20), (0, 4)], [(20, 7), (4, 0)]]


def test_records_whose_judge_was_not_timed_are_drawn(make_record) -> None:
    left, _ = spending.time_spent([make_record("old", cost=cost(5.0, None))]).axes
    assert bars(left) == [[(0, 5)], [(5, 0)]]


def test_attacks_beyond_the_room_are_one_bar(make_record) -> None:
    count = spending.MAX_BARS + 5
    records = [make_record(f"{number}", cost=cost(100.0 - number, 0.0)) for number in range(count)]
    left, _ = spending.time_spent(records).axes
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == [*map(str, range(spending.MAX_BARS - 1)), "6 others"]
    assert sum(width for container in bars(left) for _, width in container) == sum(100 - k for k in range(count))


def test_figure_is_the_same_from_the_same_records(make_record, tmp_path: Path) -> None:
    records = [make_record(label, cost=cost(5.0, 1.0)) for label in ("a", "b $x$", "c" * 99)]
    once = plots.save(spending.time_spent(records), tmp_path / "once")
    again = plots.save(spending.time_spent(records[::-1]), tmp_path / "again")
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]
    with pytest.raises(UsageError, match="got none"):
        spending.time_spent([])
