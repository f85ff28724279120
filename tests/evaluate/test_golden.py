"""Golden records: what every attack gives on shipped weights, kept in `golden.json` with its tolerances.

A deliberate change is written down by `ROBUSTBENCH_DEQ_UPDATE_GOLDEN=1 make test ARGS='-k golden -n 0'` (one process:
they share the file), and shows in the diff.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from robustbench_deq.attacks import ATTACKS
from robustbench_deq.data import load
from robustbench_deq.evaluate.evaluation import evaluate
from robustbench_deq.files import write_json
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.protocol import make_attack
from robustbench_deq.records.record import Record
from robustbench_deq.threats import Threat

GOLDEN = Path(__file__).parent / "golden.json"
UPDATE = "ROBUSTBENCH_DEQ_UPDATE_GOLDEN"
NUM_IMAGES = 64
MODELS = ("deq-conv.digits-joint-l2", "mondeq-fc.digits-joint-l2", "test-linear.tiny")
NORM_OF = {"torchattacks-pgd": Norm.LINF}
SETTINGS = {"apgd": {"steps": 20}}
"""Fewer steps than the default's, where those take a minute."""
EPSILON = {Norm.L2: 0.5, Norm.LINF: 0.06}
SAMPLES = 1
"""Accuracies and counts may differ by so many samples: another processor rounds otherwise."""
RELATIVE = 0.02
"""The loss and the costs may differ by this share."""


def measured(record: Record) -> dict[str, float]:
    return {
        "clean_correct": round(record.clean_accuracy * NUM_IMAGES),
        "robust": round(record.robust_accuracy * NUM_IMAGES),
        "num_unconverged": record.num_unconverged,
        "num_failed": record.num_failed,
        "adversarial_loss": record.adversarial_loss,
        "cell_evals": record.cost.cell_evals,
        "cell_vjps": record.cost.cell_vjps,
        "solver_steps": record.cost.solver_steps,
    }


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("model", MODELS)
def test_attacks_give_their_golden_records(model: str, name: str) -> None:
    norm = NORM_OF.get(name, Norm.L2)
    attack = make_attack(name, Threat(norm, EPSILON[norm]), SETTINGS.get(name, {}))
    torch.manual_seed(0)  # nothing may depend on it
    found = measured(evaluate(load_model(model), attack, load("digits", limit=NUM_IMAGES), model_name=model).record)
    key = f"{model} {name}"
    known = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if os.environ.get(UPDATE):
        write_json(GOLDEN, {**known, key: found})
        pytest.skip("written, not compared")
    assert key in known, f"run with {UPDATE}=1"
    for field, value in known[key].items():
        if isinstance(value, int):
            assert abs(found[field] - value) <= SAMPLES, field
        else:
            assert found[field] == pytest.approx(value, rel=RELATIVE, abs=1e-6), field
