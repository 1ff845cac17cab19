"""Detection datasets: images with boxes, their splits and their transforms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nasfast.data import layout_in
from nasfast.data.detection.base import (
    BoxSample,
    BoxSubset,
    DetectionDataset,
    DetectionParts,
    DetectionSplits,
    divide,
)
from nasfast.data.detection.coco import COCO_LAYOUT, is_coco, open_coco
from nasfast.data.detection.files import require_boxes
from nasfast.data.detection.synthetic import SyntheticShapes
from nasfast.data.detection.transforms import (
    FILL,
    PADDING,
    BoxBatch,
    BoxTrainTransform,
    BoxTransform,
    BoxValTransform,
    batch,
    scaled_size,
)
from nasfast.data.detection.voc import BOXES_LAYOUT, box_folders, open_boxes_voc
from nasfast.data.detection.yolo import YOLO_LAYOUT, open_yolo, yolo_folders

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
    "scaled_size",
]


class Layout(NamedTuple):
    """A kind of folder; as of `nasfast.data`."""

    text: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, bool], DetectionParts]
    """With whether decoded images are kept."""


LAYOUTS = {
    "COCO": Layout(COCO_LAYOUT, is_coco, open_coco),
    "PASCAL VOC": Layout(BOXES_LAYOUT, lambda root: bool(box_folders(root)), open_boxes_voc),
    "YOLO": Layout(YOLO_LAYOUT, lambda root: "train" in yolo_folders(root), open_yolo),
}


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
    root = Path(source)
    parts = layout_in(root, LAYOUTS).open(root, cache_in_memory)
    require_boxes(parts.train, parts.val)
    return divide(parts, seed=seed, fraction=held_out)
