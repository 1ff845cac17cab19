"""Which object each point of a detector learns: the assignment of FCOS.

Tian et al., ICCV 2019, arXiv 1904.01355, section 3.2; centre sampling of arXiv 2006.09214.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasfast.data.detection import PADDING
from nasfast.models.points import STRIDES, level_sizes, points

BACKGROUND, NOT_COUNTED = -1, -2
"""Of dense targets, beside the classes."""
SIZES = (64.0, 128.0, 256.0, 512.0)
"""Bounds, in pixels, between the sizes of the objects that P3 to P7 learn."""
_CHUNK = 2**20  # pairs of a point and a box that are in memory at once, at 10 bytes


@torch.no_grad()
def assign(
    boxes: Tensor,  # [N, M, 4]
    labels: Tensor,  # [N, M]
    size: tuple[int, int],
    *,
    size_scale: float = 1.0,
    center_sampling: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Classes and distances that the points of images have to give.

    A point takes the smallest box, by area, of those in which it lies, edges excluded, and whose
    farthest side from it is in the range of its level, bounds included; the first of equal ones.
    Points of no box, but inside of an ignored one, are not counted. No step depends on the data:
    a GPU need not wait, and the step can be recorded.

    Args:
        boxes: left, top, right, bottom in pixels.
        labels: int64, see `PADDING`.
        size: (H, W) of the padded images.
        size_scale: factor of `SIZES`.
        center_sampling: points must also lie less than so many strides from the centre of their
            box, horizontally and vertically; 0 leaves it out.

    Returns:
        Classes, int64 ``[N, P]``, -1 is background and -2 not counted; and the distances from the
        points to the left, top, right and bottom of their boxes, float32 ``[N, P, 4]``, in pixels,
        1 where there is no box.
    """
    boxes = boxes.float()
    if boxes.device.type == "cpu":  # rows that are padding in all images
        used = max((labels != PADDING).any(0).nonzero().flatten().tolist(), default=-1) + 1
        boxes, labels = boxes[:, :used], labels[:, :used]
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    order = areas.argsort(dim=1, stable=True)  # the smallest box that takes a point is the first
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    labels = labels.gather(1, order)
    bounds = [-math.inf, *(size_scale * bound for bound in SIZES), math.inf]
    found = [
        _owners(boxes, labels, level, stride, (bounds[i], bounds[i + 1]), center_sampling)
        for i, (stride, level) in enumerate(zip(STRIDES, level_sizes(*size), strict=True))
    ]
    owners, unclear = (torch.cat(each, 1) for each in zip(*found, strict=True))  # [N, P]
    # a last row for the points of no box
    boxes = torch.cat([boxes, boxes.new_zeros(len(boxes), 1, 4)], 1)
    labels = torch.cat([labels, labels.new_full((len(labels), 1), BACKGROUND)], 1)
    none = owners == labels.shape[1] - 1
    classes = labels.gather(1, owners).masked_fill(unclear & none, NOT_COUNTED)
    owned = boxes.gather(1, owners[..., None].expand(-1, -1, 4))
    places, _ = points(*size, boxes.device)
    distances = torch.cat([places - owned[..., :2], owned[..., 2:] - places], -1)
    return classes, distances.masked_fill(none[..., None], 1.0)


def _owners(
    boxes: Tensor,
    labels: Tensor,
    level: tuple[int, int],
    stride: int,
    bounds: tuple[float, float],
    radius: float,
) -> tuple[Tensor, Tensor]:
    """For the points of a level, row by row, ``[N, h * w]``: the first box that takes each, M if
    none does, and whether it lies in an ignored one."""
    count = labels.shape[1]
    rows, columns = level
    if count == 0:
        shape = (len(labels), rows * columns)
        return labels.new_zeros(shape), labels.new_zeros(shape, dtype=torch.bool)
    index = torch.arange(count, device=boxes.device, dtype=torch.int32)[:, None, None]
    learned, ignored = ((labels >= 0)[..., None], (labels < PADDING)[..., None])
    far_y, in_y, near_y = _along(rows, stride, boxes[..., 1], boxes[..., 3], radius)
    far_x, in_x, near_x = _along(columns, stride, boxes[..., 0], boxes[..., 2], radius)
    far_x, near_x, in_x = (
        far_x[:, :, None],
        (near_x & learned)[:, :, None],
        (in_x & ignored)[:, :, None],
    )
    owners, unclear = [], []
    step = max(1, _CHUNK // (len(labels) * count * columns))
    for first in range(0, rows, step):
        piece = slice(first, first + step)
        far = torch.maximum(far_y[:, :, piece, None], far_x)  # [N, M, h, w]
        takes = (far >= bounds[0]) & (far <= bounds[1])
        takes &= near_y[:, :, piece, None] & near_x
        owners.append(torch.where(takes, index, count).amin(1).flatten(1).long())
        unclear.append((in_y[:, :, piece, None] & in_x).any(1).flatten(1))
    return torch.cat(owners, 1), torch.cat(unclear, 1)


def _along(
    count: int, stride: int, low: Tensor, high: Tensor, radius: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of points along one axis against boxes from ``low`` to ``high``, all ``[N, M, count]``: the
    distance to the farther side, whether it lies inside, and whether also near the centre."""
    low, high = low[..., None], high[..., None]
    places = torch.arange(count, device=low.device, dtype=torch.float32) * stride + stride // 2
    inside = (places > low) & (places < high)
    near = inside
    if radius > 0:
        near = inside & ((places - (low + high) / 2).abs() < radius * stride)
    return torch.maximum(places - low, high - places), inside, near
