"""Measuring a trained restoration network: metrics, baselines, cost, and pictures."""

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
from nasfast.methods.restoration.settings import parse
from nasfast.models.restorer import read_restorer
from nasfast.tasks.restoration import RestorationTask, task_from_json
from nasfast.tasks.restoration import base as metrics
from nasfast.tasks.restoration.base import Predict, Scores
from nasfast.training.cost import count_macs, count_parameters, measure_latency
from nasfast.training.loop import Runtime
from nasfast.utils.files import atomic_file

PICTURES = "pictures"
"""Folder beside the model that the strips are put in."""
GAP, CAPTION, LEAST_WIDTH = 6, 22, 220  # pixels between, above and across images of a strip


@dataclass(frozen=True)
class EvaluateConfig(base.EvaluateConfig):
    """What to measure, and how."""

    task: tyro.conf.Suppress[Mapping[str, Any] | None] = None
    """Another task than the network was trained for: --task NAME."""
    split: Literal["val", "test"] = "test"
    """Which images: no search and no training sees those of the test."""
    protocol: Literal["whole", "overlap"] = "whole"
    """whole: one degraded version of each whole image. overlap: averaged patches, each with noise
    of its own, which flatters; only to compare with figures measured that way."""
    baselines: bool = False
    """Also run the methods without training."""
    pictures: int = 4
    """Images to show before and after, from all over the split."""
    seed: int = 0
    """Decides what the task draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures < 0:
            raise ValueError(f"pictures: expected 0 or more, got {self.pictures}")


def parse_evaluate(argv: Sequence[str], description: str | None) -> EvaluateConfig:
    """Settings from a command line."""
    return parse(
        EvaluateConfig, argv, prog="nasfast.evaluate", description=description, default=None
    )


def evaluate(config: EvaluateConfig) -> tuple[dict[str, Any], Table]:
    """PSNR and SSIM of the network, and of methods without training, under each condition of the
    task; parameters, multiply-adds and latency. Writes the pictures."""
    model, description = read_restorer(config.path)
    runtime = Runtime(resolve_device(config.device))
    source, channels = config.data or description["data"], model.channels
    task = task_from_json(config.task or description["task"])
    if task.scale != model.scale:
        raise ValueError(
            f"evaluate {config.path}: expected a task of scale {model.scale}, as the network has, "
            f"got {task.label} of scale {task.scale}"
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
                scores[name] = metrics.evaluate(
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
    height, width = (side // task.scale for side in images.sizes[0])
    latency = measure_latency(
        model,
        (height, width),
        runtime,
        batch=config.batch,
        seconds=config.seconds,
        channels=channels,
    )
    macs = count_macs(model, (height, width), channels=channels)
    result = {
        "data": source,
        "split": config.split,
        "images": len(images),
        "task": task.describe(),
        "protocol": config.protocol,
        "seed": config.seed,
        "scores": {
            label: {name: each.as_dict() for name, each in scores.items()}
            for label, scores in found.items()
        },
        "params": count_parameters(model),
        "macs": macs,
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
    table.add_row("parameters", f"{result['params']:,}", "")
    table.add_row(f"multiply-adds, {height}x{width}", f"{macs / 1e9:.3f} G", "")
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
    for index, first in enumerate(scores[chosen[-1]].pictures):
        panels = {"clean": first.clean, "degraded": first.degraded}
        for name in chosen:
            entry = scores[name].pictures[index]
            ratio = next(image.psnr for image in scores[name].images if image.name == entry.name)
            panels[f"{name}, {ratio:.2f} dB"] = entry.restored
        stem = re.sub(r"[^\w.+-]+", "-", f"{Path(first.name).stem} {task.label}")
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"{stem}.png") as file:
            strip(panels).save(file, "png", optimize=True)


def strip(panels: Mapping[str, Tensor]) -> Image.Image:
    """Images ``[c, H, W]`` in [0, 1] side by side under their captions; small ones are enlarged by
    whole factors, to one size and room for the text."""
    height, width = (max(image.shape[axis] for image in panels.values()) for axis in (-2, -1))
    factor = max(1, math.ceil(LEAST_WIDTH / width))
    size = (factor * width, factor * height)
    pictures = [_picture(image).resize(size, Image.Resampling.NEAREST) for image in panels.values()]
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    canvas = Image.new(pictures[0].mode, (width, size[1] + CAPTION), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for caption, picture in zip(panels, pictures, strict=True):
        canvas.paste(picture, (left, CAPTION))
        draw.text((left + 2, 2), caption, fill="black", font_size=CAPTION - 6)
        left += picture.width + GAP
    return canvas


def _picture(image: Tensor) -> Image.Image:
    pixels = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()  # [H, W, c]
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
