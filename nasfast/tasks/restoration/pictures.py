"""Restored images beside what they were made from and what they should be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from nasfast.tasks.restoration.fidelity import psnr
from nasfast.tasks.restoration.scoring import Restored
from nasfast.training.pictures import SIDE, png, strip


def before_and_after(images: Iterable[Restored]) -> dict[str, bytes]:
    """A picture of each image, by the name of its file: degraded, restored, clean.

    It shows the centre, pixel for pixel, as a smaller copy would hide what is restored; PSNR is of
    the whole image.
    """
    files = {}
    for image in images:
        panels = {
            f"before{_ratio(image.degraded, image.clean)}": image.degraded,
            f"after{_ratio(image.restored, image.clean)}": image.restored,
            "truth": image.clean,
        }
        side = min(SIDE, *image.clean.shape[-2:])
        whole = image.clean.shape[-1]
        parts = {name: _centre(panel, side, whole) for name, panel in panels.items()}
        files[f"{file_stem(image.name)}.png"] = png(strip(parts))
    return files


def file_stem(name: str, *more: str) -> str:
    """Name of an image, and more words, as the name of a file without its ending."""
    return re.sub(r"[^\w.+-]+", "-", " ".join([Path(name).stem, *more]))


def _ratio(image: Tensor, clean: Tensor) -> str:
    return f", {psnr(image[None], clean[None]).item():.2f} dB" if image.shape == clean.shape else ""


def _centre(panel: Tensor, side: int, whole: int) -> Tensor:
    """The middle of a panel, of ``side`` pixels where the clean image is ``whole`` pixels wide."""
    scale = whole // panel.shape[-1]
    side = side // scale
    top, left = ((length - side) // 2 for length in panel.shape[-2:])
    return panel[:, top : top + side, left : left + side]
