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
from nasfast.tasks.detection.intervals import ap_intervals
from nasfast.tasks.detection.postprocess import detections
from nasfast.tasks.detection.scores import voc_ap
from nasfast.training.cost import measure_latency
from nasfast.training.loop import Runtime, in_order
from nasfast.training.pictures import spread
from nasfast.utils.config import Bound, Pixels
from nasfast.utils.errors import UserError
from nasfast.utils.statistics import Estimate

MEASURES = {
    "ap50": "AP50",
    "ap": "AP",
    "ap75": "AP75",
    "ap_small": "AP of small objects, below 32x32 pixels",
    "ap_medium": "AP of medium objects, below 96x96",
    "ap_large": "AP of large objects",
    "voc_ap50": "VOC AP50",
}
"""What a table calls the figures that it shows."""


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


def open_split(
    model: Model,
    data: str,
    split: Split,
    post: PostProcessing = PostProcessing(),  # noqa: B008 - it is frozen
) -> tuple[DetectionTask, DetectionDataset]:
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
    return DetectionTask(splits, settings=post), part


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
    return task.score(batches, model, runtime)


def score(model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
    """See `nasfast.methods.base.Method.score`."""
    task, part = open_split(model, data, split)
    found = scores_of(model, task, part, transform_of(model), runtime)
    return {"AP50": found.ap50, "AP": found.ap}


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
        self.size = (images.shape[-2], images.shape[-1])
        self.sizes = torch.tensor([self.size] * len(images), device=images.device)

    def forward(self, _: Tensor) -> Tensor:
        return detections(self.model(self.images), self.size, self.sizes, self.settings).boxes


def evaluate(config: EvaluateConfig) -> tuple[Mapping[str, Any], Table]:
    """AP on a split, size and latency, without and with post-processing."""
    path = config.path
    model = load(path, config.device)
    runtime = Runtime(resolve_device(str(model.device)))
    data = config.source(model.description)
    task, part = open_split(model, data, config.split, config.post)
    transform = transform_of(model, config.shorter_side, config.longer_side)
    scores = scores_of(model, task, part, transform, runtime)
    images, _ = task.load_padded(part, [0], transform)
    size = (images.shape[-2], images.shape[-1])
    latencies = measure_speed(
        path, model, size, runtime, batch=config.batch, seconds=config.seconds
    )
    repeated = prepare_images(images, runtime).expand(config.batch, -1, -1, -1)
    (whole,) = measure_latency(
        [Detecting(model, repeated, config.post)],
        size,
        runtime,
        batch=config.batch,
        seconds=config.seconds,
    )
    # an export computes in its own precision and library
    whole = dataclasses.replace(whole, dtype=latencies[0].dtype, backend=latencies[0].backend)
    classes: dict[str, dict[str, float | None]] = {
        name: {"ap50": ap50, "ap": ap}
        for name, ap, ap50 in zip(part.classes, scores.class_ap, scores.class_ap50, strict=True)
    }
    intervals: dict[str, Estimate] = {}
    if config.resamples:
        intervals = ap_intervals(scores.images, len(part.classes), config.resamples)
    if config.voc:
        found = voc_ap(scores.images, len(part.classes))
        for name, value in zip(part.classes, found, strict=True):
            classes[name]["voc_ap50"] = value
    result = {
        "data": data,
        "split": config.split,
        "images": len(part),
        "shorter_side": transform.shorter_side,
        "longer_side": transform.longer_side,
        "post": dataclasses.asdict(config.post),
        **scores.as_dict(),
        "intervals": {name: dataclasses.asdict(each) for name, each in intervals.items()},
        "classes": classes,
        **measure_size(path, model, size),
        **speed_json(latencies),
        "latency_ms_with_post_processing": dataclasses.asdict(whole),
    }
    table = Table(title=escape(f"{config.label}, {len(part)} {config.split} images of {part.name}"))
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, each in classes.items():
        shown = ("absent" if value is None else f"{value:.3f}" for value in each.values())
        labels = ", ".join(MEASURES[key] for key in each)
        table.add_row(escape(f"{labels} of {name}"), ", ".join(shown))
    table.add_section()
    for key, figure in scores.as_dict().items():
        if key in MEASURES:
            about = f" (95 %: {_text(intervals[key])})" if key in intervals else ""
            table.add_row(MEASURES[key], f"{figure:.4f}{about}")
    means = [ap for each in classes.values() if (ap := each.get("voc_ap50")) is not None]
    if means:
        table.add_row(f"mean of {MEASURES['voc_ap50']}", f"{sum(means) / len(means):.4f}")
    table.add_section()
    for row in [*size_rows(result), *speed_rows(latencies)]:
        table.add_row(*row)
    ((label, speed),) = speed_rows([whole])
    table.add_row(f"with post-processing, {len(part[0].labels)} objects: {label}", speed)
    return result, table


def _text(interval: Estimate) -> str:
    low, high = interval.low, interval.high
    return "not known" if low is None or high is None else f"{low:.3f} to {high:.3f}"
