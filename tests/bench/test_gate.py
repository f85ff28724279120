"""The gate catches what got worse, and nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cli
from attacks import JointPGD, JointPGDConfig
from robustbench_deq.bench.evaluate import evaluate
from robustbench_deq.bench.gate import (
    Baseline,
    Entry,
    Tolerances,
    Update,
    compare,
    read_baseline,
    to_entries,
    to_junit,
    update_baseline,
)
from robustbench_deq.data import load
from robustbench_deq.errors import UsageError
from robustbench_deq.models import load_model
from robustbench_deq.threats import Norm, Threat

MODEL, NUM_IMAGES = "deq-fc.digits-joint-l2", 96
THREAT = Threat(Norm.L2, 0.5)


def run(model=None, batch_size: int = 48, **settings: Any) -> list:
    """The records of a small run: the joint attack and noise."""
    model, data = model or load_model(MODEL), load("digits", limit=NUM_IMAGES)
    attacks = {
        "joint-pgd": JointPGD(THREAT, JointPGDConfig(**{"steps": 16, **settings})),
        "noise": cli.build_attack("noise", THREAT, {}),
    }
    found = [
        evaluate(model, attack, data, model_name=MODEL, label=label, batch_size=batch_size)
        for label, attack in attacks.items()
    ]
    return [(one.record, one.samples) for one in found]


def without_settings(runs: list) -> list:
    """As if the attack's settings were what they were: a change that its config does not tell of."""
    return [(record.model_copy(update={"attack_config": {}}), samples) for record, samples in runs]


@pytest.fixture(scope="module")
def runs() -> list:
    return without_settings(run())


@pytest.fixture(scope="module")
def baseline(runs) -> Baseline:
    update = Update(date="2026-01-31", reason="the first")
    return Baseline(reference="noise", updates=[update], entries=to_entries(runs, "noise"))


def bad(baseline: Baseline, runs: list) -> set[str]:
    return {check.field for check in compare(baseline, to_entries(runs, "noise")) if not check.is_good}


def test_the_same_records_pass(baseline: Baseline, runs: list) -> None:
    checks = compare(baseline, to_entries(runs, "noise"))
    assert all(check.is_good for check in checks)
    fields = ["clean", "robust", "unconverged", "failed", "evaluations", "VJPs", "seconds / reference"]
    assert [check.field for check in checks] == [*fields, *fields[:-1]]  # the reference has no ratio to itself


def test_weakened_attack_is_caught(baseline: Baseline) -> None:
    assert "robust" in bad(baseline, without_settings(run(step_size=0.2)))


def test_broken_projection_is_caught(baseline: Baseline, monkeypatch) -> None:
    monkeypatch.setattr(Threat, "project", lambda self, delta, x: torch.zeros_like(delta))
    assert "robust" in bad(baseline, without_settings(run()))


def test_solver_that_takes_a_fifth_more_steps_is_caught(baseline: Baseline) -> None:
    assert {"evaluations", "VJPs"} <= bad(baseline, without_settings(run(steps=19)))


def test_flipped_weights_are_caught(baseline: Baseline) -> None:
    model = load_model(MODEL)
    with torch.no_grad():
        model.readout.weight.neg_()
    assert {"clean", "robust"} <= bad(baseline, without_settings(run(model)))


@pytest.mark.parametrize("batch_size", [7, 32, 96])
def test_batch_size_raises_no_alarm(baseline: Baseline, batch_size: int) -> None:
    found = bad(baseline, without_settings(run(batch_size=batch_size)))
    assert found <= {"seconds / reference"}  # a clock, on 96 images


def entry(**changes: Any) -> Entry:
    values = {
        "key": "m | a | b | {} | l2 1 | digits test 400 | 0",
        "digest": "d",
        "num_samples": 400,
        "is_clean": np.packbits(np.ones(400, dtype=bool)).tobytes().hex(),
        "is_robust": robust(200),
        "num_unconverged": 3,
        "num_failed": 0,
        "cell_evals": 100.0,
        "cell_vjps": 50.0,
        "relative_seconds": 4.0,
    }
    return Entry(**values | changes)


def robust(count: int, begin: int = 0) -> str:
    bits = np.zeros(400, dtype=bool)
    bits[begin : begin + count] = True
    return np.packbits(bits).tobytes().hex()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"is_robust": robust(202)}, None),
        ({"is_robust": robust(200, begin=60)}, None),
        ({"is_robust": robust(203)}, "robust"),
        ({"is_robust": robust(197)}, "robust"),
        ({"num_unconverged": 4}, None),
        ({"num_unconverged": 5}, "unconverged"),
        ({"num_unconverged": 0}, None),
        ({"num_failed": 2}, "failed"),
        ({"cell_evals": 101.9}, None),
        ({"cell_evals": 97.0}, "evaluations"),
        ({"cell_vjps": 51.1}, "VJPs"),
        ({"relative_seconds": 7.9}, None),
        ({"relative_seconds": 8.1}, "seconds / reference"),
        ({"relative_seconds": 0.1}, None),
        ({"digest": "other", "is_robust": robust(225)}, None),
        ({"digest": "other", "is_robust": robust(260)}, "robust"),
    ],
)
def test_every_field_has_its_tolerance(changes: dict, field: str | None) -> None:
    baseline = Baseline(reference="r", updates=[Update(date="d", reason="r")], entries=[entry()])
    found = {check.field for check in compare(baseline, [entry(**changes)]) if not check.is_good}
    assert found == ({field} if field else set())


def test_flips_that_cancel_are_shown_with_their_probability() -> None:
    baseline = Baseline(reference="r", updates=[Update(date="d", reason="r")], entries=[entry()])
    row = compare(baseline, [entry(is_robust=robust(200, begin=60))])[1]
    assert "-60 +60" in row.now and "p 1" in row.now


def test_missing_record_fails_and_a_new_one_passes() -> None:
    baseline = Baseline(reference="r", updates=[Update(date="d", reason="r")], entries=[entry()])
    checks = compare(baseline, [entry(key=entry().key.replace("m |", "n |"))])
    assert [(check.now, check.is_good) for check in checks] == [("missing", False), ("new", True)]


def test_two_records_of_one_kind_are_refused(runs: list) -> None:
    with pytest.raises(UsageError, match="one of each"):
        to_entries([*runs, runs[0]], "noise")


def test_updates_keep_their_reasons_and_the_tolerances(tmp_path: Path, runs: list) -> None:
    path, entries = tmp_path / "quick.json", to_entries(runs, "noise")
    first = update_baseline(path, entries, "noise", "the first", None)
    loose = first.model_copy(update={"tolerances": Tolerances(count=0.5)})
    path.write_text(loose.model_dump_json())
    update_baseline(path, entries[:1], "noise", "noise is gone", "abc")
    found = read_baseline(path)
    assert [update.reason for update in found.updates] == ["the first", "noise is gone"]
    assert found.tolerances.count == 0.5 and len(found.entries) == 1


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no such file"), ("{", "not JSON"), ('{"schema_version": 1}', "reference")]
)
def test_damaged_baselines_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_baseline(path)


def test_junit_has_a_case_for_each_check(baseline: Baseline, runs: list) -> None:
    checks = compare(baseline, to_entries(runs[:1], "noise"))
    suite = tree.fromstring(to_junit(checks))
    assert (suite.get("tests"), suite.get("failures")) == (str(len(checks)), "1")
    assert len(suite.findall("testcase")) == len(checks) and len(suite.findall("testcase/failure")) == 1
