"""Proportions: 95 % intervals of accuracies, and exact tests of whether two of them differ.

one accuracy                   Wilson's interval (1927)
two, on other samples          Newcombe's hybrid score interval of the difference (1998, method 10); Fisher's exact
                               test
two, on the same samples       McNemar's exact test: of the samples whose verdict differs, is either way too many?

SciPy's statistics take a second to import. Wilson's formula, which every listing and record shows, does without them;
the tests import them when they are computed.
"""

from __future__ import annotations

import math

Z = 1.959963984540054
"""The standard normal distribution's quantile of 97.5 %."""


def wilson_interval(num_correct: int, count: int) -> tuple[float, float]:
    """Of the fraction `num_correct / count`."""
    size = 2 * (count + Z**2)
    centre = (2 * num_correct + Z**2) / size
    reach = Z / size * math.sqrt(4 * num_correct * (count - num_correct) / count + Z**2)
    return centre - reach if num_correct else 0.0, centre + reach if num_correct < count else 1.0


def newcombe_interval(num_before: int, count_before: int, num_after: int, count_after: int) -> tuple[float, float]:
    """Of the difference `num_after / count_after - num_before / count_before`."""
    before, after = num_before / count_before, num_after / count_after
    low_before, high_before = wilson_interval(num_before, count_before)
    low_after, high_after = wilson_interval(num_after, count_after)
    low = after - before - math.hypot(after - low_after, high_before - before)
    high = after - before + math.hypot(high_after - after, before - low_before)
    return max(-1.0, low), min(1.0, high)


def mcnemar_p_value(num_lost: int, num_gained: int) -> float:
    """Two-sided, from the samples that were right only before (lost) and only after (gained)."""
    from scipy.stats import binomtest

    return float(binomtest(num_lost, num_lost + num_gained).pvalue) if num_lost + num_gained else 1.0


def fisher_p_value(num_before: int, count_before: int, num_after: int, count_after: int) -> float:
    """Two-sided, for two counts of independent samples."""
    from scipy.stats import fisher_exact

    table = [[num_before, count_before - num_before], [num_after, count_after - num_after]]
    return float(fisher_exact(table)[1])
