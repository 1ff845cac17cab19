"""Gaussian process regression on descriptions of architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_LINEAR = (0.0, 0.3, 0.7, 1.0)
"""Shares of the linear kernel that are tried; the rest is the squared exponential's."""
_LENGTHS = (0.5, 1.0, 2.0)
"""Its length scales that are tried, in units of the mean distance of two architectures."""
_NOISES = (0.03, 0.1, 0.3, 1.0)
"""Variances of the noise that are tried, in units of that of the reward itself."""


class GaussianProcess:
    """Mean and covariance of rewards, given those of some architectures.

    The kernel is a sum of a linear one and of a squared exponential, on counts scaled to unit
    variance. Its settings are those of a grid, weighted by their likelihood: an ensemble, of which
    `draw` takes one member at a time and `predict` the mean.

    Args:
        features: of each architecture, numbers by name (`Space.features`).
        rewards: theirs.
    """

    def __init__(self, features: Sequence[Mapping[str, float]], rewards: Sequence[float]) -> None:
        names = sorted({name for each in features for name in each})
        self._names = names
        x = self._matrix(features)
        self._center, self._scale = x.mean(0), x.std(0).clamp(min=1e-9)
        self._scale[self._scale <= 1e-9] = math.inf  # tells nothing
        y = torch.tensor(rewards, dtype=torch.float64)
        self._mean, self._std = y.mean(), y.std().clamp(min=1e-12)
        self._x, self._y = self._scaled(x), (y - self._mean) / self._std
        self._members: list[tuple[float, float, float, Tensor, Tensor, Tensor]] = []
        scores = []
        count = len(y)
        self._unit = self._distances(self._x, self._x).sum() / max(count * (count - 1), 1)
        for linear in _LINEAR:
            for length in _LENGTHS if linear < 1 else _LENGTHS[:1]:
                kernel = self._kernel(self._x, self._x, linear, length)
                for noise in _NOISES:
                    matrix = kernel + noise * torch.eye(count, dtype=torch.float64)
                    factor = torch.linalg.cholesky(matrix)
                    solved = torch.cholesky_solve(self._y[:, None], factor)[:, 0]
                    variance = (self._y @ solved) / count  # of the kernel, the most likely one
                    scores.append(-count / 2 * variance.log() - factor.diagonal().log().sum())
                    self._members.append((linear, length, noise, factor, solved, variance))
        self.weights = torch.stack(scores).softmax(0)

    def _matrix(self, features: Sequence[Mapping[str, float]]) -> Tensor:
        rows = [[each.get(name, 0.0) for name in self._names] for each in features]
        return torch.tensor(rows, dtype=torch.float64)

    def _scaled(self, x: Tensor) -> Tensor:
        return (x - self._center) / self._scale

    @staticmethod
    def _distances(a: Tensor, b: Tensor) -> Tensor:
        """Squared distances, ``[A, B]``."""
        products = a @ b.T
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * products).clamp(min=0)

    def _kernel(self, a: Tensor, b: Tensor, linear: float, length: float) -> Tensor:
        k = linear * (a @ b.T) / (self._unit / 2)
        if linear < 1:
            k = k + (1 - linear) * (-self._distances(a, b) / (2 * length**2 * self._unit)).exp()
        return k

    def member(self, index: int, features: Sequence[Mapping[str, float]]) -> tuple[Tensor, Tensor]:
        """Mean ``[N]`` and covariance ``[N, N]`` of the rewards that a member predicts."""
        linear, length, _, factor, solved, variance = self._members[index]
        x = self._scaled(self._matrix(features))
        cross = self._kernel(x, self._x, linear, length)
        half = torch.linalg.solve_triangular(factor, cross.T, upper=False)
        mean = cross @ solved
        covariance = variance * (self._kernel(x, x, linear, length) - half.T @ half)
        return self._mean + self._std * mean, self._std**2 * covariance

    def predict(self, features: Sequence[Mapping[str, float]]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the rewards without noise, each ``[N]``, of all members
        by their weights."""
        x = self._scaled(self._matrix(features))
        mean = torch.zeros(len(x), dtype=torch.float64)
        second = torch.zeros_like(mean)
        for weight, (linear, length, _, factor, solved, variance) in zip(
            self.weights.tolist(), self._members, strict=True
        ):
            if weight < 1e-4:
                continue
            cross = self._kernel(x, self._x, linear, length)
            half = torch.linalg.solve_triangular(factor, cross.T, upper=False)
            own = linear * x.square().sum(1) / (self._unit / 2) + (1 - linear)
            m = cross @ solved
            v = variance * (own - half.square().sum(0)).clamp(min=0)
            mean += weight * m
            second += weight * (v + m.square())
        deviation = (second - mean.square()).clamp(min=0).sqrt()
        return self._mean + self._std * mean, self._std * deviation
