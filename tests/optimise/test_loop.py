"""The loop: who leaves, what a row gets whoever else is there, and what a budget stops."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import robustbench_deq.meter
from robustbench_deq.meter import Meter
from robustbench_deq.models import Linear
from robustbench_deq.optimise import (
    APGD,
    Ball,
    Classification,
    HighestLoss,
    Joint,
    Keep,
    Langevin,
    Last,
    Look,
    Norm,
    Optimum,
    ProjectedAscent,
    Schedule,
    Settled,
    Source,
    Step,
    optimise,
)
from robustbench_deq.optimise.objectives import CrossEntropy, Margin
from robustbench_deq.solvers import Picard, Solve
from tests.optimise.cases import DRIVERS, LABELS, SOURCES, TIGHTLY, run

every_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
KEEP = HighestLoss(0.005, 0.1)
STEP = ProjectedAscent(0.3)


@pytest.fixture
def fooled_by_half(make_model, make_images) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """Model, images, labels, and a radius a row: two thirds of the rows can be fooled, the sooner the lower they
    stand; every third cannot."""
    model, x = make_model("test-linear", num_classes=2), 0.4 + 0.2 * make_images(9)
    with torch.no_grad():
        y = model(x).argmax(1)
        matrix = model.input_matrix()
        distance = -Margin(y)(model(x)) / (matrix[1 - y] - matrix[y]).norm(dim=1)
        share = torch.tensor([4.0, 2.0, 0.5] * 3, dtype=x.dtype)
    return model, x, y, distance * share


def attacked(
    case, source: Source, rows: Tensor | None = None, step: Step = STEP, keep: Keep = KEEP, leaves=True, **options
) -> Optimum:
    model, x, y, radius = case
    rows = torch.arange(len(x)) if rows is None else rows
    x, y, radius = x[rows], y[rows], radius[rows]
    problem = Classification(model, x, Margin(y))
    options = {"num_steps": 40, "ids": rows} | options
    return optimise(
        problem, source, Ball(Norm.L2, radius, x), step, keep, torch.zeros_like(x), leaves=leaves, **options
    )


# ---------------------------------------------------------------- leaving


@every_source
def test_rows_that_are_done_leave_fooled_and_cost_no_more(source: Source, fooled_by_half) -> None:
    model, x, y, _ = fooled_by_half
    model.requires_grad_(False)
    with Meter(model) as meter:
        found = attacked(fooled_by_half, source)
    with Meter(model) as whole:
        stayed = attacked(fooled_by_half, source, leaves=False)
    can_be = torch.tensor([True, True, False] * 3)
    with torch.no_grad():
        is_fooled = model(x + found.variable).argmax(1) != y
    assert torch.equal(found.is_done, can_be) and torch.equal(is_fooled, can_be)
    assert meter.eval_rows < 0.9 * whole.eval_rows and meter.vjp_rows < 0.9 * whole.vjp_rows
    assert found.z is None and found.mu is None and stayed.z is not None
    # Those that stay are as strong as without anybody leaving; those that left did so at their first success.
    torch.testing.assert_close(found.variable[~can_be], stayed.variable[~can_be], rtol=1e-6, atol=1e-8)
    assert bool((found.loss[can_be] > 0).all()) and bool((found.loss[can_be] <= stayed.loss[can_be] + 1e-6).all())
    assert not bool(stayed.is_done.any())


@every_source
def test_what_a_row_gets_does_not_depend_on_who_is_there_or_has_left(source: Source, fooled_by_half) -> None:
    whole = attacked(fooled_by_half, source)
    for rows in ([3], [8, 0, 5], [2, 5, 8], [0, 1, 3, 4], [4, 2, 7, 0, 1, 8, 6, 3, 5]):
        part = attacked(fooled_by_half, source, torch.tensor(rows))
        torch.testing.assert_close(part.variable, whole.variable[rows], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(part.loss, whole.loss[rows], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(part.residual, whole.residual[rows], rtol=1e-4, atol=1e-8)
        assert torch.equal(part.is_done, whole.is_done[rows])
        assert part.tally.keys() == whole.tally.keys()
        for name, counts in part.tally.items():
            assert torch.equal(counts, whole.tally[name][rows]), name


@pytest.mark.parametrize("step", [APGD(), ProjectedAscent(0.3, momentum=0.75), Langevin(0.3, 0.01)], ids=str)
def test_states_of_steps_leave_with_their_rows(step: Step, fooled_by_half) -> None:
    """And noise is keyed by the row's number, not by its place."""
    source = SOURCES["k=1"]
    whole = attacked(fooled_by_half, source, step=step)
    assert bool(whole.is_done.any()) and not bool(whole.is_done.all())
    for rows in ([2], [5, 0, 8], [1, 4, 7, 2]):
        part = attacked(fooled_by_half, source, torch.tensor(rows), step=step)
        torch.testing.assert_close(part.variable, whole.variable[rows], rtol=1e-6, atol=1e-8)
        assert torch.equal(part.is_done, whole.is_done[rows])


def test_watcher_is_told_of_all_rows_to_the_end_though_all_have_left(fooled_by_half) -> None:
    rows, seen = torch.tensor([0, 1, 3]), []

    def watch(step: int, present, residual: Tensor) -> None:
        variable, loss = present()
        seen.append((step, variable.clone(), loss.clone()))

    found = attacked(fooled_by_half, SOURCES["k=1"], rows, watch=watch)
    assert bool(found.is_done.all())
    assert [step for step, _, _ in seen] == list(range(41))
    assert torch.equal(seen[-1][1], found.variable) and torch.equal(seen[-1][2], found.loss)
    assert all(variable.shape == found.variable.shape for _, variable, _ in seen)


class Shown(NamedTuple):
    look: Look
    z: Tensor | None = None
    mu: Tensor | None = None


class Given(Source):
    """Shows given residuals `(rows,)` and success everywhere, at every look."""

    def __init__(self, residual: list[float]) -> None:
        self.residual = torch.tensor(residual, dtype=torch.float64)

    def start(self, problem, variable: Tensor, settled: Settled | None) -> Shown:
        output = torch.nn.functional.one_hot(1 - problem.objective.labels, 2).to(variable)
        return Shown(Look(output[:, 0] * 0, self.residual, output, torch.ones_like(variable)))

    def look(self, problem, state: Shown, variable: Tensor, moment) -> tuple[Look, Shown]:
        return state.look, state

    def close(self, problem, state: Shown, variable: Tensor) -> tuple[Look, Shown]:
        return state.look, state

    def take(self, problem, state: Shown, rows: Tensor) -> Shown:
        return Shown(state.look.take(problem, rows))


@pytest.mark.parametrize(("amplification", "limit"), [(None, 0.002), (1.0, 0.02), (100.0, 0.0002)])
def test_rows_of_a_large_residual_never_leave(amplification: float | None, limit: float, make_images) -> None:
    residual = [0.9 * limit, 1.1 * limit, 0.0, float("nan"), float("inf")]
    x, y = make_images(5), torch.tensor([0, 1, 0, 1, 0])
    settled = None
    if amplification is not None:
        settled = Settled(x, None, torch.full((5,), amplification, dtype=torch.float64))
    problem, seen = Classification(None, x, Margin(y)), []
    found = optimise(
        problem,
        Given(residual),
        Ball(Norm.L2, 0.3, x),
        STEP,
        Last(),
        torch.zeros_like(x),
        num_steps=6,
        leaves=True,
        settled=settled,
        watch=lambda step, present, residual: seen.append(len(residual)),
    )
    assert found.is_done.tolist() == [True, False, True, False, False]
    assert seen == [5] + [3] * 6
    assert not bool(found.variable.any())  # they seem successful, and wait


class Acted(Source):
    """Shows at every look what a script says of each row, `(looks, rows)`: whether it seems successful, and its
    residual."""

    def __init__(self, is_success: list[list[bool]], residual: list[list[float]]) -> None:
        self.is_success, self.residual = torch.tensor(is_success), torch.tensor(residual, dtype=torch.float64)
        self.seen: list[Tensor] = []

    def start(self, problem, variable: Tensor, settled: Settled | None) -> Acting:
        return Acting(torch.arange(len(variable)))

    def look(self, problem, state: Acting, variable: Tensor, moment) -> tuple[Look, Acting]:
        self.seen.append(variable.clone())
        return self._at(moment.number, problem, state, variable), state

    def close(self, problem, state: Acting, variable: Tensor) -> tuple[Look, Acting]:
        return self._at(-1, problem, state, variable)._replace(gradient=None), state

    def take(self, problem, state: Acting, rows: Tensor) -> Acting:
        return Acting(state.row[rows])

    def _at(self, number: int, problem, state: Acting, variable: Tensor) -> Look:
        is_success = self.is_success[number][state.row]
        label = torch.where(is_success, 1 - problem.objective.labels, problem.objective.labels)
        output = torch.nn.functional.one_hot(label, 2).to(variable)
        residual = self.residual[number][state.row]
        return Look(problem.losses(output, variable, 1.0).compared, residual, output, torch.ones_like(variable))


class Acting(NamedTuple):
    row: Tensor
    z: Tensor | None = None
    mu: Tensor | None = None


def act(source: Source, leaves: bool, make_images, **options) -> Optimum:
    """Constant steps of a tenth of the radius, so that the size of a variable tells how often it has moved."""
    x, y = 0.3 + 0.4 * make_images(3), torch.tensor([0, 1, 0])
    problem, step = Classification(None, x, Margin(y)), ProjectedAscent(0.1, Schedule.CONSTANT)
    ball, start = Ball(Norm.L2, 0.3, x), torch.zeros_like(x)
    return optimise(problem, source, ball, step, Last(), start, num_steps=6, leaves=leaves, **options)


def num_moves(variable: Tensor) -> list[int]:
    return [round(float(size)) for size in Norm.L2.size(variable) / 0.03]


def test_what_seems_successful_stands_still_until_its_state_has_settled(make_images) -> None:
    """The first row is right, and leaves where its state has settled; the second was wrong, and moves on; the third
    never seems successful."""
    yes, no = True, False
    is_success = [[no, no, no], [yes, yes, no], [yes, yes, no], [yes, no, no], [yes, no, no], [yes, no, no]]
    residual = [[0.1] * 3, [0.1] * 3, [0.05] * 3, [1e-3] * 3, [1e-3] * 3, [1e-3] * 3]
    source = Acted(is_success, residual)
    found = act(source, True, make_images)
    assert [num_moves(variable) for variable in source.seen] == [
        [0, 0, 0],
        [1, 1, 1],
        [1, 1, 2],
        [1, 1, 3],  # here the first has left with its one step
        [2, 4],
        [3, 5],
    ]
    assert num_moves(found.variable) == [1, 4, 6] and found.is_done.tolist() == [True, False, False]
    stayed = act(Acted(is_success, residual), False, make_images)
    assert num_moves(stayed.variable) == [6, 6, 6] and not bool(stayed.is_done.any())


def test_gain_is_from_the_first_look_to_what_is_kept(make_images) -> None:
    yes, no = True, False
    found = act(Acted([[no, yes, no]] + [[no] * 3] * 4 + [[yes, no, no]], [[1.0] * 3] * 6), False, make_images)
    assert found.loss.tolist() == [1.0, -1.0, -1.0] and found.gain.tolist() == [2.0, -2.0, 0.0]


class Flat(Acted):
    """No slope at the first looks, as many for each row as `flats` says."""

    flats = (1, 2, 6)

    def look(self, problem, state: Acting, variable: Tensor, moment) -> tuple[Look, Acting]:
        look, state = super().look(problem, state, variable, moment)
        is_flat = torch.tensor(self.flats)[state.row] > moment.number
        return look._replace(gradient=(~is_flat).to(variable)[:, None, None, None] * look.gradient), state


def test_rows_without_a_slope_in_the_first_two_looks_are_flat(make_images) -> None:
    found = act(Flat([[False] * 3] * 6, [[0.0] * 3] * 6), False, make_images)
    assert found.is_flat.tolist() == [False, True, True]
    gone = act(Flat([[True, False, True]] * 6, [[0.0] * 3] * 6), True, make_images)
    assert gone.is_done.tolist() == [True, False, True] and gone.is_flat.tolist() == [False, True, False]


@pytest.mark.parametrize("leaves", [False, True], ids=["stay", "leave"])
def test_without_a_closing_look_the_last_variable_costs_none_and_has_no_loss(leaves: bool, fooled_by_half) -> None:
    model, options = fooled_by_half[0], {"keep": Last(), "leaves": leaves, "num_steps": 7}
    model.requires_grad_(False)
    with Meter(model) as whole:
        closed = attacked(fooled_by_half, Joint(), **options)
    with Meter(model) as meter:
        found = attacked(fooled_by_half, Joint(), settles=False, **options)
    left = int((~(found.is_done if leaves else torch.zeros(9, dtype=torch.bool))).sum())
    assert whole.eval_rows - meter.eval_rows == left and whole.vjp_rows == meter.vjp_rows
    assert torch.equal(found.variable, closed.variable)
    is_left = torch.isnan(found.loss)
    assert int(is_left.sum()) == left and torch.equal(found.loss[~is_left], closed.loss[~is_left])
    if not leaves:
        assert meter.eval_rows == 7 * 9


class FooledAtTheEnd(Given):
    """Fooled at the last look alone, and at a lower loss than before: a cross-entropy of three classes may fall so."""

    def look(self, problem, state: Shown, variable: Tensor, moment) -> tuple[Look, Shown]:
        return state.look._replace(loss=state.look.loss + 0.8, output=1 - state.look.output), state

    def close(self, problem, state: Shown, variable: Tensor) -> tuple[Look, Shown]:
        return state.look._replace(loss=state.look.loss + 0.7), state


@pytest.mark.parametrize("keep", [HighestLoss(0.005, 0.1), Last()], ids=str)
def test_rows_done_at_the_last_look_return_what_fooled(keep: Keep, make_images) -> None:
    x, y = make_images(2), torch.tensor([0, 1])
    problem, ball, start = Classification(None, x, Margin(y)), Ball(Norm.L2, 0.3, x), torch.zeros_like(x)
    source = FooledAtTheEnd([1e-4, 0.0045])  # the second has not settled enough to be done
    found = optimise(problem, source, ball, STEP, keep, start, num_steps=3, leaves=True)
    last = optimise(problem, source, ball, STEP, Last(), start, num_steps=3, leaves=True)
    assert found.is_done.tolist() == [True, False]
    assert torch.equal(found.variable[0], last.variable[0]) and float(found.loss[0]) == pytest.approx(0.7)
    if isinstance(keep, HighestLoss):
        assert not torch.equal(found.variable[1], last.variable[1]) and float(found.loss[1]) == pytest.approx(0.8)


# ---------------------------------------------------------------- batch mates, watchers


@pytest.mark.parametrize("driver", DRIVERS.values(), ids=DRIVERS)
@pytest.mark.parametrize("family", ["test-linear", "deq-fc", "deq-conv"])
def test_batch_mates_do_not_matter(family: str, driver: dict, make_model, make_images) -> None:
    model, x, y = make_model(family), make_images(6), torch.arange(6) % 3
    step = ProjectedAscent(0.6)
    whole = run(model, x, CrossEntropy(y), Ball(Norm.L2, 0.4, x), step, 25, **driver)
    for index in (torch.tensor([4]), torch.tensor([5, 0, 2])):
        part = run(model, x[index], CrossEntropy(y[index]), Ball(Norm.L2, 0.4, x[index]), step, 25, **driver)
        for name in ("variable", "loss", "z", "mu", "residual", "is_done"):
            mine, other = getattr(part, name), getattr(whole, name)[index]
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        assert torch.equal(part.tally["perturbation_steps"], whole.tally["perturbation_steps"][index])


def test_watcher_sees_every_step_and_a_kept_loss_that_never_falls(make_model, make_images) -> None:
    model, x = make_model("deq-fc"), make_images(4)
    seen = []
    found = run(
        model,
        x,
        CrossEntropy(LABELS),
        Ball(Norm.L2, 0.4, x),
        ProjectedAscent(0.8),
        20,
        watch=lambda step, present, residual: seen.append((step, *present(), residual)),
    )
    assert [step for step, *_ in seen] == list(range(21))
    losses = torch.stack([loss for _, _, loss, _ in seen])
    assert bool((losses[1:] >= losses[:-1]).all()) and bool((losses[-1] > losses[5]).all())
    assert torch.equal(losses[-1], found.loss) and torch.equal(seen[-1][1], found.variable)
    for _, delta, _, residual in seen:
        assert delta.shape == x.shape and residual.shape == (4,)


# ---------------------------------------------------------------- budgets

BUDGETED = {
    "joint, cold": Joint(),
    "joint, warmed up": Joint(warmup=Solve(Picard(), rtol=1e-3, max_steps=7)),
    "joint, k=3": Joint(3, warmup=Solve(Picard(), rtol=1e-3, max_steps=7)),
    "solved": TIGHTLY,
}


@pytest.mark.parametrize("leaves", [False, True], ids=["stay", "leave"])
@pytest.mark.parametrize("source", BUDGETED.values(), ids=BUDGETED)
def test_budget_stops_exactly_with_what_is_kept_until_then(source: Source, leaves: bool, fooled_by_half) -> None:
    model, x = fooled_by_half[:2]
    model.requires_grad_(False)
    seen = [(0, torch.zeros_like(x), None)]

    def watch(step: int, present, residual: Tensor) -> None:
        seen.append((meter.eval_rows, *(part.clone() for part in present())))

    with Meter(model) as meter:
        whole = attacked(fooled_by_half, source, leaves=leaves, num_steps=8, watch=watch)
    total = meter.eval_rows
    assert not whole.is_stopped and not meter.is_spent
    for budget in (0, 1, total // 5, total // 3, total // 2, total - 1, total, 2 * total):
        with Meter(model, max_rows=budget) as limited:
            found = attacked(fooled_by_half, source, leaves=leaves, num_steps=8)
        assert limited.eval_rows <= budget
        assert found.is_stopped is limited.is_spent is (budget < total)
        if budget < total:
            _, variable, loss = [entry for entry in seen if entry[0] <= budget][-1]
            if not leaves:  # who leaves after the last look takes another variable along
                assert torch.equal(found.variable, variable)
                assert loss is None or torch.equal(found.loss, loss)
            assert bool((Norm.L2.size(found.variable) <= fooled_by_half[3] * (1 + 1e-9)).all())
        else:
            assert torch.equal(found.variable, whole.variable) and limited.eval_rows == total


def test_budget_of_seconds_stops_between_two_evaluations(fooled_by_half, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that every look at it moves on by a second: the meter looks once before every evaluation."""
    model, now = fooled_by_half[0], [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(robustbench_deq.meter.time, "perf_counter", clock)
    with Meter(model, max_seconds=5.0) as meter:
        found = attacked(fooled_by_half, Joint(), leaves=False, num_steps=20)
    assert found.is_stopped and meter.is_spent
    assert meter.eval_rows == 5 * 9
    expected = attacked(fooled_by_half, Joint(), leaves=False, num_steps=20, step=STEP)
    assert not expected.is_stopped and bool((expected.loss > found.loss).any())


def test_outer_budget_stops_as_well(fooled_by_half) -> None:
    model = fooled_by_half[0]
    with Meter(model, max_rows=4 * 9) as outer:
        with Meter(model, max_rows=100 * 9) as inner:
            found = attacked(fooled_by_half, Joint(), leaves=False, num_steps=20)
        assert found.is_stopped and outer.is_spent and not inner.is_spent
    assert inner.eval_rows == outer.eval_rows == 4 * 9


def test_nothing_is_called_flat_where_the_budget_ends_before_the_first_look(fooled_by_half) -> None:
    model = fooled_by_half[0]
    with Meter(model, max_rows=1):
        found = attacked(fooled_by_half, Joint())
    assert found.is_stopped and not bool(found.is_flat.any())
