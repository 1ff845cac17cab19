"""Restoration without training, to compare networks with under the same protocol."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.utils.errors import UserError

DCT_SIDE = 8
STRIP = 16  # rows of windows at a time: their 64 coefficients a pixel stay in the cache


def dct_filter(images: Tensor, sigma: float, threshold: float = 2.7) -> Tensor:
    """Denoise by a sliding DCT: hard threshold in every 8x8 window, weighted mean of all windows.

    Translation-invariant thresholding (Coifman and Donoho, 1995) with the transform of Yu and
    Sapiro, "DCT image denoising", IPOL 2011, which takes a DCT over the channels first. A window
    weighs the inverse of how many coefficients it keeps (Guleryuz, 2007): against equal weights
    +0.1 dB at sigma 50, +0.25 dB at 70 on grey BSDS500. The border is mirrored, so that every
    pixel lies in 64 windows; the mean of a window is kept.

    Args:
        images: noisy images ``[N, C, H, W]`` in [0, 1], sides at least 8.
        sigma: deviation of the noise on the same scale.
        threshold: coefficients below this times sigma are noise.
    """
    height, width = images.shape[-2:]
    if min(height, width) < DCT_SIDE:
        raise UserError(
            f"dct_filter: expected images of at least {DCT_SIDE}x{DCT_SIDE} pixels, got "
            f"{height}x{width}; leave smaller images out"
        )
    across = _dct(images.shape[1]).to(images)
    basis = torch.kron(_dct(DCT_SIDE), _dct(DCT_SIDE)).to(images)  # [64, 64], the mean first
    planes = torch.einsum("dc,nchw->ndhw", across, images).flatten(0, 1)
    restored = torch.stack([_threshold(plane, basis, threshold * sigma) for plane in planes])
    return torch.einsum("dc,ndhw->nchw", across, restored.reshape(images.shape))


def _threshold(plane: Tensor, basis: Tensor, threshold: float) -> Tensor:
    """One plane ``[H, W]``, filtered."""
    reach = DCT_SIDE - 1
    mirrored = F.pad(plane[None, None], (reach,) * 4, mode="reflect")
    total, weights = torch.zeros_like(mirrored), torch.zeros_like(mirrored)
    for top in range(0, mirrored.shape[2] - reach, STRIP):
        rows = (..., slice(top, top + STRIP + reach), slice(None))
        strip = mirrored[rows]
        size = strip.shape[-2:]
        coefficients = basis @ F.unfold(strip, DCT_SIDE)  # [1, 64, windows]
        kept = coefficients.abs() >= threshold
        kept[:, 0] = True
        weight = 1 / kept.sum(1, keepdim=True, dtype=plane.dtype)
        restored = basis.T @ coefficients.mul_(kept).mul_(weight)
        total[rows] += F.fold(restored, size, DCT_SIDE)
        weights[rows] += F.fold(weight.expand_as(restored), size, DCT_SIDE)
    return (total / weights)[0, 0, reach:-reach, reach:-reach]


def _dct(size: int) -> Tensor:
    """Orthonormal DCT-II ``[size, size]``, a coefficient a row, float64."""
    n = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * (n + 0.5) * n[:, None]) * math.sqrt(2 / size)
    rows[0] = math.sqrt(1 / size)
    return rows


def noise_deviation(images: Tensor) -> float:
    """Deviation of white noise in images ``[N, C, H, W]``, sides at least 2, on their
    scale: the median of their finest diagonal Haar coefficients (Donoho and Johnstone, 1994).

    Noise that varies slowly from pixel to pixel, as cameras and JPEG leave it, is underestimated.
    """
    height, width = (side - side % 2 for side in images.shape[-2:])
    rows = images[..., 0:height:2, :width] - images[..., 1:height:2, :width]
    diagonal = (rows[..., 0::2] - rows[..., 1::2]) / 2
    return diagonal.abs().median().item() / 0.6745


def non_local_means(images: Tensor, sigma: float) -> Tensor:
    """Denoise by non-local means (Buades et al., 2005) of scikit-image, with known noise.

    Patches of 5x5 in a window of 13x13, h = 0.6 sigma, the fast mode: on BSDS500 no other setting
    of its cost that was tried is better at sigma 30 and 50.

    Args:
        images: noisy images ``[N, C, H, W]`` in [0, 1].
        sigma: deviation of the noise on the same scale.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage.restoration import denoise_nl_means
    except ImportError as error:
        raise ImportError(
            "non-local means needs scikit-image, which is not installed: "
            "pip install 'nasfast[restoration]'"
        ) from error
    restored = [
        denoise_nl_means(
            image if image.shape[-1] > 1 else image[..., 0],
            patch_size=5,
            patch_distance=6,
            h=0.6 * sigma,
            sigma=sigma,
            fast_mode=True,
            channel_axis=-1 if image.shape[-1] > 1 else None,
        ).reshape(image.shape)
        for image in images.double().permute(0, 2, 3, 1).numpy()  # [H, W, C]
    ]
    return torch.from_numpy(np.stack(restored)).permute(0, 3, 1, 2).to(images.dtype)


def bicubic(images: Tensor, scale: int) -> Tensor:
    """Enlarge ``[N, C, h, w]`` to ``[N, C, scale * h, scale * w]`` (bicubic, a = -0.5)."""
    size = [scale * side for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def diffuse(images: Tensor, steps: int = 500) -> Tensor:
    """Fill missing pixels from their neighbours: heat flow from the known ones, which stay.

    Args:
        images: ``[N, C, H, W]``; pixels that are 0 in all channels count as missing.
        steps: of Jacobi's iteration for Laplace's equation; gaps are filled well up to about
            the square root of them in width.
    """
    missing = (images == 0).all(1, keepdim=True)
    known = (~missing).sum((2, 3), keepdim=True).clamp(min=1)
    filled = torch.where(missing, images.sum((2, 3), keepdim=True) / known, images)
    for _ in range(steps):
        around = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        rows = around[..., :-2, 1:-1] + around[..., 2:, 1:-1]
        columns = around[..., 1:-1, :-2] + around[..., 1:-1, 2:]
        filled = torch.where(missing, (rows + columns) / 4, images)
    return filled


def dark_channel_prior(images: Tensor) -> Tensor:
    """Remove haze by the dark channel prior (He, Sun and Tang, CVPR 2009): some channel of some
    pixel in a window of 15x15 would be dark without haze.

    The airlight is the brightest pixel among the 0.1 % with the brightest dark channel; 95 % of
    the haze is removed, and what passes it counts as 10 % at least. A guided filter refines the
    transmission in place of soft matting.

    Args:
        images: hazy images ``[N, C, H, W]`` in [0, 1].
    """
    dark = dark_channel(images, 15).flatten(1)  # [N, H * W]
    hazy = dark.topk(math.ceil(dark.shape[1] / 1000)).indices[:, None]
    light = images.flatten(2).take_along_dim(hazy, 2)  # [N, C, k]
    brightest = light.sum(1, keepdim=True).argmax(2, keepdim=True)
    airlight = light.take_along_dim(brightest, 2)[..., None].clamp(min=1 / 255)
    transmission = 1 - 0.95 * dark_channel(images / airlight, 15)
    transmission = guided_filter(images.mean(1, keepdim=True), transmission, 20, 1e-3)
    return (images - airlight) / transmission.clamp(min=0.1) + airlight


def dark_channel(images: Tensor, window: int) -> Tensor:
    """The least value of all channels in the window around a pixel, of an odd side: ``[N, C, H,
    W]`` to ``[N, 1, H, W]``. Beyond the border is nothing."""
    return -F.max_pool2d(-images.amin(1, keepdim=True), window, stride=1, padding=window // 2)


def guided_filter(guide: Tensor, images: Tensor, radius: int, epsilon: float) -> Tensor:
    """Smooth images and keep the edges of a guide (He, Sun and Tang, "Guided image filtering",
    ECCV 2010): in each window, a linear function of the guide; a pixel has the mean of its windows.

    Args:
        guide: ``[N, 1, H, W]``.
        images: ``[N, 1, H, W]``.
        radius: a window has 2 * radius + 1 pixels a side, fewer at the border.
        epsilon: variance of the guide below which a window is smoothed.
    """

    def mean(values: Tensor) -> Tensor:
        side = 2 * radius + 1
        columns = F.avg_pool2d(values, (side, 1), 1, (radius, 0), count_include_pad=False)
        return F.avg_pool2d(columns, (1, side), 1, (0, radius), count_include_pad=False)

    mean_guide, mean_images = mean(guide), mean(images)
    variance = mean(guide * guide) - mean_guide * mean_guide
    slope = (mean(guide * images) - mean_guide * mean_images) / (variance + epsilon)
    return mean(slope) * guide + mean(mean_images - slope * mean_guide)
