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
