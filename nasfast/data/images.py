"""Image files: what a folder holds of them, and the reader that names one which it cannot read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nasfast.utils.errors import UserError, cause

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, by name."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(files, key=lambda path: path.name)


def open_image(path: Path, kind: str = "image", *, decode: bool = True) -> Image.Image:
    """Read an image file; UserError names one that cannot be read.

    Args:
        path: the file.
        kind: what the error calls it.
        decode: read the pixels, not only the mode and the size.
    """
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image
    except MemoryError:
        raise
    except Exception as error:  # by the damage: OSError, SyntaxError, struct.error, ..
        raise UserError(
            f"{kind} {path} cannot be read: {cause(error)}; restore it from a copy, or save it as "
            "an 8-bit PNG"
        ) from error


def read_image(path: Path, channels: int = 3) -> Tensor:
    """Pixels of an image file, upright, uint8 ``[channels, H, W]``; UserError names one that cannot
    be read.

    Args:
        path: the file.
        channels: 1 converts to grey (ITU-R 601 luma, PIL's "L"), 3 to RGB.
    """
    image = open_image(path)
    upright = ImageOps.exif_transpose(image).convert({1: "L", 3: "RGB"}[channels])
    pixels = np.atleast_3d(np.array(upright)).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))
