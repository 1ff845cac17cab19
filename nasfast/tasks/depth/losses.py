"""Losses of depth estimation, of the logarithms that a network gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nasfast.data.depth import DepthReading

Loss = Literal["berhu", "l1-log", "scale-invariant"]
THRESHOLD = 0.2
"""Of the reverse Huber loss, as a share of the batch's largest error."""
LAMBDA = 0.5
"""Of the scale-invariant loss: 0 is the mean squared error of the logarithms, 1 sees no scale."""


@dataclass(frozen=True)
class DepthSettings(DepthReading):
    """How depth files are read, and what a network learns from them."""

    loss: Loss | None = None
    """berhu: reverse Huber, in metres. l1-log: absolute error of the logarithms. scale-invariant:
    of Eigen et al. (2014). Default: berhu."""


def berhu(logs: Tensor, depth: Tensor, known: Tensor) -> Tensor:
    """Reverse Huber loss (Laina et al., 2016, section 3.2), in metres: |e| up to c, and
    (e^2 + c^2) / 2c beyond, where c is a fifth of the largest |e| of the batch; the mean over
    pixels.

    Args:
        logs: logarithms of predicted metres ``[N, H, W]``, float32.
        depth: metres ``[N, H, W]``, any where they are not known.
        known: which are, bool ``[N, H, W]``.
    """
    error = (logs.exp() - depth).abs().where(known, 0.0)
    limit = (THRESHOLD * error.detach().amax()).clamp(min=torch.finfo(error.dtype).tiny)
    beyond = (error.square() + limit.square()) / (2 * limit)
    return torch.where(error <= limit, error, beyond).sum() / known.sum().clamp(min=1)


def l1_log(logs: Tensor, depth: Tensor, known: Tensor) -> Tensor:
    """Mean over pixels of the absolute difference of the logarithms; arguments as of `berhu`."""
    error = (logs - depth.where(known, 1.0).log()).abs().where(known, 0.0)
    return error.sum() / known.sum().clamp(min=1)


def scale_invariant(logs: Tensor, depth: Tensor, known: Tensor) -> Tensor:
    """Mean over images of mean(d^2) - lambda mean(d)^2, where d is the difference of the
    logarithms at a pixel (Eigen et al., 2014, section 3.2, with lambda 0.5); arguments as of
    `berhu`. Images without a known pixel do not count."""
    error = (logs - depth.where(known, 1.0).log()).where(known, 0.0)
    pixels = known.sum((1, 2)).clamp(min=1)
    mean, square = error.sum((1, 2)) / pixels, error.square().sum((1, 2)) / pixels
    return (square - LAMBDA * mean.square()).sum() / known.flatten(1).any(1).sum().clamp(min=1)


LOSSES: Mapping[Loss, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "berhu": berhu,
    "l1-log": l1_log,
    "scale-invariant": scale_invariant,
}
