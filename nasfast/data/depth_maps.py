"""The one reader of depths: a 16-bit PNG or a .npy with a depth for each pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasfast.data.images import WIDE_MODES, list_folder, open_image
from nasfast.utils.errors import UserError, cause

SATURATED = 65535
"""Value of 16 bits that is no measurement; the invalid code of 7-Scenes."""


def read_depth(path: Path, scale: float | None) -> Tensor:
    """Depths of a file, float32 [H, W] in metres; 0 where it has none: values that are not finite
    or not above 0, and 65535 of integers.

    Raises:
        UserError: the file cannot be read or is no map of depths, or needs a scale.
    """
    values: NDArray[Any] = _array(path) if path.suffix == ".npy" else _picture(path)
    whole = np.issubdtype(values.dtype, np.integer)
    if whole and scale is None:
        raise UserError(
            f"depth {path} holds whole numbers: expected --depth.scale, values a metre, which the "
            "file does not say, got none; add it (1000 for millimetres, as of NYU Depth v2; 256 "
            "for KITTI)"
        )
    known = np.isfinite(values) & (values > 0)
    if whole:
        known &= values != SATURATED
    metres = np.where(known, values, 0).astype(np.float32) / np.float32(scale or 1)
    return torch.from_numpy(metres)


def _array(path: Path) -> NDArray[Any]:
    try:
        values: NDArray[Any] = np.load(path, allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # by the damage: OSError, ValueError, EOFError, ..
        raise UserError(
            f"depth {path} cannot be read: {cause(error)}; replace the file or take it out of the "
            "folder"
        ) from error
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        raise UserError(
            f"depth {path}: expected an array [height, width] of numbers, got "
            f"{list(values.shape)} of {values.dtype}; save the depths alone"
        )
    return values


def _picture(path: Path) -> NDArray[Any]:
    image = open_image(path, "depth")
    if image.mode in WIDE_MODES:
        return np.array(image)
    if image.mode in ("1", "L", "P"):
        raise UserError(
            f"depth {path} has 8 bits a pixel: expected a PNG of 16 bits or a .npy, as 8 are too "
            "few for depths; export it again from its source"
        )
    raise UserError(
        f"depth {path} is a colour image (mode {image.mode}): expected a PNG of 16 bits or a .npy "
        "with one depth a pixel; give the depths themselves, not their picture"
    )


def files_of_depth(folder: Path) -> list[Path]:
    """Images and .npy files in a folder."""
    listing = list_folder(folder)
    arrays = [path for path in listing.others if path.suffix == ".npy"]
    return sorted([*listing.images, *arrays])
