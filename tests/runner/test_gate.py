"""The gate catches what got worse, and nothing else.

What is to be caught is broken for real, by other code or other weights, and goes through the runner: no record is
doctored but in the tests of single tolerances.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import xml.etree.ElementTree as tree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch

from robustbench_deq.attacks import JointPGD, build_attack
from robustbench_deq.commands import main as cli
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.models import load_model, save_model
from robustbench_deq.optimise import Ball
from robustbench_deq.optimise.domains import L2
from robustbench_deq.runner import run as runner
from robustbench_deq.runner.baseline import (
    Baseline,
    BaselineEntry,
    Tolerances,
    Update,
    read_baseline,
    read_run,
    to_entries,
    update_baseline,
)
from robustbench_deq.runner.executors import Serial
from robustbench_deq.runner.gate import Check, compare
from robustbench_deq.runner.suite import SuiteConfig, cut, plan
from robustbench_deq.solvers import Anderson

MODEL = "deq-fc.digits-joint-l2"
SUITE = {
    "name": "gate",
    "models": ["model"],  # a folder, in which every test has weights of its own
    "data": "digits",
    "threats": [{"norm": "l2", "epsilons": [0.5]}],
    "attacks": [
        {"name": "joint-pgd", "config": {"steps": 16}},
        {"name": "pgd", "label": "warm PGD", "config": {"steps": 6, "tolerance": 0.05}},
    ],
    "limit": 96,
    "batch_size": 48,
    "num_snapshots": 0,
}
RECORD_FIELDS = ["weights", "settings", "clean", "robust", "unconverged", "failed", "evaluations", "VJPs"]


def run(folder: Path, spoil: Callable[[EquilibriumModel], object] = lambda model: None, **changes: Any) -> Path:
    """A folder with the records of the suite on the shipped model, whose weights `spoil` may change."""
    model = load_model(MODEL)
    with torch.no_grad():
        spoil(model)
    folder.mkdir(exist_ok=True)
    save_model(model, folder / "model", "model")
    runner._model.cache_clear()  # it goes by names, and all models here have the same one
    with contextlib.chdir(folder):
        suite = SuiteConfig(**SUITE | changes)
        runs = [(one, cut(one, suite.batches_per_shard)) for one in plan(suite)]
        outcome = runner.run_suite(runs, Path("run"), build_attack, Serial())
    assert not outcome.failures
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def baseline(undisturbed: Path) -> Baseline:
    """With the tolerances that ship, but for the clock's: these runs take a second."""
    return Baseline(
        tolerances=Tolerances(seconds=1e6),
        updates=[Update(date="2026-01-31", reason="the first")],
        entries=to_entries(read_run(undisturbed)),
    )


def alarms(baseline: Baseline, folder: Path) -> dict[str, set[str]]:
    """The fields that fail, by the attack."""
    found: dict[str, set[str]] = {"joint-pgd": set(), "warm PGD": set()}
    for check in compare(baseline, to_entries(read_run(folder))):
        if not check.is_good:
            found[check.record.split(", ")[1]].add(check.field)
    return found


def take_steps(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Let joint PGD take this share of the steps that its settings say."""
    search = JointPGD.search

    def other(self, model, batch, source, step, keep, num_steps, record=None):
        return search(self, model, batch, source, step, keep, round(share * num_steps), record)

    monkeypatch.setattr(JointPGD, "search", other)


# ---------------------------------------------------------------- what must be caught


def test_attack_with_smaller_steps_is_caught(baseline: Baseline, tmp_path: Path, monkeypatch) -> None:
    direction = L2.direction
    monkeypatch.setattr(L2, "direction", lambda self, gradient: 0.1 * direction(self, gradient))
    found = alarms(baseline, run(tmp_path))
    assert "robust" in found["joint-pgd"] and "robust" in found["warm PGD"]


def test_attack_with_fewer_steps_is_caught(baseline: Baseline, tmp_path: Path, monkeypatch) -> None:
    take_steps(monkeypatch, 0.5)
    assert {"evaluations", "VJPs"} <= alarms(baseline, run(tmp_path))["joint-pgd"]


def test_changed_setting_is_named(baseline: Baseline, tmp_path: Path) -> None:
    weaker = [{"name": "joint-pgd", "config": {"steps": 16, "step_size": 0.01}}, SUITE["attacks"][1]]
    folder = run(tmp_path, attacks=weaker)
    found = alarms(baseline, folder)
    assert {"settings", "robust"} <= found["joint-pgd"] and not found["warm PGD"]
    rows = compare(baseline, to_entries(read_run(folder)))
    named = next(row for row in rows if row.field == "settings")
    assert (named.baseline, named.now) == ("step_size=2.0", "step_size=0.01")


def test_projection_that_leaves_the_ball_is_caught(baseline: Baseline, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Ball, "project", lambda self, delta: (self.x + delta).clamp(0, 1) - self.x)
    folder = run(tmp_path)
    assert all("failed" in fields for fields in alarms(baseline, folder).values())
    for record, samples in read_run(folder):
        is_outside = samples["perturbation"] > 0.5 * (1 + 1e-4)
        assert is_outside.any() and (is_outside == samples["is_failed"]).all()
        assert record.num_failed == is_outside.sum() and not (is_outside & samples["is_robust"]).any()


def test_projection_onto_a_smaller_ball_is_caught(baseline: Baseline, tmp_path: Path, monkeypatch) -> None:
    project = Ball.project
    monkeypatch.setattr(Ball, "project", lambda self, delta: 0.5 * project(self, delta))
    assert all("robust" in fields for fields in alarms(baseline, run(tmp_path)).values())


def test_solver_that_takes_a_fifth_more_steps_is_caught(baseline: Baseline, tmp_path: Path, monkeypatch) -> None:
    """In cold solves: a warm one that begins at the clean equilibrium is mostly a single evaluation. They are tight, so
    that no verdict hangs on where a solve stops."""
    cold = [{"name": "pgd", "label": "warm PGD", "config": {"steps": 6, "tolerance": 1e-3, "warm_start": False}}]
    before = to_entries(read_run(run(tmp_path / "before", attacks=cold)))
    baseline = baseline.model_copy(update={"entries": before})
    step, calls = Anderson.step, itertools.count(1)

    def idle_at_times(self, fn, at, state):
        return (at.z, state) if next(calls) % 6 == 0 else step(self, fn, at, state)

    monkeypatch.setattr(Anderson, "step", idle_at_times)
    assert alarms(baseline, run(tmp_path / "now", attacks=cold))["warm PGD"] == {"evaluations", "VJPs"}


def test_joint_iteration_that_takes_a_fifth_more_steps_is_caught(
    baseline: Baseline, tmp_path: Path, monkeypatch
) -> None:
    take_steps(monkeypatch, 1.2)
    assert {"evaluations", "VJPs"} <= alarms(baseline, run(tmp_path))["joint-pgd"]


def flip_readout(model: EquilibriumModel) -> None:
    model.readout.weight.neg_()


def flip_a_few(model: EquilibriumModel) -> None:
    """One weight in fifty of the cell."""
    weights = next(p for name, p in model.named_parameters() if name.startswith("recurrence")).view(-1)
    weights[::50] *= -1


@pytest.mark.parametrize("spoil", [flip_readout, flip_a_few])
def test_flipped_weights_are_caught(spoil: Callable, baseline: Baseline, tmp_path: Path) -> None:
    assert all({"weights", "clean", "robust"} <= fields for fields in alarms(baseline, run(tmp_path, spoil)).values())


def test_record_that_the_run_lacks_is_caught(baseline: Baseline, tmp_path: Path) -> None:
    folder = run(tmp_path, attacks=SUITE["attacks"][:1])
    assert alarms(baseline, folder) == {"joint-pgd": set(), "warm PGD": {"record"}}


# ---------------------------------------------------------------- what must not


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_raise_no_alarm(num_threads: int, baseline: Baseline, tmp_path: Path) -> None:
    with threads(num_threads):
        folder = run(tmp_path)
    assert alarms(baseline, folder) == {"joint-pgd": set(), "warm PGD": set()}


@pytest.mark.parametrize("batch_size", [16, 96])
def test_batch_size_raises_no_alarm(batch_size: int, baseline: Baseline, tmp_path: Path) -> None:
    """Without the audit of joint attacks, whose verdict on some samples decides how a whole batch is finished."""
    joint, warm = SUITE["attacks"]
    attacks = [joint | {"config": joint["config"] | {"has_fallback": False}}, warm]
    before = to_entries(read_run(run(tmp_path / "before", attacks=attacks)))
    baseline = baseline.model_copy(update={"entries": before})
    folder = run(tmp_path / "now", attacks=attacks, batch_size=batch_size)
    assert alarms(baseline, folder) == {"joint-pgd": set(), "warm PGD": set()}


def test_other_samples_are_compared_by_intervals(baseline: Baseline, tmp_path: Path) -> None:
    checks = compare(baseline, to_entries(read_run(run(tmp_path, limit=80))))
    verdicts = [check for check in checks if check.field in ("clean", "robust")]
    assert all(check.is_good and check.tolerance == "interval holds 0" for check in verdicts) and len(verdicts) == 4


# ---------------------------------------------------------------- single tolerances


def bits(count: int, begin: int = 0, of: int = 400) -> str:
    found = np.zeros(of, dtype=bool)
    found[begin : begin + count] = True
    return np.packbits(found).tobytes().hex()


def entry(**changes: Any) -> BaselineEntry:
    values = {
        "model": "m",
        "attack": "a",
        "label": "b",
        "norm": "l2",
        "epsilon": 1.0,
        "data": "digits",
        "split": "test",
        "seed": 0,
        "settings": {"steps": 3},
        "digest": "d",
        "num_samples": 400,
        "batch_size": 50,
        "is_clean": bits(400),
        "is_robust": bits(200),
        "num_unconverged": 3,
        "num_failed": 0,
        "cell_evals": 100.0,
        "cell_vjps": 0.0,
        "seconds": 0.04,
    }
    return BaselineEntry(**values | changes)


def small_baseline(*entries: BaselineEntry) -> Baseline:
    return Baseline(updates=[Update(date="d", reason="r")], entries=entries or [entry()])


SMALLER = {"digest": "other", "num_samples": 200, "is_clean": bits(200, of=200), "num_unconverged": 1}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"is_robust": bits(204)}, None),
        ({"is_robust": bits(205)}, "robust"),
        ({"is_robust": bits(195)}, "robust"),
        ({"is_robust": bits(200, begin=2)}, None),
        ({"is_robust": bits(200, begin=3)}, "robust"),
        ({"is_clean": bits(395)}, "clean"),
        ({"num_unconverged": 4}, None),
        ({"num_unconverged": 5}, "unconverged"),
        ({"num_unconverged": 0}, None),
        ({"num_failed": 1}, "failed"),
        ({"cell_evals": 104.9}, None),
        ({"cell_evals": 105.1}, "evaluations"),
        ({"cell_evals": 94.9}, "evaluations"),
        ({"cell_vjps": 0.1}, "VJPs"),
        ({"model_sha256": "e" * 64}, None),
        ({"settings": {"steps": 4}}, "settings"),
        ({"settings": {"steps": 3, "restarts": 1}}, "settings"),
        ({**SMALLER, "is_robust": bits(116, of=200)}, None),
        ({**SMALLER, "is_robust": bits(118, of=200)}, "robust"),
        ({**SMALLER, "is_robust": bits(84, of=200)}, None),
        ({**SMALLER, "is_robust": bits(82, of=200)}, "robust"),
        ({**SMALLER, "is_robust": bits(100, of=200), "cell_evals": 114.9}, None),
        ({**SMALLER, "is_robust": bits(100, of=200), "cell_evals": 115.1}, "evaluations"),
        ({**SMALLER, "is_robust": bits(100, of=200), "cell_evals": 84.9}, "evaluations"),
        ({**SMALLER, "is_robust": bits(100, of=200), "num_unconverged": 2}, None),
        ({**SMALLER, "is_robust": bits(100, of=200), "num_unconverged": 3}, "unconverged"),
    ],
)
def test_every_field_has_its_tolerance(changes: dict, field: str | None) -> None:
    found = {check.field for check in compare(small_baseline(), [entry(**changes)]) if not check.is_good}
    assert found == ({field} if field else set())


def test_flips_are_told_apart_by_their_direction() -> None:
    rows = compare(small_baseline(), [entry(is_robust=bits(220, begin=10))])
    assert [row.now for row in rows if row.field == "robust"] == ["55.00% (-10 +30, p 0.0022)"]


def seconds_of(shares: dict[str, tuple[float, ...]], num_models: int = 3, **changes: Any) -> dict[str, Check]:
    """The rows of seconds, by attack, of several attacks on several models, each of which took 0.1 before.

    Args:
        shares: of each attack, by its label, what it takes now on one model after the other.
    """
    expected, now = [], []
    for model, label in itertools.product("mno"[:num_models], shares):
        expected.append(entry(model=model, label=label, seconds=0.1))
        now.append(entry(model=model, label=label, seconds=shares[label]["mno".index(model)], **changes))
    rows = [check for check in compare(small_baseline(*expected), now) if check.field == "seconds"]
    return {row.record.removeprefix("all records, "): row for row in rows}


SAME = (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("shares", "bad"),
    [
        ({"b": SAME, "c": SAME}, []),
        ({"b": SAME, "c": (0.2, 0.05, 0.01)}, []),
        ({"b": (0.29, 0.29, 0.29), "c": SAME, "d": SAME}, []),
        ({"b": (0.31, 0.31, 0.31), "c": SAME}, ["b"]),
        ({"b": (0.31, 0.31, 0.31), "c": SAME, "d": SAME}, ["b"]),
        ({"b": (0.033, 0.033, 0.033), "c": SAME, "d": SAME}, ["b"]),
        ({"b": (0.31, 0.31, 0.1), "c": SAME, "d": SAME}, ["b"]),
        ({"b": (0.99, 0.1, 0.1), "c": SAME, "d": (0.01, 0.1, 0.1)}, []),  # a hiccup on one model
        ({"b": (0.99, 0.1, 0.1), "c": (0.99, 0.1, 0.1), "d": SAME, "e": SAME}, []),  # and over two attacks
        ({"b": (0.9, 0.9, 0.1), "c": (0.9, 0.9, 0.1)}, []),  # slower models
    ],
)
def test_seconds_are_compared_by_the_median_over_models(shares: dict, bad: list[str]) -> None:
    rows = seconds_of(shares)
    assert list(rows) == list(shares)
    assert [name for name, row in rows.items() if not row.is_good] == bad


def test_seconds_of_single_records_are_told() -> None:
    row = seconds_of({"b": (0.99, 0.05, 0.2), "c": SAME, "d": SAME})["b"]
    assert row[2:] == ("x 1.00", "x 2.00 (0.50 to 9.90)", "factor 3", True)


def test_seconds_that_are_not_compared_are_said() -> None:
    (row,) = seconds_of({"b": SAME}).values()
    assert row[2:] == ("x 1.00", "-", "not compared: no other attack beside it", True)
    rows = seconds_of({"b": (0.9,), "c": (0.1,)}, num_models=1, batch_size=20)
    assert {row[2:] for row in rows.values()} == {("x 1.00", "-", "not compared: other batch size", True)}


def test_seconds_are_shares_of_all_attacks_on_the_same_model(undisturbed: Path) -> None:
    runs = read_run(undisturbed)
    seconds = [record.cost.wall_seconds for record, _ in runs]
    assert [entry.seconds for entry in to_entries(runs)] == pytest.approx([one / sum(seconds) for one in seconds])
    elsewhere = runs[1][0].model_copy(update={"seed": 1})
    assert [entry.seconds for entry in to_entries([runs[0], (elsewhere, runs[1][1])])] == [1, 1]


@pytest.mark.parametrize(("now", "is_good"), [("a" * 64, True), ("e" * 64, False)])
def test_weights_are_compared_where_both_are_known(now: str, is_good: bool) -> None:
    known, other = small_baseline(entry(model_sha256="a" * 64)), [entry(model_sha256=now)]
    assert [row.is_good for row in compare(known, other) if row.field == "weights"] == [is_good]
    assert "weights" not in {row.field for row in compare(small_baseline(), other)}


@pytest.mark.parametrize(("after", "is_good"), [(111, True), (97, False), (128, True), (159, False)])
def test_drop_of_twelve_points_on_other_samples_is_caught_where_intervals_overlap(after: int, is_good: bool) -> None:
    """Of 256 samples, 128 before: 12.1 points fewer have an interval of their own that overlaps the old one's."""
    size = {"num_samples": 256, "is_clean": bits(256, of=256), "num_unconverged": 0}
    expected = small_baseline(entry(**size, is_robust=bits(128, of=256)))
    rows = compare(expected, [entry(**size, digest="other", is_robust=bits(after, of=256))])
    assert [row.is_good for row in rows if row.field == "robust"] == [is_good]


def test_missing_record_fails_and_a_new_one_passes() -> None:
    checks = compare(small_baseline(), [entry(model="n")])
    assert [(check.now, check.is_good) for check in checks] == [("missing", False), ("new", True)]


def test_two_records_of_one_kind_are_refused(undisturbed: Path) -> None:
    runs = read_run(undisturbed)
    with pytest.raises(UsageError, match="one of each"):
        to_entries([*runs, runs[0]])


# ---------------------------------------------------------------- the baseline's file


def test_updates_keep_their_reasons_and_the_tolerances(tmp_path: Path, undisturbed: Path) -> None:
    path, runs = tmp_path / "quick.json", read_run(undisturbed)
    first = update_baseline(path, runs, " the\nfirst ")
    loose = first.model_copy(update={"tolerances": Tolerances(count=0.5)})
    path.write_text(loose.model_dump_json())
    update_baseline(path, runs[1:], "joint-pgd is gone")
    found = read_baseline(path)
    assert [update.reason for update in found.updates] == ["the first", "joint-pgd is gone"]
    assert (found.tolerances.count, len(found.entries)) == (0.5, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["quick.json"]


def test_an_update_without_a_reason_writes_nothing(tmp_path: Path, undisturbed: Path) -> None:
    with pytest.raises(UsageError, match="a reason"):
        update_baseline(tmp_path / "quick.json", read_run(undisturbed), " ")
    assert not (tmp_path / "quick.json").exists()


DAMAGED = small_baseline().model_dump(mode="json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file"),
        ("{", "JSON"),
        ("[]", "JSON"),
        ('{"schema_version": 2}', "updates"),
        (json.dumps(DAMAGED | {"schema_version": 3}), "schema_version"),
        (json.dumps(DAMAGED | {"schema_version": 1}), "schema_version"),
        (json.dumps(DAMAGED | {"entries": 3}), "entries"),
        (json.dumps(DAMAGED | {"entries": [None]}), "entries"),
        (json.dumps(DAMAGED | {"updates": []}), "updates"),
        (json.dumps(DAMAGED).replace(bits(200), "xy"), "is_robust"),
        (json.dumps(DAMAGED).replace(bits(200), "ff"), "400 samples"),
    ],
)
def test_damaged_baselines_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_baseline(path)


# ---------------------------------------------------------------- the command


def check(*args: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli.main, ["check", *map(str, args)])


@pytest.fixture
def kept(tmp_path: Path, undisturbed: Path) -> Path:
    """The file of a baseline that the command has written."""
    path = tmp_path / "baseline.json"
    result = check("--baseline", path, undisturbed, "--update", "the first")
    assert (result.exit_code, result.stderr) == (0, "") and "2 records" in result.stdout
    return path


def test_what_is_unchanged_passes_as_table_json_and_junit(kept: Path, undisturbed: Path, tmp_path: Path) -> None:
    result = check("--baseline", kept, undisturbed, "--junit", tmp_path / "junit.xml")
    assert (result.exit_code, result.stderr) == (0, "")
    header, *rows, last = result.stdout.splitlines()
    assert header.split() == ["record", "field", "baseline", "now", "tolerance", "verdict"]
    assert len(rows) == 18 and all(row.split()[-1] == "good" for row in rows)
    assert last == "18 of 18 checks are good"
    suite = tree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "18", "0")
    assert [case.get("name") for case in suite.iter("testcase")] == [
        *RECORD_FIELDS,
        *RECORD_FIELDS,
        *["seconds"] * 2,
    ]
    content = json.loads(check("--baseline", kept, undisturbed, "--json").stdout)
    assert content["is_good"] and {row["is_good"] for row in content["checks"]} == {True}


def test_what_is_changed_fails_as_table_json_and_junit(kept: Path, undisturbed: Path, tmp_path: Path) -> None:
    content = json.loads(kept.read_text())
    content["entries"][1]["cell_evals"] *= 2
    kept.write_text(json.dumps(content))
    result = check("--baseline", kept, undisturbed, "--junit", tmp_path / "junit.xml")
    error = "Error: 1 of 18 checks failed: model, warm PGD, l2 0.5, evaluations first\n"
    assert (result.exit_code, result.stderr) == (1, error)
    assert [row.split()[-1] for row in result.stdout.splitlines()[1:-1]] == ["good"] * 17 + ["BAD"]
    suite = tree.parse(tmp_path / "junit.xml").getroot()
    assert suite.get("failures") == "1"
    assert [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None] == ["evaluations"]
    result = check("--baseline", kept, undisturbed, "--json")
    content = json.loads(result.stdout)
    assert (result.exit_code, content["is_good"]) == (1, False)
    assert [row["field"] for row in content["checks"] if not row["is_good"]] == ["evaluations"]


def test_an_update_takes_whole_runs_only_and_names_what_leaves(kept: Path, undisturbed: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    shutil.copytree(undisturbed, part)
    lines = (part / "records.jsonl").read_text().splitlines(keepends=True)
    (part / "records.jsonl").write_text(lines[0])
    result = check("--baseline", kept, part, "--update", "one attack")
    assert (result.exit_code, result.stderr) == (0, "")
    gone, written = result.stdout.splitlines()
    assert gone == "no longer in it: model, warm PGD, l2 0.5" and written.startswith("1 records written")
    before = kept.read_bytes()
    planned = [{"record_id": json.loads(line)["record_id"], "model": "m", "label": "l"} for line in lines]
    (part / "plan.json").write_text(json.dumps({"runs": planned}))
    result = check("--baseline", kept, part, "--update", "one attack")
    assert result.exit_code == 2 and "got 0 failed shards and 1 unfinished runs; go on" in result.stderr
    assert kept.read_bytes() == before


def test_wrong_usage_is_one_line_and_exit_code_2(kept: Path, undisturbed: Path, tmp_path: Path) -> None:
    calls = {
        ("--baseline", tmp_path / "nowhere.json", undisturbed): "--update",
        ("--baseline", kept, tmp_path / "nowhere"): "no such folder",
        ("--baseline", kept, undisturbed, "--update", ""): "a reason",
        ("--baseline", kept, undisturbed, "--update", "why", "--json"): "check after the update",
        (undisturbed,): "--baseline",
        ("--baseline", kept, undisturbed, "--junit", kept / "below" / "junit.xml"): "a file that can be written",
        ("--baseline", "/proc/1/new.json", undisturbed, "--update", "why"): "a file that can be written",
    }
    before = kept.read_bytes()
    for args, said in calls.items():
        result = check(*args)
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), args
        assert said in result.stderr
    assert kept.read_bytes() == before
