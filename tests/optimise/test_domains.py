"""Balls, box, projections, directions and steepest steps: as properties, and against references."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import NORMS, Ball, Box, Free, Norm
from robustbench_deq.rows import per_sample

ALL = [NORMS.get(name) for name in NORMS]
every_norm = pytest.mark.parametrize("norm", ALL)
norms = st.sampled_from(ALL)
radii = st.floats(0.0, 4.0)
seeds = st.integers(0, 10_000)
scales = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0, 1e6])


def draw(seed: int, scale: float, n: int = 3, shape: tuple[int, int, int] = (2, 3, 3)) -> tuple[Tensor, Tensor]:
    """Images with pixels at 0, 1 and between, and perturbations of the given size."""
    stream = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, *shape, dtype=torch.float64, generator=stream) * 2 - 0.5).clamp(0, 1)
    return x, scale * torch.randn(x.shape, dtype=torch.float64, generator=stream)


def inside(seed: int, norm: Norm, radius: float, share: float) -> tuple[Tensor, Tensor]:
    """Images and feasible perturbations of at most `share` of the radius."""
    x, delta = draw(seed, 1.0)
    towards = delta.sigmoid() - x  # a feasible image; the segment to it stays in the box
    return x, towards * per_sample((share * radius / norm.size(towards)).clamp_max(1.0), towards)


# ---------------------------------------------------------------- projection


@given(norms, radii, seeds, scales)
def test_projection_is_feasible(norm: Norm, epsilon: float, seed: int, scale: float) -> None:
    x, delta = draw(seed, scale)
    projected = Ball(norm, epsilon, x).project(delta)
    assert bool((norm.size(projected) <= epsilon * (1 + 1e-12) + 1e-12).all())
    assert float((x + projected).min()) >= -1e-15
    assert float((x + projected).max()) <= 1 + 1e-15


@given(norms, radii, seeds, scales)
def test_projection_is_idempotent(norm: Norm, epsilon: float, seed: int, scale: float) -> None:
    x, delta = draw(seed, scale)
    ball = Ball(norm, epsilon, x)
    once = ball.project(delta)
    torch.testing.assert_close(ball.project(once), once, rtol=1e-12, atol=1e-12)


@given(norms, st.floats(0.01, 4.0), seeds, st.floats(0.0, 1.0))
def test_projection_is_the_identity_inside(norm: Norm, epsilon: float, seed: int, share: float) -> None:
    x, delta = inside(seed, norm, epsilon, share)
    torch.testing.assert_close(Ball(norm, epsilon, x).project(delta), delta, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [0.5, 1e30])
@every_norm
def test_huge_perturbations_are_projected_like_others(norm: Norm, radius: float, dtype: torch.dtype) -> None:
    x, delta = (part.to(dtype) for part in draw(0, 1.0))
    ball, far = Ball(norm, radius, x), 1e36 if dtype is torch.float32 else 1e150
    torch.testing.assert_close(norm.size(far * delta) / far, norm.size(delta))
    projected = ball.project(far * delta)
    expected = ball.project(1e3 * delta) if radius < 1 else torch.where(delta > 0, 1 - x, -x)
    torch.testing.assert_close(projected, expected, rtol=1e-3, atol=1e-3)


@given(norms, seeds, scales)
def test_zero_radius_gives_exactly_zero(norm: Norm, seed: int, scale: float) -> None:
    x, delta = draw(seed, scale)
    ball = Ball(norm, 0.0, x)
    assert float(ball.project(delta).abs().max()) == 0.0
    assert float(ball.random_start(seed, torch.arange(len(x))).abs().max()) == 0.0


@given(norms, seeds, scales, st.lists(radii, min_size=3, max_size=3))
def test_radius_of_a_row_is_as_good_as_a_number(norm: Norm, seed: int, scale: float, radius: list[float]) -> None:
    x, delta = draw(seed, scale)
    _, gradient = draw(seed + 1, 1.0)
    ball = Ball(norm, torch.tensor(radius, dtype=x.dtype), x)
    singles = [Ball(norm, radius[row], x[row : row + 1]) for row in range(3)]
    ids = torch.tensor([4, 9, 2])
    start = singles[0].project(delta[:1]) if scale else delta[:1]

    def each(function) -> Tensor:
        return torch.cat([function(singles[row], slice(row, row + 1)) for row in range(3)])

    assert float(start.abs().max()) <= 1.0
    torch.testing.assert_close(ball.project(delta), each(lambda one, row: one.project(delta[row])))
    torch.testing.assert_close(ball.random_start(seed, ids), each(lambda one, row: one.random_start(seed, ids[row])))
    at = ball.project(delta)
    torch.testing.assert_close(
        ball.steepest(gradient, ball.radius, at),
        each(lambda one, row: one.steepest(gradient[row], one.radius, at[row])),
    )


@given(norms, seeds, st.permutations(range(3)), st.integers(1, 3), st.booleans())
def test_taken_rows_are_those_of_the_whole(norm: Norm, seed: int, order: list[int], kept: int, is_number: bool) -> None:
    (x, delta), rows = draw(seed, 1.0), torch.tensor(order[:kept])
    ball = Ball(norm, 0.3 if is_number else torch.tensor([0.1, 0.5, 2.0], dtype=x.dtype), x)
    taken = ball.take(rows)
    assert taken.norm is norm and torch.equal(taken.x, x[rows])
    torch.testing.assert_close(taken.project(delta[rows]), ball.project(delta)[rows])
    wider = torch.tensor([0.7, 0.2, 0.4], dtype=x.dtype)
    torch.testing.assert_close(
        taken.with_radius(wider[rows]).project(delta[rows]), ball.with_radius(wider).project(delta)[rows]
    )


@given(seeds, st.floats(0.1, 2.0))
def test_projection_to_the_l2_ball_alone_is_radial(seed: int, epsilon: float) -> None:
    _, delta = draw(seed, 5.0)
    x = torch.full_like(delta, 0.5)
    small = delta * 1e-2  # outside a ball a hundred times smaller, and far from the box
    projected = Ball(Norm.L2, epsilon * 1e-2, x).project(small)
    size = Norm.L2.size(small)
    expected = small * per_sample((epsilon * 1e-2 / size).clamp_max(1.0), small)
    torch.testing.assert_close(projected, expected, rtol=1e-9, atol=1e-12)


@given(seeds, st.floats(0.01, 0.6))
def test_projection_linf_clips_every_pixel(seed: int, epsilon: float) -> None:
    x, delta = draw(seed, 1.0)
    projected = Ball(Norm.LINF, epsilon, x).project(delta)
    expected = torch.maximum(torch.minimum(delta.clamp(-epsilon, epsilon), 1 - x), -x)
    torch.testing.assert_close(projected, expected, rtol=0.0, atol=1e-12)


def shrunk(delta: np.ndarray, x: np.ndarray, threshold: float) -> np.ndarray:
    room = np.where(delta > 0, 1.0 - x, x)
    return np.sign(delta) * np.minimum(np.maximum(np.abs(delta) - threshold, 0.0), room)


@given(seeds, st.sampled_from([0.0, 0.01, 0.5, 2.0, 6.0, 30.0]), st.sampled_from([0.1, 1.0, 30.0]))
def test_l1_projection_is_that_of_bisection(seed: int, epsilon: float, scale: float) -> None:
    x, delta = draw(seed, scale)
    found = Ball(Norm.L1, epsilon, x).project(delta)
    for row in range(3):
        one, image = delta[row].numpy().ravel(), x[row].numpy().ravel()
        low, high = 0.0, float(np.abs(one).max())
        if np.abs(shrunk(one, image, 0.0)).sum() > epsilon:
            for _ in range(200):
                middle = (low + high) / 2
                is_outside = np.abs(shrunk(one, image, middle)).sum() > epsilon
                low, high = (middle, high) if is_outside else (low, middle)
            expected = shrunk(one, image, high)
        else:
            expected = shrunk(one, image, 0.0)
        np.testing.assert_allclose(found[row].numpy().ravel(), expected, rtol=0, atol=1e-12 * max(1.0, scale))


@pytest.mark.parametrize("seed", range(6))
def test_l1_projection_is_the_nearest_feasible_point(seed: int) -> None:
    """Against a solver that knows nothing of thresholds: d = p - q with p, q >= 0 and sum p + q <= epsilon."""
    x, delta = draw(seed, 0.7, n=1, shape=(1, 2, 3))
    epsilon = [0.2, 0.5, 1.0][seed % 3]
    target, image = delta.numpy().ravel(), x.numpy().ravel()
    count = len(target)
    found = Ball(Norm.L1, epsilon, x).project(delta).numpy().ravel()
    reference = minimize(
        lambda v: ((v[:count] - v[count:] - target) ** 2).sum(),
        np.zeros(2 * count),
        jac=lambda v: (
            np.concatenate([1, -1] * np.ones((1, 1)), axis=0).repeat(count)
            * np.tile(2 * (v[:count] - v[count:] - target), 2)
        ),
        bounds=[*((0, 1 - pixel) for pixel in image), *((0, pixel) for pixel in image)],
        constraints={"type": "ineq", "fun": lambda v: epsilon - v.sum(), "jac": lambda v: -np.ones(2 * count)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert reference.success
    np.testing.assert_allclose(found, reference.x[:count] - reference.x[count:], rtol=0, atol=1e-5)
    assert ((found - target) ** 2).sum() <= reference.fun + 1e-9


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_of_large_images_is_within_rounding(norm: Norm, dtype: torch.dtype) -> None:
    stream = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 32, 32, generator=stream, dtype=dtype)
    delta = torch.randn(x.shape, generator=stream, dtype=dtype)
    for radius in (8 / 255, 0.5, 12.0):
        found = Ball(norm, radius, x).project(delta)
        assert found.dtype is dtype
        assert float(norm.size(found).max()) <= radius * (1 + (1e-5 if dtype is torch.float32 else 1e-11))
        most = min(radius, 0.99) if norm is Norm.LINF else radius
        assert float(norm.size(found).min()) >= most * (0.5 if norm is Norm.L2 else 0.99)  # L2 clips after it rescales


def test_projection_leaves_its_arguments_alone() -> None:
    x, delta = draw(0, 3.0)
    copies = x.clone(), delta.clone()
    for norm in ALL:
        ball = Ball(norm, 0.3, x)
        ball.project(delta), ball.direction(delta), ball.steepest(delta, 0.2, ball.project(delta))
    assert torch.equal(x, copies[0]) and torch.equal(delta, copies[1])


# ---------------------------------------------------------------- directions and steps


@given(seeds, st.sampled_from([1e-30, 1e-14, 1e-6, 1.0, 1e6]), st.sampled_from([Norm.L1, Norm.L2]))
def test_direction_is_the_unit_gradient_whatever_its_scale(seed: int, scale: float, norm: Norm) -> None:
    # A confident classifier has gradients far below 1e-12; an attack that stalls there calls it robust.
    x, gradient = draw(seed, 1.0)
    direction = Ball(norm, 1.0, x).direction((gradient * scale).float())
    expected = gradient / per_sample(norm.size(gradient), gradient)
    torch.testing.assert_close(direction, expected.float(), rtol=1e-4, atol=1e-6)


@given(seeds)
def test_linf_direction_is_the_sign(seed: int) -> None:
    x, gradient = draw(seed, 1e-8)
    gradient[0, 0, 0, 0] = 0.0
    assert torch.equal(Ball(Norm.LINF, 1.0, x).direction(gradient), gradient.sign())


@every_norm
def test_direction_and_step_of_a_zero_gradient_are_zero(norm: Norm) -> None:
    gradient = torch.zeros(2, 1, 3, 3)
    gradient[1] = 1.0
    ball = Ball(norm, 1.0, torch.full_like(gradient, 0.5))
    for found in (ball.direction(gradient), ball.steepest(gradient, 1.0, torch.zeros_like(gradient))):
        assert float(found[0].abs().max()) == 0.0
        assert float(norm.size(found)[1]) == pytest.approx(1.0)


@given(norms, seeds, st.floats(0.01, 3.0))
def test_dual_size_is_the_most_that_a_linear_function_rises_in_the_unit_ball(
    norm: Norm, seed: int, length: float
) -> None:
    _, gradient = draw(seed, 1.0)
    x = torch.full_like(gradient, 0.5)
    most = norm.dual_size(gradient)
    points = torch.from_numpy(np.stack([norm.draw(np.random.default_rng([seed, i]), 18) for i in range(200)]))
    rises = points @ gradient.flatten(1).mT
    assert bool((rises <= most * (1 + 1e-12)).all())
    step = norm.steepest(gradient * 1e3, 0.4 * length / 3, torch.zeros_like(x), x)  # too short to meet the box
    rise = (step * gradient).flatten(1).sum(1)
    torch.testing.assert_close(rise, 0.4 * length / 3 * most)
    torch.testing.assert_close(norm.size(step), torch.full_like(most, 0.4 * length / 3))


@given(seeds, st.sampled_from([0.0, 0.05, 1.0, 4.0, 30.0]), st.floats(0.0, 1.0))
def test_l1_steepest_step_solves_its_linear_program(seed: int, length: float, share: float) -> None:
    """max g d  over  ||d||_1 <= length,  0 <= x + delta + d <= 1."""
    x, delta = inside(seed, Norm.L1, 3.0, share)
    _, gradient = draw(seed + 1, 1.0)
    step = Ball(Norm.L1, 3.0, x).steepest(gradient, length, delta)
    assert float(Norm.L1.size(step).max()) <= length + 1e-12
    assert float((x + delta + step).min()) >= -1e-12 and float((x + delta + step).max()) <= 1 + 1e-12
    for row in range(3):
        g, image = gradient[row].numpy().ravel(), (x + delta)[row].numpy().ravel().clip(0, 1)
        count = len(g)
        reference = linprog(
            np.concatenate([-g, g]),
            A_ub=np.ones((1, 2 * count)),
            b_ub=[length],
            bounds=[*((0, 1 - pixel) for pixel in image), *((0, pixel) for pixel in image)],
        )
        assert reference.success
        assert float((gradient * step)[row].sum()) == pytest.approx(-reference.fun, abs=1e-8)


def test_steepest_of_a_length_a_row() -> None:
    _, gradient = draw(0, 1.0)
    x, length = torch.full_like(gradient, 0.5), torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    for norm in ALL:
        step = Ball(norm, 1.0, x).steepest(gradient, length, torch.zeros_like(x))
        torch.testing.assert_close(norm.size(step), length)


# ---------------------------------------------------------------- random starts


@given(norms, st.floats(0.01, 3.0), seeds, st.integers(0, 3))
def test_random_start_lies_inside(norm: Norm, epsilon: float, seed: int, restart: int) -> None:
    x, _ = draw(seed, 1.0)
    delta = Ball(norm, epsilon, x).random_start(seed, torch.tensor([5, 0, 2**40]), restart)
    assert bool((norm.size(delta) <= epsilon * (1 + 1e-12)).all())
    assert bool((norm.size(delta) > 0).all())
    assert float((x + delta).min()) >= 0 and float((x + delta).max()) <= 1


@given(norms, seeds, st.permutations(range(4)), st.integers(1, 4))
def test_random_start_of_a_sample_does_not_depend_on_its_batch(
    norm: Norm, seed: int, rows: list[int], kept: int
) -> None:
    x, _ = draw(seed, 1.0, n=4)
    ids, ball, index = torch.tensor([7, 3, 1000, 8]), Ball(norm, 0.5, x), torch.tensor(rows[:kept])
    whole = ball.random_start(seed, ids, 1)
    assert torch.equal(ball.take(index).random_start(seed, ids[index], 1), whole[index])


@every_norm
def test_random_start_differs_by_seed_restart_and_sample(norm: Norm) -> None:
    ball, ids = Ball(norm, 0.3, torch.full((2, 1, 4, 4), 0.5)), torch.tensor([0, 1])
    base = ball.random_start(0, ids, 0)
    others = [ball.random_start(1, ids, 0), ball.random_start(0, ids, 1), ball.random_start(0, ids + 2)]
    for other in [*others, base.flip(0)]:
        assert bool(((base - other).abs().flatten(1).amax(1) > 1e-3).all())
    # (seed, restart) is one key, not a sum: seed 0 restart 1 is not seed 1 restart 0
    assert not torch.equal(others[0], others[1])


@every_norm
def test_draws_are_uniform_in_the_unit_ball(norm: Norm) -> None:
    """Radii: `r^n` is uniform on [0, 1]. Entries: no mean, and the second moment of a uniform point of the ball, which
    is 1/3 for Linf, 1 / (n + 2) for L2 and 2 / ((n + 1)(n + 2)) for L1."""
    count, rows = 3, 20_000
    stream = np.random.default_rng(0)
    points = torch.from_numpy(np.stack([norm.draw(stream, count) for _ in range(rows)]))
    share = norm.size(points) ** count
    for power in (1, 2, 3):
        assert float((share**power).mean()) == pytest.approx(1 / (power + 1), abs=4 / math.sqrt(rows) / 3)
    second = {Norm.LINF: 1 / 3, Norm.L2: 1 / (count + 2), Norm.L1: 2 / ((count + 1) * (count + 2))}[norm]
    deviation = float((points**2).std()) / math.sqrt(rows)
    for entry in range(count):
        assert abs(float(points[:, entry].mean())) < 4 * math.sqrt(second / rows)
        assert float((points[:, entry] ** 2).mean()) == pytest.approx(second, abs=5 * deviation)
    half = points[:, 0].sign() * points[:, 1].sign()
    assert abs(float(half.mean())) < 4 / math.sqrt(rows)


def test_random_start_fills_the_ball() -> None:
    # Uniform in an n-ball: (r / eps)^n is uniform on [0, 1], so its mean is 1/2.
    n, epsilon = 4000, 0.4
    x = torch.full((n, 1, 1, 2), 0.5, dtype=torch.float64)
    for norm in ALL:
        share = (norm.size(Ball(norm, epsilon, x).random_start(0, torch.arange(n))) / epsilon).square()
        assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
    flat = Ball(Norm.LINF, epsilon, x).random_start(0, torch.arange(n)).flatten()
    assert float(flat.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(flat.abs().mean()) == pytest.approx(epsilon / 2, abs=0.02)


def test_random_start_does_not_use_the_global_generator() -> None:
    ball, state = Ball(Norm.L2, 0.1, torch.full((1, 1, 2, 2), 0.5)), torch.get_rng_state()
    ball.random_start(0, torch.tensor([0]))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------- box and free space


@given(seeds, scales)
def test_box_clips_and_free_space_does_not(seed: int, scale: float) -> None:
    _, variable = draw(seed, scale)
    box, free, rows = Box(-0.5, 2.0), Free(), torch.tensor([2, 0])
    assert torch.equal(free.project(variable), variable)
    inner = box.project(variable)
    assert torch.equal(inner, variable.clamp(-0.5, 2.0)) and torch.equal(box.project(inner), inner)
    for domain in (box, free):
        assert domain.take(rows) == domain and domain.radius == 1.0
        torch.testing.assert_close(domain.direction(variable), Norm.L2.direction(variable))
        length = torch.tensor([0.1, 2.0, 0.0], dtype=variable.dtype)
        step = domain.steepest(variable, length, variable)
        torch.testing.assert_close(step, Norm.L2.direction(variable) * per_sample(length, variable))


def test_box_is_the_pixel_box_unless_told() -> None:
    assert Box().project(torch.tensor([[-1.0, 0.3, 7.0]])).tolist() == [[0.0, pytest.approx(0.3), 1.0]]


# ---------------------------------------------------------------- the norms themselves


def test_norms_are_per_sample() -> None:
    delta = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 1.0]]]])
    assert Norm.L1.size(delta).tolist() == [7.0, 1.0] == Norm.LINF.dual_size(delta).tolist()
    assert Norm.L2.size(delta).tolist() == [5.0, 1.0] == Norm.L2.dual_size(delta).tolist()
    assert Norm.LINF.size(delta).tolist() == [4.0, 1.0] == Norm.L1.dual_size(delta).tolist()


@every_norm
def test_norms_are_one_object_each(norm: Norm) -> None:
    assert NORMS.get(norm.name) is norm is getattr(Norm, norm.name.upper()) is pickle.loads(pickle.dumps(norm))
    assert repr(norm) == f"Norm.{norm.name.upper()}"
    for name in (norm.name, norm.name.upper(), norm.name.capitalize(), norm):
        assert Norm.parse(name) is norm


@pytest.mark.parametrize("name", ["l0", "", "2", 3, 2.0000001, math.nan, True, None])
def test_unknown_norm_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match=f"^norm: expected l1, l2 or linf, got {name!r}; pass for example --norm l1$"):
        Norm.parse(name)
