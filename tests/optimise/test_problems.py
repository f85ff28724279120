"""Problems: reconstruction through a decoder, one variable for many rows; closed forms of the affine model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustbench_deq.adjoints import Implicit
from robustbench_deq.models import Linear
from robustbench_deq.optimise import (
    Adam,
    Classification,
    Free,
    HighestLoss,
    Joint,
    Last,
    Problem,
    Reconstruction,
    Schedule,
    Settled,
    Shared,
    Solved,
    Source,
    optimise,
)
from robustbench_deq.optimise.objectives import CrossEntropy, Margin
from robustbench_deq.optimise.sources.base import Moment
from robustbench_deq.optimise.sources.joint import augmented
from robustbench_deq.solvers import Anderson, Picard, Solve
from tests.optimise.cases import TIGHTLY

LOOSE = Solve(Anderson(), rtol=1e-6, max_steps=300)
SOURCES = {
    "joint": Joint(warmup=Solve(Picard(), rtol=0.01, max_steps=30)),
    "joint, adaptive": Joint(None),
    "solved": Solved(LOOSE, Implicit(LOOSE)),
    "solved, cold": Solved(LOOSE, Implicit(LOOSE), is_warm=False),
}
every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


@pytest.fixture
def decoder(make_model) -> Linear:
    """Latents of 4 numbers, readouts of 6; well conditioned, so that Adam comes to its end."""
    model = make_model("test-linear", input_shape=(1, 2, 2), num_classes=6, hidden=8)
    with torch.no_grad():
        passed = torch.linalg.solve(torch.eye(8, dtype=torch.float64) - model.a, model.injection.weight)
        model.readout.weight.copy_(torch.linalg.qr(drawn(6, 4, seed=9))[0] @ torch.linalg.pinv(passed))
    return model


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ridge(model: Linear, target: Tensor, prior: float) -> Tensor:
    """`argmin ||M d + c - target||^2 + prior ||d||^2`."""
    with torch.no_grad():
        matrix, offset = model.input_matrix(), model(torch.zeros(1, 4, dtype=torch.float64))
        square = matrix.mT @ matrix + prior * torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(square, matrix.mT @ (target - offset).mT).mT


def ascended(problem: Problem, source: Source, rows: int, num_steps: int = 300) -> Tensor:
    start, step = torch.zeros(rows, 4, dtype=torch.float64), Adam(0.05, Schedule.COSINE)
    return optimise(problem, source, Free(), step, Last(), start, num_steps=num_steps).variable


@every_source
@pytest.mark.parametrize("prior", [0.0, 0.3])
def test_reconstruction_reaches_the_ridge_optimum(prior: float, source: Source, decoder) -> None:
    target = drawn(3, 6)
    expected = ridge(decoder, target, prior)
    assert float(expected.abs().max()) > 0.3
    found = ascended(Reconstruction(decoder, target, prior), source, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    if prior:
        assert float((expected - ridge(decoder, target, 0.0)).abs().max()) > 0.05  # the prior is seen


@every_source
def test_shared_variable_reaches_the_optimum_of_the_summed_loss(source: Source, decoder) -> None:
    """Of every owner the mean target; the prior of a row counts as often as the row is served."""
    target, owner = drawn(6, 6), torch.tensor([1, 0, 1, 2, 1, 0])
    means = torch.stack([target[owner == row].mean(0) for row in range(3)])
    found = ascended(Shared(Reconstruction(decoder, target, 0.2), owner), source, 3)
    torch.testing.assert_close(found, ridge(decoder, means, 0.2), rtol=0, atol=2e-3)


@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "mondeq-fc"])
@pytest.mark.parametrize("is_joint", [True, False], ids=["joint", "solved"])
def test_gradient_of_a_shared_variable_is_that_of_autograd(
    is_joint: bool, family: str, make_model, make_images
) -> None:
    model, x, owner = make_model(family), make_images(5), torch.tensor([0, 1, 1, 0, 1])
    objective = CrossEntropy(torch.tensor([0, 1, 2, 0, 1]))
    variable = 0.05 * make_images(2, seed=7)
    leaf = variable.clone().requires_grad_()
    losses = objective(model(x + leaf[owner]))
    expected = torch.autograd.grad(losses.sum(), leaf)[0]
    problem = Shared(Classification(model, x, objective), owner)
    if is_joint:
        source, steps = Joint(), 300
    else:
        source, steps = TIGHTLY, 1
    state = source.start(problem, variable, None)
    for _ in range(steps):
        look, state = source.look(problem, state, variable, Moment(0, 1))
        state, _ = source.advance(problem, Free(), state, look, variable, variable)
    assert float(expected.abs().amax()) > 1e-4
    torch.testing.assert_close(look.gradient, expected, rtol=1e-5, atol=1e-9)
    summed = torch.stack([losses[owner == row].sum() for row in range(2)]).detach()
    torch.testing.assert_close(look.loss, summed, rtol=1e-6, atol=1e-9)
    assert look.residual.shape == (2,)


@every_source
def test_prior_has_a_gradient_of_its_own(source: Source, decoder) -> None:
    """Beside the one that passes the equilibrium: -2 prior d."""
    variable, target = drawn(3, 4, seed=5), drawn(3, 6)
    gradients = []
    for prior in (0.0, 0.7):
        problem = Reconstruction(decoder, target, prior)
        state = source.start(problem, variable, None)
        gradients.append(source.look(problem, state, variable, Moment(0, 1))[0].gradient)
    torch.testing.assert_close(gradients[1] - gradients[0], -1.4 * variable, rtol=1e-7, atol=1e-9)


def test_losses_of_the_prior_are_the_rows_own(decoder) -> None:
    output, target, variable = drawn(3, 6, seed=1), drawn(3, 6), drawn(3, 4, seed=2)
    losses = Reconstruction(decoder, target, 0.5).losses(output, variable, 0.0)
    torch.testing.assert_close(losses.ascended, -(output - target).square().sum(1) - 0.5 * variable.square().sum(1))
    assert losses.compared is losses.ascended
    taken = Reconstruction(decoder, target, 0.5).take(torch.tensor([2, 0]))
    torch.testing.assert_close(taken.losses(output[[2, 0]], variable[[2, 0]], 0.0).ascended, losses.ascended[[2, 0]])
    with pytest.raises(NotImplementedError, match="Reconstruction has no success"):
        taken.is_success(output)


@pytest.mark.parametrize("rows", [[0, 2], [2, 0], [1], [], [0, 1, 2]])
def test_shared_take_keeps_who_serves_whom(rows: list[int], make_model, make_images) -> None:
    model, x, owner = make_model("test-linear"), make_images(6), torch.tensor([1, 0, 1, 2, 1, 0])
    problem = Shared(Classification(model, x, Margin(torch.tensor([0, 1, 2, 0, 1, 2]))), owner)
    kept = torch.tensor(rows, dtype=torch.int64)
    variable, output = 0.1 * make_images(3, seed=4), drawn(6, 3, seed=3)
    part, state_rows = problem.take(kept), problem.state_rows(kept)
    assert state_rows.tolist() == [row for row in range(6) if int(owner[row]) in rows]
    torch.testing.assert_close(part.inject(variable[kept]), problem.inject(variable)[state_rows])
    whole = problem.losses(output, variable, 0.0).ascended
    torch.testing.assert_close(part.losses(output[state_rows], variable[kept], 0.0).ascended, whole[kept])
    values = output[:, 0]
    worst = torch.stack([values[owner == row].amax() for row in range(3)])
    torch.testing.assert_close(problem.worst(values), worst)
    torch.testing.assert_close(part.worst(values[state_rows]), worst[kept])
    torch.testing.assert_close(part.spread(variable[kept]), problem.spread(variable)[state_rows])
    reached = torch.stack(
        [(output.argmax(1) != problem.inner.objective.labels)[owner == row].all() for row in range(3)]
    )
    assert torch.equal(problem.is_success(output), reached)
    assert torch.equal(part.is_success(output[state_rows]), reached[kept])
    again = part.take(torch.arange(len(rows)).flip(0))
    torch.testing.assert_close(
        again.losses(output[again_rows(problem, kept)], variable[kept.flip(0)], 0.0).ascended, whole[kept.flip(0)]
    )


def again_rows(problem: Shared, kept: Tensor) -> Tensor:
    return problem.state_rows(kept)  # in the order of the state, whatever the order of the variable


@pytest.mark.parametrize("has_settled", [False, True])
@every_source
def test_rows_of_a_shared_variable_leave_when_all_that_they_serve_are_done(
    source: Source, has_settled: bool, make_model, make_images
) -> None:
    model, x = make_model("test-linear", num_classes=2), make_images(6)
    with torch.no_grad():
        solution = model.equilibrium(x)
        y = model.head(solution.value).argmax(1)
    owner = torch.tensor([0, 1, 1, 2, 2, 0])
    y[[0, 5, 1]] = 1 - y[[0, 5, 1]]  # the first row is done from the start, half of the second, none of the third
    problem = Shared(Classification(model, x, Margin(y)), owner)
    settled = Settled(solution.value, None, torch.full_like(x[:, 0, 0, 0], 3.0)) if has_settled else None
    start = torch.zeros_like(x[:3])
    step = Adam(1e-9)
    keep = HighestLoss(0.005, 0.1)
    found = optimise(problem, source, Free(), step, keep, start, num_steps=60, settled=settled, leaves=True)
    assert found.is_done.tolist() == [True, False, False]
    assert found.variable.shape == start.shape and bool(torch.isfinite(found.loss).all())
    expected = problem.losses(model.head(solution.value), start, 1.0).ascended.detach()
    torch.testing.assert_close(found.loss, expected, rtol=0.05, atol=0.05)


def test_one_look_at_a_classification_has_the_loss_that_is_compared(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    objective = CrossEntropy(torch.tensor([0, 1, 2]))
    problem = Classification(model, x, objective)
    output = drawn(3, 3)
    losses = problem.losses(output, torch.zeros_like(x), 0.3)
    assert losses.compared is losses.ascended
    torch.testing.assert_close(losses.ascended, objective(output))
    rows = torch.tensor([2, 1])
    assert torch.equal(problem.take(rows).is_success(output[rows]), problem.is_success(output)[rows])
    z = model.equilibrium(x).value.detach()
    torch.testing.assert_close(augmented(problem, z, z, torch.zeros_like(x)).loss, objective(model(x)).detach())
