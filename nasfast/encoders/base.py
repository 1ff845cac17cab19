"""What an encoder is: a backbone that gives maps of several strides."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class FeatureInfo:
    """One tap of an encoder."""

    module: str
    """Name of the submodule whose output is tapped."""
    channels: int
    """Channels of the feature map."""
    stride: int
    """Input pixels per feature-map pixel, along each axis."""


class Encoder(nn.Module):
    """A backbone with taps.

    Shapes: images ``[N, 3, H, W]`` to a list of ``[N, C_i, ceil(H / s_i), ceil(W / s_i)]``.
    """

    name: ClassVar[str]
    """In model files."""
    feature_info: tuple[FeatureInfo, ...]

    @abstractmethod
    def forward(self, images: Tensor) -> list[Tensor]:
        """The taps, from the finest to the coarsest."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it is built from again, as plain JSON with its "name"."""

    @abstractmethod
    def load_strict(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load a state dict of torchvision's form; a classification head may be present.

        Raises:
            UserError: a key is missing, unknown or of another shape; the message names it.
        """

    @abstractmethod
    def first(self) -> list[nn.Module]:
        """What full trainings of detectors keep as it is: the layers nearest to the image."""
