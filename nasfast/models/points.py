"""The points of an anchor-free detector: one a cell of each level of its pyramid.

FCOS: Tian et al., ICCV 2019, arXiv 1904.01355, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIDES = (8, 16, 32, 64, 128)
"""Of the levels P3 to P7, in pixels."""


def level_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """(h, w) of the levels for an image: each halves the one before, rounded up."""
    return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]


def points(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The points of an image in the order of a detector's output: level by level, row by row.

    Returns:
        x and y of each in pixels of the image, float32 ``[P, 2]``, and its stride, ``[P]``.
    """
    places, strides = [], []
    for stride, (rows, columns) in zip(STRIDES, level_sizes(height, width), strict=True):
        x, y = (
            torch.arange(count, device=device, dtype=torch.float32) * stride + stride // 2
            for count in (columns, rows)
        )
        grid = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], -1)
        places.append(grid.reshape(-1, 2))
        strides.append(torch.full((rows * columns,), float(stride), device=device))
    return torch.cat(places), torch.cat(strides)
