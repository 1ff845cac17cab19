"""Single-image super-resolution by 2, 3 or 4 after bicubic reduction."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.tasks.restoration.base import Name, Predict, RestorationTask
from nasfast.tasks.restoration.baselines import bicubic
from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class SuperResolution(RestorationTask):
    """Antialiased bicubic reduction (a = -0.5, as MATLAB's and PIL's), clipped and rounded to
    8 bits, as the small images of the field's test sets are.

    Metrics cover all channels and the border; the literature's PSNR of the luma alone, without
    a border of `scale` pixels, is another number.
    """

    task: Name = field(default="super-resolution", init=False)

    scale: int = 2
    """Factor of the sides: 2, 3 or 4."""

    def __post_init__(self) -> None:
        if self.scale not in (2, 3, 4):
            raise UserError(f"super-resolution: expected scale 2, 3 or 4, got {self.scale}")

    @property
    def label(self) -> str:
        return f"super-resolution x{self.scale}"

    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        size = [side // self.scale for side in clean.shape[-2:]]
        small = F.interpolate(clean[None], size, mode="bicubic", antialias=True)[0]
        return (255 * small.clamp(0, 1)).round() / 255

    def baselines(self) -> dict[str, Predict]:
        return {"bicubic": lambda images: bicubic(images, self.scale)}
