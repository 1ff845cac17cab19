"""How good detections are: average precision as COCO and as PASCAL VOC define it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasfast.utils.errors import UserError

FIGURES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
"""COCO's 12, in its order. Small objects have less than 32^2 square pixels, large ones 96^2."""


@dataclass(frozen=True)
class ImageBoxes:
    """Objects and detections of one image, in the same pixels, on the CPU."""

    boxes: Tensor  # float32 [M, 4]: left, top, right, bottom
    labels: Tensor  # int64 [M]
    ignored: Tensor  # bool [M]
    areas: Tensor  # float32 [M]
    found: Tensor  # float32 [D, 4]
    scores: Tensor  # float32 [D]
    found_labels: Tensor  # int64 [D]


@dataclass(frozen=True)
class DetectionScores:
    """What a detector is worth. What the data do not define is left out: the AP of large objects
    where there are none."""

    reward: float
    figures: Mapping[str, float]
    """COCO's, by the names in `FIGURES`, in 0..1."""
    losses: Mapping[str, float]
    """By the names in `LOSSES`."""
    class_ap: tuple[float | None, ...] = ()
    """AP of each class; None where it has no object."""
    class_ap50: tuple[float | None, ...] = ()
    images: Sequence[ImageBoxes] = field(default=(), repr=False, compare=False)
    """What AP was computed of."""

    @property
    def ap(self) -> float:
        """Mean of the classes' AP over IoU of 0.5 to 0.95; 0 where there is no object."""
        return self.figures.get("ap", 0.0)

    @property
    def ap50(self) -> float:
        """Of IoU 0.5."""
        return self.figures.get("ap50", 0.0)

    def as_dict(self) -> dict[str, float]:
        """AP50 and AP, COCO's other figures, and the losses as "loss_classes" and so on."""
        losses = {f"loss_{name}": value for name, value in self.losses.items()}
        return {"ap50": self.ap50, "ap": self.ap, **self.figures, **losses}


def check_packages() -> None:
    """UserError without faster-coco-eval."""
    if importlib.util.find_spec("faster_coco_eval") is None:
        raise UserError(
            "detection: expected the package faster-coco-eval, which computes AP, got none; "
            "pip install 'nasfast[detection]'"
        )


@dataclass(frozen=True)
class AveragePrecision:
    """As COCO defines it."""

    figures: Mapping[str, float]
    class_ap: tuple[float | None, ...]
    class_ap50: tuple[float | None, ...]


def coco_evaluation(images: Sequence[ImageBoxes], classes: int, **options: Any) -> Any:
    """faster-coco-eval's COCOeval_faster of the boxes, with options of its own, yet to be run.

    An ignored object is a crowd: detections that lie in it count as nothing. Images without objects
    count, by their wrong detections.

    Raises:
        UserError: faster-coco-eval is not installed.
    """
    check_packages()
    from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-untyped]

    objects = [
        {
            "image_id": number,
            "category_id": label,
            "bbox": box,
            "area": area,
            "iscrowd": int(ignored),
        }
        for number, image in enumerate(images, 1)
        for box, label, area, ignored in zip(
            _corners_and_sides(image.boxes),
            image.labels.tolist(),
            image.areas.tolist(),
            image.ignored.tolist(),
            strict=True,
        )
    ]
    truth = {
        "images": [{"id": number} for number in range(1, len(images) + 1)],
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
        "annotations": [{"id": number, **each} for number, each in enumerate(objects, 1)],
    }
    found = [
        {
            "image_id": number,
            "category_id": label,
            "bbox": box,
            "score": score,
        }
        for number, image in enumerate(images, 1)
        for box, label, score in zip(
            _corners_and_sides(image.found),
            image.found_labels.tolist(),
            image.scores.tolist(),
            strict=True,
        )
    ]
    expected = COCO(truth)
    return COCOeval_faster(expected, expected.loadRes(found), "bbox", **options)


def coco_ap(images: Sequence[ImageBoxes], classes: int) -> AveragePrecision:
    """COCO's figures, see `coco_evaluation`; those that the data do not define are left out."""
    evaluation = coco_evaluation(images, classes)
    evaluation.run()
    figures = dict(zip(FIGURES, evaluation.stats[: len(FIGURES)].tolist(), strict=True))
    # [thresholds, recalls, classes, areas, counts], -1 where there is no object
    precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]
    class_ap, class_ap50 = (
        tuple(_mean(part[:, :, label]) for label in range(classes))
        for part in (precision, precision[:1])
    )
    defined = {name: value for name, value in figures.items() if value >= 0}
    return AveragePrecision(defined, class_ap, class_ap50)


def _corners_and_sides(boxes: Tensor) -> list[list[float]]:
    corners, ends = boxes.double().split(2, 1)  # type: ignore[no-untyped-call]
    sides: list[list[float]] = torch.cat([corners, ends - corners], 1).tolist()
    return sides


def _mean(precision: Any) -> float | None:
    return float(precision.mean()) if (precision >= 0).all() else None


def voc_ap(
    images: Sequence[ImageBoxes], classes: int, threshold: float = 0.5, *, points: int | None = None
) -> tuple[float | None, ...]:
    """AP of each class as PASCAL VOC defines it; None for a class without objects.

    A detection, by falling score, is right if its IoU with the object that it overlaps most is at
    least ``threshold`` and no other has found it before. Ignored objects, VOC's difficult ones, are
    not counted, nor what finds them.

    Args:
        images: objects and detections.
        classes: how many.
        threshold: of IoU.
        points: 11: the mean over as many recalls, as until 2009; None: the area under the curve,
            as from 2010 on.
    """
    return tuple(_voc_class_ap(images, label, threshold, points) for label in range(classes))


def _voc_class_ap(
    images: Sequence[ImageBoxes], label: int, threshold: float, points: int | None
) -> float | None:
    objects, scores, right = 0, [], []
    for image in images:
        mine = (image.labels == label).numpy()
        boxes, ignored = image.boxes.numpy()[mine], image.ignored.numpy()[mine]
        objects += int((~ignored).sum())
        taken = np.zeros(len(boxes), bool)
        found = (image.found_labels == label).numpy()
        own = image.scores.numpy()[found]
        order = np.argsort(-own, kind="stable")
        overlaps = _ious(image.found.numpy()[found][order], boxes)
        for score, row in zip(own[order], overlaps, strict=True):
            best = int(row.argmax()) if len(row) else -1
            if best < 0 or row[best] < threshold:
                hit = False
            elif ignored[best]:
                continue
            else:
                hit, taken[best] = not taken[best], True
            scores.append(score)
            right.append(hit)
    if objects == 0:
        return None
    order = np.argsort(-np.array(scores), kind="stable")
    hits = np.cumsum(np.array(right, float)[order])
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if points is None:
        return float((np.diff(recall, prepend=0.0) * envelope).sum())
    first = np.searchsorted(recall, np.linspace(0, 1, points) - 1e-9)
    return float(np.append(envelope, 0.0)[first].mean())


def _ious(a: Any, b: Any) -> Any:
    """IoU of boxes ``[A, 4]`` and ``[B, 4]``: ``[A, B]``."""
    low = np.maximum(a[:, None, :2], b[:, :2])
    high = np.minimum(a[:, None, 2:], b[:, 2:])
    both = (high - low).clip(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return both / np.maximum(areas[0][:, None] + areas[1] - both, 1e-9)
