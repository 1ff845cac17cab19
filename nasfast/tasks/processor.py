"""How a trained network is used: the part of a task that needs no data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from nasfast.utils.config import from_mapping

STRIDE = 32
"""Of the coarsest maps of encoders: images for them are padded to multiples of it."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network: values of 0..1, less the mean, over the
    deviation, one of each a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return len(self.mean)

    def __call__(self, images: Tensor) -> Tensor:
        """Images of 0..255, any dtype, ``[N, c, H, W]``, to float32."""
        mean, std = torch.tensor([self.mean, self.std], device=images.device).view(2, -1, 1, 1)
        normalized: Tensor = (images.to(torch.float32) - 255 * mean) / (255 * std)
        return normalized

    def describe(self) -> dict[str, Any]:
        """Plain JSON, for the metadata of model files."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Preprocessing:
        """Inverse of `describe`; UserError for another form."""
        return from_mapping(cls, description, "preprocessing")


@dataclass(frozen=True)
class Tiling:
    """How a large image is cut into tiles that overlap. All in pixels of the network's input."""

    side: int
    """Greatest height and width of a tile."""
    halo: int = 0
    """What is left out of a tile along the borders to its neighbours: what lies beyond them would
    have changed the output there."""
    blend: int = 0
    """Width over which one tile fades into the next; 0 cuts."""
    multiple: int = 1
    """Tiles begin at multiples of this, the stride of the network: all tiles share one grid."""


class Prediction(ABC):
    """A task's result for one image, at the image's own size. Its tensors are on the CPU.

    Attributes:
        image: what was predicted on, uint8 ``[c, H, W]``.
    """

    image: Tensor

    @abstractmethod
    def draw(self) -> Tensor:
        """Something to look at, uint8 ``[3, h, w]``: the result, over the image where it covers
        none of it."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What there is to say beside the arrays, as plain JSON."""

    @abstractmethod
    def save(self, folder: Path, stem: str) -> list[Path]:
        """Write the result atomically, as one file for each of ``Processor.suffixes``; returns
        them."""


class Processor(ABC):
    """Turns an image into the input of a network, and what the network gives into a prediction.

    One subclass a task; ``nasfast.tasks.registry.processor_of`` makes it from a model file's
    description. An output goes through `reduce`, part by part where the image is large, and then as
    a whole through `result`.
    """

    full_size: ClassVar[bool] = True
    """Whether outputs are first brought to the size of the result. Where not, as for
    keypoints, `reduce` gets a map ``[.., h, w]`` at the network's resolution, which covers the
    image: the centre of its cell (y, x) is at ((y + 0.5) H / h, (x + 0.5) W / w)."""
    resizes: ClassVar[bool] = True
    """Whether an image may be enlarged or reduced for the network: objects have a usual size."""
    whole: ClassVar[bool] = False
    """Whether outputs are of whole images, as boxes are: then `DetectionProcessor.detections` has
    the part of `reduce` and `result`."""
    suffixes: ClassVar[tuple[str, ...]] = (".png",)
    """Ends of the names of the files that ``Prediction.save`` writes."""

    @property
    @abstractmethod
    def task(self) -> str:
        """Its name in model files: "segmentation", "denoising"."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """What is done to the values of an image."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what the output distinguishes; empty where it is no classification."""
        return ()

    @property
    def scale(self) -> int:
        """Factor from the sides of the image to those of the result."""
        return 1

    @property
    def tiling(self) -> Tiling:
        """How large images are cut: as an encoder that looks far needs it."""
        return Tiling(side=1024, halo=64, blend=128, multiple=STRIDE)

    def reduce(self, output: Tensor) -> Tensor:
        """What is kept of an output, pixel by pixel: float32 ``[.., outputs, h, w]`` to a tensor
        ``[.., k, h, w]`` of any dtype. Whole outputs of large images would not fit in memory."""
        return output

    @abstractmethod
    def result(self, reduced: Tensor, image: Tensor) -> Prediction:
        """What an output means.

        Args:
            reduced: of the whole image, ``[k, scale * H, scale * W]``, on the CPU.
            image: uint8 ``[c, H, W]``.
        """

    def prediction(self, output: Tensor, image: Tensor) -> Prediction:
        """The result for an output ``[outputs, scale * H, scale * W]``, float32, of an image
        ``[c, H, W]``, uint8."""
        return self.result(self.reduce(output).cpu(), image.cpu())
