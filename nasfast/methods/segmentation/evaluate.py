"""Measuring a trained network with a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from nasfast.data.depth import DepthReading
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
from nasfast.methods.segmentation.tasks import BINDINGS, Binding, Opened, Reading
from nasfast.models.io import MODEL_FILE
from nasfast.tasks.base import DenseTask, prepare_images
from nasfast.training.loop import Runtime
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
    and its class probabilities are summed, or the logarithms of depths averaged. The result says
    so; the latency is that of one pass. Keypoints have 1 alone."""
    flip: bool = False
    """Mirrored images as well."""
    depth: DepthReading = dataclasses.field(default_factory=DepthReading)
    """Reading of data for depth; default: as in the training."""

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
        return f"over scales {scales}{' and mirror images' if self.flip else ''}"


def open_split(
    model: Model, split: Split, reading: Reading
) -> tuple[Binding[Any], Opened[Any], Any, Reading]:
    """A part of the data, on which the network can be judged, and how it was read."""
    binding = BINDINGS[model.task]
    reading = binding.of_model(model, reading)
    opened = binding.open(reading)
    part = getattr(opened.splits, split, None)
    if part is None:
        raise UserError(
            f"split {split}: expected data with that part, got {reading.data} without it; use "
            "another, or --data"
        )
    binding.require_fit(model, opened, part, reading.data)
    return binding, opened, part, reading


def inputs(model: Model, data: str, split: Split, count: int) -> list[Tensor]:
    """See `nasfast.methods.base.Method.inputs`."""
    binding, opened, part, _ = open_split(model, split, Reading(data, keep=False))
    transform = binding.as_scored(model)
    chosen = spread(len(part), count)
    images = (opened.task.load_batch(part, [index], transform)[0] for index in chosen)
    return [model.preprocessing(image) for image in images]


def scores_of(
    model: Callable[[Tensor], Tensor],
    task: DenseTask[Any],
    part: Any,
    transform: Any,
    runtime: Runtime,
) -> Any:
    """Scores on the samples, one at a time; the network pads them itself."""
    loaded = (task.load_batch(part, [index], transform) for index in range(len(part)))
    batches = ((prepare_images(images, runtime), targets) for images, targets in loaded)
    return task.score(batches, model, runtime)


def score(model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
    """See `nasfast.methods.base.Method.score`."""
    binding, opened, part, _ = open_split(model, split, Reading(data, keep=False))
    return binding.better(scores_of(model, opened.task, part, binding.as_scored(model), runtime))


def evaluate(config: EvaluateConfig) -> tuple[Mapping[str, Any], Table]:
    """Scores on a split, size and latency."""
    path = config.path
    if config.views and path.suffix in EXPORT_SUFFIXES:
        raise UserError(
            f"evaluate: expected a {MODEL_FILE} beside --scales and --flip, got the export {path}, "
            "which is measured as it runs; leave them out"
        )
    model = load(path, config.device)
    runtime = Runtime(resolve_device(str(model.device)))
    data = config.source(model.description)
    BINDINGS[model.task].refuse_foreign(config, f"a network for {model.task}", "leave it out")
    reading = Reading.of(config, data=data, seed=0, keep=False)
    binding, opened, part, reading = open_split(model, config.split, reading)
    network: Callable[[Tensor], Tensor] = model
    views = f"{binding.views} {config.views}" if config.views else ""
    if views:
        network = binding.viewed(model, config.factors, config.flip)
    transform = binding.as_scored(model)
    scores = scores_of(network, opened.task, part, transform, runtime)
    images, _ = opened.task.load_batch(part, [0], transform)
    height, width = images.shape[-2:]
    latencies = measure_speed(
        path, model, (height, width), runtime, batch=config.batch, seconds=config.seconds
    )
    result = {
        "data": data,
        "split": config.split,
        opened.task.samples: len(part),
        **({"resize_longer": reading.resize_longer} if reading.resize_longer else {}),
        **({"views": views} if views else {}),
        **binding.evaluated(part, scores, reading),
        **measure_size(path, model, (height, width)),
        **speed_json(latencies),
    }
    judged = f"{len(part)} {config.split} {opened.task.samples} of {part.name}"
    judged += f"; {views}" if views else ""
    table = Table(title=escape(f"{config.label}, {judged}"))
    table.add_column("measure")
    table.add_column("value", justify="right")
    binding.tabulate(table, part, scores)
    for row in [*size_rows(result), *speed_rows(latencies)]:
        table.add_row(*row)
    return result, table
