"""Two runs: pairs are found, noise is told from change, and the tables say how."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

from robustbench_deq.errors import UsageError
from robustbench_deq.records.record import Record
from robustbench_deq.report.pages.comparison import comparison_html, comparison_markdown, headline
from robustbench_deq.report.supplements import SampleVerdicts
from robustbench_deq.report.tables.comparison import Change, RunComparison, compare_runs

Run = tuple[Record, pd.DataFrame]
NASTY = "<script>alert('1')</script> a|b"
OTHER_SAMPLES = {"name": "digits", "split": "test", "num_samples": 100, "digest": "0ther"}


def verdicts_of(runs: Sequence[Run]) -> dict[str, SampleVerdicts]:
    names = ("is_clean_correct", "is_robust", "is_converged", "is_failed")
    return {record.record_id: SampleVerdicts(*(samples[name].to_numpy() for name in names)) for record, samples in runs}


def compare(before: Sequence[Run], after: Sequence[Run]) -> RunComparison:
    records = [[record for record, _ in runs] for runs in (before, after)]
    return compare_runs(*records, verdicts_of(before), verdicts_of(after))


def test_the_same_samples_are_paired(make_run) -> None:
    before = make_run("PGD", range(10), num_samples=100)
    after = make_run("PGD", range(5, 30), num_samples=100, cell_evals=82.0)
    (row,) = compare([before], [after]).rows
    assert (row.robust.num_lost, row.robust.num_gained, row.robust.interval) == (20, 5, None)
    p_value = 2 * sum(math.comb(25, k) for k in range(6)) / 2**25
    assert row.robust.p_value == row.robust.adjusted_p_value == pytest.approx(p_value)
    assert row.robust.change is Change.LOWER
    assert row.robust.value == pytest.approx(-0.15)
    assert (row.ratio("cell_evals"), row.ratio("cell_vjps"), row.notes) == (2.0, pytest.approx(81 / 40), ())
    (row,) = compare([after], [before]).rows
    assert row.robust.change is Change.HIGHER


def test_pairing_sees_what_two_intervals_would_not(make_run) -> None:
    """Ten samples lost and none gained of 400 is no noise; as independent proportions it would be."""
    before, after = make_run("PGD", range(100), num_samples=400), make_run("PGD", range(110), num_samples=400)
    records = [before[0]], [after[0]]
    (row,) = compare([before], [after]).rows
    assert row.robust.p_value == pytest.approx(2 * 0.5**10)
    assert row.robust.change is Change.LOWER
    (row,) = compare_runs(*records, {}, {}).rows
    assert row.robust.change is Change.NONE
    assert row.notes == ("no verdicts",)
    assert row.robust.num_lost is None


def test_other_samples_are_compared_by_their_proportions(make_run) -> None:
    before = make_run("PGD", range(10), num_samples=100)
    same = make_run("PGD", range(12), num_samples=100, data=OTHER_SAMPLES)
    worse = make_run("PGD", range(50), num_samples=100, data=OTHER_SAMPLES)
    (row,) = compare([before], [same]).rows
    low, high = row.robust.interval
    assert (row.robust.change, row.notes, row.robust.num_lost) == (Change.NONE, ("other samples",), None)
    assert low < -0.02 < high and low < 0 < high
    (row,) = compare([before], [worse]).rows
    assert row.robust.change is Change.LOWER
    assert row.robust.interval[1] < 0


def test_one_chance_in_twenty_is_noise_among_many_rows(make_run) -> None:
    names = [f"PGD-{number}" for number in range(20)]
    before = [make_run(name, range(20), num_samples=100) for name in names]
    moved = make_run(names[0], range(27), num_samples=100)
    after = [moved, *(make_run(name, range(20), num_samples=100) for name in names[1:])]
    (alone,) = compare(before[:1], after[:1]).rows
    assert alone.robust.p_value < 0.05 and alone.robust.change is Change.LOWER
    rows = compare(before, after).rows
    assert {row.robust.change for row in rows} == {Change.NONE}
    assert min(row.robust.p_value for row in rows) == alone.robust.p_value


def test_a_run_equals_itself(make_run) -> None:
    runs = [make_run(str(number), range(number)) for number in range(5)]
    found = compare(runs, runs[::-1])
    assert [row.robust.adjusted_p_value for row in found.rows] == [1.0] * 5
    assert all(row.before is row.after for row in found.rows)
    assert headline(found).count("lower in 0, higher in 0 and within noise in 5") == 2
    assert headline(found).count("fewer in 0, more in 0 and as many in 5") == 2
    assert headline(found).endswith("Cell evaluations or VJPs differ by more than 1% in 0.")


def with_clean(run: Run, num_clean: int) -> Run:
    """The same run, right without an attack on so many samples only."""
    record, samples = run
    samples = samples.assign(is_clean_correct=np.arange(len(samples)) < num_clean)
    return record.model_copy(update={"clean_accuracy": num_clean / len(samples)}), samples


@pytest.mark.parametrize("data", [None, OTHER_SAMPLES])
def test_clean_accuracy_is_compared_by_itself(make_run, data: dict | None) -> None:
    changes = {} if data is None else {"data": data}
    before = with_clean(make_run("PGD", range(50), num_samples=100), 99)
    after = with_clean(make_run("PGD", range(50), num_samples=100, **changes), 80)
    found = compare([before], [after])
    (row,) = found.rows
    assert (row.robust.change, row.clean.change, row.is_changed) == (Change.NONE, Change.LOWER, True)
    assert (row.clean.num_lost, row.clean.num_gained) == ((19, 0) if data is None else (None, None))
    assert "clean accuracy is lower in 1, higher in 0 and within noise in 0." in headline(found)
    text = comparison_markdown(found)
    assert "99.0 → 80.0" in text and ("-19.0 (-19 +0)" if data is None else "-19.0 [-2") in text
    assert '<tr class="is-changed">' in comparison_html(found)


@pytest.mark.parametrize("count", ["num_unconverged", "num_failed"])
@pytest.mark.parametrize(
    ("before", "after", "data", "change"),
    [
        (0, 1, None, Change.HIGHER),
        (1, 0, None, Change.LOWER),
        (1, 1, None, Change.NONE),
        (0, 1, OTHER_SAMPLES, Change.NONE),
        (0, 12, OTHER_SAMPLES, Change.HIGHER),
        (12, 0, OTHER_SAMPLES, Change.LOWER),
    ],
)
def test_faults_are_judged_and_counted(
    make_run, count: str, before: int, after: int, data: dict | None, change: Change
) -> None:
    changes = {} if data is None else {"data": data}
    sides = (
        make_run("PGD", [0], num_samples=100, **{count: before}),
        make_run("PGD", [0], num_samples=100, **changes, **{count: after}),
    )
    found = compare(*([side] for side in sides))
    (row,) = found.rows
    assert (row.unconverged if count == "num_unconverged" else row.failed) is change
    assert row.is_changed is (change is not Change.NONE)
    said = {Change.HIGHER: "fewer in 0, more in 1", Change.LOWER: "fewer in 1, more in 0"}
    assert headline(found).count(said.get(change, "as many in 1")) == (1 if change in said else 2)
    word = {Change.HIGHER: " (more)", Change.LOWER: " (fewer)", Change.NONE: ""}[change]
    assert f"{before} → {after}{word} |" in comparison_markdown(found)


@pytest.mark.parametrize(("evals", "differs"), [(41.0, False), (41.4, False), (41.6, True), (30.0, True)])
def test_counts_that_differ_are_said(make_run, evals: float, differs: bool) -> None:
    found = compare([make_run("PGD", [0])], [make_run("PGD", [0], cell_evals=evals)])
    assert found.rows[0].has_other_cost is differs
    assert headline(found).endswith(f"in {int(differs)}.")
    assert ("other cost" in comparison_markdown(found)) is differs


def test_noise_alone_is_called_noise(make_run) -> None:
    """Twenty pairs of runs of ten attacks with random verdicts; one pair in twenty may cry wolf, give or take."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(20):
        sides = [
            [make_run(f"PGD-{k}", np.flatnonzero(rng.random(64) < 0.4), num_samples=64) for k in range(10)]
            for _ in "ab"
        ]
        alarms += any(row.is_changed for row in compare(*sides).rows)
    assert alarms <= 3


def test_the_closest_records_are_pairs(make_run) -> None:
    def run(name: str, **changes: object) -> Run:
        return make_run(name, [0], label="PGD", record_id=name, **changes)

    data = OTHER_SAMPLES | {"num_samples": 8}
    before = [run("a0", seed=0), run("a1", seed=1), run("a-set", attack_config={"steps": 9}), run("a-data", data=data)]
    after = [run("b-data", data=data), run("b-set", attack_config={"steps": 9}), run("b2", seed=2), run("b1", seed=1)]
    found = compare(before, after)
    pairs = {(row.before.record_id, row.after.record_id): row.notes for row in found.rows}
    assert pairs == {
        ("a0", "b2"): ("other seed",),
        ("a1", "b1"): (),
        ("a-set", "b-set"): (),
        ("a-data", "b-data"): (),
    }


def test_what_only_one_run_has_is_named(make_run) -> None:
    shared = make_run("shared", [0])
    found = compare([shared, make_run("gone", [0])], [shared, make_run("new", [0], model_sha256="other")])
    assert [record.label for record in found.only_before] == ["gone"]
    assert [record.label for record in found.only_after] == ["new"]
    text = comparison_markdown(found)
    assert "Only in the first run:\n\n- deq-conv, L2, ε = 1, digits test, gone, seed 0" in text
    assert "Only in the second run" in comparison_html(found)
    (row,) = compare([shared], [make_run("shared", [0], model_sha256="other")]).rows
    assert row.notes == ("other weights",)


def test_runs_without_a_common_attack_are_refused(make_run) -> None:
    with pytest.raises(UsageError, match="two runs with an attack in common"):
        compare([make_run("a", [0])], [make_run("b", [0])])


def test_tables_show_the_rows_and_no_text_breaks_out(make_run) -> None:
    before = make_run("a", range(10), num_samples=100, label=NASTY, model=NASTY)
    free = {"cell_evals": 0, "cell_vjps": 0, "solver_steps": 0, "wall_seconds": 0, "peak_memory_mb": None}
    after = make_run("b", range(40), num_samples=100, label=NASTY, model=NASTY)
    other = make_run("c", [0], num_samples=100, cost=free), make_run("c", [0], num_samples=100, data=OTHER_SAMPLES)
    found = compare([before, other[0]], [after, other[1]])
    text, page = comparison_markdown(found), comparison_html(found)
    rows = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({len(row) for row in rows}) == 1
    assert "<script>" not in text and "<script>" not in page
    assert html.escape(NASTY).replace("&#x27;", "&#39;") in page
    for shown in ("89.0 → 59.0", "-30 +0", "× 1.000", "lower"):
        assert shown in text and shown in page
    assert "+0.0 [-5.2, +5.2]" in text and "other samples" in text
    assert "robust accuracy is lower in 1, higher in 0 and within noise in 1;" in page
    assert not re.search(r"https?:|url\(|@import|src=|href=\"(?!data:)", page)


def test_the_order_of_records_does_not_matter(make_run) -> None:
    before = [make_run(f"a{number}", range(number), label=f"PGD-{number % 3}") for number in range(6)]
    after = [make_run(f"b{number}", range(5 - number), label=f"PGD-{number % 3}") for number in range(6)]
    assert comparison_html(compare(before, after)) == comparison_html(compare(before[::-1], after[::-1]))
