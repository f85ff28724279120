"""Costs are exact counts of rows: cell evaluations, vector-Jacobian products, solver steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import robustbench_deq.meter
from robustbench_deq.adjoints import ADJOINTS, Implicit, Neumann, Phantom, Unrolled
from robustbench_deq.equilibrium import EquilibriumModel
from robustbench_deq.meter import BudgetSpent, Meter
from robustbench_deq.solvers import CellMap, NewtonKrylov, Picard, Solve

NEVER = 1e-300
"""A tolerance that only an exact zero meets."""


def fixed(steps: int) -> Solve:
    return Solve(Picard(), rtol=NEVER, max_steps=steps)


def input_gradient(model, x: Tensor, solve: Solve, adjoint) -> None:
    leaf = x.clone().requires_grad_()
    logits = model.head(model.equilibrium(leaf, solve=solve, adjoint=adjoint).value)
    torch.autograd.grad(logits.square().sum(), leaf)


@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (7, 5), (4, 9)])
def test_implicit_gradient_costs_both_solves_and_one_more_each(
    forward: int, backward: int, make_model, make_images
) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with Meter(model) as meter:
        input_gradient(model, x, fixed(forward), Implicit(fixed(backward)))
    assert meter.eval_rows == 3 * (forward + 1)
    assert meter.vjp_rows == 3 * (backward + 1)
    cost = meter.cost(3)
    assert (cost.cell_evals, cost.cell_vjps) == (forward + 1, backward + 1)
    assert cost.solver_steps == forward + backward


@pytest.mark.parametrize(
    ("adjoint", "evals", "vjps"),
    [(Neumann(4), 7 + 1, 3 + 1), (Phantom(5), 7 + 5, 5), (ADJOINTS.get("jacobian-free")(fixed(1)), 7 + 1, 1)],
)
def test_other_adjoints_cost_what_they_say(adjoint, evals: int, vjps: int, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    with Meter(model) as meter:
        input_gradient(model, x, fixed(7), adjoint)
    assert (meter.eval_rows, meter.vjp_rows) == (2 * evals, 2 * vjps)


def test_unrolled_costs_an_evaluation_and_a_product_a_step_and_its_check(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    with Meter(model) as meter:
        input_gradient(model, x, fixed(7), Unrolled(6))
    assert (meter.eval_rows, meter.vjp_rows) == (2 * (6 + 1), 2 * 6)


def test_forward_without_gradients_costs_its_steps_alone(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with Meter(model) as meter, torch.no_grad():
        model.equilibrium(x, solve=fixed(7))
    assert (meter.eval_rows, meter.vjp_rows) == (21, 0)
    assert meter.cost(3).solver_steps == 7


def test_a_batch_that_shrinks_costs_less(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(4)
    with torch.no_grad():
        z0 = model.equilibrium(x).value
        z0[2:] = 0.0  # two samples start at their equilibrium, two do not
        solve = Solve(Picard(), rtol=1e-6, max_steps=100)
        with Meter(model) as meter:
            solution = model.equilibrium(x, z0, solve=solve)
    steps = solution.num_steps.tolist()
    assert steps[:2] == [1, 1] and min(steps[2:]) > 5
    # Compacted once half of the batch is done; the last two may differ by the steps of the slower one.
    assert meter.eval_rows == 4 + 2 * (max(steps) - 1) - (max(steps) - min(steps[2:]))
    assert meter.eval_rows < 4 * max(steps)
    assert meter.cost(4).solver_steps == sum(steps) / 4


def test_a_shrinking_adjoint_pays_for_its_new_graph(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    leaf = x.clone().requires_grad_()
    with Meter(model) as meter:
        logits = model.head(model.equilibrium(leaf, solve=fixed(3), adjoint=Implicit(fixed(6))).value)
        torch.autograd.grad(logits[0].square().sum(), leaf)  # the second sample's adjoint is zero from the start
    assert meter.eval_rows == 2 * (3 + 1) + 1
    assert meter.vjp_rows == 2 + 5 + 2


def test_jacobian_products_of_newton_are_cell_evaluations(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    with torch.no_grad(), Meter(model) as meter:
        u = model.inject(x)
        solve = Solve(NewtonKrylov(krylov_size=3), rtol=NEVER, max_steps=2)
        solve(CellMap(model.evaluate, u), model.initial_state(u))
    assert meter.eval_rows == 2 * (2 + 3)


def test_autograd_of_somebody_else_is_counted(make_model, make_images) -> None:
    model = make_model("test-linear")
    with torch.no_grad():
        u = model.inject(make_images(3))
    z = model.initial_state(u).requires_grad_()
    with Meter(model) as meter:
        for _ in range(2):
            torch.autograd.grad(model.evaluate(model.evaluate(z, u), u).sum(), z)
    assert (meter.eval_rows, meter.vjp_rows) == (12, 12)


def test_meters_nest(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    with Meter(model) as outer:
        input_gradient(model, x, fixed(3), Implicit(fixed(2)))
        with Meter(model) as inner:
            input_gradient(model, x, fixed(5), Implicit(fixed(4)))
            assert model.meter is inner
        assert model.meter is outer
        with torch.no_grad():
            model.equilibrium(x, solve=fixed(1))
    assert (inner.eval_rows, inner.vjp_rows) == (12, 10)
    assert (outer.eval_rows, outer.vjp_rows) == (8 + 12 + 2, 6 + 10)
    assert inner.cost(2).solver_steps == 9
    assert outer.cost(2).solver_steps == 5 + 9 + 1


def test_steps_that_are_no_solve_reach_the_outer_meter(make_model) -> None:
    model = make_model("test-linear")
    with Meter(model) as outer, Meter(model) as inner:
        inner.count_steps(6)
    assert inner.cost(2).solver_steps == 3
    assert outer.cost(2).solver_steps == 3


def test_model_gets_its_meter_back_even_after_an_error(make_model) -> None:
    model = make_model("test-linear")
    with pytest.raises(KeyError), Meter(model):
        assert model.meter is not None
        raise KeyError
    assert model.meter is None


def test_a_model_without_parameters_is_metered() -> None:
    class Half(EquilibriumModel):
        def inject(self, x: Tensor) -> Tensor:
            return x.flatten(1)

        def cell(self, z: Tensor, u: Tensor) -> Tensor:
            return 0.5 * z + u

        def head(self, z: Tensor) -> Tensor:
            return z

        def initial_state(self, u: Tensor) -> Tensor:
            return torch.zeros_like(u)

    model = Half()
    with Meter(model) as meter, torch.no_grad():
        model.equilibrium(torch.rand(2, 1, 2, 2), solve=fixed(3))
    assert meter.cost(2).cell_evals == 3


def test_counting_changes_no_value(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(2)
    free = x.clone().requires_grad_()
    model(free).square().sum().backward()
    metered = x.clone().requires_grad_()
    with Meter(model):
        model(metered).square().sum().backward()
    assert torch.equal(free.grad, metered.grad)


def test_cost_is_a_mean_over_the_samples(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(4)
    with Meter(model) as meter, torch.no_grad():
        model.equilibrium(x, solve=fixed(3))
    cost = meter.cost(8)
    assert (cost.cell_evals, cost.solver_steps) == (1.5, 1.5)
    assert cost.wall_seconds > 0 and cost.peak_memory_mb > 0


# ---------------------------------------------------------------- budgets


def test_a_budget_admits_up_to_its_last_row_and_refuses_the_next_evaluation(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with torch.no_grad():
        u = model.inject(x)
        z = model.initial_state(u)
        with Meter(model, max_rows=6) as meter:
            model.evaluate(z, u)
            model.evaluate(z, u)
            assert not meter.is_spent and meter.eval_rows == 6
            with pytest.raises(BudgetSpent):
                model.evaluate(z[:1], u[:1])
            assert meter.is_spent and meter.eval_rows == 6  # what was refused is not counted
        model.evaluate(z, u)
    assert meter.eval_rows == 6 and model.meter is None


def test_a_batch_that_does_not_fit_is_refused_as_a_whole_and_a_smaller_one_is_not(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with torch.no_grad(), Meter(model, max_rows=4) as meter:
        u = model.inject(x)
        z = model.initial_state(u)
        model.evaluate(z, u)
        with pytest.raises(BudgetSpent):
            model.evaluate(z, u)
        model.evaluate(z[:1], u[:1])
    assert meter.eval_rows == 4 and meter.is_spent


def test_meters_without_a_budget_admit_everything(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(3)
    with Meter(model) as meter:
        meter.admit(10**9)
        input_gradient(model, x, fixed(30), Implicit(fixed(30)))
    assert not meter.is_spent and meter.eval_rows == 3 * 31


@pytest.mark.parametrize("is_outer", [True, False])
def test_either_of_two_nested_budgets_refuses(is_outer: bool, make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    limits = (4, None) if is_outer else (None, 4)
    with torch.no_grad(), Meter(model, max_rows=limits[0]) as outer:
        with pytest.raises(BudgetSpent), Meter(model, max_rows=limits[1]) as inner:
            model.equilibrium(x, solve=fixed(9))
        assert model.meter is outer
        assert (outer.is_spent, inner.is_spent) == (is_outer, not is_outer)
        assert outer.eval_rows == inner.eval_rows == 4
        if not is_outer:  # the outer one has no limit of its own
            model.equilibrium(x, solve=fixed(2))
            assert outer.eval_rows == 8


def test_what_an_inner_meter_has_counted_is_spent_of_the_outer_budget(make_model, make_images) -> None:
    model, x = make_model("test-linear"), make_images(2)
    with torch.no_grad(), Meter(model, max_rows=10) as outer:
        for _ in range(2):
            with Meter(model, max_rows=4) as inner:
                model.equilibrium(x, solve=fixed(2))
            assert not inner.is_spent
        with pytest.raises(BudgetSpent):
            model.equilibrium(x, solve=fixed(2))
    assert outer.eval_rows == 10


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(robustbench_deq.meter.time, "perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_seconds_are_counted_from_the_opening_and_stop_at_the_end(make_model, make_images, monkeypatch) -> None:
    model, clock = make_model("test-linear"), Clock(monkeypatch)
    with torch.no_grad():
        u = model.inject(make_images(2))
        z = model.initial_state(u)
    clock.pass_(50.0)
    with torch.no_grad(), Meter(model, max_seconds=2.0) as meter:
        clock.pass_(2.0)
        model.evaluate(z, u)
        clock.pass_(0.001)
        with pytest.raises(BudgetSpent):
            model.evaluate(z, u)
        assert meter.is_spent and meter.elapsed_seconds == pytest.approx(2.001)
    clock.pass_(7.0)
    assert meter.elapsed_seconds == pytest.approx(2.001)
    assert meter.cost(2).wall_seconds == pytest.approx(2.001) and meter.eval_rows == 2


def test_a_pause_costs_this_meter_nothing_and_the_outer_one_everything(make_model, make_images, monkeypatch) -> None:
    model, x, clock = make_model("test-linear"), make_images(2), Clock(monkeypatch)
    with torch.no_grad(), Meter(model) as outer, Meter(model, max_rows=10, max_seconds=3.0) as inner:
        model.equilibrium(x, solve=fixed(2))
        clock.pass_(1.0)
        for _ in range(2):
            with inner.paused():
                assert model.meter is outer
                clock.pass_(10.0)
                model.equilibrium(x, solve=fixed(10))
            assert model.meter is inner
        clock.pass_(1.0)
        model.equilibrium(x, solve=fixed(3))
        assert not inner.is_spent and inner.elapsed_seconds == pytest.approx(2.0)
        clock.pass_(1.5)
        with pytest.raises(BudgetSpent):
            model.equilibrium(x, solve=fixed(1))
    assert (inner.eval_rows, outer.eval_rows) == (10, 50)
    assert inner.elapsed_seconds == pytest.approx(3.5) and outer.elapsed_seconds == pytest.approx(23.5)
    assert inner.cost(2).solver_steps == 5 and outer.cost(2).solver_steps == 25


def test_a_pause_ends_even_after_an_error(make_model) -> None:
    model = make_model("test-linear")
    with Meter(model) as meter:
        with pytest.raises(KeyError), meter.paused():
            assert model.meter is None
            raise KeyError
        assert model.meter is meter
