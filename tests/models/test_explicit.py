"""Explicit twins: what they compute, and that they are twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from robustbench_deq.configs import read_yaml, validate
from robustbench_deq.models import FAMILIES
from robustbench_deq.solvers import Status

CONFIGS = Path(__file__).parents[2] / "configs" / "training"
SHAPE = {"input_shape": (1, 28, 28), "num_classes": 10}
TWINS = {
    "unrolled-conv": "deq-conv-small",
    "unrolled-fc": "deq-fc",
    "unrolled-lben": "lben",
    "unrolled-mdeq": "mdeq",
    "unrolled-mondeq-conv": "mondeq-conv",
    "unrolled-mondeq-fc": "mondeq-fc",
    "unrolled-mondeq-multi": "mondeq-multi",
    "resnet": "deq-conv-small",
}


def trained_by(stem: str):
    spec = read_yaml(CONFIGS / f"fashion-{stem}.yaml")
    family = FAMILIES.get(spec["model"]["family"])
    return family.build(validate(family.config_type, {**SHAPE, **spec["model"]["config"]}, stem)), spec


@pytest.mark.parametrize("training", ["joint-l2", "standard"])
@pytest.mark.parametrize(("twin", "deq"), TWINS.items())
def test_twins_have_as_many_parameters_and_the_same_training(twin: str, deq: str, training: str) -> None:
    deq = deq if training == "joint-l2" else deq.removesuffix("-small")
    (one, first), (other, second) = trained_by(f"{twin}-{training}"), trained_by(f"{deq}-{training}")
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (one, other)]
    assert counts[0] == pytest.approx(counts[1], rel=0.02)
    for key in ("data", "epochs", "batch_size", "learning_rate", "weight_decay", "random_shift"):
        assert first.get(key) == second.get(key)
    if training == "joint-l2":
        assert first["attack"]["threat"] == second["attack"]["threat"]
        assert first["attack"]["config"]["steps"] == second["attack"]["config"]["steps"]


@pytest.mark.parametrize("steps", [1, 5])
def test_unrolled_is_its_cells_iterate(steps: int, make_model, make_images) -> None:
    cell_config = {"hidden": 6}
    model, x = make_model("unrolled", cell="deq-fc", cell_config=cell_config, num_steps=steps), make_images(3)
    with torch.no_grad():
        u = model.inject(x)
        z = model.deq.initial_state(u)
        for _ in range(steps):
            z = model.deq.cell(z, u)
        torch.testing.assert_close(model(x), model.deq.head(z))


@pytest.mark.parametrize("family", ["unrolled", "resnet"])
def test_two_evaluations_are_a_prediction_and_its_gradient_is_exact(family: str, make_model, make_images) -> None:
    seeded, x = make_model(family), make_images(3)
    model = FAMILIES.get(family).build(seeded.config).double()
    found = model.equilibrium(x)
    assert found.num_steps.tolist() == [2, 2, 2] and found.status.tolist() == [Status.CONVERGED] * 3
    model.load_state_dict(seeded.state_dict())
    leaf = x.clone().requires_grad_()
    exact = torch.autograd.grad(seeded(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(torch.autograd.grad(model(leaf).square().sum(), leaf)[0], exact)
