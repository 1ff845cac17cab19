"""How close a restored image comes to the clean one: PSNR and SSIM on float images in [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasfast.utils.errors import UserError

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2  # for a data range of 1


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, peak 1, of each image: ``[N, C, H, W]`` to ``[N]``.

    Nothing is clamped or rounded. Equal images give infinity.
    """
    _check_shapes("psnr", prediction, target)
    error = (prediction.double() - target.double()).square().mean((1, 2, 3))
    return -10 * error.log10()


def ssim(prediction: Tensor, target: Tensor, *, padding: bool = False) -> Tensor:
    """Mean structural similarity of each image: ``[N, C, H, W]`` to ``[N]``, differentiable.

    Wang et al., 2004: Gaussian window of 11x11 with deviation 1.5, biased variances, data range
    1, channels apart. Computed in float32 (float64 for such input), also under autocast.

    Args:
        prediction: restored images.
        target: clean images.
        padding: extend the images by zeros, so that the window centres on every pixel, as the
            loss of IR-NAS does; else only windows inside the image count, as is usual for
            reports (both sides at least 11 pixels).
    """
    _check_shapes("ssim", prediction, target)
    height, width = target.shape[-2:]
    if not padding and min(height, width) < WINDOW:
        raise UserError(
            f"ssim: expected images of at least {WINDOW}x{WINDOW} pixels, got {height}x{width}; "
            "leave smaller images out"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        x, y = prediction.to(dtype).contiguous(), target.to(dtype).contiguous()
        down, across = _blur(height, padding, x), _blur(width, padding, x).T
        mean_x, mean_y, square_x, square_y, product = (
            down @ torch.stack([x, y, x * x, y * y, x * y]) @ across
        )
        both = mean_x * mean_y
        squares = mean_x.square() + mean_y.square()
        variances = square_x + square_y - squares
        similarity: Tensor = ((2 * both + C1) * (2 * (product - both) + C2)) / (
            (squares + C1) * (variances + C2)
        )
        return similarity.mean((1, 2, 3))


def _blur(size: int, padding: bool, like: Tensor) -> Tensor:
    """The Gaussian window as a band matrix ``[size or size - 10, size]``.

    A product with it is many times faster on a CPU than a convolution with one channel.
    """
    reach = WINDOW // 2
    offset = torch.arange(size, device=like.device)
    offset = offset - offset[:, None] if padding else offset - offset[reach : size - reach, None]
    weight = torch.exp(-offset.to(like.dtype).square() / (2 * SIGMA**2)) * (offset.abs() <= reach)
    taps = [math.exp(-(tap**2) / (2 * SIGMA**2)) for tap in range(-reach, reach + 1)]
    return torch.div(weight, sum(taps))


def _check_shapes(name: str, prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape or target.ndim != 4:
        raise ValueError(
            f"{name}: expected prediction and target of one shape [N, C, H, W], got "
            f"{list(prediction.shape)} and {list(target.shape)}"
        )
