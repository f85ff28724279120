"""Progress of a suite: counts, time left of this session's work alone, and what earlier records let expect."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from robustbench_deq.commands import display
from robustbench_deq.commands import main as cli
from robustbench_deq.files import write_sealed
from robustbench_deq.records.store import load_records
from robustbench_deq.runner import progress as progress_module
from robustbench_deq.runner.progress import EarlierPaces, SuiteProgress
from robustbench_deq.runner.run import claim_folder
from robustbench_deq.runner.shards import ShardStore
from robustbench_deq.runner.suite import Shard
from tests.runner.small_suite import do, runs_of, suite

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
    content = json.loads(held[shard.key]) | {"seconds": seconds}
    del content["sha256"]
    write_sealed(path_of(folder, shard), content)


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


def test_time_left_falls_while_a_shard_runs(folder: Path) -> None:
    now = 1000.0
    missing = RUNS[0][1] + RUNS[1][1][:1]
    held = take_back(folder, missing)
    progress = SuiteProgress(RUNS, folder, clock=lambda: now)
    finish(folder, missing[0], held, seconds=8.0)
    now += 8.0
    progress.end(missing[0], None)
    with ShardStore(folder).claim(missing[1]) as claim:
        claim.began = now
        claim.note(0, 0)
        left = []
        for seconds in (0.0, 2.0, 6.0, 100.0):
            now = 1008.0 + seconds
            left.append(progress.seconds_left())
    assert left == pytest.approx([20, 18, 14, 12])  # late, it adds nothing to the twelve samples of others


def test_one_thread_may_ask_while_another_tells(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = RUNS[0][1]
    held = take_back(folder, missing)
    progress = SuiteProgress(RUNS, folder)
    for shard in missing:
        finish(folder, shard, held, seconds=1.0)
    progress.end(missing[0], None)
    kind_of = progress_module._kind
    tellers = [threading.Thread(target=progress.end, args=(missing[1], None))]

    def slow(shard: Shard) -> tuple[str, str]:  # in the middle of the sum, another shard ends
        while tellers and threading.current_thread() is threading.main_thread():
            teller = tellers.pop()
            teller.start()
            teller.join(0.2)
        return kind_of(shard)

    monkeypatch.setattr(progress_module, "_kind", slow)
    assert progress.seconds_left() is not None


def test_looking_for_shards_in_progress_opens_only_their_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_back(folder, SHARDS)
    progress = SuiteProgress(RUNS, folder)
    opened, read_text, open_file = [], Path.read_text, os.open
    with ShardStore(folder).claim(SHARDS[3]):
        monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(Path(path).name) or open_file(path, *rest))
        monkeypatch.setattr(Path, "read_text", lambda path, **rest: opened.append(path.name) or read_text(path, **rest))
        assert [shard for shard, _ in progress.running()] == [SHARDS[3]]
        monkeypatch.undo()
    assert set(opened) == {f"{SHARDS[3].key}.lock"}


def test_robust_accuracy_is_that_of_the_samples_done(folder: Path) -> None:
    record = load_records(folder)[0]
    assert SuiteProgress(RUNS, folder).robust_accuracy(RUNS[0][0]) == record.robust_accuracy
    take_back(folder, RUNS[0][1])
    assert SuiteProgress(RUNS, folder).robust_accuracy(RUNS[0][0]) is None


def test_shards_in_progress_say_how_far_they_are(folder: Path) -> None:
    first, second, dead = SHARDS[:3]
    take_back(folder, [first, second, dead])
    store = ShardStore(folder)
    path_of(folder, dead).with_suffix(".lock").write_text('{"began": 9e9, "num_done": 4, "num_robust": 4}')
    with store.claim(first) as one, store.claim(second):
        one.began -= 3600  # by another runner, before this one
        one.note(5, 3)
        progress = SuiteProgress(RUNS, folder)
        found = [(shard.key, at.num_done, at.num_robust) for shard, at in progress.running()]
        assert found == [(first.key, 5, 3), (second.key, 0, 0)]
        table = display.suite_table("small", progress)
    assert table.row_count == 3
    assert progress.running() == []


def test_log_has_counts_accuracy_and_time_left(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(display, "SECONDS_A_LINE", 0)
    missing = RUNS[0][1]
    held = take_back(folder, missing)
    progress = SuiteProgress(RUNS, folder)
    with display.suite_display("small", progress) as watch:
        for shard in missing:
            finish(folder, shard, held, seconds=1.0)
            watch(shard, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0] == "small  9/12 shards"
    accuracy = load_records(folder)[0].robust_accuracy
    assert lines[-1] == f"small  12/12 shards  left 0:00:00  test-linear.tiny, joint-pgd: robust {accuracy:.1%} of 20"


def test_failed_shard_is_named_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    take_back(folder, SHARDS[:1])
    with display.suite_display("small", SuiteProgress(RUNS, folder)) as watch:
        watch(SHARDS[0], "RuntimeError: no luck [today]" + 99 * " really")
        said = capsys.readouterr().err
    place = "small  failed: test-linear.tiny, joint-pgd, l2 0.3, samples 0 to 8: RuntimeError: no luck [today]"
    begun, failed = said.splitlines()
    assert begun == "small  11/12 shards" and failed.startswith(place)


def test_terminal_shows_a_bar_and_what_is_in_progress(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    held = take_back(folder, SHARDS[:3])
    progress = SuiteProgress(RUNS, folder)
    with ShardStore(folder).claim(SHARDS[1]) as claim, display.suite_display("small", progress) as watch:
        claim.note(5, 3)
        finish(folder, SHARDS[0], held, seconds=1.0)
        watch(SHARDS[0], None)
        watch(SHARDS[2], "RuntimeError: no")
        time.sleep(0.5)  # it is drawn four times a second
    said = capsys.readouterr().err
    assert "small  11/12 shards  1 failed  left 0:00:0" in said and "━" in said
    assert "l2 0.3, samples 8 to 16: 5/8, robust 60.0%  0:00:0" in said
    assert "failed: test-linear.tiny, joint-pgd, l2 0.3, samples 16 to 20: RuntimeError: no" in said


def test_expected_time_is_that_of_the_same_settings(folder: Path) -> None:
    paces, records = EarlierPaces([folder.parent, folder]), load_records(folder)
    for (run, _), record in zip(RUNS[2:], records[2:], strict=True):  # under another threat, the newest counts
        seconds = record.cost.wall_seconds + record.cost.judge_seconds
        assert paces.of(run).seconds == pytest.approx(seconds / record.data.num_samples)
        assert paces.of(run).source == folder
    more_steps = runs_of(suite(attacks=[{"name": "joint-pgd", "label": "joint-pgd", "config": {"steps": 5}}]))
    assert paces.of(more_steps[0][0]) is None
    assert paces.of(RUNS[2][0]).num_threads == 1
    assert EarlierPaces([folder], "cpu").of(RUNS[2][0]) is not None
    assert EarlierPaces([folder], "cuda").of(RUNS[2][0]) is None


def test_dry_run_says_what_is_expected_and_from_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(suite().model_dump(mode="json")))  # JSON is YAML
    monkeypatch.chdir(tmp_path)
    do(tmp_path / "results" / "anywhere", suite(attacks=[{"name": "noise"}]))
    result = CliRunner().invoke(cli.main, ["bench", str(path), "--dry-run"])
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()[1:5]]
    assert [(row[1], row[-1]) for row in rows] == 2 * [("joint-pgd", "-"), ("noise", "results/anywhere")]
    assert "12 shards, 12 of them to do" in result.stdout and "2 of 4 runs to do have none" in result.stdout
    assert "workers" not in result.stdout
    assert not (tmp_path / "results" / "runs").exists()


def test_dry_run_of_what_is_done_expects_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(suite().model_dump(mode="json")))
    claim_folder(folder, suite(), [])
    monkeypatch.chdir(tmp_path)
    records = folder / "records.jsonl"
    measured = re.sub(r'"wall_seconds":[^,]+,"peak', '"wall_seconds":30.0,"peak', records.read_text())
    records.write_text(re.sub(r'"judge_seconds":[^}]+}', '"judge_seconds":0.0}', measured))
    unknown = CliRunner().invoke(cli.main, ["bench", str(path), "--out", "elsewhere", "--dry-run"]).stdout
    assert unknown.splitlines()[-1].startswith("expected: unknown")
    words = ["bench", str(path), "--out", str(folder), "--dry-run", "--workers", "3"]
    whole = CliRunner().invoke(cli.main, words).stdout
    assert "expected: 120 s" in whole and "(40 s if 3 workers did 3 times as much)" in whole
    assert "0 of 4 runs to do have none" in whole  # the folder's own records say so
    assert "0 of 0 runs to do have none" in CliRunner().invoke(cli.main, [*words, "--resume"]).stdout
    other = CliRunner().invoke(cli.main, [*words, "--resume", "--set", "limit=10"])
    assert other.exit_code == 2 and "another limit" in other.stderr


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
