"""Non-maximum suppression of boxes of many classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def nms(
    boxes: Tensor,  # [N, C, 4]
    scores: Tensor,  # [N, C]
    labels: Tensor,  # [N, C]
    threshold: float = 0.6,
    limit: int | None = 100,
) -> Tensor:
    """The boxes that greedy suppression keeps: from the highest score on, a box is dropped if its
    IoU with a kept one of the same class is greater than ``threshold``.

    Classes are compared, not shifted apart, so that large coordinates lose no digits. Of equal
    scores the first row counts. Boxes without area suppress nothing. A CPU uses numba where it is
    installed, all other devices operations of torch, without a copy to the host.

    Args:
        boxes: left, top, right, bottom.
        scores: rows below 0 are no boxes.
        labels: int64, the class.
        threshold: from 0 to 1.
        limit: most boxes that are kept of an image; None: all.

    Returns:
        Indices of the kept rows by falling score, int64 ``[N, limit]`` (``[N, C]``), and -1 after
        the last.

    Raises:
        ValueError: NaN among boxes or scores on a CPU; another device does not look.
    """
    boxes, scores = boxes.float(), scores.float()
    limit = boxes.shape[1] if limit is None else limit
    if boxes.device.type != "cpu":
        return nms_reference(boxes, scores, labels, threshold, limit)
    if boxes.isnan().any() or scores.isnan().any():
        raise ValueError("nms: expected boxes and scores that are numbers, got NaN")
    kernel = _kernel()
    if kernel is None:
        return nms_reference(boxes, scores, labels, threshold, limit)
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = torch.full((len(boxes), limit), -1)
    arrays = (each.contiguous().numpy() for each in (boxes, scores, labels, order, kept))
    kernel(*arrays, np.float32(threshold))
    return kept


def nms_reference(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, limit: int
) -> Tensor:
    """`nms` by operations of torch: the best box that is left is taken ``limit`` times."""
    left, top, right, bottom = boxes.unbind(-1)  # [N, C]
    areas = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
    kept = torch.full((len(boxes), limit), -1, device=boxes.device)
    if boxes.shape[1] == 0:
        return kept
    scores = scores.clone()
    for place in range(limit):
        best = scores.argmax(1, keepdim=True)
        score = scores.gather(1, best)
        kept[:, place] = torch.where(score >= 0, best, -1)[:, 0]
        width = torch.minimum(right, right.gather(1, best))
        width = (width - torch.maximum(left, left.gather(1, best))).clamp(min=0)
        height = torch.minimum(bottom, bottom.gather(1, best))
        height = (height - torch.maximum(top, top.gather(1, best))).clamp(min=0)
        both = width * height
        same = labels == labels.gather(1, best)
        over = same & (both > threshold * (areas + areas.gather(1, best) - both))
        scores.masked_fill_(over, -1).scatter_(1, best, -1)
    return kept


@functools.cache
def _kernel() -> Callable[..., None] | None:
    """The compiled loop over sorted boxes; None without numba."""
    try:
        import numba
    except ImportError:  # it is not installed, or not for this numpy
        return None
    try:
        return numba.njit(cache=True, nogil=True)(_suppress)
    except RuntimeError:  # no folder that compiled code can be kept in
        return numba.njit(nogil=True)(_suppress)


def _suppress(
    boxes: Any, scores: Any, labels: Any, order: Any, kept: Any, threshold: Any
) -> None:  # pragma: no cover - compiled
    images, rows = scores.shape
    zero = np.float32(0)
    for image in range(images):
        count = 0  # of real boxes, which come first
        while count < rows and scores[image, order[image, count]] >= 0:
            count += 1
        classes = 0
        for i in range(count):
            classes = max(classes, labels[image, order[image, i]] + 1)
        ends = np.zeros(classes + 1, np.int64)  # the kept boxes of a class lie together
        for i in range(count):
            ends[labels[image, order[image, i]] + 1] += 1
        for k in range(classes):
            ends[k + 1] += ends[k]
        starts = ends.copy()
        left, top, right, bottom, areas = np.empty((5, count), np.float32)
        place = 0
        for i in range(count):
            if place == kept.shape[1]:
                break
            row = order[image, i]
            k = labels[image, row]
            x1, y1, x2, y2 = boxes[image, row]
            area = max(x2 - x1, zero) * max(y2 - y1, zero)
            over = False
            for j in range(starts[k], ends[k]):
                width = max(min(x2, right[j]) - max(x1, left[j]), zero)
                height = max(min(y2, bottom[j]) - max(y1, top[j]), zero)
                both = width * height
                if both > threshold * (areas[j] + area - both):
                    over = True
                    break
            if not over:
                j = ends[k]
                left[j], top[j], right[j], bottom[j], areas[j] = x1, y1, x2, y2, area
                ends[k] = j + 1
                kept[image, place] = row
                place += 1
