"""Detection datasets: images with boxes, their splits and their transforms."""

from __future__ import annotations

from pathlib import Path

from nasfast.data.detection.base import (
    BoxSample,
    BoxSubset,
    DetectionDataset,
    DetectionParts,
    DetectionSplits,
    divide,
)
from nasfast.data.detection.synthetic import SyntheticShapes
from nasfast.data.detection.transforms import (
    FILL,
    PADDING,
    BoxBatch,
    BoxTrainTransform,
    BoxTransform,
    BoxValTransform,
    batch,
)

__all__ = [
    "FILL",
    "PADDING",
    "BoxBatch",
    "BoxSample",
    "BoxSubset",
    "BoxTrainTransform",
    "BoxTransform",
    "BoxValTransform",
    "DetectionDataset",
    "DetectionParts",
    "DetectionSplits",
    "SyntheticShapes",
    "batch",
    "load_detection_splits",
]


def load_detection_splits(
    source: str | Path,
    *,
    seed: int = 0,
    held_out: float = 0.1,
    cache_in_memory: bool = True,
) -> DetectionSplits:
    """Open a dataset and divide it; `seed` decides only which share `held_out` of `train` validates
    a search: 0.1, and 0.3 in the paper (4,000 and 1,715 photos of PASCAL VOC).

    `source` is "synthetic" (512 + 128 scenes of 128x160), or a folder of one of `LAYOUTS`, which is
    recognised by what it holds.
    """
    if source == "synthetic":
        train, val = (
            SyntheticShapes(count, stream=stream, cache_in_memory=cache_in_memory)
            for count, stream in ((512, "train"), (128, "val"))
        )
        return divide(DetectionParts(train, val), seed=seed, fraction=held_out)
    raise NotImplementedError
