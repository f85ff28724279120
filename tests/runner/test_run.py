"""Suites: the plan, shards that may be done in any order and by anybody, failures that stop nothing, and resuming."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.kills import contents, processes
from robustbench_deq import files
from robustbench_deq.attacks import build_attack
from robustbench_deq.configs import read_yaml, validate
from robustbench_deq.data import load
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.files import replacing
from robustbench_deq.models import MODELS, load_model, save_model
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import ATTACKS, Attack
from robustbench_deq.records.environment import describe_environment
from robustbench_deq.records.images import load_images
from robustbench_deq.records.store import RecordStore, load_records
from robustbench_deq.runner import run as runner
from robustbench_deq.runner import shards as shards_module
from robustbench_deq.runner.executors import WORKER_DIED, Processes, Ray
from robustbench_deq.runner.progress import SuiteProgress
from robustbench_deq.runner.run import check_folder, claim_folder, run_shard
from robustbench_deq.runner.shards import ASSEMBLY_LOCK, ShardStore
from robustbench_deq.runner.suite import cut, plan, read_suite
from robustbench_deq.threats import Threat
from tests.runner.small_suite import do, runs_of, suite

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------- the plan


def test_plan_is_every_model_threat_attack_and_seed() -> None:
    runs = plan(suite(seeds=[0, 1], attacks=[{"name": "noise"}, {"name": "joint-pgd", "grid": {"steps": [2, 4]}}]))
    assert [(run.epsilon, run.label, run.seed) for run in runs] == [
        (epsilon, label, seed)
        for epsilon in (0.3, 0.5)
        for label_group in (["noise"], ["joint-pgd steps=2", "joint-pgd steps=4"])
        for seed in (0, 1)
        for label in label_group
    ]
    assert len({run.key for run in runs}) == len(runs)


def test_wildcards_take_threat_and_data_from_the_cards() -> None:
    runs = plan(suite(models=["deq-fc.digits-*"], threats=None, data=None, attacks=[{"name": "noise"}]))
    assert [(run.model, run.data, run.norm, run.epsilon) for run in runs] == [
        ("deq-fc.digits-joint-l2", "digits", "l2", 0.5),
        ("deq-fc.digits-standard", "digits", "l2", 0.5),
    ]
    assert all(run.model_sha256 for run in runs)


def test_budgets_and_solvers_are_axes_of_the_attacks_that_have_them() -> None:
    runs = plan(
        suite(
            threats=[{"norm": "l2", "epsilons": [0.3]}],
            attacks=[{"name": "joint-pgd"}, {"name": "pgd", "label": "warm"}, {"name": "noise"}],
            budgets=[{"steps": 4}, {"steps": 6, "evaluations": 30}],
            solvers=["anderson", "broyden"],
        )
    )
    defaults = {run.attack: ATTACKS.get(run.attack).config_type().model_dump(mode="json") for run in runs}
    changed = [
        {key: value for key, value in run.config.items() if value != defaults[run.attack].get(key)} for run in runs
    ]
    assert [(run.label, settings) for run, settings in zip(runs, changed, strict=True)] == [
        ("joint-pgd steps=4", {"steps": 4}),
        ("joint-pgd steps=6 max_evaluations=30", {"steps": 6, "max_evaluations": 30}),
        ("warm steps=4 solver=anderson", {"steps": 4}),
        ("warm steps=4 solver=broyden", {"steps": 4, "solver": "broyden"}),
        ("warm steps=6 max_evaluations=30 solver=anderson", {"steps": 6, "max_evaluations": 30}),
        ("warm steps=6 max_evaluations=30 solver=broyden", {"steps": 6, "max_evaluations": 30, "solver": "broyden"}),
        ("noise", {}),
    ]


def test_several_datasets_are_an_axis(tmp_path: Path) -> None:
    few = load("digits", limit=3)
    np.savez(tmp_path / "few.npz", images=few.x.numpy().repeat(4, 0), labels=few.y.numpy().repeat(4))
    runs = plan(suite(data=["digits", f"npz:{tmp_path / 'few.npz'}"], attacks=[{"name": "noise"}]))
    assert [run.data.partition(":")[0] for run in runs] == ["digits", "digits", "npz", "npz"]
    assert len({run.digest for run in runs}) == 2


@pytest.mark.parametrize(("batches", "expected"), [(1, [(0, 8), (8, 16), (16, 20)]), (2, [(0, 16), (16, 20)])])
def test_shards_are_whole_batches_and_cover_the_run(batches: int, expected: list) -> None:
    shards = cut(plan(suite())[0], batches)
    assert [(shard.begin, shard.end) for shard in shards] == expected


def test_key_follows_from_everything_that_the_result_depends_on() -> None:
    one = plan(suite())[0]
    for change in ({"seed": 1}, {"epsilon": 0.31}, {"digest": "x"}, {"batch_size": 9}, {"model_digest": "x"}):
        assert one.model_copy(update=change).key != one.key
    assert plan(suite())[0].key == one.key


def test_key_follows_from_defaults_as_from_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ATTACKS.get("noise").config_type
    written, explicit = (
        plan(suite(attacks=[{"name": "noise", "config": config}]))[0] for config in ({}, kind().model_dump())
    )
    assert written.key == explicit.key

    class Changed(kind):
        restarts: int = 7

    monkeypatch.setattr(ATTACKS.get("noise"), "config_type", Changed)
    assert plan(suite(attacks=[{"name": "noise"}]))[0].key != written.key


def test_key_follows_from_the_settings_of_a_saved_model(tmp_path: Path) -> None:
    def key() -> str:
        return plan(suite(models=[str(tmp_path)]))[0].key

    save_model(load_model("test-linear.tiny"), tmp_path, "mine")
    before, path = key(), tmp_path / "model.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"card": {"seed": 5}}))
    assert key() == before
    path.write_text(json.dumps(described | {"config": described["config"] | {"contraction": 0.125}}))
    assert key() != before


MODEL_FILE = """
from robustbench_deq.models import load_model
def build():
    model = load_model("test-linear.tiny")
    model.readout.weight.data *= {factor}
    return model
"""


def test_edited_model_file_is_another_model(tmp_path: Path) -> None:
    path, folder = tmp_path / "model.py", tmp_path / "suite"
    path.write_text(MODEL_FILE.format(factor=1))
    config = suite(models=[f"{path}:build"], attacks=[{"name": "noise"}])
    before = runs_of(config)
    assert run_shard(before[0][1][0], folder, build_attack) is None

    path.write_text(MODEL_FILE.format(factor=-1.5))
    assert not {run.key for run in plan(config)} & {run.key for run, _ in before}
    runner._model.cache_clear()  # as in another process
    reason = run_shard(before[0][1][1], folder, build_attack)
    assert "expected the model that was planned, got a changed one" in reason
    do(folder, config)
    assert len(load_records(folder)) == 2 and ShardStore(folder).is_done(before[0][1][0])

    claim_folder(folder, config, [])
    check_folder(folder, config, plan(config))
    path.write_text(MODEL_FILE.format(factor=2))
    with pytest.raises(UsageError, match="models, data and settings of today, got 2 of earlier ones"):
        check_folder(folder, config, plan(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["deq-conv.nothing-*"]}, "model"),
        ({"attacks": [{"name": "joint-pdg"}]}, "joint-pgd"),
        ({"attacks": [{"name": "joint-pgd", "config": {"stepz": 3}}]}, "stepz"),
        ({"attacks": [{"name": "noise"}, {"name": "noise"}]}, "different labels, got noise twice"),
        ({"attacks": [{"name": "noise"}, {"name": "noise", "config": {"restarts": 2}}]}, "noise twice"),
        ({"threats": None}, "set threats"),
        ({"threats": [{"norm": "l3", "epsilons": [1]}]}, "l3"),
        ({"data": None}, "set data"),
        ({"data": []}, "data"),
        ({"threats": []}, "threats: expected at least 1 item"),
        ({"attacks": [{"name": "pgd", "grid": {"steps": []}}]}, "grid.steps: expected at least 1 item"),
        ({"models": ["deq-conv.fashion-joint-l2"]}, r"images \[1, 28, 28\], got \[1, 8, 8\] of digits"),
        ({"threats": [{"norm": "l2", "epsilons": [-1]}]}, "epsilon"),
        ({"attacks": [{"name": "torchattacks-pgd"}]}, "norm linf"),
        ({"solvers": ["simplex"]}, "anderson"),
        ({"seeds": [-1]}, "seeds"),
        ({"models": ["nowhere/model.py:build"]}, "nowhere/model.py:build: expected file.py:function, got No such file"),
        ({"solvers": ["anderson"]}, "an attack with solver, got none"),
        ({"budgets": [{"steps": 4}], "attacks": [{"name": "noise"}]}, "an attack with steps, got none"),
        ({"budgets": [{"steps": 4}]}, "one place for steps"),
        ({"budgets": [{}]}, "steps, evaluations or seconds"),
        ({"budgets": [{"seconds": 1}], "attacks": [{"name": "torchattacks-pgdl2"}]}, "max_seconds"),
    ],
)
def test_plans_that_cannot_be_done_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(suite(**change))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "suites").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_suites_are_sound(path: Path) -> None:
    config = read_suite(path)
    variants = [(spec, *variant) for spec in config.attacks for variant in spec.variants(config.axes())]
    assert len({label for _, label, _ in variants}) == len(variants)
    for spec, label, settings in variants:
        validate(ATTACKS.get(spec.name).config_type, settings, label)
    trained = {f"results/runs/{read_yaml(path)['name']}" for path in (ROOT / "configs" / "training").glob("*.yaml")}
    assert all(pattern in trained or MODELS.list(pattern) for pattern in config.models)


# ---------------------------------------------------------------- running


def test_record_of_a_run_is_that_of_one_evaluation(undisturbed: Path) -> None:
    record = load_records(undisturbed)[0]
    attack = build_attack("joint-pgd", Threat(Norm.L2, 0.3), {"steps": 4})
    whole = evaluate(load_model("test-linear.tiny"), attack, load("digits", limit=20), batch_size=8, num_snapshots=2)
    for field in (
        "robust_accuracy",
        "clean_accuracy",
        "adversarial_loss",
        "num_unconverged",
        "residuals",
        "diagnostics",
    ):
        assert getattr(record, field) == getattr(whole.record, field)
    assert record.cost.cell_vjps == whole.record.cost.cell_vjps
    pd.testing.assert_frame_equal(RecordStore(undisturbed).load_samples(record.record_id), whole.samples)


def test_the_panel_of_a_run_is_that_of_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = suite(threats=[{"norm": "l2", "epsilons": [0.3]}], attacks=[{"name": "joint-pgd", "config": {"steps": 4}}])
    plain = runner.task_of
    monkeypatch.setattr(runner, "task_of", lambda *given: plain(*given).model_copy(update={"has_panel": True}))
    do(tmp_path, config)
    (record,) = load_records(tmp_path)
    attack = build_attack("joint-pgd", Threat(Norm.L2, 0.3), {"steps": 4})
    data = load("digits", limit=20)
    alone = evaluate(load_model("test-linear.tiny"), attack, data, batch_size=8, has_panel=True).record
    assert record.probes is not None and record.probes["num_probed"] == 8
    assert record.probes == pytest.approx(alone.probes)


def test_one_gradient_is_taken_before_the_first_attack_of_a_process(tmp_path: Path, monkeypatch) -> None:
    evaluate_batch, taken = runner.evaluate_batch, []

    def watched(*args: Any) -> Any:
        taken.append(runner._warm_up.cache_info().misses)
        return evaluate_batch(*args)

    runner._warm_up.cache_clear()
    monkeypatch.setattr(runner, "evaluate_batch", watched)
    do(tmp_path)
    assert len(taken) > 1 and set(taken) == {1}


def test_every_record_has_some_images(undisturbed: Path) -> None:
    x = load("digits", limit=20).x.numpy()
    for record in load_records(undisturbed):
        images = load_images(undisturbed, record.record_id)
        assert all(any((image == clean).all() for clean in x[:8]) for image in images.clean)
        change = ((images.adversarial - images.clean) ** 2).sum((1, 2, 3)) ** 0.5
        assert len(change) == 8
        assert 0 < change.max() <= record.threat.epsilon * (1 + 1e-5)


def test_shards_in_another_order_and_cut_give_the_same_records(undisturbed: Path, tmp_path: Path) -> None:
    runs = runs_of(suite())
    for _, shards in reversed(runs):
        for shard in reversed(shards):
            assert run_shard(shard, tmp_path, build_attack) is None
    do(tmp_path)
    assert contents(tmp_path) == contents(undisturbed)


def test_running_again_does_nothing(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    before = (folder / "records.jsonl").read_bytes()
    seen: list[object] = []
    outcome = do(
        folder, build=lambda *_: pytest.fail("an attack was built for a shard that is done"), watch=seen.append
    )
    assert outcome.num_records == 0 and not seen
    assert (folder / "records.jsonl").read_bytes() == before


def test_only_missing_shards_are_done(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    _, shards = runs_of(suite())[0]
    lost = shards[1]
    (folder / "shards" / f"{lost.key}.json").unlink()
    (folder / "records.jsonl").unlink()
    seen = []
    do(folder, watch=lambda shard, reason: seen.append(shard.key))
    assert seen == [lost.key]
    assert contents(folder) == contents(undisturbed)


def test_failed_shard_is_kept_with_its_reason_and_the_rest_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    def build(name: str, threat: Threat, settings: dict[str, Any]):
        attack = build_attack(name, threat, settings)
        if name == "noise" and threat.epsilon == 0.5:
            attack = attack.with_(stop_at_success=False)  # or a shard of misclassified samples would need no luck
            attack.run = lambda *args, **rest: (_ for _ in ()).throw(RuntimeError("no luck\ntoday"))
        return attack

    outcome = do(tmp_path, build=build)
    assert set(outcome.failures.values()) == {"RuntimeError: no luck today"} and len(outcome.failures) == 3
    assert len(load_records(tmp_path)) == 3
    store = ShardStore(tmp_path)
    failed = [shard for _, shards in runs_of(suite()) for shard in shards if store.reason(shard)]
    assert {shard.key for shard in failed} == set(outcome.failures)
    kept = json.loads((tmp_path / "shards" / f"{failed[0].key}.failed.json").read_text())
    assert (
        kept["traceback"].startswith("Traceback") and "in build" not in kept["reason"] and "throw" in kept["traceback"]
    )
    assert not do(tmp_path).failures  # tried again, and now it works
    assert not any(store.reason(shard) for shard in failed)
    assert sorted(contents(tmp_path), key=str) == sorted(contents(undisturbed), key=str)


def test_a_model_without_a_gradient_fails_the_shards_that_need_one(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    cut_off = "inject = model.inject\n    model.inject = lambda x: inject(x.detach())\n    return"
    path.write_text(MODEL_FILE.format(factor=1).replace("return", cut_off))
    outcome = do(tmp_path / "suite", suite(models=[f"{path}:build"]))
    assert len(outcome.failures) == 6
    said = "UsageError: model: expected a gradient with respect to the image"
    assert all(said in why for why in outcome.failures.values())
    assert {record.attack for record in load_records(tmp_path / "suite")} == {"noise"}


def test_a_full_disk_ends_the_suite_and_what_is_done_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = runs_of(suite())[0][1][1]

    def full(write: Callable[[Path, Any], None], path: Path, content: Any) -> None:
        if path.name.startswith(lost.key):  # neither the shard nor its reason finds room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    for name in ("write_json", "write_sealed"):
        monkeypatch.setattr(shards_module, name, functools.partial(full, getattr(shards_module, name)))
    with pytest.raises(OSError, match="No space left"):
        do(tmp_path)
    shards, store = [shard for _, cut in runs_of(suite()) for shard in cut], ShardStore(tmp_path)
    assert [shard for shard in shards if store.is_done(shard)] == shards[:1]
    monkeypatch.undo()
    assert do(tmp_path).num_records == 4


def test_work_done_twice_where_there_are_no_locks(undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    shard = runs_of(suite())[0][1][0]
    with ShardStore(tmp_path).claim(shard) as one, ShardStore(tmp_path).claim(shard) as other:
        assert one is not None and other is not None
    assert not do(tmp_path).failures
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_damaged_shard_is_named(suffix: str, tmp_path: Path) -> None:
    shards = runs_of(suite())[0][1]
    for shard in shards:
        assert run_shard(shard, tmp_path, build_attack) is None
    (tmp_path / "shards" / f"{shards[0].key}{suffix}").write_text("{")
    with pytest.raises(UsageError, match=rf"a damaged one; remove {shards[0].key}\.json and go on with --resume"):
        do(tmp_path)
    (tmp_path / "shards" / f"{shards[0].key}.json").unlink()
    assert not do(tmp_path).failures and len(load_records(tmp_path)) == 4


@pytest.fixture(scope="module")
def shard_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first two shards of the small suite."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in runs_of(suite())[0][1][:2]:
        assert run_shard(shard, folder, build_attack) is None
    return folder


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_any_bit_that_flips_in_a_shard_is_told(suffix: str, shard_files: Path, tmp_path: Path) -> None:
    folder, shard = shutil.copytree(shard_files, tmp_path / "copy"), runs_of(suite())[0][1][0]
    store, path, ids = ShardStore(folder), folder / "shards" / f"{shard.key}{suffix}", load("digits").sample_ids[:8]
    store.load(shard, ids.numpy())
    good = path.read_bytes()
    for bit in range(0, 8 * len(good), 8 * len(good) // 300):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        for read in (store.times, store.num_robust, lambda shard: store.load(shard, ids.numpy())):
            with pytest.raises(UsageError, match=r"\A[^\n]* got a damaged one; remove [^\n]* go on with --resume\Z"):
                read(shard)


@pytest.mark.parametrize("suffixes", [[".parquet"], [".json"], [".json", ".parquet"]], ids=" ".join)
def test_a_shard_copied_over_another_is_told_before_anything_is_done(
    suffixes: list[str], shard_files: Path, tmp_path: Path
) -> None:
    folder, (first, second, _) = shutil.copytree(shard_files, tmp_path / "copy"), runs_of(suite())[0][1]
    for suffix in suffixes:
        shutil.copy(folder / "shards" / f"{second.key}{suffix}", folder / "shards" / f"{first.key}{suffix}")
    with pytest.raises(UsageError, match=rf"a damaged one; remove {first.key}\.json and go on with --resume"):
        SuiteProgress(runs_of(suite()), folder)


def test_samples_that_are_not_those_of_the_plan_are_told(shard_files: Path, tmp_path: Path) -> None:
    shard, ids, store = runs_of(suite())[0][1][0], load("digits").sample_ids.numpy(), ShardStore(tmp_path)
    parts, environment = ShardStore(shard_files).load(shard, ids[:8])
    parts[0].samples["sample_id"] = ids[8:16]
    store.save(shard, parts, environment, 0.0, 1.0)
    with pytest.raises(UsageError, match="expected a finished shard, got a damaged one"):
        store.load(shard, ids[:8])


def test_shard_that_another_has_done_meanwhile_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = runs_of(suite())[0][1][0]
    save = ShardStore.save

    def late(self: ShardStore, *args: Any) -> None:
        save(self, *args)
        raise FileNotFoundError("a temporary file that the other one has tidied away")

    monkeypatch.setattr(ShardStore, "save", late)
    assert run_shard(shard, tmp_path, build_attack) is None
    assert ShardStore(tmp_path).reason(shard) is None


def test_record_says_when_its_first_shard_was_begun_and_with_how_many_threads(tmp_path: Path) -> None:
    first, *rest = runs_of(suite())[0][1]
    for num_threads, shard in zip((2, 1, 1), (first, *rest), strict=True):
        torch.set_num_threads(num_threads)
        assert run_shard(shard, tmp_path, build_attack) is None
    path = tmp_path / "shards" / f"{rest[0].key}.json"
    files.write_sealed(path, files.read_sealed(path) | {"began": 0.0})
    do(tmp_path)
    record = load_records(tmp_path)[0]
    assert record.created == "1970-01-01T00:00:00+00:00"
    assert record.environment["num_threads"] == "2, 1" and record.environment["device"] == "cpu"


def test_resume_begins_where_nothing_is_and_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / ".suite.json.torn").write_text("{")  # killed before it had a suite
    check_folder(tmp_path, suite(), [])
    claim_folder(tmp_path, suite(), [])
    check_folder(tmp_path, suite(resources={"num_cpus": 2}), [])
    with pytest.raises(UsageError, match="another limit"):
        check_folder(tmp_path, suite(limit=10), [])
    (tmp_path / "suite.json").write_text("[]")
    with pytest.raises(UsageError, match=r"suite\.json of an earlier run, got a JSON list"):
        check_folder(tmp_path, suite(), [])
    (tmp_path / "suite.json").unlink()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"suite\.json of an earlier run, got none"):
        check_folder(tmp_path, suite(), [])


def test_what_killed_processes_left_goes_once_all_is_done(undisturbed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "copy")
    stale = [folder / "shards" / "two.lock"]
    for path in (folder / "shards" / "one.parquet", folder / "images" / "three.npz"):
        with contextlib.suppress(KeyError), replacing(path) as temporary:
            stale.append(shutil.copy(temporary, temporary.with_name(f".again{temporary.name}")))
            raise KeyError
    foreign = [folder / "shards" / ".nfs0001", folder / "images" / ".gitignore"]
    for path in [*stale, *foreign]:
        path.touch()
    for name in (".cache", ".dir.partial", "dir.lock"):
        (folder / "shards" / name).mkdir()
    do(folder)
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in foreign)
    assert contents(folder) == contents(undisturbed)


def test_claimed_shard_is_left_to_its_owner(tmp_path: Path) -> None:
    shard = runs_of(suite())[0][1][0]
    store = ShardStore(tmp_path)
    with store.claim(shard) as claim:
        assert claim is not None and store.is_claimed(shard)
        assert run_shard(shard, tmp_path, build_attack) is None
        assert not store.is_done(shard)
    assert not store.is_claimed(shard)
    assert run_shard(shard, tmp_path, build_attack) is None
    assert store.is_done(shard)


RUNNER = """
import json, pathlib, sys, torch
torch.set_num_threads(1)
from robustbench_deq.attacks import build_attack
from robustbench_deq.runner.executors import Serial
from robustbench_deq.runner.run import run_suite
from robustbench_deq.runner.suite import SuiteConfig, cut, plan
suite = SuiteConfig(**json.loads(sys.argv[2]))
runs = [(run, cut(run, suite.batches_per_shard)) for run in plan(suite)]
run_suite(runs, pathlib.Path(sys.argv[1]), build_attack, Serial())
"""


def start_runner(folder: Path) -> subprocess.Popen:
    """A runner of the suite in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", RUNNER, str(folder), suite().model_dump_json()], cwd=ROOT)


def test_two_runners_share_a_folder(undisturbed: Path, tmp_path: Path) -> None:
    first, second = start_runner(tmp_path), start_runner(tmp_path)
    assert (first.wait(120), second.wait(120)) == (0, 0)
    assert sorted(contents(tmp_path), key=str) == sorted(contents(undisturbed), key=str)
    assert [path.name for path in (tmp_path / "shards").glob("*.lock")] == [ASSEMBLY_LOCK]


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
def test_killed_runner_is_continued(seconds: float, undisturbed: Path, tmp_path: Path) -> None:
    runner = start_runner(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "shards").is_dir() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(seconds)
    runner.send_signal(signal.SIGKILL)
    runner.wait(10)
    do(tmp_path)
    assert contents(tmp_path) == contents(undisturbed)


# ---------------------------------------------------------------- workers


def test_processes_give_the_same_records(undisturbed: Path, tmp_path: Path) -> None:
    do(tmp_path, executor=Processes(2))
    assert sorted(contents(tmp_path), key=str) == sorted(contents(undisturbed), key=str)


def die_once(marker: Path, name: str, threat: Threat, settings: dict[str, Any]) -> Attack:
    """Builds an attack, but kills the first process that asks for one."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return build_attack(name, threat, settings)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die_at_half(name: str, threat: Threat, settings: dict[str, Any]) -> Attack:
    if threat.epsilon == 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
    return build_attack(name, threat, settings)


def test_killed_worker_loses_nothing(undisturbed: Path, tmp_path: Path) -> None:
    outcome = do(tmp_path / "suite", executor=Processes(2), build=functools.partial(die_once, tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert not outcome.failures
    assert contents(tmp_path / "suite") == contents(undisturbed)


def test_pool_that_breaks_while_it_is_given_work_is_begun_anew(undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    submit, calls = ProcessPoolExecutor.submit, []

    def fragile(self: ProcessPoolExecutor, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise BrokenProcessPool("a worker died")
        return submit(self, *args)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", fragile)
    outcome = do(tmp_path, executor=Processes(2))
    assert not outcome.failures and len(calls) > 12
    assert contents(tmp_path) == contents(undisturbed)


def test_workers_never_get_ctrl_c_not_even_while_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(ThreadPoolExecutor):
        def submit(self, *args: Any) -> Any:
            return super().submit(lambda: mask_of_a_new_process())

    def mask_of_a_new_process() -> str:
        code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout

    monkeypatch.setattr(Processes, "_pool", lambda self: Pool(1))
    shard = runs_of(suite())[0][1][0]
    assert list(Processes(1).map(lambda shard: None, [shard])) == [(shard, "True\n")]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_share_the_cpus_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert Processes(2).num_threads == 3
    assert describe_environment(torch.device("cpu"))["num_cpus"] == 6


def test_only_the_shard_that_kills_its_workers_fails(tmp_path: Path) -> None:
    small = suite(limit=8, attacks=[{"name": "noise"}])
    (_, [fine]), (_, [lost]) = runs_of(small)
    outcome = do(tmp_path, small, Processes(2), die_at_half)
    assert outcome.failures == {lost.key: WORKER_DIED}
    assert ShardStore(tmp_path).reason(lost) == WORKER_DIED
    assert ShardStore(tmp_path).is_done(fine) and outcome.num_records == 1


def test_workers_end_with_a_killed_runner(tmp_path: Path) -> None:
    script = RUNNER.replace("Serial()", "Processes(2)").replace("import Serial", "import Processes")
    script = script.replace("\nrun_suite", "\nif __name__ == '__main__': run_suite")
    (tmp_path / "runner.py").write_text(script)
    runner = subprocess.Popen(
        [sys.executable, str(tmp_path / "runner.py"), str(tmp_path / "suite"), suite().model_dump_json()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while len(group_of(runner.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(group_of(runner.pid)) >= 3  # the runner, its workers, and what multiprocessing adds
    runner.send_signal(signal.SIGKILL)
    runner.wait(10)
    deadline = time.monotonic() + 240  # a worker that is still importing torch ends when it has
    while group_of(runner.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group_of(runner.pid) == []


def group_of(leader: int) -> list[int]:
    """Living processes of a process group."""
    return [one.pid for one in processes() if one.group == leader]


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--executor ray: expected the package ray.*\[cluster\]"):
        Ray(None)
