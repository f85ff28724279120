"""Progress of a suite: counts, time left of this session's work alone, and what earlier records let expect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from robustbench_deq.bench.progress import EarlierPaces, SuiteProgress
from robustbench_deq.bench.records import load_records
from robustbench_deq.bench.shards import ShardStore
from robustbench_deq.bench.suite import Shard
from tests.bench.small_suite import do, runs_of, suite

RUNS = runs_of(suite())
SHARDS = [shard for _, shards in RUNS for shard in shards]


def path_of(folder: Path, shard: Shard) -> Path:
    return folder / "shards" / f"{shard.key}.json"


def take_back(folder: Path, shards: list[Shard]) -> dict[str, str]:
    """Make finished shards missing; what their files held."""
    held = {shard.key: path_of(folder, shard).read_text() for shard in shards}
    for shard in shards:
        path_of(folder, shard).unlink()
    return held


def finish(folder: Path, shard: Shard, held: dict[str, str], seconds: float) -> None:
    path_of(folder, shard).write_text(json.dumps(json.loads(held[shard.key]) | {"seconds": seconds}))


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(undisturbed, tmp_path / "copy")


def test_time_left_is_that_of_this_session(folder: Path) -> None:
    now = 100.0
    missing = RUNS[0][1] + RUNS[1][1]  # 20 samples each, in shards of 8, 8 and 4; two other runs were done before
    held = take_back(folder, missing)
    progress = SuiteProgress(RUNS, folder, clock=lambda: now)
    assert (progress.num_done, progress.num_shards) == (len(SHARDS) - 6, len(SHARDS))
    assert progress.seconds_left() is None

    finish(folder, missing[0], held, seconds=8.0)
    now += 8.0
    progress.end(missing[0], None)
    assert progress.seconds_left() == pytest.approx(12 + 20)  # a second a sample, for the other run as well

    finish(folder, missing[3], held, seconds=80.0)
    now += 80.0
    progress.end(missing[3], None)
    assert progress.seconds_left() == pytest.approx(12 * 1 + 12 * 10)

    progress.end(missing[4], "RuntimeError: no")
    assert progress.num_failed == 1
    assert progress.seconds_left() == pytest.approx(12 * 1 + 4 * 10)


def test_workers_side_by_side_halve_the_time_left(folder: Path) -> None:
    now = 0.0
    missing = RUNS[0][1]
    held = take_back(folder, missing)
    progress = SuiteProgress(RUNS, folder, clock=lambda: now)
    for shard in missing[:2]:
        finish(folder, shard, held, seconds=8.0)
        progress.end(shard, None)
    now = 8.0
    assert progress.seconds_left() == pytest.approx(4 / 2)


def test_robust_accuracy_is_that_of_the_samples_done(folder: Path) -> None:
    record = load_records(folder)[0]
    assert SuiteProgress(RUNS, folder).robust_accuracy(RUNS[0][0]) == record.robust_accuracy
    take_back(folder, RUNS[0][1])
    assert SuiteProgress(RUNS, folder).robust_accuracy(RUNS[0][0]) is None


def test_shards_in_progress_say_how_far_they_are(folder: Path) -> None:
    first, second, dead = SHARDS[:3]
    take_back(folder, [first, second, dead])
    store = ShardStore(folder)
    path_of(folder, dead).with_suffix(".lock").write_text('{"began": 0.0, "num_done": 4, "num_robust": 4}')
    progress = SuiteProgress(RUNS, folder)
    with store.claim(first) as one, store.claim(second):
        one.note(5, 3)
        found = [(shard.key, at.num_done, at.num_robust) for shard, at in progress.running()]
        assert found == [(first.key, 5, 3), (second.key, 0, 0)]
        table = cli._suite_table("small", progress)
    assert table.row_count == 3
    assert progress.running() == []


def test_log_has_counts_accuracy_and_time_left(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(cli, "SECONDS_A_LINE", 0)
    missing = RUNS[0][1]
    held = take_back(folder, missing)
    progress = SuiteProgress(RUNS, folder)
    with cli._suite_display("small", progress) as watch:
        for shard in missing:
            finish(folder, shard, held, seconds=1.0)
            watch(shard, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    accuracy = load_records(folder)[0].robust_accuracy
    assert lines[-1] == f"small  12/12 shards  left 0:00:00  test-linear.tiny, joint-pgd: robust {accuracy:.1%} of 20"


def test_expected_time_is_that_of_the_same_settings(folder: Path) -> None:
    paces, records = EarlierPaces(folder.parent), load_records(folder)
    for (run, _), record in zip(RUNS[2:], records[2:], strict=True):  # under another threat, the newest counts
        seconds = record.cost.wall_seconds + record.cost.judge_seconds
        assert paces.of(run).seconds == pytest.approx(seconds / record.data.num_samples)
        assert paces.of(run).source == folder
    more_steps = runs_of(suite(attacks=[{"name": "joint-pgd", "label": "joint-pgd", "config": {"steps": 5}}]))
    assert paces.of(more_steps[0][0]) is None


def test_dry_run_says_what_is_expected_and_from_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(suite().model_dump(mode="json")))  # JSON is YAML
    monkeypatch.chdir(tmp_path)
    do(tmp_path / "results" / "anywhere", suite(attacks=[{"name": "noise"}]))
    result = CliRunner().invoke(cli.main, ["bench", str(path), "--dry-run"])
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()[1:5]]
    assert [(row[1], row[-1]) for row in rows] == 2 * [("joint-pgd", "-"), ("noise", "results/anywhere")]
    assert "12 shards, 12 of them to do" in result.stdout and "2 of 4 runs have none" in result.stdout
    assert not (tmp_path / "results" / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--address", "here:1"], "--executor ray"),
        (["--executor", "ray", "--address", "here:1", "--workers", "2"], "none with --address"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["bench", "configs/suites/quick.yaml", "--out", str(tmp_path / "x"), *words])
    assert result.exit_code == 2 and said in result.stderr
    assert not (tmp_path / "x").exists()
