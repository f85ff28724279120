"""What robust accuracy must not depend on: how fast the cell mixes, in which coordinates its state is written, where
their origin lies, and the scale of the logits. Shipped models in other dress, judged."""

from __future__ import annotations

import pytest
import torch

from benchmarks.hard_cells import Coordinates, Damped, Scaled, Shifted, nonnormal
from robustbench_deq.attacks import build_attack
from robustbench_deq.data import Split, SplitName, load
from robustbench_deq.evaluate.evaluation import Evaluation, evaluate
from robustbench_deq.models import load_model
from robustbench_deq.optimise import Norm
from robustbench_deq.threats import Threat

NUM = 128
MODELS = ["mondeq-fc.digits-joint-l2", "deq-fc.digits-standard"]
THREAT = Threat(Norm.L2, 0.5)


@pytest.fixture(scope="module")
def data() -> Split:
    return load("digits", SplitName.TEST, limit=NUM)


@pytest.fixture(scope="module")
def attacked(data: Split):
    """`attacked(model name, dress)`: the evaluation of the default joint attack; the plain model's is kept."""
    known: dict[str, Evaluation] = {}

    def run(name: str, dress=None) -> Evaluation:
        if dress is None:
            if name not in known:
                known[name] = evaluate(load_model(name), build_attack("joint-pgd", THREAT, {}), data)
            return known[name]
        return evaluate(dress(load_model(name)), build_attack("joint-pgd", THREAT, {}), data)

    return run


def same_robust_accuracy(plain: Evaluation, other: Evaluation) -> None:
    """Within one sample of 128: of a model with several equilibria another dress may find another one."""
    for column in ("is_clean_correct", "is_robust"):
        num = [int(one.samples[column].sum()) for one in (plain, other)]
        assert abs(num[0] - num[1]) <= 1, (column, num)
    assert other.record.num_unconverged <= plain.record.num_unconverged + 2


@pytest.mark.parametrize("weight", [0.3, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("name", MODELS)
def test_a_slower_cell_of_the_same_equilibria(name: str, weight: float, attacked) -> None:
    plain, other = attacked(name), attacked(name, lambda model: Damped(model, weight))
    same_robust_accuracy(plain, other)
    assert other.record.cost.cell_evals <= 2 * plain.record.cost.cell_evals


def test_a_slower_cell_under_an_accelerator() -> None:
    settings = {"inner_steps": None, "accelerator": "anderson", "steps": 40}
    attack, data = build_attack("joint-pgd", Threat(Norm.L2, 1.0), settings), load("fashion-mnist", limit=NUM)
    model = load_model("deq-fc.fashion-joint-l2")
    plain, other = evaluate(model, attack, data), evaluate(Damped(model, 0.01), attack, data)
    same_robust_accuracy(plain, other)
    assert other.record.cost.cell_evals <= 2 * plain.record.cost.cell_evals


@pytest.mark.parametrize("condition", [1.0, 10.0])
@pytest.mark.parametrize("name", MODELS)
def test_other_coordinates_of_the_state(name: str, condition: float, attacked) -> None:
    plain, other = attacked(name), attacked(name, lambda model: Coordinates(model, condition))
    same_robust_accuracy(plain, other)
    assert other.record.cost.cell_evals <= 3 * plain.record.cost.cell_evals


@pytest.mark.parametrize("shift", [-1.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_another_origin_of_the_state(name: str, shift: float, attacked) -> None:
    same_robust_accuracy(attacked(name), attacked(name, lambda model: Shifted(model, shift)))


@pytest.mark.parametrize("objective", ["ce-then-margin", "cross-entropy", "margin", "dlr"])
@pytest.mark.parametrize("name", ["joint-pgd", "pgd"])
def test_the_scale_of_the_logits(name: str, objective: str, data: Split) -> None:
    attack = build_attack(name, THREAT, {"objective": objective, **({"tolerance": 1e-2} if name == "pgd" else {})})
    robust = []
    for factor in (1.0, 1e-3, 1e3, 1e5):
        found = evaluate(Scaled(load_model(MODELS[0]), factor), attack, data)
        assert found.record.num_zero_gradient == 0
        robust.append(int(found.samples["is_robust"].sum()))
    assert max(robust) - min(robust) <= 1, robust


@pytest.mark.parametrize("norm", [1.0, 1.3, 1.6])
def test_a_linear_cell_that_is_not_normal(norm: float, data: Split) -> None:
    """As strong as cold PGD-20 with tight solves, within two of 128 samples."""
    model = nonnormal(norm, load("digits", SplitName.TRAIN))
    joint = evaluate(model, build_attack("joint-pgd", THREAT, {}), data)
    settings = {"warm_start": False, "tolerance": 1e-5, "max_steps": 300}
    truth = evaluate(model, build_attack("pgd", THREAT, settings), data)
    num_joint, num_truth = (int(one.samples["is_robust"].sum()) for one in (joint, truth))
    assert num_joint <= num_truth + 2 and joint.record.num_lagging == 0


def test_the_dress_changes_no_prediction(data: Split) -> None:
    model = load_model(MODELS[0])
    with torch.no_grad():
        expected = model(data.x)
        for other in (Damped(model, 0.3), Coordinates(model, 10.0), Shifted(model, 3.0)):
            other.solve = model.solve.with_(rtol=1e-6, max_steps=500)
            torch.testing.assert_close(other(data.x), expected, rtol=5e-2, atol=5e-2)
        torch.testing.assert_close(Scaled(model, 1e3)(data.x), 1e3 * expected)
