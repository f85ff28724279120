"""How a cell contracts, estimated from a few products: linear cells, whose spectrum and norms are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.meter import Meter
from robustbench_deq.optimise import Contraction, estimate_contraction
from robustbench_deq.optimise.contraction import HARD, NUM_PRODUCTS

SIZE = NUM_PRODUCTS
"""Of the states here: the Krylov space is all of theirs, and the estimate exact."""


class Given(EquilibriumModel):
    """`f(z, u) = z + w (z J^T + u - z)`, a Jacobian J for all rows or one for each."""

    input_shape, num_classes = (1, 1, SIZE), SIZE

    def __init__(self, jacobian: Tensor, damping: float = 1.0) -> None:
        super().__init__()
        self.jacobian, self.damping = jacobian, damping

    def inject(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return z + self.damping * (torch.einsum("...ij,...j->...i", self.jacobian, z) + u - z)

    def head(self, z: Tensor) -> Tensor:
        return z

    def initial_state(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(eigenvalues: list[float], seed: int = 1) -> Tensor:
    basis = torch.linalg.qr(drawn(SIZE, SIZE, seed=seed))[0]
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT


def estimated(model: EquilibriumModel, rows: int = 3, start: Tensor | None = None) -> Contraction:
    z, u = drawn(rows, SIZE, seed=2), drawn(rows, SIZE, seed=3)
    return estimate_contraction(model, z, u, drawn(rows, SIZE, seed=4) if start is None else start)


def assert_all(found: Contraction, relaxation: float, rate: float, left: float) -> None:
    for name, expected in (("relaxation", relaxation), ("rate", rate), ("left", left)):
        part = getattr(found, name)
        torch.testing.assert_close(part, torch.full_like(part, expected), rtol=1e-8, atol=1e-10, msg=name)


def left_of(iteration: Tensor) -> float:
    return float(torch.linalg.matrix_norm(torch.linalg.matrix_power(iteration, 16), 2))


@pytest.mark.parametrize("damping", [1.0, 0.3, 0.03, 0.001])
def test_damping_of_a_symmetric_cell_is_taken_back_exactly(damping: float) -> None:
    """Eigenvalues of I - J from 0.1 to 0.8: relaxed by 1 / 0.8, the slowest leaves 1 - 0.1 / 0.8."""
    model = Given(symmetric([0.9, 0.7, 0.5, 0.4, 0.3, 0.2]), damping)
    found = estimated(model)
    assert_all(found, 1 / (0.8 * damping), 0.875, 0.875**16)
    assert found.is_hard.tolist() == [False] * 3


@pytest.mark.parametrize("damping", [1.0, 0.5, 0.01])
def test_a_relaxation_never_damps(damping: float) -> None:
    """The fastest part of the step, 1 - (-0.8) = 1.8, is brought to one where the cell's own is below one."""
    model = Given(symmetric([-0.8, 0.6, 0.5, 0.1, 0.0, -0.2]), damping)
    if damping == 1.0:
        assert_all(estimated(model), 1.0, 0.8, 0.8**16)
    else:
        assert_all(estimated(model), 1 / (1.8 * damping), 1 - 0.4 / 1.8, (1 - 0.4 / 1.8) ** 16)


def test_growth_before_the_fall_makes_a_cell_hard_though_its_rate_is_small() -> None:
    """A Jordan block of eigenvalue -1/2."""
    jordan = -0.5 * torch.eye(SIZE, dtype=torch.float64) + torch.diag(torch.full((SIZE - 1,), 2.0).double(), 1)
    found = estimated(Given(jordan))
    assert bool((found.rate < 0.7).all())  # an eigenvalue of so many is known no better
    torch.testing.assert_close(found.left, torch.full_like(found.left, left_of(jordan)), rtol=1e-8, atol=0)
    assert left_of(jordan) > 50 and bool(found.is_hard.all()) and bool((found.relaxation == 1.0).all())
    mild = estimated(Given(0.1 * jordan))
    torch.testing.assert_close(mild.left, torch.full_like(mild.left, left_of(0.1 * jordan)), rtol=1e-6, atol=1e-12)
    assert not bool(mild.is_hard.any())


def test_a_relaxation_that_makes_it_worse_is_left_out() -> None:
    """Slow turns: I - J is a tenth of 1 + 3i. Relaxed to a modulus of one, the iteration would grow."""
    turn = torch.tensor([[1.0, 3.0], [-3.0, 1.0]], dtype=torch.float64)
    jacobian = torch.eye(SIZE, dtype=torch.float64) - 0.1 * torch.block_diag(turn, turn, turn)
    relaxed = torch.eye(SIZE, dtype=torch.float64) + (jacobian - torch.eye(SIZE)) / (0.1 * 10**0.5)
    assert left_of(relaxed) > 1.0
    found = estimated(Given(jacobian))
    assert_all(found, 1.0, 0.9**0.5, 0.9**8)
    assert not bool(found.is_hard.any())


@pytest.mark.parametrize(("eigenvalue", "is_hard"), [(0.95, False), (0.96, True), (1.0, True), (-1.1, True)])
def test_a_row_is_hard_where_16_relaxed_iterations_may_leave_more_than_half(eigenvalue: float, is_hard: bool) -> None:
    found = estimated(Given(symmetric([eigenvalue, 0.0, 0.0, 0.0, 0.0, 0.0])))
    left = abs(eigenvalue) ** 16
    torch.testing.assert_close(found.left, torch.full_like(found.left, left))
    assert (left > HARD) is is_hard and found.is_hard.tolist() == [is_hard] * 3


def test_only_what_the_start_excites_is_seen() -> None:
    """Two of six eigenvectors span the space: the rest of it is not what the state's way goes through."""
    jacobian = torch.diag(torch.tensor([0.6, 0.2, 0.99, 0.99, -3.0, 0.0], dtype=torch.float64))
    start = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = estimated(Given(jacobian), 1, start)
    assert_all(found, 1 / 0.8, 1 - 0.4 / 0.8, 0.5**16)


class Stateless(Given):
    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return u.clone()


@pytest.mark.parametrize("model", [Stateless(torch.eye(SIZE)), Given(torch.zeros(SIZE, SIZE).double())], ids=str)
def test_a_cell_that_ignores_its_state_contracts_at_once(model: Given) -> None:
    assert_all(estimated(model), 1.0, 0.0, 0.0)


def test_a_start_of_zeros_is_taken_to_contract_at_once() -> None:
    start = drawn(3, SIZE)
    start[1] = 0.0
    found = estimated(Given(symmetric([0.99, 0.7, 0.5, 0.4, 0.3, 0.2])), start=start)
    assert found.is_hard.tolist() == [True, False, True]
    assert_all(found.take(torch.tensor([1])), 1.0, 0.0, 0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_jacobian_that_is_not_finite_is_hard_and_alone_in_it(value: float) -> None:
    good = symmetric([0.9, 0.7, 0.5, 0.4, 0.3, 0.2])
    found = estimated(Given(torch.stack([good, torch.full_like(good, value), good])))
    assert found.is_hard.tolist() == [False, True, False]
    assert [float(part[1]) for part in found] == [1.0, 1.0, torch.inf]
    assert_all(found.take(torch.tensor([0, 2])), 1.25, 0.875, 0.875**16)


@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "mondeq-fc", "deq-conv", "mdeq"])
def test_it_costs_one_evaluation_and_a_few_products_and_no_row_knows_of_another(
    family: str, make_model, make_images
) -> None:
    model, x = make_model(family), make_images(5)
    model.requires_grad_(False)
    with torch.no_grad():
        z, u = model.equilibrium(x).value, model.inject(x)
        start = z - model.initial_state(u)
    with Meter(model) as meter:
        whole = estimate_contraction(model, z, u, start)
    assert (meter.eval_rows, meter.vjp_rows) == (5, 5 * min(NUM_PRODUCTS, z[0].numel()))
    assert all(part.shape == (5,) and part.dtype == z.dtype and not part.requires_grad for part in whole)
    assert bool((whole.relaxation >= 1.0).all()) and bool((whole.left > 0).all())
    for rows in ([3], [4, 0], [2, 1, 0, 4, 3]):
        part = estimate_contraction(model, z[rows], u[rows], start[rows])
        for one, other in zip(part, whole.take(torch.tensor(rows)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_single_precision_is_enough() -> None:
    found = estimated(Given(symmetric([0.9, 0.7, 0.5, 0.4, 0.3, 0.2]), 0.01))
    z, u, start = (drawn(3, SIZE, seed=seed).float() for seed in (2, 3, 4))
    single = estimate_contraction(Given(symmetric([0.9, 0.7, 0.5, 0.4, 0.3, 0.2]).float(), 0.01), z, u, start)
    assert single.relaxation.dtype is torch.float32
    for one, other in zip(single, found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=5e-3, atol=0)
