"""The procedural street scenes with their depths: no download."""

from __future__ import annotations

import torch

from nasfast.data.base import digest
from nasfast.data.depth.base import DepthDataset, DepthSample
from nasfast.data.synthetic import VERSION, street

FARTHEST = 100.0
"""Metres; beyond, and in the sky, a depth is not known."""


class StreetDepths(DepthDataset):
    """Frames as those of `SyntheticStreets` at seed 0; arguments as there."""

    per_metre = 256

    def __init__(self, num_samples: int, size: tuple[int, int] = (96, 128), *, stream: str) -> None:
        self.name = "synthetic"
        self._num_samples, self._size, self._stream = num_samples, size, stream

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> DepthSample:
        scene = street(0, self._stream, range(self._num_samples)[index], self._size)
        depth = torch.from_numpy(scene.depth)
        return DepthSample(
            torch.from_numpy(scene.photograph()), depth.where(depth <= FARTHEST, 0.0)
        )

    def sizes(self) -> list[tuple[int, int]]:
        return [self._size] * self._num_samples

    def fingerprint(self) -> str:
        identity = (self._stream, self._num_samples, tuple(self._size), FARTHEST)
        return digest("synthetic street depths", VERSION, identity)
