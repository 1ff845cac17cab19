"""Detection of objects as a dense task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from nasfast.data.detection import DetectionDataset
from nasfast.tasks.base import ClassScore, DenseTask, Frames, Targets
from nasfast.tasks.detection.losses import DetectionLoss
from nasfast.tasks.detection.postprocess import PostProcessing
from nasfast.tasks.detection.processor import DetectionProcessor, Detections
from nasfast.tasks.detection.scores import DetectionScores
from nasfast.training.loop import Runtime

T = TypeVar("T")


@dataclass(frozen=True)
class DetectionTask(DenseTask[DetectionScores]):
    """Boxes of objects with their classes.

    The targets of a batch: "boxes" float32 ``[N, M, 4]``, left, top, right and bottom in pixels of
    the network's input; "labels" int64 ``[N, M]``, the class, -1 for padding and -2 - class for an
    ignored box; "areas" float32 ``[N, M]``; "index" int64 ``[N]``, in its part of the data; "size"
    int64 ``[N, 2]``, height and width before the padding; "scale" float32 ``[N, 2]``, pixels of
    the input for one of the image as the data have it, vertically and horizontally. M is the most
    of the part of the data that they come from, so that batches of it have one shape.

    Dense targets, of `resize_targets`: "classes" int64 ``[N, P]`` and "distances" float32
    ``[N, P, 4]``, see `assign`.
    """

    name: ClassVar[str] = "detection"

    splits: Any
    loss_settings: DetectionLoss = DetectionLoss()
    settings: PostProcessing = PostProcessing()
    judge: Literal["losses", "ap"] = "losses"
    """What the reward is: minus the sum of the losses, or AP."""
