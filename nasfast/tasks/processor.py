"""How a trained network is used: the part of a task that needs no data set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nasfast.utils.config import from_mapping


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


class Prediction(ABC):
    """A task's result for one image, at the image's own size.

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
        """Write the result as files that begin with ``stem``, atomically; returns them."""


class Processor(ABC):
    """Turns an image into the input of a network, and what the network gives into a prediction.

    One subclass a task; `describe` is part of a model file, and ``nasfast.tasks.processor_of``
    makes the processor again from there.
    """

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

    @abstractmethod
    def prediction(self, output: Tensor, image: Tensor) -> Prediction:
        """What an output means.

        Args:
            output: float32 ``[outputs, scale * H, scale * W]``.
            image: uint8 ``[c, H, W]``.
        """
