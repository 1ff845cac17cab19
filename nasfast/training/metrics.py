"""Segmentation metrics over a confusion matrix that stays on the device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentationScores:
    """Metrics over the classes present in the labels, each in [0, 1]."""

    miou: float
    """Mean intersection over union."""
    mean_accuracy: float
    """Mean recall of the classes."""
    fw_iou: float
    """Intersection over union weighted by the classes' frequency."""
    class_iou: tuple[float | None, ...]
    """Intersection over union of each class; None where it is absent or left out."""

    @property
    def reward(self) -> float:
        """Geometric mean of the three metrics (section 4.1 of Fast NAS)."""
        return float((self.miou * self.mean_accuracy * self.fw_iou) ** (1 / 3))

    def as_dict(self) -> dict[str, float]:
        """The three scalar metrics."""
        return {k: v for k, v in asdict(self).items() if k != "class_iou"}


class ConfusionMatrix:
    """Counts of (label, prediction) pairs; updates never wait for the device.

    Args:
        num_classes: predictions and labels lie in ``[0, num_classes)``.
        ignore_index: label that is left out.
        device: where the counts live.
    """

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # the extra row takes the ignored labels, so that no boolean mask has to be synchronised
        self._counts = torch.zeros(
            (num_classes + 1) * num_classes, dtype=torch.int64, device=device
        )

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count a batch: integer predictions and labels of one shape, ``[N, H, W]``."""
        if predictions.shape != labels.shape:
            raise ValueError(
                f"ConfusionMatrix.update: expected predictions and labels of one shape, got "
                f"{list(predictions.shape)} and {list(labels.shape)}; resize the logits first"
            )
        rows = labels.long().masked_fill(labels == self.ignore_index, self.num_classes)
        cells = rows * self.num_classes + predictions
        self._counts.scatter_add_(
            0,
            cells.flatten(),
            torch.ones((), dtype=torch.int64, device=cells.device).expand(cells.numel()),
        )

    def compute(self, omit: tuple[int, ...] = ()) -> SegmentationScores:
        """Scores over all counted pixels.

        Args:
            omit: classes left out of the means (the background in PASCAL VOC).
        """
        counts = self._counts.view(self.num_classes + 1, self.num_classes)[:-1].cpu().double()
        hit, label, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        present = label > 0
        present[list(omit)] = False
        if not present.any():
            return SegmentationScores(0.0, 0.0, 0.0, (None,) * self.num_classes)
        iou = hit / (label + predicted - hit)
        weight = label[present] / label[present].sum()
        return SegmentationScores(
            miou=iou[present].mean().item(),
            mean_accuracy=(hit[present] / label[present]).mean().item(),
            fw_iou=(weight * iou[present]).sum().item(),
            class_iou=tuple(
                value if there else None
                for value, there in zip(iou.tolist(), present.tolist(), strict=True)
            ),
        )
