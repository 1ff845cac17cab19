"""Restored images side by side with what they were made from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from nasfast.tasks.restoration import RestorationTask
from nasfast.tasks.restoration.scoring import Scores
from nasfast.utils.files import atomic_file

GAP, CAPTION, LEAST_WIDTH = 6, 22, 220  # pixels between, above and across images of a strip


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
    integer factors, to one size and room for the text."""
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
