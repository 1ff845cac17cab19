"""Gaussian process regression of rewards on descriptions of architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (0.3, 0.5)
"""Length scales that are tried, in units of the distance of two draws of the space."""
NOISES = (0.03, 0.1, 0.3, 1.0)
"""Variances of the noise that are tried, in units of the kernel's."""
MEMBERS = 4
"""How many of the likeliest settings are averaged."""
OUTLIER = 3.0
"""Rewards further below the median than this many robust standard deviations count as that low: how
bad a candidate is that failed to learn tells nothing about the good ones."""


@dataclass(frozen=True)
class _Member:
    """A kernel with its settings, fitted."""

    length: float
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
    further out than anything evaluated.

    Args:
        x: at least two architectures, float64 ``[N, D]`` of a `Scaler`.
        rewards: theirs.
    """

    def __init__(self, x: Tensor, rewards: Sequence[float]) -> None:
        y = without_outliers(torch.tensor(rewards, dtype=torch.float64))
        self._mean, self._spread = y.mean(), y.std().clamp(min=1e-12)
        self._x, z = x, (y - self._mean) / self._spread
        count = len(y)
        members = []
        for length in LENGTHS:
            values, vectors = torch.linalg.eigh(_kernel(x, x, length))
            along = vectors.T @ z
            for noise in NOISES:
                spectrum = values.clamp(min=0) + noise
                variance = (along.square() / spectrum).mean().clamp(min=1e-12)
                score = -(count * variance.log() + spectrum.log().sum()) / 2
                solved, root = vectors @ (along / spectrum), vectors / spectrum.sqrt()
                members.append(_Member(length, variance.item(), solved, root, score.item()))
        members.sort(key=lambda member: -member.score)
        self._members = members[:MEMBERS]
        scores = torch.tensor([member.score for member in self._members], dtype=torch.float64)
        self._weights = scores.softmax(0).tolist()

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the rewards without noise, float64 ``[N]`` each."""
        mean = torch.zeros(len(x), dtype=torch.float64)
        square = torch.zeros_like(mean)
        for weight, member in zip(self._weights, self._members):
            cross = _kernel(x, self._x, member.length)
            means = cross @ member.solved
            left = 1 - (cross @ member.root).square().sum(1)
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
