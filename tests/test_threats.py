"""Threats: a norm, by name or itself, and a radius; what is refused, and what rounding may add."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustbench_deq.errors import UsageError
from robustbench_deq.optimise import NORMS, Norm
from robustbench_deq.threat_spec import ThreatSpec
from robustbench_deq.threats import Threat

ALL = [NORMS.get(name) for name in NORMS]
norms, seeds = st.sampled_from(ALL), st.integers(0, 10_000)


@pytest.mark.parametrize("norm", ALL)
def test_names_are_as_good_as_norms(norm: Norm) -> None:
    order = float(norm.name[1:])
    orders = [order, np.float64(order), *([Fraction(order)] if math.isfinite(order) else [])]
    for name in (norm.name, norm.name.upper(), norm.name.capitalize(), *orders):
        assert Threat(name, 0.3) == Threat(norm, 0.3) and Threat(name, 0.3).norm is norm
    assert Threat(norm, 0.3) != Threat(norm, 0.4)
    assert len({Threat(one, 0.3) for one in ALL}) == len(ALL)


@pytest.mark.parametrize("epsilon", [0.25, "0.25", "1/4", np.float32(0.25), torch.tensor(0.25), Fraction(1, 4)])
def test_numbers_of_any_kind_and_fractions_as_text_are_radii(epsilon: object) -> None:
    for threat in (Threat("L2", epsilon), ThreatSpec(norm="L2", epsilon=epsilon).build()):
        assert threat == Threat(Norm.L2, 0.25) and type(threat.epsilon) is float
    assert ThreatSpec(norm=Norm.LINF, epsilon=epsilon).build() == Threat("linf", 0.25)


@pytest.mark.parametrize("text", ["a third", "8/0", "", "8/255/2"])
def test_text_that_is_no_radius_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^epsilon: expected a number or a fraction, got "):
        Threat("l2", text)


def test_ball_is_that_of_the_images() -> None:
    x = torch.rand(2, 1, 3, 3)
    ball = Threat("l1", 0.4).ball(x)
    assert ball.norm is Norm.L1 and ball.radius == 0.4 and ball.x is x


@pytest.mark.parametrize(("norm", "most"), [(Norm.L1, 9.0), (Norm.L2, 3.0), (Norm.LINF, 1.0)])
def test_a_radius_beyond_the_pixel_box_is_that_of_the_box_and_told_of(norm: Norm, most: float) -> None:
    x = torch.rand(2, 1, 3, 3)
    for epsilon in (most, 8.0 * most, 1e19, 1e300):
        threat = Threat(norm, epsilon)
        assert threat.ball(x).radius == pytest.approx(most)
        assert "any image into any other" in threat.doubt(9) and "8/255" in threat.doubt(9)
    for epsilon in (0.0, 0.99 * most):
        threat = Threat(norm, epsilon)
        assert threat.ball(x).radius == epsilon and threat.doubt(9) is None


@pytest.mark.parametrize("name", ["l0", "", "l2 ", 3, True, None])
def test_unknown_norms_are_refused_in_one_line(name: object) -> None:
    with pytest.raises(UsageError, match=f"^norm: expected l1, l2 or linf, got {name!r}; [^\n]*$"):
        Threat(name, 0.3)


@pytest.mark.parametrize(
    "epsilon", [-0.1, -1e-9, math.nan, math.inf, -math.inf, 10**400, True, [0.3], None, torch.ones(2)]
)
def test_radius_must_be_a_finite_number_that_is_not_negative(epsilon: object) -> None:
    with pytest.raises(UsageError, match=r"^epsilon: expected a finite number >= 0 in pixel units[^\n]*$"):
        Threat(Norm.L2, epsilon)


@given(norms, st.sampled_from([0.0, 1e-4, 1 / 255, 0.5, 4.0]), seeds)
def test_what_was_projected_and_added_in_single_precision_is_allowed(norm: Norm, epsilon: float, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 32, 32, generator=stream)
    threat = Threat(norm, epsilon)
    delta = threat.ball(x).project(torch.randn(x.shape, generator=stream))
    assert bool(threat.allows(norm.size((x + delta).clamp(0, 1) - x)).all())


@given(norms, st.floats(1 / 255, 4.0))
def test_what_lies_outside_is_not_allowed(norm: Norm, epsilon: float) -> None:
    threat = Threat(norm, epsilon)
    assert threat.allows(torch.tensor([1.01 * epsilon, math.nan, math.inf])).tolist() == [False] * 3
    assert threat.allows(torch.tensor([0.0, epsilon])).tolist() == [True] * 2
