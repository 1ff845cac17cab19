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

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name

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


def tensor_mismatch(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Which tensors of a state dict are missing, unknown, of another shape or kind, or have values
    that are not finite; None if none is. ``own`` may be on the meta device."""
    # a checkpoint with BatchNorm folded away or renamed must not leave random weights behind
    problems = {
        "missing": [key for key in own if key not in given],
        "unknown": [key for key in given if key not in own],
        "of another shape": [
            f"{key}: expected {list(own[key].shape)}, got {list(value.shape)}"
            for key, value in given.items()
            if key in own and value.shape != own[key].shape
        ],
        "of another type": [
            f"{key}: expected {own[key].dtype}, got {value.dtype}"
            for key, value in given.items()
            if key in own and own[key].is_floating_point() and not value.is_floating_point()
        ],
        "not finite": [key for key, value in given.items() if not value.isfinite().all()],
    }
    for problem, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            return f"{len(keys)} key(s) {problem}: {', '.join(keys[:5])}{more}"
    return None
