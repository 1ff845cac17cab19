"""Restored images, from networks of any restoration task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from nasfast.models.restorer import reach
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.tasks.processor import Prediction, Preprocessing, Processor, Tiling
from nasfast.tasks.restoration.base import RestorationTask
from nasfast.utils.files import atomic_file


@dataclass(frozen=True, eq=False)
class Restored(Prediction):
    """A restored image."""

    image: Tensor  # uint8 [c, H, W]
    restored: Tensor  # uint8 [c, scale * H, scale * W]

    def draw(self) -> Tensor:
        """The restored image in RGB."""
        return self.restored.expand(3, -1, -1)

    def to_json(self) -> dict[str, Any]:
        """Its size."""
        return {"size": list(self.restored.shape[-2:])}

    def save(self, folder: Path, stem: str) -> list[Path]:
        """``stem.png``."""
        pixels = self.restored.permute(1, 2, 0).contiguous().numpy()
        path = folder / f"{stem}.png"
        with atomic_file(path) as file:
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "png")
        return [path]


@dataclass(frozen=True)
class RestorationProcessor(Processor):
    """Of images in 0..1, not normalised."""

    degradation: RestorationTask
    channels: int
    reach: int
    """Pixels that an output depends on, to each side."""
    reduction: int = 1
    """Side of the blocks of pixels that the network reads as one."""

    resizes = False

    @classmethod
    def of(
        cls, task: RestorationTask, channels: int, genotype: IRNASGenotype, reduction: int
    ) -> RestorationProcessor:
        """For the network of an architecture."""
        return cls(task, channels, reach(genotype, reduction), reduction)

    @property
    def task(self) -> str:
        return self.degradation.task

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing((0.0,) * self.channels, (1.0,) * self.channels)

    @property
    def scale(self) -> int:
        return self.degradation.scale

    @property
    def tiling(self) -> Tiling:
        """A tile without its halo is what the whole image would have given there."""
        side = max(512 * min(self.reduction, 4), 4 * self.reach if self.reduction > 1 else 0)
        return Tiling(side, halo=self.reach, multiple=self.reduction)

    def reduce(self, output: Tensor) -> Tensor:
        """Clamped to 0..1 and rounded to 8 bits."""
        return (255 * output.clamp(0, 1)).round_().byte()

    def result(self, reduced: Tensor, image: Tensor) -> Restored:
        return Restored(image, reduced)
