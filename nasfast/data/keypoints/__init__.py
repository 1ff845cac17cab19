"""Keypoint datasets: people with named joints, their splits and the crops of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nasfast.data import layout_in
from nasfast.data.keypoints.base import (
    COCO,
    MPII,
    KeypointDataset,
    KeypointParts,
    KeypointSplits,
    Person,
    PersonSample,
    Skeleton,
    divide,
    halves_by_image,
)
from nasfast.data.keypoints.coco import COCO_LAYOUT, is_coco, open_coco
from nasfast.data.keypoints.files import require_people
from nasfast.data.keypoints.mpii import MPII_LAYOUT, is_mpii, open_mpii
from nasfast.data.keypoints.synthetic import SyntheticPeople
from nasfast.data.keypoints.transforms import (
    PersonBatch,
    PersonCrop,
    PersonTrainTransform,
    PersonTransform,
    PersonValTransform,
    batch,
    cropped,
    inverse,
    mapped,
    person_map,
    person_size,
)

__all__ = [
    "COCO",
    "MPII",
    "KeypointDataset",
    "KeypointParts",
    "KeypointSplits",
    "Person",
    "PersonBatch",
    "PersonCrop",
    "PersonSample",
    "PersonTrainTransform",
    "PersonTransform",
    "PersonValTransform",
    "Skeleton",
    "SyntheticPeople",
    "batch",
    "cropped",
    "divide",
    "halves_by_image",
    "inverse",
    "load_keypoint_splits",
    "mapped",
    "person_map",
    "person_size",
]


class Layout(NamedTuple):
    """A kind of folder; as of `nasfast.data`."""

    text: str
    fits: Callable[[Path], bool]
    open: Callable[[Path, bool], KeypointParts]
    """With whether decoded images are kept."""


LAYOUTS = {
    "MPII": Layout(MPII_LAYOUT, is_mpii, open_mpii),
    "COCO keypoints": Layout(COCO_LAYOUT, is_coco, open_coco),
}


def load_keypoint_splits(
    source: str | Path, *, seed: int = 0, cache_in_memory: bool = True
) -> KeypointSplits:
    """Open a dataset and divide it; `seed` decides only which 10 % of the images of `train`
    validate a search.

    `source` is "synthetic" (256 + 64 scenes of 128x160), or a folder of one of `LAYOUTS`, which is
    recognised by what it holds.
    """
    if source == "synthetic":
        train, val = (
            SyntheticPeople(count, stream=stream) for count, stream in ((256, "train"), (64, "val"))
        )
        return divide(KeypointParts(train, val), seed=seed)
    root = Path(source)
    parts = layout_in(root, LAYOUTS).open(root, cache_in_memory)
    for part, dataset in (("train", parts.train), ("val", parts.val)):
        require_people(dataset, part)
    open_test = parts.open_test and functools.partial(_test, parts.open_test)
    return divide(parts._replace(open_test=open_test), seed=seed)


def _test(opened: Callable[[], KeypointDataset]) -> KeypointDataset:
    dataset = opened()
    require_people(dataset, "test")
    return dataset
