"""The augmented iteration: the map, closed forms on the affine model, costs, and what the inner iterations see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustbench_deq.attacks import JointPGD, JointPGDConfig
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.meter import Meter
from robustbench_deq.models import Linear, LinearConfig
from robustbench_deq.optimise import (
    NORMS,
    Box,
    Classification,
    Contraction,
    HighestLoss,
    Joint,
    Last,
    Look,
    Mixing,
    Norm,
    Objective,
    Optimum,
    ProjectedAscent,
    Settled,
    Shared,
    estimate_contraction,
    optimise,
)
from robustbench_deq.optimise.contraction import NUM_PRODUCTS
from robustbench_deq.optimise.objectives import CrossEntropy, CrossEntropyThenMargin, Margin
from robustbench_deq.optimise.sources.base import Moment
from robustbench_deq.optimise.sources.joint import augmented, loss_gradient
from robustbench_deq.optimise.steps import At
from robustbench_deq.solvers import Anderson, Picard, Solve
from robustbench_deq.threats import Threat
from tests.optimise.cases import DRIVERS, LABELS, best_of_linear, exact, log_odds, run, slope

every_driver = pytest.mark.parametrize("driver", DRIVERS.values(), ids=DRIVERS)
every_norm = pytest.mark.parametrize("norm", [NORMS.get(name) for name in NORMS])


# ---------------------------------------------------------------- the map


def test_one_look_gives_all_three_right_hand_sides(make_model, make_images) -> None:
    model, x, delta = make_model("test-linear"), make_images(4), 0.1 * make_images(4, seed=2)
    z, mu = torch.randn(2, 4, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    found = augmented(Classification(model, x, CrossEntropy(LABELS)), z, mu, delta)
    with torch.no_grad():
        loss, of_logits = log_odds(model.head(z), LABELS)
        torch.testing.assert_close(found.f, z @ model.a.mT + model.inject(x + delta))
        torch.testing.assert_close(found.g, mu @ model.a + of_logits @ model.readout.weight)
        torch.testing.assert_close(found.gradient, (mu @ model.injection.weight).view_as(x))
        torch.testing.assert_close(found.loss, loss)
        torch.testing.assert_close(found.output, model.head(z))
    assert not any(part.requires_grad for part in found if part is not None)


def test_staged_objective_ascends_one_loss_after_the_other_and_compares_by_the_last(make_model, make_images) -> None:
    model, x, delta = make_model("test-linear"), make_images(4), 0.1 * make_images(4, seed=2)
    z, mu = torch.randn(2, 4, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(3))

    def look(objective: Objective, progress: float) -> Look:
        return augmented(Classification(model, x, objective), z, mu, delta, progress)

    log_loss, margin = look(CrossEntropy(LABELS), 0.0), look(Margin(LABELS), 0.0)
    for progress, ascended in ((0.0, log_loss), (0.49, log_loss), (0.5, margin), (0.9, margin)):
        found = look(CrossEntropyThenMargin(LABELS), progress)
        torch.testing.assert_close(found.g, ascended.g)
        torch.testing.assert_close(found.loss, margin.loss)
    assert not torch.allclose(log_loss.g, margin.g)


def test_gradient_of_the_loss_with_respect_to_the_state_costs_no_evaluation(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(4)
    z = torch.randn(4, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    with Meter(model) as meter:
        found = loss_gradient(Classification(model, x, CrossEntropy(LABELS)), z, torch.zeros_like(x))
    with torch.no_grad():
        torch.testing.assert_close(found, log_odds(model.head(z), LABELS)[1] @ model.readout.weight)
    assert (meter.eval_rows, meter.vjp_rows) == (0, 0)


@pytest.mark.parametrize(("start", "moves"), [("loss", True), ("zero", False)])
def test_only_an_adjoint_that_starts_at_the_loss_moves_in_the_first_step(
    start: str, moves: bool, make_model, make_images
) -> None:
    model, x = make_model("test-linear"), make_images(4)
    config = JointPGDConfig(steps=1, keep="last", adjoint_start=start, stop_at_success=False)
    delta = JointPGD(Threat(Norm.L2, 0.1), config)(model, x, LABELS).delta
    assert bool((Norm.L2.size(delta) > 1e-3).all()) is moves and bool((delta != 0).any()) is moves


@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "mondeq-fc", "deq-conv"])
def test_inner_look_is_the_same_without_the_gradient_with_respect_to_the_variable(
    family: str, make_model, make_images
) -> None:
    model, x = make_model(family), make_images(4)
    with torch.no_grad():
        u = model.inject(x)
        z = model.cell(model.initial_state(u), u)
    mu = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(3))
    problem, nothing = Classification(model, x, CrossEntropy(LABELS)), torch.zeros_like(x)
    whole, inner = augmented(problem, z, mu, nothing), augmented(problem, z, mu, nothing, u=u)
    assert inner.gradient is None and whole.gradient is not None
    for name in ("f", "g", "loss", "output"):
        torch.testing.assert_close(getattr(inner, name), getattr(whole, name))


@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "mondeq-fc", "deq-conv"])
def test_one_variable_may_serve_many_rows(family: str, make_model, make_images) -> None:
    model, x, task = make_model(family), make_images(4), torch.tensor([0, 1, 1, 0])
    variable = 0.05 * make_images(2, seed=7)
    objective = CrossEntropy(LABELS)
    problem = Shared(Classification(model, x, objective), task)
    leaf = variable.clone().requires_grad_()
    expected = torch.autograd.grad(objective(model(x + leaf[task])).sum(), leaf)[0]
    with torch.no_grad():
        z = model.equilibrium(x + variable[task]).value
    mu = torch.zeros_like(z)
    for _ in range(400):
        now = augmented(problem, z, mu, variable)
        z, mu = now.f, now.g
    assert now.gradient.shape == variable.shape and now.loss.shape == (2,)
    assert float(expected.flatten(1).norm(dim=1).min()) > 1e-4
    torch.testing.assert_close(now.gradient, expected, rtol=1e-6, atol=1e-10)


# ---------------------------------------------------------------- the iteration


@every_driver
def test_state_and_adjoint_reach_their_closed_forms(driver: dict, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(4)
    ball = Threat(Norm.L2, 0.0).ball(x)
    found = run(model, x, CrossEntropy(LABELS), ball, ProjectedAscent(0.5), 200, **driver)
    z, mu = exact(model, x, LABELS)
    torch.testing.assert_close(found.z, z, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.mu, mu, rtol=0, atol=1e-7)
    assert float(found.residual.max()) < 1e-7
    assert torch.equal(found.variable, torch.zeros_like(x))


@every_driver
@every_norm
def test_every_driver_reaches_the_known_optimum(driver: dict, norm: Norm, make_model, make_images) -> None:
    model, x = make_model("test-linear", num_classes=2), 0.4 + 0.2 * make_images(4)
    y = torch.tensor([0, 1, 1, 0])
    optimum = best_of_linear(slope(model, x, y), norm, 0.2)
    ball, step = Threat(norm, 0.2).ball(x), ProjectedAscent(0.5)

    def margin(delta: Tensor) -> Tensor:
        return Margin(y)(model.head(exact(model, x + delta, y)[0])).detach()

    found = run(model, x, Margin(y), ball, step, 300, keep=Last(), **driver)
    torch.testing.assert_close(found.variable, optimum, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.loss, margin(optimum), rtol=1e-3, atol=1e-4)
    assert bool((found.tally["perturbation_steps"] > 10).all())
    # The highest loss may have been seen a little earlier, through a state that had not settled.
    kept = run(model, x, Margin(y), ball, step, 300, keep=HighestLoss(0.005, 0.1), **driver)
    gain = (margin(kept.variable) - margin(torch.zeros_like(x))) / (margin(optimum) - margin(torch.zeros_like(x)))
    assert bool((gain > 0.99).all()), gain


@pytest.mark.parametrize("driver", [{}, {"inner_steps": 3}, {"inner_steps": None}, {"accelerator": Anderson()}])
def test_a_step_costs_one_evaluation_and_one_product(driver: dict, make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    model.requires_grad_(False)
    with Meter(model) as meter:
        run(model, x, CrossEntropy(LABELS), Threat(Norm.L2, 0.3).ball(x), ProjectedAscent(0.5), 12, **driver)
    assert meter.vjp_rows == 12 * 4
    assert meter.eval_rows == (12 + 1) * 4  # the last variable is looked at once, without a product
    assert meter.num_steps == 12 * 4


@pytest.mark.parametrize("has_contraction", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "deq-conv"])
def test_an_unknown_contraction_costs_one_evaluation_and_a_few_products(
    family: str, has_contraction: bool, make_model, make_images
) -> None:
    model, x = make_model(family), make_images(4)
    model.requires_grad_(False)
    settled, more = known_at(model, x), 1 + 1
    if has_contraction:
        settled, more = settled._replace(contraction=contraction_at(model, x, settled)), 1
    products = 0 if has_contraction else min(NUM_PRODUCTS, settled.z[0].numel())
    problem, ball = Classification(model, x, CrossEntropy(LABELS)), Threat(Norm.L2, 0.3).ball(x)
    options = {"num_steps": 12, "settled": settled}
    with Meter(model) as meter:
        optimise(problem, Joint(relaxes=True), ball, ProjectedAscent(0.5), Last(), torch.zeros_like(x), **options)
    assert (meter.eval_rows, meter.vjp_rows) == (4 * (12 + more), 4 * (12 + products))


class CountsInjections(Classification):
    calls = 0

    def inject(self, variable: Tensor) -> Tensor:
        CountsInjections.calls += 1
        return super().inject(variable)


@pytest.mark.parametrize(("inner_steps", "injections"), [(1, 12 + 1), (3, 2 * 4 + 1), (6, 2 * 2 + 1)])
def test_injection_is_computed_when_the_variable_has_moved(
    inner_steps: int, injections: int, make_model, make_images
) -> None:
    """Twice a move where there are inner steps: for them, and with a graph for the next move. Once at the end, and once
    at the start."""
    model, x = make_model("deq-fc"), make_images(4)
    problem, source = CountsInjections(model, x, CrossEntropy(LABELS)), Joint(inner_steps)
    ball, CountsInjections.calls = Threat(Norm.L2, 0.3).ball(x), 0
    found = optimise(problem, source, ball, ProjectedAscent(0.5), Last(), torch.zeros_like(x), num_steps=12)
    assert CountsInjections.calls == injections + 1
    assert found.tally["perturbation_steps"].tolist() == [12 // inner_steps] * 4


def test_inner_steps_see_the_variable_that_has_just_moved(make_model, make_images) -> None:
    """k inner steps by hand: a stale cached injection would show."""
    model, x, k = make_model("deq-fc"), make_images(4), 3
    objective, ball, step = CrossEntropy(LABELS), Threat(Norm.L2, 0.3).ball(x), ProjectedAscent(0.5)
    found = run(model, x, objective, ball, step, 12, inner_steps=k, keep=Last())
    problem = Classification(model, x, objective)
    z, delta = model.initial_state(model.inject(x)).detach(), torch.zeros_like(x)
    mu = torch.zeros_like(z)
    for count in range(12):
        now = augmented(problem, z, mu, delta)
        z, mu = now.f, now.g
        if (count + 1) % k == 0:
            at = At(delta, now.gradient, now.loss, now.residual, None, Moment(count, 12), 0, None)
            delta, _ = step.step(at, ball, ())
    torch.testing.assert_close(found.variable, delta)
    torch.testing.assert_close(found.mu, mu)
    torch.testing.assert_close(found.z, model.cell(z, model.inject(x + delta)).detach())


# ---------------------------------------------------------------- relaxation


class Damped(Linear):
    """`f(z, u) = z + w (A z + u - z)`: the equilibria of the linear cell, whatever w is."""

    damping = 1.0

    def cell(self, z: Tensor, u: Tensor) -> Tensor:
        return z + self.damping * (super().cell(z, u) - z)


def damped(eigenvalues: list[float], damping: float = 1.0) -> Damped:
    """With a symmetric matrix A of the given eigenvalues."""
    config = LinearConfig(input_shape=(1, 4, 4), num_classes=3, hidden=len(eigenvalues))
    model = Damped(config).double().eval().requires_grad_(False)
    drawn = torch.randn(len(eigenvalues), len(eigenvalues), generator=torch.Generator().manual_seed(5))
    basis = torch.linalg.qr(drawn.double())[0]
    model.a.copy_(basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT)
    model.damping = damping
    return model


def known_at(model: EquilibriumModel, x: Tensor) -> Settled:
    """The clean equilibrium, of known size."""
    z = model.equilibrium(x).value.detach()
    return Settled(z, None, torch.ones_like(z.flatten(1)[:, 0]), z.flatten(1).norm(dim=1))


def contraction_at(model: EquilibriumModel, x: Tensor, settled: Settled) -> Contraction:
    return estimate_contraction(model, settled.z, model.inject(x).detach(), settled.z)


SLOW_EIGENVALUES = [0.85, 0.7, 0.55, 0.4, 0.3, 0.2]


def relaxed_run(
    eigenvalues: list[float], damping: float, x: Tensor, num_steps: int = 20, **options
) -> tuple[Optimum, Meter]:
    model = damped(eigenvalues, damping)
    z, mu = exact(model, x, LABELS)
    ones = torch.ones(4, dtype=x.dtype)
    settled = Settled(z, mu / damping, ones, z.norm(dim=1))
    settled = settled._replace(contraction=contraction_at(model, x, settled))
    problem, ball = Classification(model, x, CrossEntropy(LABELS)), Threat(Norm.L2, 0.5).ball(x)
    source, step, start = Joint(**{"relaxes": True, **options}), ProjectedAscent(0.8), torch.zeros_like(x)
    with Meter(model) as meter:
        keep, known = HighestLoss(0.1, 0.1), {"num_steps": num_steps, "settled": settled}
        found = optimise(problem, source, ball, step, keep, start, **known)
    return found, meter


@pytest.mark.parametrize("inner_steps", [1, 3, None])
@pytest.mark.parametrize("damping", [0.3, 0.1, 0.01, 1e-4])
def test_a_damped_cell_is_attacked_as_the_undamped_one(damping: float, inner_steps: int | None, make_images) -> None:
    x, options = make_images(4), {"inner_steps": inner_steps}
    (plain, meter), (found, other) = (relaxed_run(SLOW_EIGENVALUES, w, x, **options) for w in (1.0, damping))
    torch.testing.assert_close(found.variable, plain.variable, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.z, plain.z, rtol=0, atol=1e-9)
    torch.testing.assert_close(damping * found.mu, plain.mu, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.loss, plain.loss, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.residual, plain.residual, rtol=1e-5, atol=1e-10)
    assert (other.eval_rows, other.vjp_rows) == (meter.eval_rows, meter.vjp_rows) == (4 * 21, 4 * 20)
    behind = relaxed_run(SLOW_EIGENVALUES, damping, x, relaxes=False, **options)[0]
    assert float((behind.z - plain.z).norm()) > 0.05 * float(plain.z.norm())  # which is what it is for


def test_a_cell_that_swings_up_is_damped_on_the_way_and_settles(make_images) -> None:
    """An eigenvalue of -1.1: 60 plain steps multiply an error by 300. Steps of a half, where a row is damped down to
    them, leave a twentieth of it each."""
    x, eigenvalues = make_images(4), [-1.1, 0.5, 0.4, 0.3, 0.2, 0.1]
    (found, _), (plain, _) = (relaxed_run(eigenvalues, 1.0, x, 60, relaxes=relaxes) for relaxes in (True, False))
    z = exact(damped(eigenvalues), x + found.variable, LABELS)[0]
    assert bool((found.residual < 1e-3).all()) and bool((plain.residual > 0.5).all())
    assert bool(((found.z - z).norm(dim=1) < 1e-2 * z.norm(dim=1)).all())


def test_a_variable_of_many_rows_has_gone_astray_with_any_of_them(make_images) -> None:
    """A cell with an eigenvalue of -9, which no damping down to the least brings home."""
    model, x, owner = damped([-9.0, 0.5, 0.4, 0.3, 0.2, 0.1], 1.0), make_images(4), torch.tensor([0, 1, 1, 0])
    problem = Shared(Classification(model, x, CrossEntropy(LABELS)), owner)
    step, keep, start = ProjectedAscent(0.1), HighestLoss(0.1, 0.1), torch.zeros_like(x[:2])
    found = optimise(problem, Joint(relaxes=True), Box(-0.1, 0.1), step, keep, start, num_steps=30)
    assert found.tally["is_astray"].tolist() == [True, True]


def test_relaxation_of_a_row_knows_nothing_of_its_batch_mates(make_images) -> None:
    """Nor does the damping of rows that swing up."""
    for eigenvalues in (SLOW_EIGENVALUES, [-1.1, 0.5, 0.4, 0.3, 0.2, 0.1]):
        model, x = damped(eigenvalues, 0.9), make_images(4)
        problem, settled = Classification(model, x, CrossEntropy(LABELS)), known_at(model, x)

        def found_of(rows: list[int], problem=problem, settled=settled, x=x) -> Optimum:
            take, ball = torch.tensor(rows), Threat(Norm.L2, 0.5).ball(x[rows])
            arguments = (problem.take(take), Joint(relaxes=True), ball, ProjectedAscent(0.8), HighestLoss(0.1, 0.1))
            return optimise(*arguments, torch.zeros_like(x[rows]), num_steps=20, settled=settled.take(take))

        whole = found_of([0, 1, 2, 3])
        for rows in ([2], [3, 0], [1, 3, 2, 0]):
            part = found_of(rows)
            torch.testing.assert_close(part.variable, whole.variable[rows], rtol=0, atol=1e-8)
            torch.testing.assert_close(part.residual, whole.residual[rows], rtol=1e-5, atol=1e-9)


def test_warm_up_is_a_solve_at_the_first_variable(make_model, make_images) -> None:
    model, x, start = make_model("deq-fc"), make_images(4), 0.1 * make_images(4, seed=5)
    warmup = Solve(Picard(), rtol=1e-2, max_steps=50)
    problem = Classification(model, x, CrossEntropy(LABELS))
    state = Joint(warmup=warmup).start(problem, start, None)
    with torch.no_grad():
        expected = model.equilibrium(x + start, solve=warmup).value
        assert float((expected - model.equilibrium(x + start).value).abs().max()) > 1e-5  # not the equilibrium yet
    torch.testing.assert_close(state.z, expected)
    torch.testing.assert_close(state.mu, loss_gradient(problem, expected, start))


@every_norm
@pytest.mark.parametrize("mixing", [Mixing.STATE, Mixing.ALL])
def test_mixed_variables_are_back_in_ball_and_box_before_they_are_used(
    mixing: Mixing, norm: Norm, make_model, make_images
) -> None:
    model, x = make_model("test-linear"), make_images(4).round()  # half of the pixels on the limits
    seen, ball = [], Threat(norm, 0.3).ball(x)
    driver = {"accelerator": Anderson(), "mixing": mixing, "keep": Last()}
    watch = lambda step, present, residual: seen.append(present()[0])  # noqa: E731
    run(model, x, CrossEntropy(LABELS), ball, ProjectedAscent(0.8), 12, watch=watch, **driver)
    assert len(seen) == 13
    for delta in seen:
        assert float(norm.size(delta).max()) <= 0.3 * (1 + 1e-9)
        assert float((x + delta).min()) >= 0.0 and float((x + delta).max()) <= 1.0
