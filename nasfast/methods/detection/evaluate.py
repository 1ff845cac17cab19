"""Measuring a trained detector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from nasfast.data.detection import BoxValTransform, DetectionDataset, load_detection_splits
from nasfast.device import resolve_device
from nasfast.inference.model import Model, load
from nasfast.inference.speed import (
    measure_size,
    measure_speed,
    size_rows,
    speed_json,
    speed_rows,
)
from nasfast.methods import base
from nasfast.methods.base import Split
from nasfast.tasks.base import prepare_images
from nasfast.tasks.detection import DetectionScores, DetectionTask, PostProcessing
from nasfast.tasks.detection.postprocess import detections
from nasfast.training.cost import measure_latency
from nasfast.training.loop import Runtime
from nasfast.training.pictures import spread
from nasfast.utils.config import Bound, Pixels
from nasfast.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(base.EvaluateConfig):
    """What to measure, and where."""

    shorter_side: Pixels | None = None
    """Images are brought to this shorter side; default: as in the training."""
    longer_side: Pixels | None = None
    """The longer side stays within this; default: as in the training."""
    post: PostProcessing = PostProcessing()  # noqa: RUF009 - it is frozen
    """Which boxes become detections."""
    voc: bool = False
    """Also AP50 of each class as PASCAL VOC defines it, the area under the curve."""
    resamples: Annotated[int, Bound(0, 10**6)] = 1000
    """Draws of as many images, with replacement, for 95 % intervals of AP and AP50; 0: none."""


def open_split(model: Model, data: str, split: Split) -> tuple[DetectionTask, DetectionDataset]:
    """A part of the data, which must have the network's classes."""
    splits = load_detection_splits(data, cache_in_memory=False)
    part = getattr(splits, split, None)
    if part is None:
        raise UserError(
            f"split {split}: expected data with that part, got {data} without it; use another, or "
            "--data"
        )
    assert isinstance(part, DetectionDataset)
    if model.classes != tuple(part.classes):
        raise UserError(
            f"evaluate: expected data of the network's classes {', '.join(model.classes)}, got "
            f"{', '.join(part.classes)} in {data}; give the data it was trained for by --data"
        )
    return DetectionTask(splits), part


def transform_of(
    model: Model, shorter_side: int | None = None, longer_side: int | None = None
) -> BoxValTransform:
    """How images are resized for a network: as in its training, unless it is said."""
    found = model.description
    return BoxValTransform(
        None, shorter_side or found.get("shorter_side"), longer_side or found.get("longer_side")
    )


def inputs(model: Model, data: str, split: Split, count: int) -> list[Tensor]:
    """See `nasfast.methods.base.Method.inputs`."""
    _, part = open_split(model, data, split)
    transform = transform_of(model)
    images = (transform(part[index]).image for index in spread(len(part), count))
    return [model.preprocessing(image[None]) for image in images]


def scores_of(
    model: Model,
    task: DetectionTask,
    part: DetectionDataset,
    transform: BoxValTransform,
    runtime: Runtime,
) -> DetectionScores:
    """Scores on whole images, one at a time."""
    batches = task.batches(part, in_order(len(part), 1), transform, runtime)
    return task.score(batches, model.map, runtime)


def score(model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
    """See `nasfast.methods.base.Method.score`."""
    task, part = open_split(model, data, split)
    found = scores_of(model, task, part, transform_of(model), runtime).ap
    return {"AP50": found["ap50"], "AP": found["ap"]}


class Detecting(nn.Module):
    """A network with its post-processing, on images of the data: how many boxes there are to
    suppress decides how long that takes.

    Args:
        model: the network.
        images: preprocessed, padded ``[N, 3, H, W]``.
        settings: of the post-processing.
    """

    def __init__(self, model: Model, images: Tensor, settings: PostProcessing) -> None:
        super().__init__()
        self.model, self.images, self.settings = model, images, settings

    def forward(self, _: Tensor) -> Tensor:
        size = (self.images.shape[-2], self.images.shape[-1])
        sizes = torch.tensor([size] * len(self.images), device=self.images.device)
        return detections(self.model.map(self.images), size, sizes, self.settings).boxes
