"""How a network for depth is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nasfast.data import IMAGENET_MEAN, IMAGENET_STD
from nasfast.data.depth import colored_depth
from nasfast.tasks.processor import Prediction, Preprocessing, Processor
from nasfast.utils.files import atomic_file

MOST = 65534
"""Greatest value in a file; 65535 is no measurement."""


@dataclass(frozen=True, eq=False)
class DepthMap(Prediction):
    """A depth for every pixel."""

    image: Tensor  # uint8 [3, H, W]
    depth: Tensor  # float32 [H, W]
    """Metres along the optical axis; 0 where a truth is not known."""
    per_metre: float
    """Values a metre in the file."""
    typical: float
    """Metres that the colours lie around."""

    def draw(self) -> Tensor:
        """Colours, bright where it is near, equal for equal depths in all images of a network."""
        return colored_depth(self.depth, self.typical)

    def to_json(self) -> dict[str, Any]:
        """Size, values a metre in the file, and nearest, median and farthest depth in metres."""
        low, middle, high = self.depth.min(), self.depth.median(), self.depth.max()
        return {
            "size": list(self.depth.shape),
            "values_a_metre": self.per_metre,
            "depth": {"nearest": low.item(), "median": middle.item(), "farthest": high.item()},
        }

    def save(self, folder: Path, stem: str) -> list[Path]:
        """``stem.png`` of 16 bits, ``per_metre`` values a metre, as the files of the training, and
        ``stem-color.png``. The array is `depth`."""
        values = (self.depth * self.per_metre).round().clamp(1, MOST)
        drawn = self.draw().permute(1, 2, 0).contiguous().numpy()
        pictures = Image.fromarray(values.numpy().astype(np.uint16)), Image.fromarray(drawn)
        paths = [folder / f"{stem}{suffix}" for suffix in DepthProcessor.suffixes]
        for path, picture in zip(paths, pictures, strict=True):
            with atomic_file(path) as file:
                picture.save(file, "png")
        return paths


@dataclass(frozen=True)
class DepthProcessor(Processor):
    """Of one output, the natural logarithm of metres."""

    per_metre: float
    typical: float

    suffixes = (".png", "-color.png")
    task = "depth"
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)

    def result(self, reduced: Tensor, image: Tensor) -> DepthMap:
        return DepthMap(image, reduced[0].exp(), self.per_metre, self.typical)
