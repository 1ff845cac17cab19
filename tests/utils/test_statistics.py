"""Rank correlations, noise and best draws against values by hand, scipy and enumeration."""

import itertools
import math
import statistics

import pytest

from nasfast.utils.statistics import Estimate, best_of_draws, ceiling, noise, rank_correlations

NONE = Estimate(None, None, None)


@pytest.mark.parametrize(
    ("x", "y", "tau", "rho"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1, 1),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1, -1),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6, 0.8),
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3), math.sqrt(3) / 2),  # one tie in x
    ],
)
def test_by_hand(x, y, tau, rho):
    found = rank_correlations(x, y, resamples=200)
    assert [estimate.value for estimate in found] == pytest.approx([tau, rho])


@pytest.mark.parametrize("count", [5, 12])
def test_as_scipy_with_ties(count):
    scipy = pytest.importorskip("scipy.stats")
    x, y = [i * 7 % 5 for i in range(count)], [i * i % 7 for i in range(count)]
    tau, rho = rank_correlations(x, y, resamples=200)
    assert tau.value == pytest.approx(scipy.kendalltau(x, y).statistic)
    assert rho.value == pytest.approx(scipy.spearmanr(x, y).statistic)


def test_the_interval_narrows_with_pairs_and_repeats():
    x = [float(i) for i in range(40)]
    y = [i + 8 * math.sin(5 * i) for i in range(40)]
    (few, _), (many, _) = (rank_correlations(x[:n], y[:n], resamples=2000) for n in (8, 40))
    assert many.low < many.value < many.high
    assert many.high - many.low < few.high - few.low
    assert rank_correlations(x, y) == rank_correlations(x, y)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3])])
def test_what_has_no_correlation(x, y):
    assert rank_correlations(x, y, resamples=50) == (NONE, NONE)


def test_noise_and_ceiling():
    groups = [[1.0, 3.0], [5.0, 7.0], [9.0, 11.0]]  # variance 2 within, means 2, 6, 10
    assert noise(groups) == pytest.approx(math.sqrt(2))
    assert ceiling(groups) == pytest.approx(math.sqrt(1 - 1 / 16))
    assert ceiling([[1.0, 9.0], [2.0, 8.5]]) == 0
    assert noise([[1.0], [2.0]]) is ceiling([[1.0], [2.0]]) is ceiling([[1.0, 2.0]]) is None


def test_best_of_draws_as_all_draws():
    values = [3.0, 1.0, 2.0, 2.0, 5.0]
    for n, best in enumerate(best_of_draws(values), start=1):
        draws = sorted(max(draw) for draw in itertools.combinations(values, n))
        assert best.mean == pytest.approx(statistics.fmean(draws))
        assert (best.low, best.high) == (draws[0], draws[-1])
    assert best_of_draws([]) == []
