"""Balls, box, projections and directions, as properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import NORMS, Norm
from robustbench_deq.rows import per_sample
from robustbench_deq.threats import Threat

norms = st.sampled_from(Norm)
radii = st.floats(0.0, 4.0)
seeds = st.integers(0, 10_000)
scales = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0, 1e6])


def draw(seed: int, scale: float, n: int = 3) -> tuple[Tensor, Tensor]:
    """Images with pixels at 0, 1 and between, and perturbations of the given size."""
    stream = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, 2, 3, 3, dtype=torch.float64, generator=stream) * 2 - 0.5).clamp(0, 1)
    return x, scale * torch.randn(x.shape, dtype=torch.float64, generator=stream)


@given(norms, radii, seeds, scales)
def test_projection_is_feasible(norm: Norm, epsilon: float, seed: int, scale: float) -> None:
    x, delta = draw(seed, scale)
    projected = Threat(norm, epsilon).project(delta, x)
    assert bool((norm_of(projected, norm) <= epsilon * (1 + 1e-12) + 1e-12).all())
    assert float((x + projected).min()) >= -1e-15
    assert float((x + projected).max()) <= 1 + 1e-15


@given(norms, radii, seeds, scales)
def test_projection_is_idempotent(norm: Norm, epsilon: float, seed: int, scale: float) -> None:
    x, delta = draw(seed, scale)
    threat = Threat(norm, epsilon)
    once = threat.project(delta, x)
    torch.testing.assert_close(threat.project(once, x), once, rtol=1e-12, atol=1e-12)


@given(norms, st.floats(0.01, 4.0), seeds, st.floats(0.0, 1.0))
def test_projection_is_the_identity_inside(norm: Norm, epsilon: float, seed: int, share: float) -> None:
    x, delta = draw(seed, 1.0)
    target = delta.sigmoid()  # a feasible image; the segment to it stays in the box
    inside = target - x
    inside = inside * per_sample((share * epsilon / norm_of(inside, norm)).clamp_max(1.0), inside)
    torch.testing.assert_close(Threat(norm, epsilon).project(inside, x), inside, rtol=1e-9, atol=1e-12)


@given(norms, seeds, scales)
def test_zero_radius_gives_exactly_zero(norm: Norm, seed: int, scale: float) -> None:
    x, delta = draw(seed, scale)
    threat = Threat(norm, 0.0)
    assert float(threat.project(delta, x).abs().max()) == 0.0
    assert float(threat.random_start(x, seed, torch.arange(len(x))).abs().max()) == 0.0


@given(seeds, st.floats(0.1, 2.0))
def test_projection_to_the_l2_ball_alone_is_radial(seed: int, epsilon: float) -> None:
    _, delta = draw(seed, 5.0)
    x = torch.full_like(delta, 0.5)
    small = delta * 1e-2  # outside a ball a hundred times smaller, and far from the box
    projected = Threat(Norm.L2, epsilon * 1e-2).project(small, x)
    size = norm_of(small, Norm.L2)
    expected = small * per_sample((epsilon * 1e-2 / size).clamp_max(1.0), small)
    torch.testing.assert_close(projected, expected, rtol=1e-9, atol=1e-12)


@given(seeds, st.floats(0.01, 0.6))
def test_projection_linf_clips_every_pixel(seed: int, epsilon: float) -> None:
    x, delta = draw(seed, 1.0)
    projected = Threat(Norm.LINF, epsilon).project(delta, x)
    expected = torch.maximum(torch.minimum(delta.clamp(-epsilon, epsilon), 1 - x), -x)
    torch.testing.assert_close(projected, expected, rtol=0.0, atol=1e-12)


def test_projection_leaves_its_arguments_alone() -> None:
    x, delta = draw(0, 3.0)
    copies = x.clone(), delta.clone()
    for norm in Norm:
        Threat(norm, 0.3).project(delta, x)
    assert torch.equal(x, copies[0]) and torch.equal(delta, copies[1])


@given(seeds, st.sampled_from([1e-30, 1e-14, 1e-6, 1.0, 1e6]))
def test_l2_direction_is_the_unit_gradient_whatever_its_scale(seed: int, scale: float) -> None:
    # A confident classifier has gradients far below 1e-12; an attack that stalls there calls it robust.
    _, gradient = draw(seed, 1.0)
    direction = Threat(Norm.L2, 1.0).direction((gradient * scale).float())
    expected = gradient / per_sample(norm_of(gradient, Norm.L2), gradient)
    torch.testing.assert_close(direction, expected.float(), rtol=1e-4, atol=1e-6)


@given(seeds)
def test_linf_direction_is_the_sign(seed: int) -> None:
    _, gradient = draw(seed, 1e-8)
    gradient[0, 0, 0, 0] = 0.0
    assert torch.equal(Threat(Norm.LINF, 1.0).direction(gradient), gradient.sign())


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_direction_of_a_zero_gradient_is_zero(norm: Norm) -> None:
    gradient = torch.zeros(2, 1, 3, 3)
    gradient[1] = 1.0
    direction = Threat(norm, 1.0).direction(gradient)
    assert float(direction[0].abs().max()) == 0.0
    assert float(norm_of(direction, norm)[1]) == pytest.approx(1.0)


@given(norms, st.sampled_from([0.0, 1e-4, 1 / 255, 0.5, 4.0]), seeds)
def test_what_was_projected_and_added_in_single_precision_is_allowed(norm: Norm, epsilon: float, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 32, 32, generator=stream)
    threat = Threat(norm, epsilon)
    delta = threat.project(torch.randn(x.shape, generator=stream), x)
    assert bool(threat.allows(norm_of((x + delta).clamp(0, 1) - x, norm)).all())


@given(st.floats(1 / 255, 4.0))
def test_what_lies_outside_is_not_allowed(epsilon: float) -> None:
    threat = Threat(Norm.L2, epsilon)
    assert threat.allows(torch.tensor([1.01 * epsilon, math.nan, math.inf])).tolist() == [False] * 3


@given(norms, st.floats(0.01, 3.0), seeds, st.integers(0, 3))
def test_random_start_lies_inside(norm: Norm, epsilon: float, seed: int, restart: int) -> None:
    x, _ = draw(seed, 1.0)
    delta = Threat(norm, epsilon).random_start(x, seed, torch.tensor([5, 0, 2**40]), restart)
    assert bool((norm_of(delta, norm) <= epsilon * (1 + 1e-12)).all())
    assert bool((norm_of(delta, norm) > 0).all())
    assert float((x + delta).min()) >= 0 and float((x + delta).max()) <= 1


@given(norms, seeds, st.permutations(range(4)), st.integers(1, 4))
def test_random_start_of_a_sample_does_not_depend_on_its_batch(
    norm: Norm, seed: int, rows: list[int], kept: int
) -> None:
    x, _ = draw(seed, 1.0, n=4)
    ids, threat, index = torch.tensor([7, 3, 1000, 8]), Threat(norm, 0.5), torch.tensor(rows[:kept])
    whole = threat.random_start(x, seed, ids, 1)
    assert torch.equal(threat.random_start(x[index], seed, ids[index], 1), whole[index])


@pytest.mark.parametrize("norm", NORMS.values(), ids=repr)
def test_random_start_differs_by_seed_restart_and_sample(norm: Norm) -> None:
    x = torch.full((2, 1, 4, 4), 0.5)
    threat, ids = Threat(norm, 0.3), torch.tensor([0, 1])
    base = threat.random_start(x, 0, ids, 0)
    others = [threat.random_start(x, 1, ids, 0), threat.random_start(x, 0, ids, 1), threat.random_start(x, 0, ids + 2)]
    for other in [*others, base.flip(0)]:
        assert bool(((base - other).abs().flatten(1).amax(1) > 1e-3).all())
    # (seed, restart) is one key, not a sum: seed 0 restart 1 is not seed 1 restart 0
    assert not torch.equal(others[0], others[1])


def test_random_start_fills_the_ball() -> None:
    # Uniform in an n-ball: (r / eps)^n is uniform on [0, 1], so its mean is 1/2.
    n, epsilon = 4000, 0.4
    x = torch.full((n, 1, 1, 2), 0.5, dtype=torch.float64)
    delta = Threat(Norm.L2, epsilon).random_start(x, 0, torch.arange(n))
    share = (norm_of(delta, Norm.L2) / epsilon).square()
    assert float(share.mean()) == pytest.approx(0.5, abs=0.03)
    flat = Threat(Norm.LINF, epsilon).random_start(x, 0, torch.arange(n)).flatten()
    assert float(flat.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(flat.abs().mean()) == pytest.approx(epsilon / 2, abs=0.02)


def test_random_start_does_not_use_the_global_generator() -> None:
    x = torch.full((1, 1, 2, 2), 0.5)
    state = torch.get_rng_state()
    Threat(Norm.L2, 0.1).random_start(x, 0, torch.tensor([0]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("epsilon", [-0.1, -1e-9, math.nan, math.inf, -math.inf])
def test_radius_must_be_finite_and_not_negative(epsilon: float) -> None:
    with pytest.raises(UsageError, match="epsilon: expected a finite number >= 0"):
        Threat(Norm.L2, epsilon)


@pytest.mark.parametrize(("name", "norm"), [("l2", Norm.L2), ("LINF", Norm.LINF), ("Linf", Norm.LINF)])
def test_norm_is_read_in_any_case(name: str, norm: Norm) -> None:
    assert Norm.parse(name) is norm


@pytest.mark.parametrize("name", ["l1", "", "2"])
def test_unknown_norm_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="norm: expected l2 or linf"):
        Norm.parse(name)


def test_norms_are_per_sample() -> None:
    delta = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 1.0]]]])
    assert norm_of(delta, Norm.L2).tolist() == [5.0, 1.0]
    assert norm_of(delta, Norm.LINF).tolist() == [4.0, 1.0]
