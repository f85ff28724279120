"""Intervals and tests against published values and closed forms."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from robustbench_deq.proportions import fisher_p_value, mcnemar_p_value, newcombe_interval, wilson_interval


@pytest.mark.parametrize("count", [1, 7, 256, 10_000])
def test_wilson_is_that_of_scipy(count: int) -> None:
    for num_correct in {0, 1, count // 3, count - 1, count}:
        expected = binomtest(num_correct, count).proportion_ci(0.95, method="wilson")
        assert wilson_interval(num_correct, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("num_correct", "count"), [(0, 0), (-1, 4), (5, 4)])
def test_no_interval_of_what_is_no_fraction(num_correct: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to count"):
        wilson_interval(num_correct, count)


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
