"""Pictures of what a network gives, side by side with what it should give."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from nasfast.utils.errors import cause

SAMPLES = 3  # that are shown of a candidate
SIDE = 240  # of a thumbnail, in pixels, at most
GAP, CAPTION, LEAST_WIDTH = 6, 22, 220  # pixels between, above and across images of a strip
FAILED = "failed.txt"
"""File that says why there are no pictures."""


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices below ``length``, from all over."""
    count = min(count, length)
    return [round((i + 0.5) * length / count - 0.5) for i in range(count)]


def thumbnail(image: Tensor) -> Tensor:
    """A smaller copy of an image, uint8 ``[c, H, W]``, whose width is `SIDE` at most."""
    height, width = image.shape[-2:]
    if width <= SIDE:
        return image
    size = (max(1, round(height * SIDE / width)), SIDE)
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def strip(panels: Mapping[str, Tensor]) -> Image.Image:
    """Images ``[c, H, W]``, uint8 or in [0, 1], side by side under their captions; small ones are
    enlarged by integer factors, to one size and room for the text."""
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


def png(image: Image.Image, *, palette: bool = False) -> bytes:
    """The content of a PNG file; with a palette, of 256 colours and a quarter of the size."""
    if palette:
        method, dither = Image.Quantize.FASTOCTREE, Image.Dither.NONE
        image = image.quantize(256, method=method, dither=dither)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def drawn(draw: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
    """The files that ``draw`` makes, by name, or `FAILED` alone: a network is worth the same
    without its pictures, and whoever looks for them finds the cause."""
    try:
        return dict(draw())
    except Exception as error:
        return {FAILED: f"{type(error).__name__}: {cause(error)}".encode()}


def _image(panel: Tensor) -> Image.Image:
    if panel.dtype != torch.uint8:
        panel = (255 * panel.clamp(0, 1)).round().byte()
    pixels = panel.permute(1, 2, 0).contiguous().numpy()  # [H, W, c]
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
