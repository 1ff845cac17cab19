"""Gaussian process regression of rewards on descriptions of architectures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (0.3, 0.5)
"""Length scales that are tried, in units of the distance of two draws of the space."""
NOISES = (0.03, 0.1, 0.3, 1.0)
"""Variances of the noise that are tried, in units of the kernel's."""
TRENDS = (0.0, 1.0, 4.0)
"""Variances of the slope along a trend that are tried, in units of the kernel's."""
MEMBERS = 4
"""How many of the likeliest settings are averaged."""
OUTLIER = 3.0
"""Rewards further below the median than this many robust standard deviations count as that low: how
bad a candidate is that failed to learn tells nothing about the good ones."""


@dataclass(frozen=True)
class _Member:
    """A kernel with its settings, fitted."""

    length: float
    slope: float
    variance: float
    solved: Tensor  # [N], inverse of the covariance times the rewards
    root: Tensor  # [N, N], root @ root.T is the inverse of the covariance
    score: float
    """Logarithm of the likelihood."""


class Scaler:
    """Features as vectors whose entries have mean 0 and variance 1 over the reference.

    That is a sample of the space, not what a search evaluates: there the good ones grow alike, and
    what they have in common would seem to tell nothing.
    """

    def __init__(self, reference: Sequence[Mapping[str, float]]) -> None:
        self._names = sorted({name for each in reference for name in each})
        x = self._matrix(reference)
        self._center, spread = x.mean(0), x.std(0)
        self._scale = torch.where(spread > 1e-9, spread, math.inf)  # a constant tells nothing

    def __call__(self, features: Sequence[Mapping[str, float]]) -> Tensor:
        """float64 ``[N, D]``; a name that the reference lacks is left out."""
        return (self._matrix(features) - self._center) / self._scale

    def _matrix(self, features: Sequence[Mapping[str, float]]) -> Tensor:
        rows = [[each.get(name, 0.0) for name in self._names] for each in features]
        return torch.tensor(rows, dtype=torch.float64)


class GaussianProcess:
    """An ensemble of Gaussian processes whose squared exponential kernels and noises differ,
    weighted by their likelihood (Rasmussen and Williams, Gaussian Processes for Machine Learning,
    2006, section 5.4).

    A linear kernel beside it makes predictions worse where it matters: it promises most of what is
    further out than anything evaluated. Along a trend, which is what is expected of them from
    elsewhere, rewards may rise linearly, as far as they turn out to (Kennedy and O'Hagan,
    Biometrika 87, 2000).

    Args:
        x: at least two architectures, float64 ``[N, D]`` of a `Scaler`.
        rewards: theirs.
        trend: of each, float64 ``[N]`` with mean 0 and variance 1 over the space.
    """

    def __init__(self, x: Tensor, rewards: Sequence[float], trend: Tensor | None = None) -> None:
        y = without_outliers(torch.tensor(rewards, dtype=torch.float64))
        self._mean, self._spread = y.mean(), y.std().clamp(min=1e-12)
        self._x, z = x, (y - self._mean) / self._spread
        self._trend = torch.zeros_like(y) if trend is None else trend
        count = len(y)
        members = []
        for length, slope in itertools.product(LENGTHS, TRENDS if trend is not None else (0.0,)):
            covariance = _kernel(x, x, length) + slope * self._trend.outer(self._trend)
            values, vectors = torch.linalg.eigh(covariance)
            along = vectors.T @ z
            for noise in NOISES:
                spectrum = values.clamp(min=0) + noise
                variance = (along.square() / spectrum).mean().clamp(min=1e-12)
                score = -(count * variance.log() + spectrum.log().sum()) / 2
                solved, root = vectors @ (along / spectrum), vectors / spectrum.sqrt()
                members.append(_Member(length, slope, variance.item(), solved, root, score.item()))
        members.sort(key=lambda member: -member.score)
        self._members = members[:MEMBERS]
        scores = torch.tensor([member.score for member in self._members], dtype=torch.float64)
        self._weights = scores.softmax(0).tolist()

    def predict(self, x: Tensor, trend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the rewards without noise, float64 ``[N]`` each."""
        trend = x.new_zeros(len(x)) if trend is None else trend
        mean = torch.zeros(len(x), dtype=torch.float64)
        square = torch.zeros_like(mean)
        for weight, member in zip(self._weights, self._members):
            cross = _kernel(x, self._x, member.length) + member.slope * trend.outer(self._trend)
            means = cross @ member.solved
            left = 1 + member.slope * trend.square() - (cross @ member.root).square().sum(1)
            mean += weight * means
            square += weight * (member.variance * left.clamp(min=1e-12) + means.square())
        deviation = (square - mean.square()).clamp(min=1e-12).sqrt()
        return self._mean + self._spread * mean, self._spread * deviation


def _kernel(a: Tensor, b: Tensor, length: float) -> Tensor:  # [A, D], [B, D] to [A, B]
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    unit = 2 * a.shape[1]  # between two draws of the space, on average
    return (-squares.clamp(min=0) / (2 * length**2 * unit)).exp()


def without_outliers(rewards: Tensor) -> Tensor:
    """Rewards ``[N]``, none of them far below the median."""
    median = rewards.median()
    spread = 1.4826 * (rewards - median).abs().median()
    return rewards.clamp(min=(median - OUTLIER * spread).item()) if spread > 0 else rewards
