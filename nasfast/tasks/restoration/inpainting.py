"""Inpainting: pixels that are missing, alone or in boxes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nasfast.tasks.restoration.base import Name, Predict, RestorationTask
from nasfast.tasks.restoration.baselines import diffuse
from nasfast.utils.errors import UserError


@dataclass(frozen=True)
class Inpainting(RestorationTask):
    """Missing pixels are 0 in all channels; the network gets no mask beside the image.

    Metrics cover the whole image, also the pixels that were given.
    """

    task: Name = field(default="inpainting", init=False)

    missing: float = 0.5
    """Share of the pixels that are missing, each by itself."""
    boxes: float = 0.0
    """Area of the missing boxes, which may overlap, over the image's area; above 0 there is at
    least one box."""
    box: int = 16
    """Side of a box, pixels; cut to the image's sides."""

    def __post_init__(self) -> None:
        for name in ("missing", "boxes"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"inpainting: expected {name} from 0 to below 1, got {value}")
        if self.missing == self.boxes == 0:
            raise UserError("inpainting: expected missing or boxes above 0, got 0 for both")
        if self.box < 1:
            raise UserError(f"inpainting: expected box of at least 1 pixel, got {self.box}")

    @property
    def label(self) -> str:
        parts = [f"{100 * self.missing:g} % of the pixels"] if self.missing else []
        parts += [f"{100 * self.boxes:g} % in boxes of {self.box}"] if self.boxes else []
        return "inpainting, " + " and ".join(parts)

    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        height, width = clean.shape[-2:]
        missing = torch.rand(height, width, generator=generator) < self.missing
        if self.boxes:
            side = min(self.box, height, width)
            count = max(1, round(self.boxes * height * width / side**2))
            for y, x in torch.rand(count, 2, generator=generator).tolist():
                top, left = int(y * (height - side + 1)), int(x * (width - side + 1))
                missing[top : top + side, left : left + side] = True
        return clean.masked_fill(missing, 0)

    def baselines(self) -> dict[str, Predict]:
        return {"identity": lambda images: images, "diffusion": diffuse}
