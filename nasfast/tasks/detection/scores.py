"""How good detections are: average precision as COCO and as PASCAL VOC define it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class DetectionScores:
    """What a detector is worth. Figures that the data do not define, as that of large objects where
    there are none, are left out."""

    reward: float
    ap: Mapping[str, float]
    """COCO's 12 figures by name: ap, ap50, ap75, ap_small .., ar_1, ar_10, ar_100, ar_small .."""
    losses: Mapping[str, float]
    """By name, see `LOSSES`."""
    class_ap: tuple[float | None, ...] = ()
    """AP of each class; None where it has no object."""
    class_ap50: tuple[float | None, ...] = ()

    def as_dict(self) -> dict[str, float]:
        """AP50 first, COCO's figures, and the losses as "loss_classes" .."""
        raise NotImplementedError


@dataclass
class ImageBoxes:
    """Objects and detections of one image, in the same pixels."""

    boxes: Tensor  # [M, 4]
    labels: Tensor  # [M]
    ignored: Tensor  # [M]
    areas: Tensor  # [M]
    found: Tensor  # [D, 4]
    scores: Tensor  # [D]
    found_labels: Tensor  # [D]


def check_packages() -> None:
    """UserError where faster-coco-eval is not installed."""
    raise NotImplementedError


def coco_ap(images: Sequence[ImageBoxes], classes: int) -> Any:
    raise NotImplementedError
