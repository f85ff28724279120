"""The leaderboard in print: every model with its interval, and tables that say each thing once."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.standings import LAST_RANK, README, SUITES, standings_text, table_of
from robustbench_deq.records.missing import UNKNOWN, Missing, read_missing, write_plan
from robustbench_deq.report.figures import standings as drawing
from robustbench_deq.report.pages.report import write_report
from robustbench_deq.report.supplements import Supplements
from robustbench_deq.report.tables import standings
from robustbench_deq.report.tables.columns import COLUMNS
from robustbench_deq.report.tables.leaderboard import Entry, make_leaderboard
from tests.runner.small_suite import runs_of, suite

NASTY = "<b> a|b_$x^$"


def card(name: str, threat: dict | None) -> dict:
    described = {"name": name, "family": "deq-conv", "config": {}, "sha256": "0123456789abcdef", "num_parameters": 1}
    return described | {"card": {"threat": threat}}


def ball(epsilon: float) -> dict[str, object]:
    return {"norm": "l2", "epsilon": epsilon}


@pytest.fixture
def entries(make_record) -> list[Entry]:
    """Three models on one board, of which two share a place, and one on another."""
    robust = {"hard": 0.75, "soft": 0.25, "as soft": 0.25}
    records = [make_record("PGD", model, robust=value) for model, value in robust.items()]
    records.append(make_record("PGD", NASTY, robust=0.5, threat=ball(2.0), clean_accuracy=0.75))
    cards = {"hard": card("hard", ball(1.0)), "soft": card("soft", None)}
    return make_leaderboard(records, Supplements(cards=cards))


def test_figure_has_a_row_a_model_by_threat_and_robustness(entries: list[Entry]) -> None:
    first, second = drawing.draw_standings(entries).axes
    assert [text.get_text() for text in first.get_yticklabels()] == ["hard", "as soft", "soft"]
    assert [text.get_text() for text in second.get_yticklabels()] == [NASTY.replace("$", r"\$")]
    assert first.get_title(loc="left").startswith("L2, ε = 1 ") and second.get_title(loc="left").startswith("L2, ε = 2")
    bottom, top = first.get_ylim()
    assert bottom > 2 > 0 > top  # the best is on top
    found = {}
    for container in first.containers:
        line, _, (bars,) = container.lines
        for value, row, ((low, _), (high, _)) in zip(*line.get_data(), bars.get_segments(), strict=True):
            found[int(row)] = (line.get_color(), value, low, high)
    colours = {name: look["color"] for name, look in drawing.TRAININGS.items()}
    assert found[0][:2] == (colours["adversarial"], 75.0)
    assert found[1][:2] == (colours["unknown"], 25.0) and found[2][:2] == (colours["standard"], 25.0)
    assert found[0][2:] == pytest.approx([100 * end for end in entries[0].robust_accuracy_ci])
    clean = first.lines[-1]
    assert list(clean.get_xdata()) == [87.5] * 3


def test_figure_keeps_the_best_of_each_board_where_room_ends(make_record) -> None:
    models = range(drawing.MAX_ROWS)
    records = [
        make_record("a", f"{k:03}", robust=0.8 - k / 256, threat=ball(epsilon))
        for k in models
        for epsilon in (0.5, 1.0)
    ]
    entries = make_leaderboard(records, Supplements())
    drawn, note = drawing.choose_ranked(entries)
    assert len(drawn) == drawing.MAX_ROWS
    assert {entry.rank for entry in drawn} == set(range(1, drawing.MAX_ROWS // 2 + 1))
    assert note.startswith(f"Drawn are {drawing.MAX_ROWS} of {2 * drawing.MAX_ROWS} rows")
    assert drawing.choose_ranked(entries[: drawing.MAX_ROWS]) == (entries[: drawing.MAX_ROWS], "")
    many = [make_record("a", "m", threat=ball(k)) for k in range(1, drawing.MAX_PANELS + 3)]
    drawn, _ = drawing.choose_ranked(make_leaderboard([*many, make_record("a", "n", threat=ball(9))], Supplements()))
    assert len(drawn) == drawing.MAX_PANELS + 1
    assert {entry.setting.epsilon for entry in drawn} > {9.0}


def test_markdown_says_once_what_is_the_same_in_a_board(entries: list[Entry]) -> None:
    text = standings.standings_markdown(entries)
    shared = (
        "The same in all 3 rows: Clean % 87.5; Flags –; Data digits test; Threat L2, ε = 1; n 256; Evaluation –; "
        "Attacks 1; Cell evals 41.0"
    )
    assert shared in text
    boards = [part for part in text.split("## ")[1:]]
    heads = [next(line for line in board.splitlines() if line.startswith("|")) for board in boards]
    assert "Trained against" in heads[0] and "Clean %" not in heads[0]
    assert [name.strip() for name in heads[1].strip("|").split("|")] == [column.title for column in COLUMNS]
    rows = [re.split(r"(?<!\\)\|", line) for line in boards[0].splitlines() if line.startswith("|")]
    assert [(row[1].strip(), row[2].strip()) for row in rows[2:]] == [("1", "hard"), ("2", "as soft"), ("2", "soft")]
    assert "<b>" not in text and r"a\|b" in text


def test_csv_holds_the_numbers_and_latex_all_rows(entries: list[Entry]) -> None:
    table = pd.read_csv(io.StringIO(standings.standings_csv(entries)))
    assert table["robust_accuracy"].tolist() == [0.75, 0.25, 0.25, 0.5]
    assert table["rank"].tolist() == [1, 2, 2, 1]
    assert table["training"].tolist() == ["adversarial", "unknown", "standard", "unknown"]
    latex = standings.standings_latex(entries).splitlines()
    assert latex[1] == r"\toprule" and len(latex) == 6 + len(entries)
    assert all(line.count(" & ") == len(COLUMNS) - 1 and line.endswith(r"\\") for line in (latex[2], *latex[4:-2]))


@pytest.mark.parametrize("suite", SUITES)
def test_readme_shows_the_first_ranks_of_every_board(suite: str) -> None:
    text = standings_text(suite)
    assert text in README.read_text(encoding="utf-8"), "run 'python -m benchmarks.standings'"
    rows = [int(line.split("|")[1]) for line in text.splitlines() if re.match(r"\| \d", line)]
    assert rows.count(1) == table_of(suite).read_text(encoding="utf-8").count("\n## ") and max(rows) <= LAST_RANK


# ---------------------------------------------------------------- attacks that are missing


def fail(folder: Path, name: str, content: object) -> None:
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / f"{name}.failed.json").write_text(json.dumps(content))


def test_failed_shards_are_counted_by_model_and_attack(tmp_path: Path) -> None:
    assert not read_missing(tmp_path, [])
    for begin in (0, 128):
        shard = {"run": {"model": "m", "label": "cold PGD"}, "begin": begin, "end": begin + 128}
        fail(tmp_path, f"k-{begin}", {"reason": "no memory", "record_id": "k", "shard": shard})
    fail(tmp_path, "other", [])
    assert read_missing(tmp_path, []) == Missing(Counter({("m", "cold PGD"): 2, UNKNOWN: 1}), Counter())
    assert read_missing(tmp_path, ["k"]) == Missing(Counter({UNKNOWN: 1}), Counter())
    write_plan(tmp_path, {})
    assert read_missing(tmp_path, []) == Missing(Counter({UNKNOWN: 1}), Counter())


def test_runs_without_a_record_are_unfinished_unless_they_have_failed(tmp_path: Path) -> None:
    runs = [run for run, _ in runs_of(suite())]
    write_plan(tmp_path, {run.key: (run.model, run.label) for run in runs})
    names = Counter((run.model, run.label) for run in runs)
    assert read_missing(tmp_path, []).unfinished == names and len(names) > 1
    first, *rest = runs
    assert read_missing(tmp_path, [first.key]).unfinished == names - Counter([(first.model, first.label)])
    assert not read_missing(tmp_path, [run.key for run in runs])
    (tmp_path / "shards").mkdir()
    fail(tmp_path, "key", {"record_id": first.key, "shard": {"run": {"model": first.model, "label": first.label}}})
    found = read_missing(tmp_path, [run.key for run in rest])
    assert found == Missing(Counter([(first.model, first.label)]), Counter())
    (tmp_path / "plan.json").write_text("[]")
    assert not read_missing(tmp_path, []).unfinished


def test_page_and_board_say_which_attacks_are_missing(make_record, tmp_path: Path) -> None:
    missing = Missing(Counter({(NASTY, "cold PGD"): 2, ("a", "b"): 1}), Counter({("a", "noise"): 1}))
    write_report([make_record()], tmp_path, supplements=Supplements(missing=missing))
    for name in ("index.html", "leaderboard.html", "report.md", "leaderboard.md"):
        text = (tmp_path / name).read_text()
        assert text.count("3 failed shards have left no record") == text.count("Go on with bench --resume") == 1, name
        assert text.count("1 unfinished run has left no record") == 1 and "others: a, noise (1)" in text, name
        assert "cold PGD (2); a, b (1)" in text and "<b> a" not in text, name
    write_report([make_record()], tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_file() and "left no record" in path.read_text()]
