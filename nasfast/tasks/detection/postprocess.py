"""From the output of a detector to boxes: section 3 of FCOS (arXiv 1904.01355)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


def candidates(
    output: Tensor,  # [N, K + 5, P]
    size: tuple[int, int],
    sizes: Tensor,  # [N, 2]
    settings: PostProcessing = PostProcessing(),
    *,
    fixed: bool = False,
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
        fixed: give ``settings.candidates`` rows of every level, even where it has fewer pairs, so
            that a traced graph holds for other sizes too. Equal scores are then kept in the order
            that the runtime's top-k has; ONNX defines the one that is used here.
    """
    count = output.shape[1] - 5
    places, _ = points(*size, output.device)
    lengths = [rows * columns for rows, columns in level_sizes(*size)]
    output = output.float()
    scores = output[:, :count].sigmoid()
    scores = torch.where(scores > settings.score_threshold, scores * output[:, -1:].sigmoid(), -1.0)
    found, first = [], 0
    for level, length in zip(torch.split(scores, lengths, 2), lengths, strict=True):
        flat = level.flatten(1)  # [N, K * P_l]
        if fixed:
            best, index = F.pad(flat, (0, settings.candidates), value=-1.0).topk(
                settings.candidates
            )
            index = index.clamp(max=count * length - 1)
        else:
            best, index = _top(flat, min(settings.candidates, count * length))
        found.append((best, index // length, first + index % length))
        first += length
    score, label, point = (torch.cat(each, 1) for each in zip(*found, strict=True))  # [N, C]
    sides = output[:, count : count + 4].gather(2, point[:, None].expand(-1, 4, -1))
    place = places[point].movedim(-1, 1)  # [N, 2, C]
    most = sizes.to(output.device, torch.float32).flip(1)[..., None]  # width and height
    low = (place - sides[:, :2]).clamp(min=0).minimum(most)
    high = (place + sides[:, 2:]).clamp(min=0).minimum(most)
    real = (score >= 0) & (high > low).all(1)
    boxes = torch.cat([low, high], 1).transpose(1, 2)
    return Boxes(boxes, torch.where(real, score, -1.0), torch.where(real, label, -1))


def detections(
    output: Tensor,
    size: tuple[int, int],
    sizes: Tensor,
    settings: PostProcessing = PostProcessing(),
) -> Boxes:
    """The detections of images by falling score: `candidates` and the suppression, on the device of
    the output, without a copy to the host on a GPU. ``limit`` rows an image."""
    found = candidates(output, size, sizes, settings)
    index = nms(*found, settings.nms_threshold, settings.limit)
    none, index = index < 0, index.clamp(min=0)
    boxes = found.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return Boxes(
        boxes.masked_fill(none[..., None], 0.0),
        found.scores.gather(1, index).masked_fill(none, -1.0),
        found.labels.gather(1, index).masked_fill(none, -1),
    )


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The greatest of each row, and where; of equal ones the first, on every device."""
    # floats of 0 and more are ordered as their bits are; -1 comes before all of them
    bits = values.contiguous().view(torch.int32).clamp(min=-1).long()
    place = torch.arange(values.shape[1], device=values.device)
    _, index = ((bits << 32) - place).topk(count, dim=1)
    return values.gather(1, index), index
