"""Gradients through an equilibrium: closed forms on the affine cell, and three ways of differentiating that agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from robustbench_deq.adjoints import (
    ADJOINTS,
    AdjointMap,
    AdjointTrace,
    Implicit,
    Neumann,
    Phantom,
    Unrolled,
    jacobian_free,
)
from robustbench_deq.models import FAMILIES
from robustbench_deq.rows import per_sample
from robustbench_deq.solvers import SOLVERS, Anderson, NewtonKrylov, Picard, Solve, Status

TIGHT = Solve(Anderson(), rtol=1e-12, max_steps=500)
every_family = pytest.mark.parametrize("family", list(FAMILIES))


def loss_of(model, x: Tensor, adjoint=None, trace: AdjointTrace | None = None) -> Tensor:
    """A fixed smooth function of the logits, summed over the batch."""
    logits = model.head(model.equilibrium(x, adjoint=adjoint, trace=trace).value)
    weight = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)
    return (logits.square() * 0.5 + logits * weight).sum()


def gradients(model, x: Tensor, adjoint) -> list[Tensor]:
    """By the input, then by every parameter."""
    leaf = x.clone().requires_grad_()
    return list(torch.autograd.grad(loss_of(model, leaf, adjoint), [leaf, *model.parameters()]))


def linear_pieces(model, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, U and `v = dL/dz*` `(batch, hidden)` for the sum of the logits weighted by 1, 2, 3."""
    weight = torch.arange(1.0, model.num_classes + 1, dtype=x.dtype)
    v = (weight @ model.readout.weight).detach().expand(len(x), -1)
    return model.a.detach(), model.injection.weight.detach(), v


def weighted_gradient(model, x: Tensor, adjoint) -> Tensor:
    leaf = x.clone().requires_grad_()
    logits = model.head(model.equilibrium(leaf, adjoint=adjoint).value)
    weight = torch.arange(1.0, model.num_classes + 1, dtype=x.dtype)
    return torch.autograd.grad((logits @ weight).sum(), leaf)[0].flatten(1)


@every_family
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradcheck_of_implicit_by_the_input(family: str, mode: str, make_model, make_images) -> None:
    model = make_model(family).train(mode == "train")
    x = make_images(1).requires_grad_()
    assert torch.autograd.gradcheck(model, (x,), eps=1e-6, atol=1e-5, rtol=1e-4)


@every_family
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_implicit_equals_a_long_unroll(family: str, mode: str, make_model, make_images) -> None:
    model = make_model(family).train(mode == "train")
    x = make_images(3)
    implicit = gradients(model, x, Implicit(TIGHT))
    unrolled = gradients(model, x, Unrolled(num_steps=400, damping=0.7))
    assert float(implicit[0].abs().max()) > 1e-4
    for one, other in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@every_family
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_implicit_equals_finite_differences_by_the_parameters(family: str, mode: str, make_model, make_images) -> None:
    model = make_model(family).train(mode == "train")
    x, step = make_images(3), 1e-5
    found = gradients(model, x, Implicit(TIGHT))[1:]
    stream = torch.Generator().manual_seed(4)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=stream)
        values = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(float(loss_of(model, x)))
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
        slope = (values[0] - values[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@every_family
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_every_solver_finds_the_same_adjoint(family: str, solver: str, make_model, make_images) -> None:
    model, x = make_model(family), make_images(3)
    backward = Solve(SOLVERS.get(solver)(), rtol=1e-10, max_steps=500)
    reference = gradients(model, x, Implicit(TIGHT))[0]
    torch.testing.assert_close(gradients(model, x, Implicit(backward))[0], reference, rtol=1e-6, atol=1e-8)


def test_implicit_on_the_affine_cell_is_the_transposed_inverse(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    a, u, v = linear_pieces(model, x)
    mu = torch.linalg.solve(torch.eye(len(a), dtype=a.dtype) - a.mT, v.mT).mT
    torch.testing.assert_close(weighted_gradient(model, x, Implicit(TIGHT)), mu @ u)


@pytest.mark.parametrize("terms", [1, 2, 5, 10])
def test_neumann_is_the_partial_sum(terms: int, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    a, u, v = linear_pieces(model, x)
    mu = sum(v @ torch.linalg.matrix_power(a, i) for i in range(terms))
    torch.testing.assert_close(weighted_gradient(model, x, Neumann(terms)), mu @ u)


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (1, 0.5), (4, 0.5), (5, 1.0)])
def test_phantom_is_the_damped_partial_sum(steps: int, damping: float, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    a, u, v = linear_pieces(model, x)
    move = (1 - damping) * torch.eye(len(a), dtype=a.dtype) + damping * a
    mu = damping * sum(v @ torch.linalg.matrix_power(move, i) for i in range(steps))
    torch.testing.assert_close(weighted_gradient(model, x, Phantom(steps, damping)), mu @ u)


def test_jacobian_free_takes_the_loss_gradient_for_the_adjoint(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    _, u, v = linear_pieces(model, x)
    torch.testing.assert_close(weighted_gradient(model, x, jacobian_free()), v @ u)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_unrolled_is_the_partial_sum_and_returns_its_last_iterate(steps: int, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    a, u, v = linear_pieces(model, x)
    mu = sum(v @ torch.linalg.matrix_power(a, i) for i in range(steps))
    torch.testing.assert_close(weighted_gradient(model, x, Unrolled(steps)), mu @ u)
    injection = model.inject(x).detach()
    state = sum(injection @ torch.linalg.matrix_power(a.mT, i) for i in range(steps))
    solution = model.equilibrium(x, adjoint=Unrolled(steps))
    torch.testing.assert_close(solution.value.detach(), state)
    assert solution.num_steps.tolist() == [steps, steps]


@pytest.mark.parametrize("name", list(ADJOINTS))
def test_every_registered_adjoint_points_uphill(name: str, make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    exact = gradients(model, x, Implicit(TIGHT))[0].flatten(1)
    found = gradients(model, x, ADJOINTS.get(name)(TIGHT))[0].flatten(1)
    assert bool((torch.cosine_similarity(found, exact) > 0.5).all())


def test_warm_start_takes_fewer_steps_to_the_same_gradient(make_model, make_images) -> None:
    model, x = make_model("deq-fc", hidden=12), make_images(3)
    backward = Solve(Anderson(), rtol=1e-6, max_steps=200)
    before, cold, warm, same = AdjointTrace(), AdjointTrace(), AdjointTrace(), AdjointTrace()
    loss_of(model, x.clone().requires_grad_(), Implicit(TIGHT), before).backward()
    loss_of(model, x.clone().requires_grad_(), Implicit(backward, before.mu), same).backward()
    assert same.solution.num_steps.tolist() == [1, 1, 1]

    moved = (x + 1e-4).clone()
    leaves = moved.clone().requires_grad_(), moved.clone().requires_grad_()
    loss_of(model, leaves[0], Implicit(backward), cold).backward()
    loss_of(model, leaves[1], Implicit(backward).warm_started(before.mu), warm).backward()
    assert bool((warm.solution.num_steps < cold.solution.num_steps).all())
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)


def test_a_start_of_another_scale_is_fitted(make_model, make_images) -> None:
    """The adjoint of a loss with other factors a row; of one row nothing is known."""
    model, x = make_model("deq-fc", hidden=12), make_images(4)
    backward = Solve(Picard(), rtol=1e-6, max_steps=200)
    exact, plain, fitted = AdjointTrace(), AdjointTrace(), AdjointTrace()
    loss_of(model, x.clone().requires_grad_(), Implicit(TIGHT), exact).backward()
    factors = torch.tensor([1e3, 1e-3, -2.0, 0.0])[torch.arange(len(x)) % 4].to(x)
    mu0 = per_sample(factors, exact.mu) * exact.mu
    leaf, leaf_of_plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss_of(model, leaf_of_plain, Implicit(backward, mu0), plain).backward()
    loss_of(model, leaf, Implicit(backward, mu0, fits_start=True), fitted).backward()
    assert bool((fitted.solution.num_steps[factors != 0] <= 1).all())
    assert bool((fitted.solution.num_steps <= plain.solution.num_steps).all())
    torch.testing.assert_close(leaf.grad, leaf_of_plain.grad, rtol=1e-4, atol=1e-6)


def test_warm_started_keeps_the_backward_solve() -> None:
    mu0, adjoint = torch.ones(2, 3), Implicit(TIGHT)
    assert adjoint.warm_started(mu0).mu0 is mu0
    assert adjoint.warm_started(mu0).backward is TIGHT
    assert adjoint.mu0 is None


def test_trace_holds_the_adjoint_and_its_solve(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(3)
    trace = AdjointTrace()
    loss = loss_of(model, x.clone().requires_grad_(), Implicit(TIGHT), trace)
    assert trace.mu is None and trace.solution is None, "nothing is filled in before the backward pass"
    loss.backward()
    assert trace.solution.is_converged.all()
    assert torch.equal(trace.mu, trace.solution.value)
    # mu = J^T mu + v, checked on a graph of its own
    with torch.no_grad():
        u = model.inject(x)
    z = model.equilibrium(x).value.detach()
    leaf = z.clone().requires_grad_()
    logits = model.head(leaf)
    weight = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)
    v = torch.autograd.grad((logits.square() * 0.5 + logits * weight).sum(), leaf)[0]
    jacobian = AdjointMap(model, z, u, v)
    torch.testing.assert_close(jacobian(trace.mu), trace.mu, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(jacobian(trace.mu) - jacobian.transpose(trace.mu), v)


def test_phantom_leaves_the_trace_empty(make_model, make_images) -> None:
    trace = AdjointTrace()
    loss_of(make_model("deq-fc"), make_images(2).requires_grad_(), Phantom(), trace).backward()
    assert trace.mu is None and trace.solution is None


def test_one_step_backward_is_the_jacobian_free_gradient_and_says_so(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(3)
    trace = AdjointTrace()
    leaf = x.clone().requires_grad_()
    loss_of(model, leaf, Implicit(replace(TIGHT, max_steps=1)), trace).backward()
    assert trace.solution.status.tolist() == [Status.MAX_STEPS] * 3
    torch.testing.assert_close(leaf.grad, gradients(model, x, jacobian_free())[0])
    assert float(leaf.grad.abs().max()) > 1e-3


def test_diverging_backward_returns_something_finite_and_says_so(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with torch.no_grad():
        model.a.copy_(2.0 * torch.linalg.qr(model.a)[0])  # every singular value is 2: Picard diverges
    model.solve = Solve(NewtonKrylov(), rtol=1e-10, max_steps=50)
    trace = AdjointTrace()
    leaf = x.clone().requires_grad_()
    loss_of(model, leaf, Implicit(Solve(Picard(), rtol=1e-10, max_steps=100)), trace).backward()
    assert trace.solution.status.tolist() == [Status.DIVERGED] * 3
    assert bool((leaf.grad.flatten(1).norm(dim=1) > 1e-3).all())
    assert bool(torch.isfinite(leaf.grad).all())


@every_family
def test_samples_that_finish_apart_get_the_gradient_they_get_alone(family: str, make_model, make_images) -> None:
    # The adjoint solve compacts its batch, which rebuilds the graph of the cell for the samples that remain.
    model, x = make_model(family), make_images(4)
    scale = torch.tensor([1.0, 0.0, 1e-3, 1.0], dtype=x.dtype)
    backward = replace(TIGHT, compact_below=1.0)

    def gradient(rows: list[int]) -> Tensor:
        leaf = x[rows].clone().requires_grad_()
        logits = model.head(model.equilibrium(leaf, adjoint=Implicit(backward)).value)
        return torch.autograd.grad((logits[:, 0].square() * scale[rows]).sum(), leaf)[0]

    together = gradient([0, 1, 2, 3])
    for row in range(4):
        torch.testing.assert_close(together[row], gradient([row])[0], rtol=1e-7, atol=1e-9)
    assert float(together[1].abs().max()) == 0.0


def test_the_backward_pass_touches_no_gradient_but_those_asked_for(make_model, make_images) -> None:
    model = make_model("deq-fc")
    leaf = make_images(2).requires_grad_()
    torch.autograd.grad(loss_of(model, leaf), leaf)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert leaf.grad is None


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**-40, 2.0**80])
def test_an_adjoint_does_not_depend_on_the_size_of_the_loss(scale: float, make_model, make_images) -> None:
    model, x = make_model("test-linear", dtype=torch.float32), make_images(3, dtype=torch.float32).requires_grad_()

    def gradient(factor: float) -> Tensor:
        state = model.equilibrium(x, adjoint=Implicit(Solve(Anderson(), rtol=1e-5, max_steps=50))).value
        return torch.autograd.grad((model.head(state)[:, 0] * factor).sum(), x)[0]

    torch.testing.assert_close(gradient(scale) / scale, gradient(1.0), rtol=1e-3, atol=1e-6)
