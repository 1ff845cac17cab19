"""Removal of rain streaks: pairs of rainy and clean images, or streaks drawn over clean images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.tasks.restoration.base import Name, RestorationTask


@dataclass(frozen=True)
class Deraining(RestorationTask):
    """Real pairs where the data has them; else streaks are added to clean images.

    The additive model of the field (Fu et al., "Removing rain from single images via a deep
    detail network", 2017): rainy = clean + streaks, the same in all channels, clipped at 1, as
    sensors saturate. All streaks of an image share direction, length and width. Each field is a
    range (low, high) to draw from uniformly, for each image.
    """

    task: Name = field(default="deraining", init=False)
    pairs: ClassVar[str] = "rainy"

    density: tuple[float, float] = (0.001, 0.008)
    """Streaks per pixel."""
    length: tuple[float, float] = (8.0, 28.0)
    """Pixels."""
    angle: tuple[float, float] = (-30.0, 30.0)
    """Degrees from the vertical, to the right at the top."""
    width: tuple[float, float] = (0.5, 1.0)
    """Deviation of a streak's profile, pixels."""
    brightness: tuple[float, float] = (0.2, 0.6)
    """Light of the brightest streak, on the scale 0..1; the others have half of it or more."""

    def __post_init__(self) -> None:
        self.require_ranges(
            {
                "density": (0, 1),
                "length": (1, 255),
                "angle": (-90, 90),
                "width": (0.1, 10),
                "brightness": (0, 1),
            }
        )

    @property
    def label(self) -> str:
        return "deraining"

    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        ranges = (self.density, self.length, self.angle, self.width, self.brightness)
        draws = torch.rand(len(ranges), generator=generator, dtype=torch.float64).tolist()
        density, length, angle, width, brightness = (
            low + (high - low) * draw for (low, high), draw in zip(ranges, draws, strict=True)
        )
        streak = _streak(length, math.radians(angle), width)
        reach = streak.shape[-1] // 2
        height, columns = (side + 2 * reach for side in clean.shape[-2:])
        seeds, light = torch.rand(2, height, columns, generator=generator)
        drops = torch.where(seeds < density, (1 + light) / 2, 0)
        streaks = F.conv2d(drops[None, None], streak[None, None])[0].clamp(max=1)  # [1, H, W]
        return torch.add(clean, streaks, alpha=brightness).clamp(max=1)


def _streak(length: float, angle: float, width: float) -> Tensor:
    """A line through the middle, 1 at its brightest, ``[2 r + 1, 2 r + 1]``; angle in radians."""
    reach = math.ceil(length / 2 + 2 * width)
    offset = torch.arange(-reach, reach + 1, dtype=torch.float32)
    y, x = offset[:, None], offset[None]
    along = x * math.sin(angle) - y * math.cos(angle)
    across = x * math.cos(angle) + y * math.sin(angle)
    ends = (length / 2 + 0.5 - along.abs()).clamp(0, 1)
    streak: Tensor = ends * torch.exp(-across.square() / (2 * width**2))
    return streak
