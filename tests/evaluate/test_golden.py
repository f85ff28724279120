"""Golden records: what every attack gives on shipped weights, kept in `golden.json` with its tolerances.

A deliberate change is written down by `ROBUSTBENCH_DEQ_UPDATE_GOLDEN=1 make test ARGS='-k golden -n 0'` (one process:
they share the file), and shows in the diff.

Another processor rounds otherwise. A sample that this moves over a threshold (a solve ends a step earlier, the sample
leaves a step later, it stands where two equilibria part) ends with another loss, of any size; the others with the same
one. So losses are compared sample by sample, and few may differ; their mean would be at the mercy of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustbench_deq.data import load
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.files import write_text
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import Attack, make_attack
from robustbench_deq.threats import Threat
from tests.attacks.test_contract import SINGLE

GOLDEN = Path(__file__).parent / "golden.json"
UPDATE = "ROBUSTBENCH_DEQ_UPDATE_GOLDEN"
NUM_IMAGES = 64
MODELS = ("deq-conv.digits-joint-l2", "mondeq-fc.digits-joint-l2", "test-linear.tiny")
NORM_OF = {"torchattacks-pgd": Norm.LINF}
SETTINGS = {
    "apgd": {"steps": 20},
    "apgd-t": {"steps": 8, "num_targets": 3},
    "fmn": {"steps": 20},
    "intermediate-pgd": {"steps": 10},
    "torchattacks-pgd": {"steps": 10},
    "torchattacks-pgdl2": {"steps": 10},
    "yopo": {"steps": 5},
}
"""Fewer steps than the default's, where those take long."""
DEAR = {"apgd-t", "fast", "fgsm", "fmn", "intermediate-pgd", "yopo"}
"""Of parts that others are of; on the convolutional model these do."""
EPSILON = {Norm.L2: 0.5, Norm.LINF: 0.06}
SAMPLES = 1
"""Accuracies and counts may differ by so many samples."""
COSTS = 0.1
"""Mean costs may differ by this share: one sample that falls back, or leaves late, has made 7 % between two instruction
sets."""
RELATIVE, ABSOLUTE = 0.005, 0.0005
"""A sample's loss may differ by this share, or by so much: the judge solves to a tolerance."""
STRAYS = 4
"""The losses of so many samples may differ by more. Between two instruction sets three have; a tenth of the step size
moves twenty."""


def golden_attack(name: str, **changes: Any) -> Attack:
    norm = NORM_OF.get(name, Norm.L2)
    return make_attack(name, Threat(norm, EPSILON[norm]), SETTINGS.get(name, {}) | changes)


def measured(model: str, attack: Attack) -> dict[str, Any]:
    torch.manual_seed(0)  # nothing may depend on it
    evaluation = evaluate(load_model(model), attack, load("digits", limit=NUM_IMAGES), model_name=model)
    record = evaluation.record
    return {
        "clean_correct": round(record.clean_accuracy * NUM_IMAGES),
        "robust": round(record.robust_accuracy * NUM_IMAGES),
        "num_unconverged": record.num_unconverged,
        "num_failed": record.num_failed,
        "cell_evals": record.cost.cell_evals,
        "cell_vjps": record.cost.cell_vjps,
        "solver_steps": record.cost.solver_steps,
        "losses": [round(loss, 4) for loss in evaluation.samples["adversarial_loss"].tolist()],
    }


def differences(found: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """The fields in which two records differ by more than another processor explains."""

    def is_near(field: str) -> bool:
        one, other = found[field], known[field]
        if field == "losses":
            pairs = zip(one, other, strict=True)
            return sum(new != pytest.approx(old, rel=RELATIVE, abs=ABSOLUTE) for new, old in pairs) <= STRAYS
        if isinstance(other, int):
            return abs(one - other) <= SAMPLES
        return one == pytest.approx(other, rel=COSTS, abs=1e-6)

    return [field for field in known if not is_near(field)]


def read() -> dict[str, dict[str, Any]]:
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


@pytest.mark.parametrize(
    ("model", "name"),
    [(model, name) for model in MODELS for name in (*SINGLE, "fast") if model != MODELS[0] or name not in DEAR],
)
def test_attacks_give_their_golden_records(model: str, name: str) -> None:
    found = measured(model, golden_attack(name))
    key, known = f"{model} {name}", read()
    if os.environ.get(UPDATE):
        lines = [f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in {**known, key: found}.items()]
        write_text(GOLDEN, "{\n" + ",\n".join(lines) + "\n}\n")
        pytest.skip("written, not compared")
    assert key in known, f"run with {UPDATE}=1"
    assert not differences(found, known[key])


@pytest.mark.parametrize(("name", "setting", "change"), [
    ("joint-pgd", "step_size", lambda size: 1.1 * size),
    ("joint-pgd", "steps", lambda steps: steps - 1),
    ("pgd", "step_size", lambda size: 0.9 * size),
    ("pgd", "steps", lambda steps: steps - 1),
])  # fmt: skip
def test_a_small_change_of_an_attack_is_noticed(name: str, setting: str, change: Callable[[Any], Any]) -> None:
    model = MODELS[0]
    usual = getattr(golden_attack(name).config, setting)
    found = measured(model, golden_attack(name, **{setting: change(usual)}))
    assert "losses" in differences(found, read()[f"{model} {name}"])
