"""Rank correlations with bootstrap intervals, noise between repetitions, best of random draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "LEAST",
    "Best",
    "Estimate",
    "best_of_draws",
    "ceiling",
    "estimate",
    "noise",
    "rank_correlations",
]

COVERAGE = 0.95
"""Of every interval here."""
RESAMPLES = 10_000
LEAST = 3
"""Pairs that a correlation takes: two always have one of 1 or -1."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def rank_correlations(
    x: Sequence[float], y: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Kendall's tau-b and Spearman's rho of pairs; both are corrected for ties.

    The intervals are percentiles of the bootstrap: pairs are drawn with replacement. Draws in
    which all values of x or of y are equal have no correlation and are left out.

    Args:
        x: one value a pair.
        y: likewise.
        resamples: of the bootstrap.
        seed: of the resamples.
    """
    count = len(x)
    if count < LEAST:
        return Estimate(None, None, None), Estimate(None, None, None)
    pairs = torch.tensor([*zip(x, y, strict=True)], dtype=torch.float64).reshape(count, 2)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    counts = torch.zeros(resamples, count, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    weights = torch.cat([torch.ones(1, count, dtype=torch.float64), counts])
    tau, rho = _weighted(pairs[:, 0], pairs[:, 1], weights)
    return estimate(tau), estimate(rho)


def _weighted(x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """tau-b and rho of samples [b] that hold the pair i ``weights[b, i]`` times; NaN where one is
    not defined.

    Kendall, The treatment of ties in ranking problems, 1945; rho is Pearson's correlation of the
    mean ranks.
    """
    signs_x, signs_y = (torch.sign(v[:, None] - v[None]) for v in (x, y))

    def total(matrix: Tensor) -> Tensor:
        return ((weights @ matrix) * weights).sum(1)

    tau = total(signs_x * signs_y) / (total(signs_x**2) * total(signs_y**2)).sqrt()
    # as many as are smaller less as many as are larger: twice the rank, 0 on average
    ranks_x, ranks_y = weights @ signs_x.T, weights @ signs_y.T
    covariance, first, second = (
        (weights * a * b).sum(1)
        for a, b in ((ranks_x, ranks_y), (ranks_x, ranks_x), (ranks_y, ranks_y))
    )
    return tau, covariance / (first * second).sqrt()


def estimate(values: Tensor) -> Estimate:
    """Of a figure [1 + resamples], the sample's own first; the interval is that of percentiles.
    Resamples without the figure (NaN) are left out."""
    value, resampled = values[0].item(), values[1:]
    resampled = resampled[resampled.isfinite()]
    if not math.isfinite(value) or not len(resampled):
        return Estimate(None, None, None)
    tail = (1 - COVERAGE) / 2
    edges = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = resampled.quantile(edges).tolist()
    return Estimate(value, low, high)


def noise(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation of repetitions of the same, pooled over groups; None where no group has
    two."""
    squares, freedom = 0.0, 0
    for group in groups:
        mean = sum(group) / len(group)
        squares += sum((value - mean) ** 2 for value in group)
        freedom += len(group) - 1
    return math.sqrt(squares / freedom) if freedom else None


def ceiling(groups: Sequence[Sequence[float]]) -> float | None:
    """Largest correlation that anything can have with the means of the groups, given their noise.

    It is the square root of the reliability, 1 - (variance of a mean by noise) / (variance of the
    means) (Spearman, 1904), exact for Pearson's correlation and near it for rank correlations of
    normal values. None where the noise is not known or the means are equal.
    """
    deviation = noise(groups)
    if deviation is None or len(groups) < 2:
        return None
    means = torch.tensor([sum(group) / len(group) for group in groups], dtype=torch.float64)
    spread = means.var().item()
    if spread == 0:
        return None
    of_mean = deviation**2 * sum(1 / len(group) for group in groups) / len(groups)
    return math.sqrt(max(0.0, 1 - of_mean / spread))


@dataclass(frozen=True)
class Best:
    """The best of some random draws."""

    mean: float
    low: float
    high: float
    """The mean, and quantiles: ends of the interval."""


def best_of_draws(values: Sequence[float]) -> list[Best]:
    """The best of n = 1 .. N values drawn without replacement, exactly: over all orders of the N.

    The best of n is at most the i-th smallest value in C(i, n) of C(N, n) draws.
    """
    ordered, tail = torch.tensor(values, dtype=torch.float64).sort().values, (1 - COVERAGE) / 2
    factorial = torch.lgamma(torch.arange(len(values) + 1, dtype=torch.float64) + 1)  # logarithms
    found = []
    for n in range(1, len(values) + 1):
        ways = factorial[n:] - factorial[: len(values) + 1 - n]
        shares = (ways - ways[-1]).exp()
        mean = (ordered[n - 1 :] * torch.diff(shares, prepend=shares.new_zeros(1))).sum()
        ends = torch.searchsorted(shares, shares.new_tensor([tail, 1 - tail]))
        low, high = ordered[n - 1 + ends].tolist()
        found.append(Best(mean.item(), low, high))
    return found
