"""Ratios of seconds that the benchmarks print."""

from __future__ import annotations

import pytest

from benchmarks.timing import Ratio


def test_the_interval_of_many_rounds_is_narrower_than_their_range() -> None:
    fast = [1.0] * 40
    slow = [1.0 + 0.01 * round_ for round_ in range(39)] + [50.0]
    ratio = Ratio.of(slow, fast)
    assert ratio.median == pytest.approx(1.195, abs=0.01)
    assert 1.0 < ratio.low < ratio.median < ratio.high < 1.39


def test_the_interval_of_few_rounds_is_their_range() -> None:
    assert Ratio.of([2.0, 3.0, 1.0], [1.0, 1.0, 1.0]) == Ratio(2.0, 1.0, 3.0)
    assert str(Ratio.of([2.0], [1.0])) == "2.00 [2.00, 2.00]"


def test_rounds_that_do_not_pair_up_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Ratio.of([1.0, 2.0], [1.0])
