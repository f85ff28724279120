"""Keyed numbers: their distribution, and that nothing but the key decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from robustbench_deq.randomness import keyed_normal, keyed_uniform

ROWS, COUNT = 400, 500


def draw(seed: int = 0, counter: int = 0, ids: Tensor | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    ids = torch.arange(ROWS) if ids is None else ids
    return keyed_normal(torch.zeros(len(ids), COUNT, dtype=dtype), seed, ids, counter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("seed", "counter"), [(0, 0), (1, 7), (2**40, 1000), (-3, 0)])
def test_numbers_are_standard_normal(seed: int, counter: int, dtype: torch.dtype) -> None:
    found = draw(seed, counter, dtype=dtype)
    assert found.dtype is dtype and bool(torch.isfinite(found).all())
    flat, size = found.double().flatten().numpy(), ROWS * COUNT
    # mean, variance, skewness and kurtosis, with the standard error of each
    for power, moment, error in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert np.mean(flat**power) == pytest.approx(moment, abs=4.5 * error / math.sqrt(size))
    assert kstest(flat, "norm").pvalue > 1e-3
    assert np.abs(flat).max() > 4.0  # the tails are there: 200000 numbers, 13 of them expected


def test_every_row_and_every_place_is_standard_normal() -> None:
    found = draw(3)
    for of in (found, found.T):
        values = np.array([kstest(row.numpy(), "norm").pvalue for row in of])
        assert kstest(values, "uniform").pvalue > 1e-3  # p-values of true hypotheses are uniform
        assert float(of.var(dim=1).max()) < 1.5 and float(of.var(dim=1).min()) > 0.6


def test_rows_places_counters_and_seeds_are_uncorrelated() -> None:
    base = draw()
    others = {
        "counter": draw(counter=1),
        "seed": draw(seed=1),
        "seed and counter": draw(seed=1, counter=1),
        "next row": draw(ids=torch.arange(ROWS) + 1).roll(0, 0),
        "far rows": draw(ids=torch.arange(ROWS) + 2**33),
        "next place": base.roll(1, 1),
        "other row": base.roll(1, 0),
    }
    limit = 4.5 / math.sqrt(ROWS * COUNT)
    for name, other in others.items():
        assert abs(float((base * other).mean())) < limit, name
        assert abs(float(((base.square() - 1) * (other.square() - 1)).mean())) < 2 * limit, name
        assert not bool((base == other).any()), name
    # All pairs of rows at once: correlations of independent rows of 500 have a standard deviation of 1 / sqrt(500).
    pairs = torch.corrcoef(base)[torch.triu_indices(ROWS, ROWS, 1).unbind()]
    assert float(pairs.std()) == pytest.approx(1 / math.sqrt(COUNT), rel=0.02)
    assert float(pairs.abs().max()) < 6 / math.sqrt(COUNT)


def test_key_is_not_a_sum() -> None:
    """Seed, row and counter are told apart: none of them can stand in for another."""
    keys = [(0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1), (0, 2, 0), (2, 0, 0), (0, 0, 2)]
    drawn = torch.cat([draw(seed, counter, torch.tensor([row])) for seed, row, counter in keys])
    assert len(torch.unique(drawn)) == drawn.numel()


def test_what_a_row_draws_depends_on_nothing_but_its_key() -> None:
    ids = torch.tensor([3, 2**40, 0, 17, 5])
    like = torch.zeros(5, 2, 3, 4, dtype=torch.float64)
    whole = keyed_normal(like, 9, ids, 4)
    assert whole.shape == like.shape
    for rows in ([4, 0], [2], [1, 1, 3]):
        assert torch.equal(keyed_normal(like[rows], 9, ids[rows], 4), whole[rows])
    assert torch.equal(keyed_normal(like + 7.0, 9, ids, 4), whole)  # `like` gives shape and type alone
    assert torch.equal(keyed_normal(like, 9, ids.to(torch.int32).long(), 4)[[0, 2, 3, 4]], whole[[0, 2, 3, 4]])
    torch.testing.assert_close(keyed_normal(like.float(), 9, ids, 4), whole.float(), rtol=0, atol=0)
    state = torch.get_rng_state()
    keyed_normal(like, 0, ids, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_bits_are_those_of_splitmix() -> None:
    """The same in Python's integers of any length; the numbers must not change between versions of torch."""
    mask, phi = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(s: int) -> int:
        s = ((s ^ (s >> 30)) * 0xBF58476D1CE4E5B9) & mask
        s = ((s ^ (s >> 27)) * 0x94D049BB133111EB) & mask
        return s ^ (s >> 31)

    seed, row, counter, count = 12, 2**35 + 1, 6, 3
    key = mix((row + mix((seed + phi) & mask) + counter * phi) & mask)
    uniform = [((mix((key + j * phi) & mask) >> 11) + 0.5) * 2.0**-53 for j in range(1, 2 * count + 1)]
    expected = [math.sqrt(-2 * math.log(uniform[j])) * math.cos(2 * math.pi * uniform[count + j]) for j in range(count)]
    found = keyed_normal(torch.zeros(1, count, dtype=torch.float64), seed, torch.tensor([row]), counter)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("seed", "counter"), [(0, 0), (1, 7), (2**40, 1000), (-3, 0)])
def test_one_number_a_row_is_uniform(seed: int, counter: int) -> None:
    found = keyed_uniform(torch.arange(ROWS * COUNT), seed, counter)
    assert found.dtype is torch.float64 and 0.0 < float(found.min()) < float(found.max()) < 1.0
    assert kstest(found.numpy(), "uniform").pvalue > 1e-3
    following = np.corrcoef(found[:-1].numpy(), found[1:].numpy())[0, 1]
    assert abs(following) < 4.5 / math.sqrt(len(found))


def test_one_number_a_row_depends_on_its_key_alone() -> None:
    ids = torch.tensor([3, 2**40, 0, 17, 5])
    whole = keyed_uniform(ids, 9, 4)
    for rows in ([4, 0], [2], [1, 1, 3]):
        assert torch.equal(keyed_uniform(ids[rows], 9, 4), whole[rows])
    keys = [(0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 1), (0, 2, 0), (2, 0, 0), (0, 0, 2)]
    drawn = torch.cat([keyed_uniform(torch.tensor([row]), seed, counter) for seed, row, counter in keys])
    assert len(torch.unique(drawn)) == len(keys)
    state = torch.get_rng_state()
    keyed_uniform(ids, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
