"""Monotone and Lipschitz-bounded families: what their parametrisations promise, with matrices in real space."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.errors import UsageError
from robustbench_deq.models import load_folder, save_model
from robustbench_deq.models.splitting import Splitting
from robustbench_deq.solvers import CellMap, Picard, Solve

MONOTONE = ["mondeq-fc", "mondeq-conv", "mondeq-multi"]
every_splitting_family = pytest.mark.parametrize("family", [*MONOTONE, "lben"])
every_monotone_family = pytest.mark.parametrize("family", MONOTONE)
CONVOLUTIONAL = [
    ("mondeq-conv", {"channels": 3, "stride": 1}),
    ("mondeq-conv", {"channels": 2, "stride": 2, "input_shape": (2, 7, 6)}),
    ("mondeq-multi", {"channels": (2, 3), "stride": 1}),
    ("mondeq-multi", {"channels": (2, 1, 3), "stride": 1, "input_shape": (1, 8, 12)}),
]
PEACEMAN_RACHFORD, FORWARD_BACKWARD = "peaceman-rachford", "forward-backward"


def written_out(model, matrix: Tensor) -> Tensor:
    """The map `model.multiply(matrix, .)` as one real matrix over the flattened state."""
    with torch.no_grad():
        shape = model.initial_state(model.inject(torch.zeros(1, *model.input_shape, dtype=torch.float64))).shape[1:]
        size = shape.numel()
        return model.multiply(matrix, torch.eye(size, dtype=torch.float64).unflatten(1, shape)).flatten(1).mT


def moved(model, factor: float = 3.0):
    """The model with its parameters far from where they began."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


@pytest.mark.parametrize(("family", "config"), [("mondeq-fc", {}), *CONVOLUTIONAL])
@pytest.mark.parametrize("monotonicity", [0.1, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_operator_is_monotone_however_its_parameters_move(
    family: str, config: dict, monotonicity: float, seed: int, make_model
) -> None:
    model = moved(make_model(family, seed=seed, monotonicity=monotonicity, **config))
    operator = written_out(model, model.operator().detach())
    gap = torch.eye(len(operator), dtype=torch.float64) - operator
    margin = float(torch.linalg.eigvalsh((gap + gap.mT) / 2).min())
    assert margin >= monotonicity - 1e-9
    assert model.monotonicity() == pytest.approx(margin, rel=1e-6)


@every_splitting_family
def test_step_matrix_of_peaceman_rachford_is_the_exact_inverse(family: str, make_model) -> None:
    model = moved(make_model(family, splitting=PEACEMAN_RACHFORD, splitting_step=0.7), 1.5)
    with torch.no_grad():
        operator, inverse = written_out(model, model.operator()), written_out(model, model.matrix())
    eye = torch.eye(len(operator), dtype=torch.float64)
    torch.testing.assert_close(inverse @ (eye + 0.7 * (eye - operator)), eye, rtol=0, atol=1e-9)


@every_splitting_family
def test_a_solve_in_inference_mode_leaves_nothing_that_gradients_stumble_over(
    family: str, make_model, make_images
) -> None:
    model, x = make_model(family).requires_grad_(False), make_images(2)
    with torch.inference_mode():
        plain = model(x)
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    torch.testing.assert_close(logits.detach(), plain.clone())
    assert float(torch.autograd.grad(logits.sum(), leaf)[0].abs().max()) > 0


@every_splitting_family
def test_in_inference_mode_a_model_made_there_sees_its_parameters_change(family: str, make_model, make_images) -> None:
    usual, x = make_model(family), make_images(2)
    with torch.inference_mode():
        model = make_model(family)
        torch.testing.assert_close(model(x), usual(x))
        for one in (model, usual):
            moved(one, 1.2)
        torch.testing.assert_close(model(x), usual(x))


@every_splitting_family
def test_both_splittings_have_the_same_equilibrium_and_gradient(family: str, make_model, make_images) -> None:
    x, found = make_images(3), []
    for splitting, step in ((FORWARD_BACKWARD, 0.2), (PEACEMAN_RACHFORD, 0.4), (PEACEMAN_RACHFORD, 3.0)):
        model = make_model(family, splitting=splitting, splitting_step=step)
        model.solve = Solve(Picard(), rtol=1e-12, max_steps=5000)
        model.adjoint = Implicit(Solve(Picard(), rtol=1e-12, max_steps=5000))  # the same splitting with W^T
        leaf = x.clone().requires_grad_()
        logits = model(leaf)
        gradient = torch.autograd.grad((logits * torch.linspace(-1, 1, 3, dtype=x.dtype)).sum(), leaf)[0]
        assert float(gradient.abs().max()) > 1e-3
        found.append((logits.detach(), gradient))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-8)


@every_splitting_family
def test_a_loaded_model_changes_its_splitting_and_keeps_its_equilibrium(
    family: str, make_model, make_images, tmp_path: Path
) -> None:
    save_model(make_model(family, torch.float32), tmp_path, "mine")
    x, found, steps = make_images(3), [], []
    for splitting, step in ((Splitting.FORWARD_BACKWARD, 0.2), (PEACEMAN_RACHFORD, 0.4), (PEACEMAN_RACHFORD, 3)):
        model = load_folder(tmp_path).double()
        with torch.no_grad():
            model(x)  # with the splitting of its config
            model.choose_splitting(splitting, step)
            solution = model.equilibrium(x, solve=Solve(Picard(), rtol=1e-12, max_steps=5000))
            found.append(model.head(solution.value))
            steps.append(int(solution.num_steps.max()))
        assert (model.config.splitting, model.config.splitting_step) == (Splitting(splitting), step)
    torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=1e-6, atol=1e-8)
    assert len(set(steps)) == 3  # it did not merely keep its old one
    save_model(model.float(), tmp_path, "mine")
    assert load_folder(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("splitting", "step", "said"),
    [
        ("douglas-rachford", 0.3, "splitting: expected 'forward-backward' or 'peaceman-rachford', got 'douglas-r"),
        (PEACEMAN_RACHFORD, 0.0, "splitting_step: expected greater than 0, got 0.0"),
    ],
)
def test_a_splitting_that_is_none_is_refused(splitting: str, step: float, said: str, make_model) -> None:
    model = make_model("lben")
    before = model.config
    with pytest.raises(UsageError) as caught:
        model.choose_splitting(splitting, step)
    assert said in str(caught.value) and "\n" not in str(caught.value) and model.config == before


@every_splitting_family
def test_equilibrium_is_that_of_the_networks_equation(family: str, make_model, make_images) -> None:
    model, x = make_model(family, splitting=PEACEMAN_RACHFORD), make_images(3)
    with torch.no_grad():
        u, z = model.inject(x), torch.relu(model.equilibrium(x).value)
        torch.testing.assert_close(torch.relu(model.multiply(model.operator(), z) + u), z, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(model(x), z.flatten(1) @ model.readout.weight.mT + model.readout.bias)


@every_splitting_family
@pytest.mark.parametrize("step", [0.1, 1.0, 5.0])
def test_peaceman_rachford_converges_where_plain_iteration_does_not(
    family: str, step: float, make_model, make_images
) -> None:
    model, x = moved(make_model(family, splitting=PEACEMAN_RACHFORD, splitting_step=step), 4.0), make_images(4)
    with torch.no_grad():
        u = model.inject(x)
        start, operator = model.initial_state(u), model.operator()
        solve = Solve(Picard(), rtol=1e-6, max_steps=2000)
        assert bool(solve(CellMap(model.cell, u), start).is_converged.all())
        if family in MONOTONE:  # W itself is no contraction, so that iterating the equation would fail
            plain = CellMap(lambda z, u: torch.relu(model.multiply(operator, z) + u), u)
            assert not bool(solve(plain, start).is_converged.any())


@every_splitting_family
@pytest.mark.parametrize("pixel_std", [1.0, 0.35])
def test_logits_move_no_further_than_the_bound(
    family: str, pixel_std: float, make_model, make_images, logit_gain
) -> None:
    model = moved(make_model(family, pixel_mean=0.3, pixel_std=pixel_std), 1.5)
    bound, x = model.certificates()["lipschitz"], make_images(4)
    assert 0 < logit_gain(model, x) <= bound
    with torch.no_grad():
        distance = torch.linalg.vector_norm((x[1:] - x[:-1]).flatten(1), dim=1)
        change = torch.linalg.vector_norm(model(x[1:]) - model(x[:-1]), dim=1)
    assert bool((change <= bound * distance).all())


@pytest.mark.parametrize("lipschitz", [0.5, 8.0])
def test_lben_satisfies_the_condition_of_its_theorem(lipschitz: float, make_model) -> None:
    model = moved(make_model("lben", lipschitz=lipschitz, margin=0.05, pixel_std=0.35), 2.0)
    with torch.no_grad():
        weight, readout = model.operator(), model.readout.weight
        injection = model.injection.weight / 0.35
        slack = 2 * torch.eye(len(weight), dtype=weight.dtype) - weight - weight.mT
        slack = slack - (readout.mT @ readout + injection @ injection.mT) / lipschitz
    assert float(torch.linalg.eigvalsh(slack).min()) >= 2 * 0.05 - 1e-9
    assert model.certificates() == {"lipschitz": lipschitz, "monotonicity": model.monotonicity()}
    assert model.monotonicity() >= 0.05 - 1e-9


def test_lben_comes_close_to_a_tight_bound(make_model, make_images, logit_gain) -> None:
    """A bound that no network comes near would be true and worth nothing."""
    model, x = moved(make_model("lben", lipschitz=0.3), 3.0), make_images(6)
    assert 0.3 * 0.3 <= logit_gain(model, x) <= 0.3


@every_monotone_family
def test_certificate_is_the_product_of_its_parts(family: str, make_model) -> None:
    model = make_model(family, monotonicity=0.5, pixel_std=0.5)
    x = torch.zeros(1, *model.input_shape, dtype=torch.float64)
    injection = torch.autograd.functional.jacobian(lambda x: model.inject(x).flatten(), x).flatten(1)
    gain = torch.linalg.matrix_norm(injection, ord=2) * torch.linalg.matrix_norm(model.readout.weight.detach(), ord=2)
    found = model.certificates()
    assert found["lipschitz"] == pytest.approx(float(gain) / found["monotonicity"], rel=1e-6)
    assert found["monotonicity"] >= 0.5 - 1e-9


# Convolutions by the discrete Fourier transform


@pytest.mark.parametrize(("family", "config"), CONVOLUTIONAL)
def test_spectral_operator_is_its_convolutions(family: str, config: dict, make_model) -> None:
    model = make_model(family, monotonicity=0.4, **config)
    size = torch.Size(model.grid).numel()
    units = torch.eye(size, dtype=torch.float64).view(size, *model.grid)
    with torch.no_grad():
        a, b = (part(units).flatten(1).mT for part in (model.symmetric_part, model.skew_part))
    expected = 0.6 * torch.eye(size, dtype=torch.float64) - a.mT @ a + b - b.mT
    torch.testing.assert_close(written_out(model, model.operator().detach()), expected)


def test_tiers_pack_and_unpack(make_model, make_images) -> None:
    model = make_model("mondeq-multi", channels=(2, 1, 3), stride=1, input_shape=(1, 8, 12))
    z = torch.randn(2, *model.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tiers = model.tiers(z)
    assert [tuple(tier.shape[1:]) for tier in tiers] == [(2, 8, 12), (1, 4, 6), (3, 2, 3)]
    assert torch.equal(model.pack(tiers), z)
    with torch.no_grad():
        first, *others = model.tiers(model.inject(make_images(2, shape=(1, 8, 12))))
    assert float(first.abs().min(1).values.max()) > 0
    assert all(float(other.abs().max()) == 0.0 for other in others)


def test_sides_that_tiers_do_not_divide_are_refused(make_model) -> None:
    with pytest.raises(ValueError, match="that 4 divides"):
        make_model("mondeq-multi", channels=(2, 2, 2), stride=1, input_shape=(1, 6, 8))
