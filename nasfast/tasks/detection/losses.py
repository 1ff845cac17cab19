"""Losses of FCOS: focal loss of the classes, IoU of the boxes, centre-ness.

Tian et al., ICCV 2019, arXiv 1904.01355; focal loss: Lin et al., ICCV 2017; GIoU: Rezatofighi et
al., CVPR 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.tasks.detection.assign import NOT_COUNTED
from nasfast.utils.config import Bound, Bounded, Positive

LOSSES = ("classes", "boxes", "centerness")
"""The terms, in the order of `loss_sums` and `normalizers`."""
_ALPHA = 0.25  # weight of positives in the focal loss; its exponent is 2
_FARTHEST = 1e6  # pixels; areas of larger boxes would leave float32


@dataclass(frozen=True)
class DetectionLoss(Bounded):
    """What a detector learns by. The defaults are those of the released code of NAS-FCOS; "giou",
    a radius of 1.5 and no images in the normaliser are FCOS "with improvements"."""

    box: Literal["iou", "giou"] = "iou"
    """Of boxes: -log IoU, whose areas have 1 square pixel added, or 1 - GIoU, without."""
    center_sampling: Annotated[float, Bound(0)] = 0.0
    """Only points less than so many strides from the centre of a box learn it; 0: all inside."""
    size_scale: Positive = 1.0
    """Factor of the sizes of objects that divide the levels, which are 64 to 512 pixels. For
    crops, their side / 800."""
    count_images: bool = True
    """Whether the focal loss is divided by positive points + images, or by positive points."""


def loss_sums(output: Tensor, classes: Tensor, distances: Tensor, loss: DetectionLoss) -> Tensor:
    """Sums of the three losses over the points of a batch, float32 ``[3]``, see `LOSSES`.

    That of boxes is weighted by the targets of centre-ness. They and their gradients are finite for
    outputs up to 1e30, without a positive point too; half precision is computed in float32.

    Args:
        output: ``[N, K + 5, P]``.
        classes: int64 ``[N, P]``, of `assign`.
        distances: float32 ``[N, P, 4]``, likewise.
        loss: settings.
    """
    logits, sides, center = torch.split(output, [output.shape[1] - 5, 4, 1], 1)
    positive = classes >= 0
    focal: Tensor = _Focal.apply(logits, classes)  # type: ignore[no-untyped-call]
    # points without a box compare equal boxes: masks of infinite numbers would give NaN gradients
    wanted = distances.transpose(1, 2)
    sides = torch.where(positive[:, None], sides.float().clamp(0, _FARTHEST), 1.0)
    target = centerness(distances) * positive
    boxes = (_box_losses(sides, wanted, loss.box) * target).sum()
    ness = F.binary_cross_entropy_with_logits(
        center[:, 0].float(), target, weight=positive.float(), reduction="sum"
    )
    return torch.stack([focal, boxes, ness])


def normalizers(classes: Tensor, distances: Tensor, loss: DetectionLoss) -> Tensor:
    """What the sums of `loss_sums` are divided by, float32 ``[3]``: positive points (+ images),
    the sum of the targets of centre-ness, positive points."""
    positive = classes >= 0
    count = positive.sum().float()
    images = len(classes) if loss.count_images else 0
    return torch.stack([count + images, (centerness(distances) * positive).sum(), count])


def normalized(sums: Tensor, weight: Tensor) -> Tensor:
    """Sums over what they are means over; where that is nothing they stay."""
    return sums / torch.where(weight > 0, weight, 1.0)


def centerness(distances: Tensor) -> Tensor:
    """1 at the centre of a box to 0 at its edges: positive ``[.., 4]`` to ``[..]``."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).sqrt()


def _box_losses(sides: Tensor, wanted: Tensor, kind: str) -> Tensor:
    """Losses ``[N, P]`` of distances ``[N, 4, P]``, of which the wanted are positive."""
    inner = torch.minimum(sides, wanted)
    area, goal, both = (
        (each[:, 0] + each[:, 2]) * (each[:, 1] + each[:, 3]) for each in (sides, wanted, inner)
    )
    union = area + goal - both
    if kind == "iou":
        return (union + 1).log() - (both + 1).log()
    outer = torch.maximum(sides, wanted)
    hull = (outer[:, 0] + outer[:, 2]) * (outer[:, 1] + outer[:, 3])
    return 1 - both / union + (hull - union) / hull


class _Focal(torch.autograd.Function):
    """Sum of the sigmoid focal losses of logits ``[N, K, P]`` at the points that are counted.

    Value and gradient are computed together, by few passes over the logits: all are taken as
    negatives, and the one of its class at each positive point is exchanged.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor) -> Tensor:
        x, index = logits.float(), classes.clamp(min=0)[:, None]
        positive, counted = (classes >= 0)[:, None], (classes != NOT_COUNTED)[:, None]

        def exchange(values: Tensor, own: Tensor) -> Tensor:
            """With the values of the positives in place of those as negatives."""
            return values.scatter_(1, index, torch.where(positive, own, values.gather(1, index)))

        p, ahead = x.sigmoid(), F.softplus(x)  # probability, -log(1 - p)
        own = p.gather(1, index)  # [N, 1, P]
        rest, back = (1 - own).square(), F.softplus(-x.gather(1, index))
        square = p * p
        grad = square * ahead  # is the loss first: p^2 ahead
        losses = exchange(grad, _ALPHA / (1 - _ALPHA) * rest * back)
        total = (1 - _ALPHA) * (losses.sum(1, keepdim=True) * counted).sum()
        # d loss / d x = p^2 (2 (1 - p) ahead + p)
        torch.mul(square, ahead, out=grad).mul_(1 - p).mul_(2).addcmul_(square, p)
        grad.mul_((1 - _ALPHA) * counted)
        grad = exchange(grad, -_ALPHA * rest * (2 * own * back + 1 - own))
        ctx.save_for_backward(grad.to(logits.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None
