"""Measuring a trained segmentation network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from nasfast.data import SegmentationDataset, ValTransform, load_splits
from nasfast.device import resolve_device
from nasfast.inference.exported import EXPORT_SUFFIXES
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
from nasfast.models.io import MODEL_FILE
from nasfast.models.layers import resize
from nasfast.tasks.base import prepare_images
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.loop import Runtime
from nasfast.training.metrics import SegmentationScores
from nasfast.training.pictures import spread
from nasfast.utils.config import Pixels
from nasfast.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(base.EvaluateConfig):
    """What to measure, and where."""

    mask_values: str | None = None
    """Values of the classes in the masks of other data: 0,255; default: those of the training."""
    resize_longer: Pixels | None = None
    """Images whose longer side has more pixels are reduced to it, and their labels too; default:
    as in the training."""
    scales: str = "1"
    """Factors of an image's sides, such as 0.75,1,1.25: the network sees each image at all of them,
    and its class probabilities are summed. The result says so; the latency is that of one pass."""
    flip: bool = False
    """Sum those of mirrored images as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.factors

    @property
    def factors(self) -> tuple[float, ...]:
        """The scales; UserError where they are none."""
        try:
            factors = tuple(float(word) for word in self.scales.split(","))
        except ValueError:
            factors = ()
        if not factors or not all(0.05 <= factor <= 20 for factor in factors):
            raise UserError(
                f"scales: expected factors from 0.05 to 20, such as 0.75,1,1.25, got "
                f"{self.scales!r}; correct them"
            )
        return factors

    @property
    def views(self) -> str:
        """How each image is seen, where it is not as it is; else nothing."""
        if self.factors == (1.0,) and not self.flip:
            return ""
        scales = ", ".join(f"{factor:g}" for factor in self.factors)
        return f"softmax summed over scales {scales}{' and mirror images' if self.flip else ''}"


def open_split(
    model: Model,
    data: str,
    split: Split,
    mask_values: str | None = None,
    resize_longer: int | None = None,
) -> tuple[SegmentationTask, SegmentationDataset]:
    """A part of the data, which must have the network's classes."""
    splits = load_splits(
        data,
        cache_in_memory=False,
        mask_values=mask_values or model.description.get("mask_values"),
        resize_longer=resize_longer or model.description.get("resize_longer"),
    )
    task = SegmentationTask(splits)
    part = getattr(task.splits, split, None)
    if part is None:
        raise UserError(
            f"split {split}: expected data with that part, got {data} without it; use another, or "
            "--data"
        )
    assert isinstance(part, SegmentationDataset)
    if model.classes != tuple(part.classes):
        raise UserError(
            f"evaluate: expected data of the network's classes {', '.join(model.classes)}, got "
            f"{', '.join(part.classes)} in {data}; give the data it was trained for by --data"
        )
    return task, part


def inputs(model: Model, data: str, split: Split, count: int) -> list[Tensor]:
    """See `nasfast.methods.base.Method.inputs`."""
    _, part = open_split(model, data, split)
    images = (part[index].image for index in spread(len(part), count))
    return [model.preprocessing(image[None]) for image in images]


def summed(
    model: Callable[[Tensor], Tensor], factors: Sequence[float], flip: bool, images: Tensor
) -> Tensor:
    """Class probabilities ``[N, K, H, W]`` of images ``[N, 3, H, W]``, summed over scales and, with
    ``flip``, mirror images."""
    height, width = images.shape[-2:]
    total = images.new_zeros(())
    for factor in factors:
        scaled = resize(images, (max(1, round(factor * height)), max(1, round(factor * width))))
        for view in (scaled, scaled.flip(-1)) if flip else (scaled,):
            found = model(view)
            found = found if view is scaled else found.flip(-1)
            total = total + resize(found.float().softmax(1), (height, width))
    return total


def scores_of(
    model: Callable[[Tensor], Tensor],
    task: SegmentationTask,
    part: SegmentationDataset,
    runtime: Runtime,
) -> SegmentationScores:
    """Scores on whole images, one at a time; the network pads them itself."""
    loaded = (task.load_batch(part, [index], ValTransform(None)) for index in range(len(part)))
    batches = ((prepare_images(images, runtime), targets) for images, targets in loaded)
    return task.score(batches, model, runtime)


def score(model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
    """See `nasfast.methods.base.Method.score`."""
    scores = scores_of(model, *open_split(model, data, split), runtime)
    return {
        "mIoU": scores.miou,
        "mean accuracy": scores.mean_accuracy,
        "frequency-weighted IoU": scores.fw_iou,
    }


def evaluate(config: EvaluateConfig) -> tuple[Mapping[str, Any], Table]:
    """mIoU on a split, size and latency."""
    path = config.path
    if config.views and path.suffix in EXPORT_SUFFIXES:
        raise UserError(
            f"evaluate: expected a {MODEL_FILE} beside --scales and --flip, got the export {path}, "
            "which is measured as it runs; leave them out"
        )
    model = load(path, config.device)
    runtime = Runtime(resolve_device(str(model.device)))
    data = config.source(model.description)
    longer = config.resize_longer or model.description.get("resize_longer")
    task, part = open_split(model, data, config.split, config.mask_values, longer)
    network: Callable[[Tensor], Tensor] = model
    if config.views:
        network = functools.partial(summed, model, config.factors, config.flip)
    scores = scores_of(network, task, part, runtime)
    height, width = part[0].mask.shape
    latencies = measure_speed(
        path, model, (height, width), runtime, batch=config.batch, seconds=config.seconds
    )
    class_iou = dict(zip(part.classes, scores.class_iou, strict=True))
    result = {
        "data": data,
        "split": config.split,
        "images": len(part),
        **({"resize_longer": longer} if longer else {}),
        **({"views": config.views} if config.views else {}),
        **scores.as_dict(),
        "class_iou": class_iou,
        **measure_size(path, model, (height, width)),
        **speed_json(latencies),
    }
    images = f"{len(part)} {config.split} images of {part.name}"
    images += f"; {config.views}" if config.views else ""
    table = Table(title=escape(f"{config.label}, {images}"))
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, iou in class_iou.items():
        table.add_row(escape(f"IoU {name}"), "absent" if iou is None else f"{iou:.3f}")
    table.add_section()
    table.add_row("mIoU", f"{scores.miou:.4f}")
    table.add_row("mean accuracy", f"{scores.mean_accuracy:.4f}")
    table.add_row("frequency-weighted IoU", f"{scores.fw_iou:.4f}")
    for row in [*size_rows(result), *speed_rows(latencies)]:
        table.add_row(*row)
    return result, table
