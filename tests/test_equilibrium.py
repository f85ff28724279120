"""`EquilibriumModel.from_callables`: a model like any other, from functions, modules or methods of modules."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustbench_deq.adjoints import Implicit
from robustbench_deq.attacks import JointPGD
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.errors import UsageError
from robustbench_deq.evaluate.judge import judge
from robustbench_deq.meter import Meter
from robustbench_deq.models import save_model
from robustbench_deq.optimise import Norm
from robustbench_deq.solvers import Anderson, Solve
from robustbench_deq.threats import Threat

ROOT = Path(__file__).parents[1]
FITS = {"input_shape": (1, 4, 4), "num_classes": 3}


class Network(nn.Module):
    """`f(z, u) = tanh(W z) / 2 + u`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.recurrence, self.readout = nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def encode(self, x: Tensor) -> Tensor:
        return self.drop(self.stem(x.flatten(1)))

    def layer(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.recurrence(z)) / 2 + u

    def decode(self, z: Tensor) -> Tensor:
        return self.readout(z)


@pytest.fixture
def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network().double()


def from_methods(network: Network) -> EquilibriumModel:
    model = EquilibriumModel.from_callables(network.encode, network.layer, network.decode, **FITS)
    model.solve = Solve(Anderson(), rtol=1e-12, max_steps=500)
    model.adjoint = Implicit(model.solve)
    return model


def test_methods_bring_their_modules_parameters_and_mode(network: Network) -> None:
    model = from_methods(network)
    assert {id(parameter) for parameter in model.parameters()} == {id(one) for one in network.parameters()}
    assert len(list(model.parameters())) == 6
    assert not model.training and not network.drop.training
    model.train()
    assert network.drop.training
    assert model.float().inject(torch.rand(2, 1, 4, 4)).dtype == torch.float32


def test_modules_and_functions_mix() -> None:
    stem, readout = nn.Sequential(nn.Flatten(), nn.Linear(16, 6)), nn.Linear(6, 3)
    model = EquilibriumModel.from_callables(stem, lambda z, u: torch.tanh(z) / 2 + u, readout, torch.ones_like, **FITS)
    assert {id(one) for one in model.parameters()} == {id(one) for part in (stem, readout) for one in part.parameters()}
    u = model.inject(torch.rand(2, 1, 4, 4))
    assert torch.equal(model.initial_state(u), torch.ones(2, 6))
    plain = EquilibriumModel.from_callables(stem, lambda z, u: u, readout, **FITS)
    assert torch.equal(plain.initial_state(u), torch.zeros(2, 6))
    assert isinstance(plain, EquilibriumModel) and (plain.input_shape, plain.num_classes) == ((1, 4, 4), 3)


def test_its_logits_are_those_at_the_fixed_point(network: Network, make_images) -> None:
    model, x = from_methods(network), make_images(3)
    with torch.no_grad():
        z = u = network.encode(x)
        for _ in range(200):
            z = network.layer(z, u)
        torch.testing.assert_close(model(x), network.decode(z))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_its_gradients_are_those_of_finite_differences(mode: str, network: Network, make_images) -> None:
    network.drop.p = 0.0
    model, x = from_methods(network).train(mode == "train"), make_images(2).requires_grad_()
    assert torch.autograd.gradcheck(model, x, eps=1e-6, atol=1e-6)
    model(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())


def test_it_is_attacked_by_the_joint_iteration(network: Network, make_images) -> None:
    model, x = from_methods(network), make_images(8)
    with torch.no_grad():
        y = model(x).argmax(1)
    result = JointPGD(Threat(Norm.L2, 0.5))(model, x, y, seed=0)
    clean, attacked = judge(model, x, y), judge(model, result.x_adv, y)
    assert bool(clean.is_correct.all()) and bool(attacked.is_converged.all())
    assert bool((attacked.loss > clean.loss + 0.05).all())
    assert result.cost.cell_vjps > 8


def test_a_gradient_is_looked_for_whatever_the_callers_mode(network: Network, make_images) -> None:
    model, x = from_methods(network), make_images(2)
    model.check_gradient(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            model.check_gradient(x.clone())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_gradient_that_vanishes_is_one_and_an_initial_state_does_not_carry_it(network: Network, make_images) -> None:
    x = make_images(2)
    model = from_methods(network)
    model.cell = lambda z, u: network.layer(z, 0 * u)
    model.check_gradient(x)  # zero everywhere, as behind a dead unit
    model.cell, model.initial_state = (lambda z, u: network.layer(z, 0.5)), (lambda u: u)
    with pytest.raises(UsageError, match="expected a gradient with respect to the image"):
        model.check_gradient(x)


def test_a_gradient_is_looked_for_with_two_images_and_costs_nothing(network: Network, make_images) -> None:
    model, rows = from_methods(network), []
    model.cell = lambda z, u: rows.append(len(z)) or network.layer(z, u)
    with Meter(model) as meter:
        model.check_gradient(make_images(5))
    assert rows == [2] and (meter.eval_rows, meter.vjp_rows, meter.num_steps) == (0, 0, 0)


def test_a_copy_has_parameters_of_its_own(network: Network, make_images) -> None:
    model, x = from_methods(network), make_images(2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(model(x), before)
        assert not bool(other(x).any())


def test_it_is_not_saved_and_leaves_no_file(network: Network, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        save_model(from_methods(network), tmp_path / "mine", "mine")
    assert "expected one of a registered family, got one of the family 'own'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inject": 3}, "from_callables: inject: expected a function or module, got int"),
        ({"cell": None}, "from_callables: cell: expected a function or module, got NoneType"),
        ({"head": torch.zeros(3)}, "from_callables: head: expected a function or module, got Tensor"),
        ({"initial_state": torch.zeros(6)}, "from_callables: initial_state: expected a function or module, got Tensor"),
        ({"input_shape": (4, 4)}, "input_shape: expected (channels, height, width), three integers >= 1, got (4, 4)"),
        ({"input_shape": 64}, "input_shape: expected (channels, height, width), three integers >= 1, got 64"),
        ({"input_shape": "144"}, "got '144'"),
        ({"input_shape": (1.5, "a", -3)}, "got (1.5, 'a', -3)"),
        ({"input_shape": (1, 4, 0)}, "got (1, 4, 0)"),
        ({"input_shape": (True, 4, 4)}, "got (True, 4, 4)"),
        ({"num_classes": 0}, "num_classes: expected an integer >= 2, got 0"),
        ({"num_classes": 3.0}, "num_classes: expected an integer >= 2, got 3.0"),
        ({"num_classes": None}, "num_classes: expected an integer >= 2, got None"),
    ],
)
def test_what_is_no_part_is_refused(changes: dict, said: str, network: Network) -> None:
    parts = {"inject": network.encode, "cell": network.layer, "head": network.decode, **FITS}
    with pytest.raises(UsageError) as caught:
        EquilibriumModel.from_callables(**{**parts, **changes})
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "wrong", "said"),
    [
        (
            "inject",
            lambda x: x.missing,
            r"inject: expected a result, got AttributeError: .*test_equi.*; correct inject",
        ),
        (
            "inject",
            lambda x: x.flatten(1)[:1],
            r"inject: expected \(2, 16\), got \(1, 16\); return \(2, 16\) from inject",
        ),
        ("cell", lambda z, u: z[:, :2], r"cell: expected \(2, 5\), got \(2, 2\); return \(2, 5\) from cell"),
        ("cell", lambda z, u: None, r"cell: expected one tensor \(batch, ...\), got NoneType"),
        ("head", lambda z: {"logits": z}, r"head: expected one tensor \(batch, ...\), got dict"),
        ("head", lambda z: z.sum(), r"head: expected one tensor \(batch, ...\), got \(\)"),
        ("head", lambda z: z[:, :3].argsort(), r"head: expected float64, .* got int64; return float64 from head"),
        (
            "inject",
            lambda x: x.sub_(0.5).flatten(1)[:, :5],
            r"inject: expected its arguments .* in place on the images",
        ),
        ("cell", lambda z, u: z.mul_(0.5) + u, r"cell: expected its arguments .* in place on the state"),
        ("cell", lambda z, u: 0.5 * z + u.mul_(2), r"cell: expected its arguments .* in place on the injection"),
        ("head", lambda z: z.add_(1)[:, :3], r"head: expected its arguments .* in place on the state"),
    ],
)
def test_a_part_that_fails_or_returns_another_shape_is_named(part: str, wrong, said: str, make_images) -> None:
    weight = make_images(1).new_ones(16, 5) / 16
    parts = {
        "inject": lambda x: x.flatten(1) @ weight,
        "cell": lambda z, u: 0.5 * z + u,
        "head": lambda z: z[:, :3],
    }
    model = EquilibriumModel.from_callables(**parts, **FITS)
    model.check_parts(make_images(4))
    model = EquilibriumModel.from_callables(**parts | {part: wrong}, **FITS)
    with pytest.raises(UsageError, match=said):
        model.check_parts(make_images(4))


@pytest.mark.parametrize(("name", "value"), [("num_classes", "ten"), ("num_classes", 0), ("input_shape", None)])
def test_sizes_that_are_none_are_refused_with_the_images(
    name: str, value: object, network: Network, make_images
) -> None:
    model = from_methods(network)
    setattr(model, name, value)
    with pytest.raises(UsageError, match=f"model: {name}: expected"):
        model.check_images(make_images(2))
