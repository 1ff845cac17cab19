"""Skeletons drawn over an image."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from nasfast.data.keypoints.base import MIDDLE, Skeleton

LEAST_SIDE = 200
"""Pixels of a picture, the longer side: smaller images are enlarged."""


def drawn(image: Tensor, joints: Tensor, there: Tensor, skeleton: Skeleton) -> Tensor:
    """Bones and joints in the colours of their sides, uint8 ``[3, h, w]``.

    Args:
        image: uint8 ``[3, H, W]``.
        joints: float ``[P, J, 2]``, x and y in its pixels, of P people.
        there: bool ``[P, J]``, which are drawn; a bone needs both of its joints.
        skeleton: names and bones.
    """
    factor = math.ceil(LEAST_SIDE / max(image.shape[1:]))
    canvas = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    if factor > 1:
        size = (factor * canvas.width, factor * canvas.height)
        canvas = canvas.resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 200))
    colors = skeleton.colors
    for points, seen in zip((factor * joints).tolist(), there.tolist(), strict=True):
        for a, b in skeleton.bones:
            if seen[a] and seen[b]:
                color = colors[a] if colors[a] == colors[b] else MIDDLE
                draw.line((*points[a], *points[b]), fill=color, width=line)
        for (x, y), there_, color in zip(points, seen, colors, strict=True):
            if there_:
                edges = (x - 1.5 * line, y - 1.5 * line, x + 1.5 * line, y + 1.5 * line)
                draw.ellipse(edges, fill=color, outline="black")
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
