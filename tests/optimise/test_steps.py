"""Every step against its equation, and against optima that are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustbench_deq.optimise import (
    APGD,
    NORMS,
    Adam,
    Ball,
    Box,
    Classification,
    Free,
    HighestLoss,
    Joint,
    Langevin,
    Last,
    MinimalNorm,
    Norm,
    ProjectedAscent,
    Schedule,
    SmallestNorm,
    Source,
    Step,
    optimise,
)
from robustbench_deq.optimise.objectives import Margin
from robustbench_deq.optimise.sources.base import Moment
from robustbench_deq.optimise.steps import At
from robustbench_deq.optimise.steps.apgd import checkpoints
from robustbench_deq.randomness import keyed_normal
from robustbench_deq.rows import per_sample
from robustbench_deq.threats import Threat
from tests.optimise.cases import TIGHTLY, best_of_linear, slope

ALL = [NORMS.get(name) for name in NORMS]
every_norm = pytest.mark.parametrize("norm", ALL, ids=list(NORMS))
every_source = pytest.mark.parametrize("source", [Joint(), TIGHTLY], ids=["joint", "solved"])
Y = torch.tensor([0, 1, 1, 0])


def at(
    variable: Tensor, gradient: Tensor, loss: Tensor, moment: Moment, residual: float = 0.0, is_success=None, **keys
) -> At:
    return At(
        variable,
        gradient,
        loss,
        torch.full_like(loss, residual),
        is_success,
        moment,
        keys.get("seed", 0),
        keys.get("ids"),
    )


def climbed(step: Step, domain, start: Tensor, loss_of, num_steps: int, **keys) -> list[Tensor]:
    """All variables of a run on a loss of its own, `variable -> (rows,)`."""
    variable, state, path = start, step.init(start, domain), [start]
    for count in range(num_steps):
        leaf = variable.clone().requires_grad_()
        loss = loss_of(leaf)
        gradient = torch.autograd.grad(loss.sum(), leaf)[0]
        moment = Moment(count, num_steps, step.length(count / num_steps))
        variable, state = step.step(at(variable, gradient, loss.detach(), moment, **keys), domain, state)
        path.append(variable)
    return path


# ---------------------------------------------------------------- projected ascent


@every_norm
def test_ascent_step_follows_its_equation(norm: Norm, make_images) -> None:
    x, delta, gradient = (make_images(3, seed=seed) for seed in (1, 2, 3))
    ball = Threat(norm, 0.4).ball(x)
    delta, gradient = ball.project(0.1 * (delta - 0.5)), gradient - 0.5
    step = ProjectedAscent(0.5, Schedule.DROP, momentum=0.9)
    velocity = gradient.roll(1, 0)
    moved, (after,) = step.step(at(delta, gradient, gradient[:, 0, 0, 0], Moment(7, 10)), ball, (velocity,))
    torch.testing.assert_close(after, 0.9 * velocity + ball.direction(gradient))
    way = ball.steepest(after, 0.4 * 0.5 / 3, delta)
    if norm is not Norm.L1:  # which sees the box
        torch.testing.assert_close(way, 0.4 * 0.5 / 3 * ball.direction(after))
    torch.testing.assert_close(moved, ball.project(delta + way))


def test_schedules_begin_at_one_and_do_not_rise() -> None:
    points = [index / 40 for index in range(40)]
    for schedule in Schedule:
        factors = [schedule.factor(point) for point in points]
        assert factors[0] == 1.0 and factors == sorted(factors, reverse=True) and factors[-1] > 0
    assert Schedule.DROP.factor(0.624) == 1.0 and Schedule.DROP.factor(0.625) == pytest.approx(1 / 3)
    assert Schedule.COSINE.factor(0.5) == pytest.approx(0.5)
    assert Schedule.CONSTANT.factor(0.99) == 1.0


@every_norm
@every_source
@pytest.mark.parametrize("step", [ProjectedAscent(1.0), ProjectedAscent(0.5, momentum=0.75), APGD()], ids=str)
def test_ascents_reach_the_known_optimum(step: Step, source: Source, norm: Norm, make_model, make_images) -> None:
    """And with a radius a row, each its own."""
    model, x = make_model("test-linear", num_classes=2), 0.4 + 0.2 * make_images(4)
    radius = torch.tensor([0.05, 0.1, 0.2, 0.3], dtype=x.dtype)
    best = best_of_linear(slope(model, x, Y), norm, radius)
    num_steps = 200 if isinstance(source, Joint) else 60
    problem, ball, start = Classification(model, x, Margin(Y)), Ball(norm, radius, x), torch.zeros_like(x)
    found = optimise(problem, source, ball, step, HighestLoss(1e-3, 1e-3), start, num_steps=num_steps)
    share = (slope(model, x, Y) * found.variable).sum((1, 2, 3)) / (slope(model, x, Y) * best).sum((1, 2, 3))
    assert bool((share > 0.998).all()) and bool((share <= 1 + 1e-9).all()), share
    assert bool((norm.size(found.variable) <= radius * (1 + 1e-9)).all())


# ---------------------------------------------------------------- Adam


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adam_is_that_of_torch_step_by_step(betas: tuple[float, float]) -> None:
    stream = torch.Generator().manual_seed(0)
    start, target = torch.randn(2, 3, 5, dtype=torch.float64, generator=stream)
    weight = torch.rand(5, dtype=torch.float64, generator=stream)

    def loss_of(variable: Tensor) -> Tensor:
        return -(weight * (variable - target).square()).sum(1)

    path = climbed(Adam(0.1, betas=betas), Free(), start, loss_of, 50)
    leaf = start.clone().requires_grad_()
    reference = torch.optim.Adam([leaf], lr=0.1, betas=betas, maximize=True)
    for found in path:
        torch.testing.assert_close(found, leaf.detach(), rtol=1e-10, atol=1e-12)
        reference.zero_grad()
        loss_of(leaf).sum().backward()
        reference.step()


def test_adam_stays_in_its_domain_and_follows_its_schedule() -> None:
    start = torch.full((2, 3), 0.95, dtype=torch.float64)
    path = climbed(Adam(0.1), Box(), start, lambda variable: variable.sum(1), 5)
    assert bool((torch.stack(path) <= 1.0).all()) and torch.equal(path[-1], torch.ones_like(start))
    path = climbed(Adam(0.1, Schedule.DROP), Free(), start, lambda variable: variable.sum(1), 16)
    lengths = torch.stack(path).diff(dim=0)[:, 0, 0]
    torch.testing.assert_close(lengths[:10], torch.full_like(lengths[:10], 0.1))
    torch.testing.assert_close(lengths[10:], torch.full_like(lengths[10:], 0.1 / 3))


# ---------------------------------------------------------------- APGD


def test_checkpoints_are_the_published_ones() -> None:
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    for num_steps in (1, 2, 7, 64, 1000):
        shares, marks = [0.0, 0.22], []
        while shares[-1] < 1:
            marks.append(math.ceil(round(shares[-1] * num_steps, 9)))
            shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        assert list(checkpoints(num_steps)) == sorted({mark for mark in marks if 0 < mark < num_steps})


def apgd_by_hand(losses: list[float], residuals: list[float], step_size: float) -> list[tuple[float, bool]]:
    """Step length after every look, and whether the row went back to its best point in it."""
    marks, eta, found = checkpoints(len(losses)), step_size, []
    last, best, checked, rises, was_halved, before = None, -math.inf, -math.inf, 0, True, 0
    for count, (loss, residual) in enumerate(zip(losses, residuals, strict=True)):
        rises += last is not None and loss > last
        if residual <= 0.05:
            best = max(best, loss)
        last, goes_back = loss, False
        if count in marks:
            halves = rises < 0.75 * (count - before) or (not was_halved and best <= checked)
            if halves:
                eta /= 2
                if best > -math.inf:
                    goes_back, last = True, best
            rises, before, checked, was_halved = 0, count, best, halves
        found.append((eta, goes_back))
    return found


RISING = [float(index) for index in range(20)]
SEQUENCES = {
    "rises": (RISING, [0.0] * 20),
    "falls": ([-loss for loss in RISING], [0.0] * 20),
    "stands still": ([1.0] * 20, [0.0] * 20),
    "three of four": ([float(index - 3 * (index % 4 == 3)) for index in range(20)], [0.0] * 20),
    "rises below its best": ([99.0, *RISING[1:]], [0.0] * 20),
    "rises, not settled": (RISING, [0.5] * 20),
    "falls, not settled": ([-loss for loss in RISING], [0.5] * 20),
    "best not settled": ([1.0, 50.0, *RISING[2:12], *([3.0] * 8)], [0.0, 0.5] + [0.0] * 18),
    "the first loss is no rise": ([0.0, 1.0, 2.0, 3.0, 2.5, 2.0, *RISING[6:]], [0.0] * 20),
}


def test_apgd_halves_and_returns_as_written_by_hand() -> None:
    """All sequences at once, a row each, in free space, where a step of length eta along (1, 0) is seen exactly."""
    rows, step = len(SEQUENCES), APGD(step_size=1.0)
    losses = torch.tensor([losses for losses, _ in SEQUENCES.values()], dtype=torch.float64)
    residuals = torch.tensor([residuals for _, residuals in SEQUENCES.values()], dtype=torch.float64)
    by_hand = [apgd_by_hand(*sequence, 1.0) for sequence in SEQUENCES.values()]
    variable, state = torch.zeros(rows, 2, dtype=torch.float64), ()
    state = step.init(variable, Free())
    seen, previous = [], variable
    for count in range(20):
        gradient = torch.zeros_like(variable)
        gradient[:, 0] = 1.0 + count  # the direction is what counts
        look = At(variable, gradient, losses[:, count], residuals[:, count], None, Moment(count, 20), 0, None)
        moved, state = step.step(look, Free(), state)
        seen.append((variable, residuals[:, count] <= 0.05))
        for row in range(rows):
            eta, goes_back = by_hand[row][count]
            start, momentum = variable[row], variable[row] - previous[row]
            if goes_back:
                trusted = [index for index in range(count + 1) if bool(seen[index][1][row])]
                start = seen[max(trusted, key=lambda index: float(losses[row, index]))][0][row]
                momentum = torch.zeros(2, dtype=torch.float64)
            weight = 0.75 if count else 1.0
            expected = start + weight * torch.tensor([eta, 0.0], dtype=torch.float64) + 0.25 * momentum
            torch.testing.assert_close(moved[row], expected, msg=f"row {row} step {count}")
        goes_back = torch.tensor([of[count][1] for of in by_hand])[:, None]
        previous = torch.where(goes_back, state[0], variable)  # a row that went back comes from its best point
        variable = moved
    ends = dict(zip(SEQUENCES, (row[-1][0] for row in by_hand), strict=True))
    assert ends["rises"] == 1.0
    assert ends["falls"] == 2.0 ** -len(checkpoints(20)) == ends["falls, not settled"]
    assert ends["rises, not settled"] < 1.0  # no trusted best point, so that none rises either


def test_apgd_checks_late_where_a_row_may_not_move_at_a_checkpoint(make_model, make_images) -> None:
    """With k = 2 the step is asked at every other look only, and half of the checkpoints fall between."""
    model, x = make_model("test-linear", num_classes=2), 0.4 + 0.2 * make_images(4)
    halvings = []

    class Watched(APGD):
        def step(self, at: At, domain, state):
            moved, after = super().step(at, domain, state)
            halvings.append((at.moment.number, (state[5] / after[5]).log2().tolist()))
            return moved, after

    problem, ball = Classification(model, x, Margin(Y)), Threat("l2", 0.3).ball(x)
    optimise(problem, Joint(2), ball, Watched(2.0), Last(), torch.zeros_like(x), num_steps=100)
    assert [count for count, _ in halvings] == list(range(1, 100, 2))
    halved = [count for count, logs in halvings if any(logs)]
    due = [next(count for count in range(1, 100, 2) if count >= mark) for mark in checkpoints(100)]
    assert halved and set(halved) <= set(due)
    assert any(mark % 2 == 0 for mark in checkpoints(100) if mark + 1 in halved)


# ---------------------------------------------------------------- the smallest norm


@every_norm
@every_source
def test_smallest_norm_is_the_distance_to_the_boundary(source: Source, norm: Norm, make_model, make_images) -> None:
    model, x = make_model("test-linear", num_classes=2), 0.4 + 0.2 * make_images(4)
    with torch.no_grad():
        y = model(x).argmax(1)
        gradient = slope(model, x, y)
        distance = -Margin(y)(model(x)) / norm.dual_size(gradient)
    # No box in the way of the optimum, and balls from just large enough to far too large.
    radius = distance * torch.tensor([1.3, 2.0, 4.0, 8.0], dtype=x.dtype)
    scale = (0.35 / radius.amax()).clamp_max(1.0) if norm is not Norm.LINF else torch.tensor(1.0, dtype=x.dtype)
    if float(scale) < 1.0:  # bring the boundary nearer: shift the images towards it
        x = x + best_of_linear(gradient, norm, distance * (1 - scale))
        assert float(x.min()) > 0 and float(x.max()) < 1
        distance, radius = distance * scale, radius * scale
    problem, start = Classification(model, x, Margin(y)), torch.zeros_like(x)
    num_steps = 300 if isinstance(source, Joint) else 100
    step, keep = MinimalNorm(trusted_residual=1e-5), SmallestNorm(1e-5, 1e-5)
    found = optimise(problem, source, Ball(norm, radius, x), step, keep, start, num_steps=num_steps)
    with torch.no_grad():
        assert bool((model(x + found.variable).argmax(1) != y).all())
    ratio = norm.size(found.variable) / distance
    assert bool((ratio >= 1 - 1e-3).all()) and bool((ratio <= 1.02).all()), ratio


@every_norm
def test_rows_out_of_reach_are_ascended_on_the_whole_ball(norm: Norm, make_model, make_images) -> None:
    model, x = make_model("test-linear", num_classes=2), 0.4 + 0.2 * make_images(4)
    with torch.no_grad():
        y = model(x).argmax(1)
        distance = -Margin(y)(model(x)) / norm.dual_size(slope(model, x, y))
    radius = 0.1 * distance
    problem, ball = Classification(model, x, Margin(y)), Ball(norm, radius, x)
    keep = SmallestNorm(1e-3, 1e-3)
    found = optimise(problem, Joint(), ball, MinimalNorm(), keep, torch.zeros_like(x), num_steps=200)
    best = best_of_linear(slope(model, x, y), norm, radius)
    share = (slope(model, x, y) * found.variable).sum((1, 2, 3)) / (slope(model, x, y) * best).sum((1, 2, 3))
    assert bool((share > 0.998).all()), share
    assert not bool(found.is_done.any())


def test_radius_follows_successes_and_failures() -> None:
    """By hand, at the first step, where gamma is 0.05 and the step as long as the radius."""
    x = torch.full((5, 1, 1, 2), 0.5, dtype=torch.float64)
    ball, step, inf = Ball(Norm.L2, 0.4, x), MinimalNorm(), torch.inf
    variable = torch.zeros_like(x)
    variable[..., 0] = 0.2
    gradient = torch.zeros_like(x)
    gradient[..., 0] = 2.0
    # rows: never succeeded; failure after a success; success just beyond the boundary, far beyond, and between
    loss = torch.tensor([-1.0, -1.0, 2.1 * 0.015 * 0.2, 5.0, 0.06], dtype=x.dtype)
    state = (
        torch.tensor([0.4, 0.3, 0.2, 0.2, 0.2], dtype=x.dtype),
        torch.tensor([inf, 0.35, inf, inf, 0.19], dtype=x.dtype),
        torch.tensor([0.0, 3.0, 0.0, 0.0, 20.0], dtype=x.dtype),
    )
    moved, (radius, smallest, waited) = step.step(
        at(variable, gradient, loss, Moment(0, 9), is_success=loss > 0), ball, state
    )
    assert radius.tolist() == pytest.approx([0.4, 0.315, 0.19, 0.16, 0.17 / 0.985])
    assert smallest.tolist() == pytest.approx([inf, 0.35, 0.2, 0.2, 0.19])
    torch.testing.assert_close(Norm.L2.size(moved), radius)
    assert not bool(waited.any())
    # Right at the boundary a success is none.
    look = at(variable, gradient, loss.clamp_max(1.9 * 0.015 * 0.2), Moment(0, 9), is_success=loss > 0)
    _, (radius, smallest, _) = step.step(look, ball, state)
    assert radius.tolist() == pytest.approx([0.4, 0.315, 0.2, 0.2, 0.21])
    assert smallest.tolist() == pytest.approx([inf, 0.35, inf, inf, 0.19])
    # Where the state has not settled, all wait that have succeeded or seem to; but not for ever.
    look = at(variable, gradient, loss, Moment(0, 9), residual=0.1, is_success=loss > 0)
    moved, (radius, smallest, waited) = step.step(look, ball, state)
    assert radius.tolist() == pytest.approx([0.4, 0.3, 0.2, 0.2, 0.21])
    assert smallest.tolist() == pytest.approx([inf, 0.35, inf, inf, 0.19])
    assert waited.tolist() == [0, 4, 1, 1, 0]
    assert (moved == variable).flatten(1).all(1).tolist() == [False, True, True, True, False]


# ---------------------------------------------------------------- Langevin


def test_langevin_noise_is_keyed_by_seed_row_and_step() -> None:
    variable = torch.zeros(4, 3, dtype=torch.float64)
    gradient, loss, ids = torch.ones_like(variable), variable[:, 0], torch.tensor([7, 12, 9, 5])
    step = Langevin(0.0, noise=0.5)

    def noise(rows: list[int], seed: int = 0, count: int = 2, keyed: bool = True) -> Tensor:
        keys = {"seed": seed, "ids": ids[rows] if keyed else None}
        return step.step(at(variable[rows], gradient[rows], loss[rows], Moment(count, 9), **keys), Free(), ())[0]

    whole = noise([0, 1, 2, 3])
    torch.testing.assert_close(whole, 0.5 * keyed_normal(variable, 0, ids, 2))
    assert torch.equal(noise([2, 0]), whole[[2, 0]])
    for other in (noise([0, 1, 2, 3], seed=1), noise([0, 1, 2, 3], count=3), noise([0, 1, 2, 3], keyed=False)):
        assert bool(((other - whole).abs() > 1e-6).all())
    torch.testing.assert_close(noise([0, 1], keyed=False), 0.5 * keyed_normal(variable[:2], 0, torch.arange(2), 2))


def test_langevin_without_noise_is_clipped_ascent() -> None:
    variable = torch.tensor([[0.5, 0.5, 0.5]], dtype=torch.float64)
    gradient = torch.tensor([[3.0, -0.2, -40.0]], dtype=torch.float64)
    look = at(variable, gradient, variable[:, 0], Moment(0, 9))
    assert Langevin(0.1).step(look, Free(), ())[0][0].tolist() == pytest.approx([0.8, 0.48, -3.5])
    assert Langevin(0.1, clip=1.0).step(look, Free(), ())[0][0].tolist() == pytest.approx([0.6, 0.48, 0.4])
    assert Langevin(0.1).step(look, Box(), ())[0][0].tolist() == pytest.approx([0.8, 0.48, 0.0])
    assert variable[0].tolist() == [0.5] * 3 and gradient[0].tolist() == [3.0, -0.2, -40.0]


def test_langevin_has_the_stationary_variance_of_a_quadratic() -> None:
    """d' = (1 - rate) d + noise xi has variance noise^2 / (1 - (1 - rate)^2), and covariance 0 between entries."""
    rows, rate, noise = 20_000, 0.2, 0.3
    start = torch.zeros(rows, 2, dtype=torch.float64)

    def loss_of(variable: Tensor) -> Tensor:
        return -0.5 * variable.square().sum(1)

    last = climbed(Langevin(rate, noise), Free(), start, loss_of, 60, ids=torch.arange(rows), seed=5)[-1]
    variance = noise**2 / (1 - (1 - rate) ** 2)
    error = variance * math.sqrt(2 / rows)
    for entry in range(2):
        assert float(last[:, entry].var()) == pytest.approx(variance, abs=4 * error)
        assert abs(float(last[:, entry].mean())) < 4 * math.sqrt(variance / rows)
    assert abs(float((last[:, 0] * last[:, 1]).mean())) < 4 * variance / math.sqrt(rows)


@every_norm
def test_steps_of_all_kinds_stay_in_ball_and_box(norm: Norm, make_images) -> None:
    x = make_images(4).round()
    ball = Ball(norm, torch.tensor([0.0, 0.1, 0.5, 2.0], dtype=x.dtype), x)
    weight = make_images(4, seed=3) - 0.5
    for step in (ProjectedAscent(1.5), APGD(), Adam(0.3), Langevin(0.5, 0.2)):
        path = climbed(step, ball, torch.zeros_like(x), lambda variable: (weight * variable).flatten(1).sum(1), 12)
        for variable in path:
            assert bool((norm.size(variable) <= ball.radius * (1 + 1e-9) + 1e-12).all()), step
            assert float((x + variable).min()) >= -1e-12 and float((x + variable).max()) <= 1 + 1e-12
        assert bool((per_sample(ball.radius, x) * path[-1] != 0).flatten(1).any(1)[1:].all()), step
