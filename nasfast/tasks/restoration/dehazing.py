"""Removal of haze: pairs of hazy and clean images, or haze generated over clean images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from nasfast.data.restoration import ImagePair
from nasfast.tasks.restoration.base import Name, Predict, RestorationTask
from nasfast.tasks.restoration.baselines import dark_channel_prior

SPACING = (48, 192)  # pixels between the knots of a random depth


@dataclass(frozen=True)
class Dehazing(RestorationTask):
    """Real pairs where the data has them; else haze over clean images, by their depth, or by a
    random one.

    The scattering model of the field (Narasimhan and Nayar, "Vision and the atmosphere", 2002):
    hazy = clean * t + airlight * (1 - t), t = exp(-beta * depth), where depth is 1 at the farthest
    point of a scene. The hazy image is not rounded. Each field is a range (low, high) to draw from
    uniformly, for each image, and for each channel of the airlight.
    """

    task: Name = field(default="dehazing", init=False)
    pairs: ClassVar[str] = "hazy"
    takes_depth: ClassVar[bool] = True
    colour: ClassVar[bool] = True
    reduction: ClassVar[int] = 8

    beta: tuple[float, float] = (0.6, 1.8)
    """Scattering of the haze, for a depth of 1: 0.6 leaves 55 % of the light, 1.8 leaves 17 %."""
    airlight: tuple[float, float] = (0.7, 1.0)
    """Light that an endless depth has, on the scale 0..1."""

    def __post_init__(self) -> None:
        self.require_ranges({"beta": (0, 10), "airlight": (0, 1)})

    @property
    def label(self) -> str:
        return "dehazing"

    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        height, width = clean.shape[-2:]
        return self._haze(clean, random_depth(height, width, generator), generator)

    def pair(self, images: ImagePair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if images.depth is None or images.degraded is not None:
            return super().pair(images, generator)
        clean = images.clean.float() / 255
        return self._haze(clean, images.depth, generator), clean

    def baselines(self) -> dict[str, Predict]:
        return {"identity": lambda images: images, "dark channel prior": dark_channel_prior}

    def _haze(self, clean: Tensor, depth: Tensor, generator: torch.Generator) -> Tensor:
        """Clean ``[c, H, W]`` and depth ``[1, H, W]`` to the hazy image."""
        draws = torch.rand(1 + len(clean), 1, 1, generator=generator)
        (beta, beta_to), (airlight, airlight_to) = self.beta, self.airlight
        transmission = torch.exp(-(beta + (beta_to - beta) * draws[0]) * depth)
        return torch.lerp(airlight + (airlight_to - airlight) * draws[1:], clean, transmission)


def random_depth(height: int, width: int, generator: torch.Generator) -> Tensor:
    """A smooth random depth in 0..1, float32 ``[1, height, width]``.

    Uniform values on a grid, joined by half waves of a cosine. The distance of its knots is in
    pixels, so that patches have the depth that parts of whole images have.
    """
    spacing, *phases = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    spacing = SPACING[0] + (SPACING[1] - SPACING[0]) * spacing
    down, across = (_waves(n, spacing, p) for n, p in zip((height, width), phases, strict=True))
    knots = torch.rand(down.shape[1], across.shape[1], generator=generator)
    depth: Tensor = down @ knots @ across.T
    return depth[None]


def _waves(side: int, spacing: float, phase: float) -> Tensor:
    """Weights ``[side, knots]`` of the two knots around each pixel; their sum is 1."""
    places = torch.arange(side) / spacing + phase
    knots = torch.arange(math.floor(places[-1]) + 2)
    return (1 + torch.cos(math.pi * (places[:, None] - knots).abs().clamp(max=1))) / 2
