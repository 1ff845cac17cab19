"""From the output of a detector to boxes: section 3 of FCOS (arXiv 1904.01355)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from nasfast.models.points import level_sizes, points
from nasfast.tasks.detection.nms import nms
from nasfast.utils.config import Bound, Bounded, Count


@dataclass(frozen=True)
class PostProcessing(Bounded):
    """Which boxes become detections."""

    score_threshold: Annotated[float, Bound(0, 1)] = 0.05
    """Least probability of a class, before it is multiplied with centre-ness."""
    nms_threshold: Annotated[float, Bound(0, 1)] = 0.6
    """Greatest IoU of two detections of one class."""
    candidates: Count = 1000
    """Most boxes of a level that go on to the suppression."""
    limit: Count = 100
    """Most detections of an image."""


class Boxes(NamedTuple):
    """Boxes of images; those after the last of an image have the score and the label -1."""

    boxes: Tensor  # float32 [N, C, 4]: left, top, right, bottom in pixels of the network's input
    scores: Tensor  # float32 [N, C]
    labels: Tensor  # int64 [N, C]

    def chosen(self, index: Tensor) -> Boxes:
        """The rows that `nms` has kept, ``[N, limit]``."""
        none, index = index < 0, index.clamp(min=0)
        boxes = self.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return Boxes(
            boxes.masked_fill(none[..., None], 0),
            self.scores.gather(1, index).masked_fill(none, -1),
            self.labels.gather(1, index).masked_fill(none, -1),
        )

    def clipped(self, sizes: Tensor) -> Boxes:
        """Within images of sizes ``[N, 2]``, height and width; boxes without area have the score
        and the label -1."""
        most = sizes.to(self.boxes).flip(1).repeat(1, 2)[:, None]
        boxes = self.boxes.clamp(min=0).minimum(most)
        none = (boxes[..., 2:] <= boxes[..., :2]).any(-1)
        return Boxes(boxes, self.scores.masked_fill(none, -1), self.labels.masked_fill(none, -1))


class Pairs(NamedTuple):
    """Pairs of a point and a class, and what the network says of the point."""

    scores: Tensor  # float32 [N, C]
    labels: Tensor  # int64 [N, C]
    sides: Tensor  # float32 [N, C, 4]: distances to left, top, right, bottom
    places: Tensor  # float32 [N, C, 2]: x and y


def candidates(
    output: Tensor,  # [N, K + 5, P]
    size: tuple[int, int],
    sizes: Tensor,  # [N, 2]
    settings: PostProcessing = PostProcessing(),
) -> Boxes:
    """What goes on to the suppression: of each level the best pairs of a point and a class, not in
    order. No step depends on the data.

    The score is the probability of the class times the centre-ness. Boxes are clipped to their
    image. Pairs below the threshold and boxes without area have the score -1.

    Args:
        output: of a detector, finite.
        size: (H, W) of the padded images.
        sizes: height and width of each image before the padding.
        settings: of this and of the suppression.
    """
    pairs = best_pairs(output.float(), size, settings.score_threshold, settings.candidates)
    return boxes_of(pairs, sizes)


def best_pairs(output: Tensor, size: tuple[int, int], threshold: float, count: int) -> Pairs:
    """Up to ``count`` pairs with the greatest scores of each level; of equal ones the first."""
    places, _ = points(*size, output.device)
    lengths = [rows * columns for rows, columns in level_sizes(*size)]
    logits, sides, center = torch.split(output, [output.shape[1] - 5, 4, 1], 1)
    scores = logits.sigmoid()
    low = ~(scores > threshold)
    scores = (scores * center.sigmoid()).masked_fill(low, -1.0)
    found, first = [], 0
    for level, length in zip(torch.split(scores, lengths, 2), lengths, strict=True):
        flat = level.flatten(1)  # [N, K * P_l]
        best, index = _top(flat, min(count, flat.shape[1]))
        found.append((best, index // length, first + index % length))
        first += length
    score, label, point = (torch.cat(each, 1) for each in zip(*found, strict=True))  # [N, C]
    own = sides.gather(2, point[:, None].expand(-1, 4, -1)).mT
    return Pairs(score, label, own, places[point])


def boxes_of(pairs: Pairs, sizes: Tensor) -> Boxes:
    """The boxes of pairs, clipped to images of ``sizes``."""
    scores, labels, sides, places = pairs
    boxes = torch.cat([places - sides[..., :2], places + sides[..., 2:]], 2)
    return Boxes(boxes, scores, labels.masked_fill(scores < 0, -1)).clipped(sizes)


def detections(
    output: Tensor,
    size: tuple[int, int],
    sizes: Tensor,
    settings: PostProcessing = PostProcessing(),
) -> Boxes:
    """The detections of images by falling score: `candidates` and the suppression, on the device of
    the output, without a copy to the host on a GPU. ``limit`` rows an image."""
    found = candidates(output, size, sizes, settings)
    return found.chosen(nms(*found, settings.nms_threshold, settings.limit))


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest of each row, and where; of equal ones the first, which come in their order."""
    if values.device.type == "cpu":  # keys take three times as long, and are seldom needed
        best, index = values.topk(count, dim=1, sorted=False)
        least = best.amin(1, keepdim=True)
        if (least < 0).all() or not _left_out(values, best, least):
            index = index.sort(1)[0]
            return values.gather(1, index), index
    # floats of 0 and more are ordered as their bits are; -1 comes before all of them
    bits = values.contiguous().view(torch.int32).clamp(min=-1).long()
    place = torch.arange(values.shape[1], device=values.device)
    _, index = ((bits << 32) - place).topk(count, dim=1)
    return values.gather(1, index), index


def _left_out(values: Tensor, best: Tensor, least: Tensor) -> bool:
    """Whether a value is not among the best that is equal to the least of them."""
    return any(
        low >= 0 and (row == low).sum() > (some == low).sum()
        for row, some, low in zip(values, best, least, strict=True)
    )
