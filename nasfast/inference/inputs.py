"""What a person gives to predict on, as pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nasfast.data.images import MAX_PIXELS, WIDE_MODES, planes, read_image, upright
from nasfast.utils.errors import UserError
from nasfast.utils.files import expanded

Input = Path | str | Image.Image | NDArray[Any] | Tensor
"""A file, a PIL image, an array uint8 ``[H, W, 3]`` or ``[H, W]``, a tensor uint8 ``[c, H, W]``
with c = 1 or 3."""
Resize = Literal["auto", "none"] | int
"""Whether an image is enlarged or reduced for the network; a number is its shorter side then."""

SCALES = 0.7, 1.4
"""A training shows images at these factors of their size (Fast NAS): the network knows them."""
SHORTEST = 32
"""Least side that images can be brought to on demand."""


def pixels_of(image: Input, channels: int) -> Tensor:
    """An image as uint8 ``[channels, H, W]``. Photos are turned upright (EXIF), alpha is dropped;
    colour becomes grey (ITU-R 601 luma, PIL's "L"), grey three equal channels, as for training.

    Raises:
        UserError: none of the accepted forms, or a file that cannot be read.
    """
    if isinstance(image, str | Path):
        return read_image(expanded(image), channels)
    if isinstance(image, Tensor):
        _check(image, image.dim() == 3 and image.shape[0] in (1, 3))
        pixels = image.detach().cpu()
    elif isinstance(image, np.ndarray):
        _check(image, image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3))
        pixels = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1)))
    elif isinstance(image, Image.Image):
        _check(image, image.mode not in WIDE_MODES and min(image.size) > 0)
        return planes(upright(image), channels)
    else:
        raise _refused(type(image).__name__)
    if len(pixels) == channels:
        return pixels.clone()
    if channels == 3:
        return pixels.repeat(3, 1, 1)
    return planes(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), channels)


def _check(image: Tensor | NDArray[Any] | Image.Image, accepted: bool) -> None:
    if isinstance(image, Image.Image):
        got = f"a PIL image of mode {image.mode}, {image.width}x{image.height}"
    else:
        dtype = str(image.dtype).removeprefix("torch.")
        got = f"{type(image).__name__} {dtype} {list(image.shape)}"
        accepted = accepted and dtype == "uint8" and 0 not in image.shape
    if not accepted:
        raise _refused(got)


def _refused(got: str) -> UserError:
    return UserError(
        "predict: expected an image as a path, an 8-bit PIL image, a uint8 array [H, W, 3] or "
        f"[H, W], a uint8 tensor [c, H, W] with c = 1 or 3, or a list of them, got {got}; scale "
        "values to 0..255, and give a batch as a list"
    )


def size_for(size: tuple[int, int], usual: tuple[int, int] | None, mode: Resize) -> tuple[int, int]:
    """(H, W) that an image is brought to for a network.

    Args:
        size: of the image.
        usual: size of the images that the network was scored on, where it is known.
        mode: "none" keeps the size. A number becomes the shorter side. "auto" keeps an image whose
            shorter side is 0.7 to 1.4 times the usual one, the range of a training, and brings
            another to the usual shorter side; it enlarges no longer side beyond the usual one.

    Raises:
        UserError: the image would become too large.
    """
    if mode == "none" or (mode == "auto" and usual is None):
        return size
    if mode == "auto":
        assert usual is not None
        factor = min(usual) / min(size)
        if SCALES[0] <= 1 / factor <= SCALES[1]:
            return size
        if factor > 1:
            factor = max(1.0, min(factor, max(usual) / max(size)))
    else:
        assert isinstance(mode, int)
        factor = mode / min(size)
    height, width = (max(1, round(side * factor)) for side in size)
    if height * width > max(MAX_PIXELS, size[0] * size[1]):
        raise UserError(
            f"resize: expected at most {MAX_PIXELS:,} pixels, got {height}x{width} (height x "
            f"width) for an image of {size[0]}x{size[1]}; give a smaller number"
        )
    return height, width


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of uint8 ``[N, c, H, W]``, antialiased where it is reduced."""
    if (image.shape[-2], image.shape[-1]) == size:
        return image
    return F.interpolate(image, size, mode="bilinear", antialias=True)
