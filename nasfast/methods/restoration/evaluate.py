"""Measuring a trained restoration network: metrics, baselines, cost, and images to look at."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from PIL import Image, ImageDraw
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from nasfast.data.restoration import open_images
from nasfast.device import resolve_device
from nasfast.methods import base
from nasfast.methods.restoration.task_flags import parse_with_task
from nasfast.models.io import load_model
from nasfast.models.restorer import Restorer
from nasfast.tasks.restoration import RestorationTask, Task, scoring, task_from_json
from nasfast.tasks.restoration.base import Predict
from nasfast.tasks.restoration.scoring import EvalProtocol, Scores, costs, input_size
from nasfast.training.cost import measure_latency
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError
from nasfast.utils.files import atomic_file

PICTURES = "pictures"
"""Folder beside the model that the strips are put in."""
GAP, CAPTION, LEAST_WIDTH = 6, 22, 220  # pixels between, above and across images of a strip


@dataclass(frozen=True)
class EvaluateConfig(base.EvaluateConfig):
    """What to measure, and how."""

    task: Task | None = None
    """Another task than the network was trained for: --task NAME."""
    split: Literal["val", "test"] = "test"
    """Which images: no search and no training sees those of the test."""
    protocol: EvalProtocol = "whole"
    """whole: one degraded version of each whole image. overlap: averaged patches, each with noise
    of its own, which overestimates PSNR; only to compare with figures measured that way."""
    baselines: bool = False
    """Also run the methods without training."""
    pictures: int = 4
    """Images to show before and after, from all over the split."""
    seed: int = 0
    """Decides what the task draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures < 0:
            raise UserError(f"pictures: expected 0 or more, got {self.pictures}")


def parse_evaluate(argv: Sequence[str], description: str | None) -> EvaluateConfig:
    """Settings from a command line."""
    return parse_with_task(
        EvaluateConfig(model=tyro.MISSING), argv, "nasfast.evaluate", description
    )


def evaluate(config: EvaluateConfig) -> tuple[dict[str, Any], Table]:
    """PSNR and SSIM of the network, and of methods without training, under each condition of the
    task; parameters, multiply-adds and latency. Writes the pictures."""
    model, description = load_model(config.path, Restorer)
    runtime = Runtime(resolve_device(config.device))
    source, channels = config.data or description["data"], model.channels
    task = config.task or task_from_json(description["task"])
    if task.scale != model.scale:
        raise UserError(
            f"evaluate {config.path}: expected a task of scale {model.scale}, as the network has, "
            f"got {task.label} of scale {task.scale}; leave --task out"
        )
    images = getattr(open_images(source, channels), config.split)
    runtime.place(model)
    count = min(config.pictures, len(images))
    keep = [round((i + 0.5) * len(images) / count - 0.5) for i in range(count)]
    shown, notes = config.path.parent.name, []
    found: dict[str, dict[str, Scores]] = {}
    for condition in task.conditions():
        methods: dict[str, Predict] = dict(condition.baselines()) if config.baselines else {}
        scores = found.setdefault(condition.label, {})
        methods[shown] = model
        for name, predict in methods.items():
            try:
                scores[name] = scoring.evaluate(
                    predict,
                    condition,
                    images,
                    protocol=config.protocol,
                    seed=config.seed,
                    channels=channels,
                    runtime=runtime if predict is model else None,
                    keep=keep,
                )
            except ImportError as error:
                notes.append(f"without {name}: {error}")
        write_strips(config.path.with_name(PICTURES), condition, scores)
    height, width = size = input_size(task, images)
    cost = costs(model, task, images)
    latency = measure_latency(
        model, size, runtime, batch=config.batch, seconds=config.seconds, channels=channels
    )
    result = {
        "data": source,
        "split": config.split,
        "images": len(images),
        "task": task.describe(),
        "protocol": config.protocol,
        "seed": config.seed,
        "scores": {
            label: {name: each.to_json() for name, each in scores.items()}
            for label, scores in found.items()
        },
        **cost,
        "latency_ms": dataclasses.asdict(latency),
    }
    table = Table(
        title=escape(f"{len(images)} {config.split} images of {images.name}, {config.protocol}"),
        caption="\n".join(escape(note) for note in notes) or None,
    )
    for column in ("method", "PSNR, dB", "SSIM"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for label, scores in found.items():
        table.add_section()
        table.add_row(escape(label), "", "")
        for name, each in scores.items():
            table.add_row(escape(f"  {name}"), f"{each.psnr:.3f}", f"{each.ssim:.4f}")
    table.add_section()
    table.add_row("parameters", f"{cost['params']:,}", "")
    table.add_row(f"multiply-adds, {height}x{width}", f"{cost['macs'] / 1e9:.3f} G", "")
    table.add_row(
        f"latency, batch {latency.batch}, {latency.dtype}, {latency.device}, "
        f"{latency.threads} threads",
        f"{latency.median:.1f} ms",
        "",
    )
    return result, table


def write_strips(folder: Path, task: RestorationTask, scores: Mapping[str, Scores]) -> None:
    """One PNG for each image that was kept: clean, degraded, the last baseline, the network.

    `scores` holds the network last. Nothing is written where no image was kept.
    """
    names = list(scores)
    chosen = names[-2:] if len(names) > 2 else names[-1:]
    for index, first in enumerate(scores[chosen[-1]].kept):
        panels = {"clean": first.clean, "degraded": first.degraded}
        for name in chosen:
            entry = scores[name].kept[index]
            ratio = next(image.psnr for image in scores[name].images if image.name == entry.name)
            panels[f"{name}, {ratio:.2f} dB"] = entry.restored
        stem = re.sub(r"[^\w.+-]+", "-", f"{Path(first.name).stem} {task.label}")
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"{stem}.png") as file:
            strip(panels).save(file, "png", optimize=True)


def strip(panels: Mapping[str, Tensor]) -> Image.Image:
    """Images ``[c, H, W]`` in [0, 1] side by side under their captions; small ones are enlarged by
    whole factors, to one size and room for the text."""
    height, width = (max(panel.shape[axis] for panel in panels.values()) for axis in (-2, -1))
    factor = max(1, math.ceil(LEAST_WIDTH / width))
    size = (factor * width, factor * height)
    images = [_image(panel).resize(size, Image.Resampling.NEAREST) for panel in panels.values()]
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    canvas = Image.new(images[0].mode, (width, size[1] + CAPTION), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for caption, image in zip(panels, images, strict=True):
        canvas.paste(image, (left, CAPTION))
        draw.text((left + 2, 2), caption, fill="black", font_size=CAPTION - 6)
        left += image.width + GAP
    return canvas


def _image(panel: Tensor) -> Image.Image:
    pixels = (255 * panel.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()  # [H, W, c]
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
