"""Scores of depth estimation (Eigen et al., 2014, section 4), sums of which stay on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nasfast.data.depth import DepthDataset
from nasfast.training.pictures import spread

DELTA = 1.25
LEAST = 1e-3
"""Metres that predictions are raised to before they are scored."""


@dataclass(frozen=True)
class DepthScores:
    """Errors over all known pixels of all images, d predicted and t true, in metres."""

    delta1: float
    """Share of the pixels whose max(d / t, t / d) is below 1.25."""
    delta2: float
    """Below 1.25^2."""
    delta3: float
    """Below 1.25^3."""
    rmse: float
    """Root of the mean of (d - t)^2, in metres."""
    rmse_log: float
    """Root of the mean of (ln d - ln t)^2."""
    abs_rel: float
    """Mean of |d - t| / t."""
    sqr_rel: float
    """Mean of (d - t)^2 / t, in metres."""
    deviation: float
    """Standard deviation of t, in metres: the RMSE of their mean."""

    @property
    def reward(self) -> float:
        """Geometric mean of delta1 and of 1 / (1 + RMSE / deviation), 0 to 1. The second is 0.5
        where the mean depth is predicted everywhere, whatever the scale of the scenes."""
        relative = self.rmse / self.deviation if self.deviation > 0 else self.rmse
        return math.sqrt(self.delta1 / (1 + relative))

    def as_dict(self) -> dict[str, float]:
        """The seven metrics."""
        return {name: value for name, value in vars(self).items() if name != "deviation"}


def mean_depth_scores(
    train: DepthDataset, part: DepthDataset, cap: float | None = None
) -> DepthScores | None:
    """Scores on a part of predicting at each pixel the mean depth that it has in train, of up to
    1,000 samples: what a network has to beat. None where sizes differ."""
    if len({*train.sizes(), *part.sizes()}) > 1:
        return None
    depths = [train[index].mask.double() for index in spread(len(train), 1000)]
    zero = torch.zeros_like(depths[0])
    total, count = sum(depths, zero), sum(((depth > 0).double() for depth in depths), zero)
    mean = (total / count).where(count > 0, total.sum() / count.sum())
    errors = DepthErrors(torch.device("cpu"), cap)
    for index in range(len(part)):
        errors.update(mean, part[index].mask)
    return errors.compute()


class DepthErrors:
    """Sums over pixels, float64; updates never wait for the device.

    Args:
        device: where they live.
        cap: metres that predictions are cut to.
    """

    def __init__(self, device: torch.device, cap: float | None = None) -> None:
        self._cap = cap
        self._sums = torch.zeros(10, dtype=torch.float64, device=device)

    def update(self, depth: Tensor, truth: Tensor) -> None:
        """Count metres of one shape; those whose truth is 0 are left out."""
        if depth.shape != truth.shape:
            raise ValueError(
                f"DepthErrors.update: expected depths and truth of one shape, got "
                f"{list(depth.shape)} and {list(truth.shape)}; resize the depths first"
            )
        known = truth > 0
        d = depth.double().clamp(LEAST, self._cap).where(known, 1.0)
        t = truth.double().where(known, 1.0)
        ratio, square = torch.maximum(d / t, t / d), (d - t).square()
        terms = (
            *((ratio < DELTA**k).double() for k in (1, 2, 3)),
            square,
            (d.log() - t.log()).square(),
            (d - t).abs() / t,
            square / t,
            t,
            t.square(),
            torch.ones_like(t),
        )
        self._sums += torch.stack([(term * known).sum() for term in terms])

    def compute(self) -> DepthScores:
        """Scores over all counted pixels; all 0 where there are none."""
        *sums, pixels = self._sums.tolist()
        d1, d2, d3, square, log, absolute, relative, mean, second = (
            each / max(pixels, 1) for each in sums
        )
        deviation = math.sqrt(max(second - mean**2, 0))
        return DepthScores(
            d1, d2, d3, math.sqrt(square), math.sqrt(log), absolute, relative, deviation
        )
