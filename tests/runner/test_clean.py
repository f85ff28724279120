"""Clean equilibria of a suite: solved once, whoever needs them first, and the same for all."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks.kills import contents
from robustbench_deq.attacks import build_attack
from robustbench_deq.data import load
from robustbench_deq.evaluate import clean as clean_module
from robustbench_deq.evaluate import judge as judge_module
from robustbench_deq.evaluate.clean import CleanBatch, judge_clean
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.models import load_model
from robustbench_deq.optimise.objectives import CrossEntropy, Margin
from robustbench_deq.records.store import RecordStore, load_records
from robustbench_deq.runner.clean import CleanStore
from robustbench_deq.runner.run import run_shard, task_of
from robustbench_deq.runner.suite import SuiteConfig
from tests.runner.small_suite import do, runs_of, suite

MODEL = "test-linear.tiny"
ATTACKS = [
    {"name": "joint-pgd", "config": {"steps": 4}},
    {"name": "pgd", "config": {"steps": 3}},
    {"name": "pgd", "label": "margin", "config": {"steps": 3, "objective": "margin"}},
    {"name": "joint-fmn", "config": {"steps": 6}},
    {"name": "noise", "config": {"restarts": 2}},
]


def wide(**changes: Any) -> SuiteConfig:
    """Several attacks, seeds and threats on one model."""
    threats = [{"norm": "l2", "epsilons": [0.3, 0.6]}, {"norm": "linf", "epsilons": [0.1]}]
    return suite(**{"threats": threats, "attacks": ATTACKS, "seeds": [0, 1], "num_snapshots": 0, **changes})


class Solves:
    """Images that the judge has solved from cold at their clean state, by how often; and how many calls of
    `judge_clean` there were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit: int = 20) -> None:
        model, x = load_model(MODEL), load("digits", limit=limit).x
        with torch.no_grad():
            self.clean, self.rows = model.inject(x), []
        tight_solve = judge_module.tight_solve

        def watched(model: Any, u: torch.Tensor, *rest: Any) -> Any:
            self.rows.extend(u.detach().clone())
            return tight_solve(model, u, *rest)

        monkeypatch.setattr(judge_module, "tight_solve", watched)
        monkeypatch.setattr(clean_module, "tight_solve", watched)

    @property
    def counts(self) -> list[int]:
        rows = torch.stack(self.rows) if self.rows else self.clean[:0]
        return [int(((rows - row).abs().amax(1) < 1e-6).sum()) for row in self.clean]


@pytest.mark.parametrize("batches_per_shard", [1, 2])
def test_every_clean_image_is_solved_once_in_a_suite(batches_per_shard: int, tmp_path: Path, monkeypatch) -> None:
    solves = Solves(monkeypatch)
    outcome = do(tmp_path, wide(batches_per_shard=batches_per_shard))
    assert not outcome.failures and outcome.num_records == 3 * 2 * len(ATTACKS)
    assert solves.counts == [1] * 20
    assert not (tmp_path / "clean").exists()


def test_models_and_batches_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, run = CleanStore(tmp_path), runs_of(suite())[0][0]
    model, data = load_model(MODEL), load("digits", limit=20)
    solved = []

    def solve() -> CleanBatch:
        solved.append(1)
        return judge_clean(model, data.x[:8], data.y[:8])

    cpu = torch.device("cpu")
    others = [
        (run, slice(0, 8)),
        (run, slice(0, 4)),
        (run, slice(8, 16)),
        (run.model_copy(update={"model_digest": "x"}), slice(0, 8)),
        (run.model_copy(update={"digest": "x"}), slice(0, 8)),
    ]
    for count, (one, rows) in enumerate(others, start=1):
        for _ in range(2):
            with store.batch(one, rows, cpu, solve):
                assert len(solved) == count
    for same in ({"seed": 5}, {"epsilon": 9.0}, {"attack": "noise"}, {"norm": "linf"}):
        with store.batch(run.model_copy(update=same), slice(0, 8), cpu, solve):
            assert len(solved) == len(others)


def test_records_are_those_of_single_evaluations(tmp_path: Path) -> None:
    config = wide(seeds=[0], num_snapshots=2)
    do(tmp_path, config)
    records = {record.record_id: record for record in load_records(tmp_path)}
    model, data = load_model(MODEL), load("digits", limit=20)
    for run, _ in runs_of(config):
        task, record = task_of(run, build_attack), records[run.key]
        whole = evaluate(
            model, task.attack, data, batch_size=run.batch_size, seed=run.seed, num_snapshots=run.num_snapshots
        )
        pd.testing.assert_frame_equal(RecordStore(tmp_path).load_samples(run.key), whole.samples)
        for name in ("robust_accuracy", "clean_accuracy", "num_attacked", "adversarial_loss", "diagnostics"):
            assert getattr(record, name) == getattr(whole.record, name)
        for name in ("cell_evals", "cell_vjps", "solver_steps"):
            assert getattr(record.cost, name) == getattr(whole.record.cost, name)
        assert [point.robust_accuracy for point in record.curve] == [
            point.robust_accuracy for point in whole.record.curve
        ]


def test_the_order_of_attacks_does_not_matter(tmp_path: Path) -> None:
    """Nor the worker, for which see `test_run`."""
    config = wide(seeds=[0], limit=12)
    do(tmp_path / "one", config)
    for _, shards in reversed(runs_of(config)):
        for shard in reversed(shards):
            assert run_shard(shard, tmp_path / "other", build_attack) is None
    do(tmp_path / "other", config)
    expected = sorted(contents(tmp_path / "one"), key=str)
    assert sorted(contents(tmp_path / "other"), key=str) == expected


# ---------------------------------------------------------------- interrupts


def test_an_interrupted_suite_goes_on_with_what_was_solved(undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    _, first = runs_of(suite())[0]
    for shard in first:
        assert run_shard(shard, tmp_path, build_attack) is None
    kept = sorted((tmp_path / "clean").glob("*.safetensors"))
    assert len(kept) == 3
    solves = Solves(monkeypatch)
    assert not do(tmp_path).failures
    assert solves.counts == [0] * 20 and len(solves.rows) > 0
    assert not (tmp_path / "clean").exists()
    assert contents(tmp_path) == contents(undisturbed)


def flip(path: Path) -> None:
    """The lowest bit of the mantissa's highest byte of some number: it reads as well as before."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "text": lambda path: path.write_text("no tensors"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_batch_is_solved_again(damage, undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    _, first = runs_of(suite())[0]
    for shard in first:
        assert run_shard(shard, tmp_path, build_attack) is None
    damage(sorted((tmp_path / "clean").glob("*.safetensors"))[0])
    solves = Solves(monkeypatch)
    assert not do(tmp_path).failures
    assert sum(solves.counts) in (8, 4) and set(solves.counts) == {0, 1}  # the samples of one batch
    assert contents(tmp_path) == contents(undisturbed)


def test_the_folder_stays_while_something_is_missing(tmp_path: Path) -> None:
    def build(name: str, *rest: Any) -> Any:
        if name == "noise":
            raise RuntimeError("no luck today")
        return build_attack(name, *rest)

    assert len(do(tmp_path, build=build).failures) == 6
    assert len(list((tmp_path / "clean").glob("*.safetensors"))) == 3
    assert not do(tmp_path).failures
    assert not (tmp_path / "clean").exists()


def test_adjoints_are_kept_with_the_batch_and_add_up(tmp_path: Path) -> None:
    run = runs_of(suite())[0][0]
    model, data, rows = load_model(MODEL), load("digits", limit=20), slice(0, 8)
    store, cpu = CleanStore(tmp_path), torch.device("cpu")
    clean = judge_clean(model, data.x[rows], data.y[rows])

    def never() -> CleanBatch:
        pytest.fail("solved twice")

    with store.batch(run, rows, cpu, lambda: clean) as first:
        first.adjoints["one"] = clean.z + 1
        with store.batch(run, rows, cpu, never) as second:  # began before the first one's adjoint was kept
            assert second.adjoints == {}
            second.adjoints["other"] = clean.z + 2
    with store.batch(run, rows, cpu, never) as found:
        assert set(found.adjoints) == {"one", "other"}
        assert torch.equal(found.adjoints["one"], clean.z + 1) and torch.equal(found.adjoints["other"], clean.z + 2)
        for name in ("z", "distance", "first"):
            assert torch.equal(getattr(found, name), getattr(clean, name))
        assert found.contraction is None
        for mine, its in zip(found.verdict.parts(), clean.verdict.parts(), strict=True):
            assert torch.equal(mine, its) and mine.dtype == its.dtype
    assert not list((tmp_path / "clean").glob(".*"))  # no temporary file stays


def test_contraction_is_kept_with_the_first_adjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs_of(suite())[0][0]
    model, data, rows = load_model(MODEL), load("digits", limit=20), slice(0, 8)
    store, cpu, (x, y) = CleanStore(tmp_path), torch.device("cpu"), (data.x[rows], data.y[rows])
    with store.batch(run, rows, cpu, lambda: judge_clean(model, x, y)) as first:
        expected = first.known(model, x, Margin(y)).settled.contraction

    def never(*_: Any) -> Any:
        pytest.fail("estimated twice")

    monkeypatch.setattr(clean_module, "estimate_contraction", never)
    with store.batch(run, rows, cpu, never) as second:
        known = second.known(model, x, CrossEntropy(y)).settled
    with store.batch(run, rows, cpu, never) as third:
        assert set(third.adjoints) == {"Margin", "CrossEntropy"}
    for found in (known.contraction, third.contraction):
        assert found is not None and expected is not None
        assert all(torch.equal(mine, its) for mine, its in zip(found, expected, strict=True))


def test_contraction_of_another_worker_is_not_lost(tmp_path: Path) -> None:
    run = runs_of(suite())[0][0]
    model, data, rows = load_model(MODEL), load("digits", limit=20), slice(0, 8)
    store, cpu, (x, y) = CleanStore(tmp_path), torch.device("cpu"), (data.x[rows], data.y[rows])
    with store.batch(run, rows, cpu, lambda: judge_clean(model, x, y)) as first:
        with store.batch(run, rows, cpu, lambda: judge_clean(model, x, y)) as second:
            second.known(model, x, Margin(y))
        first.adjoints["own"] = first.z + 1
    with store.batch(run, rows, cpu, lambda: judge_clean(model, x, y)) as found:
        assert set(found.adjoints) == {"own", "Margin"} and found.contraction is not None


# ---------------------------------------------------------------- two at once


def solve_slowly(folder: Path, place: Any, began: Any) -> None:
    """Solve the first batch, and note in the folder that it was."""
    run, rows = runs_of(suite())[0][0], slice(0, 8)
    model, data = load_model(MODEL), load("digits", limit=20)

    def solve() -> CleanBatch:
        began.set()
        time.sleep(0.3)
        (folder / f"solved-{place}").touch()
        return judge_clean(model, data.x[rows], data.y[rows])

    with CleanStore(folder).batch(run, rows, torch.device("cpu"), solve) as clean:
        torch.save(clean.z, folder / f"state-{place}.pt")


def check_one_has_waited(folder: Path) -> None:
    assert len(list(folder.glob("solved-*"))) == 1
    one, other = (torch.load(path) for path in sorted(folder.glob("state-*.pt")))
    assert torch.equal(one, other)


def test_two_threads_on_one_batch_wait_for_each_other(tmp_path: Path) -> None:
    threads = [threading.Thread(target=solve_slowly, args=(tmp_path, i, threading.Event())) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    check_one_has_waited(tmp_path)


def test_two_processes_on_one_batch_wait_for_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    began = context.Event()
    other = context.Process(target=solve_slowly, args=(tmp_path, "other", began))
    other.start()
    assert began.wait(60)
    solve_slowly(tmp_path, "one", threading.Event())
    other.join(60)
    assert other.exitcode == 0 and (tmp_path / "solved-other").exists()
    check_one_has_waited(tmp_path)
