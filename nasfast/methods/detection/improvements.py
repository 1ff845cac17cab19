"""FCOS with the improvements of its authors (arXiv 2006.09214), which learns faster."""

from __future__ import annotations

import dataclasses

from nasfast.models.detector import DetectorConfig
from nasfast.tasks.detection import DetectionLoss


def improved_loss(loss: DetectionLoss) -> DetectionLoss:
    """With GIoU, centre sampling, and normalised by positive points alone."""
    return dataclasses.replace(loss, box="giou", center_sampling=1.5, count_images=False)


def improved_detector(detector: DetectorConfig) -> DetectorConfig:
    """With distances in strides, and centre-ness by the tower of the boxes."""
    return dataclasses.replace(detector, centerness="reg", normalized=True)
