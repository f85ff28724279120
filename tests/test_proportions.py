"""Intervals and tests against published values and closed forms."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binomtest

from robustbench_deq.proportions import fisher_p_value, mcnemar_p_value, newcombe_interval, wilson_interval


def test_wilson_is_its_closed_form() -> None:
    z, n, p = 1.959963984540054, 256, 176 / 256
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    assert wilson_interval(176, 256) == pytest.approx(expected, abs=1e-12)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    for right, count in ((0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (176, 256), (9_999, 10_000)):
        assert wilson_interval(right, count) == pytest.approx(
            binomtest(right, count).proportion_ci(0.95, method="wilson"), abs=1e-15
        )


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((56, 70, 48, 80), (0.0524, 0.3339)), ((9, 10, 3, 10), (0.1705, 0.8090)), ((10, 10, 0, 10), (0.6075, 1.0))],
)
def test_newcombe_is_as_published(counts: tuple[int, int, int, int], expected: tuple[float, float]) -> None:
    """Newcombe (1998), table II, method 10, which takes the first proportion less the second."""
    first, count_first, second, count_second = counts
    assert newcombe_interval(second, count_second, first, count_first) == pytest.approx(expected, abs=5e-5)


def test_mcnemar_is_a_sign_test() -> None:
    assert mcnemar_p_value(10, 0) == pytest.approx(2 * 0.5**10)
    assert mcnemar_p_value(0, 10) == mcnemar_p_value(10, 0)
    assert mcnemar_p_value(7, 7) == mcnemar_p_value(0, 0) == 1.0


def test_fisher_is_the_tea_test() -> None:
    assert fisher_p_value(3, 4, 1, 4) == pytest.approx(34 / 70)
    assert fisher_p_value(4, 4, 0, 4) == pytest.approx(2 / 70)
