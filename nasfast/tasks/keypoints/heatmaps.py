"""Heatmaps of joints: what a network learns, and the points that are read from what it gives.

Points are in pixels of the network's input, whose edges are 0 and W, 0 and H; a map of h x w cells
covers it, and the centre of cell (y, x) is at ((y + 0.5) H / h, (x + 0.5) W / w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FINEST = 4
"""Stride of the maps that are learned."""
ROWS = 32
"""Rows of a map for one cell of standard deviation."""


def sigma_of(rows: int) -> float:
    """Standard deviation of a joint's Gaussian, in cells of a map of so many rows.

    A 32nd of the rows, and at least a cell: 2 cells of 64 x 48 and 3 of 96 x 72, as in Simple
    Baselines (Xiao et al., ECCV 2018) and HRNet for crops of 256 x 192 and 384 x 288.
    """
    return max(1.0, rows / ROWS)


def heatmaps(joints: Tensor, stride: float, size: tuple[int, int]) -> Tensor:
    """A Gaussian of height 1 about each joint, `sigma_of` wide: float32 ``[.., J, h, w]``.

    Args:
        joints: ``[.., J, 2]``, x and y in pixels of the input.
        stride: pixels of a cell.
        size: (h, w).
    """
    sigma = sigma_of(size[0])
    x, y = (
        torch.exp(
            -(torch.arange(side, device=joints.device) + 0.5 - joints[..., axis, None] / stride)
            .square()
            .div(2 * sigma**2)
        )
        for axis, side in ((0, size[1]), (1, size[0]))
    )
    return y[..., :, None] * x[..., None, :]


def energy(rows: int) -> float:
    """Sum of the squares of a Gaussian of `heatmaps`: pi sigma^2, as of one that is not cut."""
    return math.pi * sigma_of(rows) ** 2


def decode(maps: Tensor, size: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Points and confidences of heatmaps.

    A point is the highest cell, moved by the Taylor expansion of the map's logarithm about it
    (DARK, Zhang et al., CVPR 2020, without its smoothing), along each axis: a Gaussian that is as
    wide as high has no mixed term, and its centre is found exactly. It moves by half a cell at
    most, and not across the border.

    Args:
        maps: float ``[.., J, h, w]``.
        size: (H, W) of the input that they cover.

    Returns:
        Points float32 ``[.., J, 2]``, x and y in pixels of the input, and the heights of the cells,
        ``[.., J]``.
    """
    h, w = maps.shape[-2:]
    flat = maps.float().flatten(-2)
    peak, index = flat.max(-1)
    row, column = index // w, index % w
    logs = flat.clamp(min=1e-6).log()

    def moved(place: Tensor, side: int, step: int) -> Tensor:
        inside = (place > 0) & (place < side - 1) & (peak > 0)
        before, here, after = (
            logs.gather(-1, (index + k * step).clamp(0, h * w - 1)[..., None])[..., 0]
            for k in (-1, 0, 1)
        )
        bend = (2 * here - before - after).clamp(min=1e-6)
        return torch.where(inside, (0.5 * (after - before) / bend).clamp(-0.5, 0.5), 0.0)

    x = (column + 0.5 + moved(column, w, 1)) * (size[1] / w)
    y = (row + 0.5 + moved(row, h, w)) * (size[0] / h)
    return torch.stack([x, y], -1), peak


def flip_tested(
    predict: Callable[[Tensor], Tensor], mirrored: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """A network whose maps ``[N, J, h, w]`` are the means of those of the images and of those of
    their mirror images, mirrored back.

    Args:
        predict: the network; images ``[N, 3, H, W]`` to maps that cover them.
        mirrored: index of the joint that each becomes in a mirror image.
    """
    order = list(mirrored)

    def both(images: Tensor) -> Tensor:
        return (predict(images) + predict(images.flip(-1)).flip(-1)[:, order]) / 2

    return both
