"""Procedural scenes with boxes: a detection set that needs no download."""

from __future__ import annotations

from nasfast.data.base import digest
from nasfast.data.detection.base import BoxSample, DetectionDataset

VERSION = 1  # part of the fingerprint: raise it with every change of what is drawn
CLASSES = ("disc", "ring", "square", "triangle")


class SyntheticShapes(DetectionDataset):
    """Shapes on cluttered ground, sample i determined by (seed, stream, i) alone.

    size: (height, width) in pixels, at least 64 each.
    stream: "train", "val" or "pretrain"; streams share no sample at any seed.
    cache_in_memory: keep each sample once drawn.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        size: tuple[int, int] = (128, 160),
        *,
        stream: str = "train",
        cache_in_memory: bool = False,
    ) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> BoxSample:
        raise NotImplementedError

    def sizes(self) -> list[tuple[int, int]]:
        raise NotImplementedError

    def counts(self) -> list[int]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return digest("synthetic shapes", VERSION)
