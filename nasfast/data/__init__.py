"""Segmentation datasets, their splits and their transforms."""

from __future__ import annotations

from pathlib import Path

from nasfast.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Sample,
    SegmentationDataset,
    Splits,
    UnknownLayout,
    normalize,
    shorter_side,
    split_for_search,
)
from nasfast.data.camvid import CAMVID_LAYOUT, open_camvid
from nasfast.data.checks import require_classes
from nasfast.data.folder import FOLDER_LAYOUT, FileDataset, open_folder
from nasfast.data.synthetic import SyntheticStreets
from nasfast.data.transforms import TrainTransform, Transform, ValTransform, batch
from nasfast.utils.errors import UserError
from nasfast.utils.files import expanded

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "FileDataset",
    "Sample",
    "SegmentationDataset",
    "Splits",
    "SyntheticStreets",
    "TrainTransform",
    "Transform",
    "UnknownLayout",
    "ValTransform",
    "batch",
    "folder_of",
    "load_splits",
    "normalize",
    "open_camvid",
    "open_folder",
    "shorter_side",
    "split_for_search",
]


def load_splits(
    source: str | Path,
    *,
    seed: int = 0,
    cache_in_memory: bool = True,
    mask_values: str | None = None,
) -> Splits:
    """Open a dataset and divide it; `seed` decides only what of `train` validates a search.

    `source` is "synthetic" (512 + 128 frames of 96x128), a CamVid folder, or a folder of images
    and masks (`open_folder`); the kind of a folder is recognised by what it holds. `mask_values`,
    such as "0,255", are the values of the classes in its masks, where they are not 0, 1, ..
    (`FileDataset`).
    """
    root = Path(source)
    if source == "synthetic":
        if mask_values is not None:
            raise UserError("mask-values: expected a folder of masks, got synthetic; leave it out")
        train, val = (
            SyntheticStreets(count, stream=stream, cache_in_memory=cache_in_memory)
            for count, stream in ((512, "train"), (128, "val"))
        )
        return split_for_search(train, val, seed=seed)
    if not root.is_dir():
        raise UserError(
            f"data: expected 'synthetic' or a folder, got {str(source)!r}; give an existing folder"
        )
    if (root / "train.txt").is_file() and (root / "trainannot").is_dir():
        open_parts = open_camvid
    elif all((root / name).exists() for name in ("images", "masks", "classes.txt")):
        open_parts = open_folder
    else:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise UnknownLayout(
            f"data: {root} has no known layout: expected CamVid ({CAMVID_LAYOUT}) or a folder pair "
            f"({FOLDER_LAYOUT}), found {found}"
        )
    parts = open_parts(root, cache_in_memory=cache_in_memory, mask_values=mask_values)
    require_classes(parts.train, parts.val)
    return split_for_search(*parts, seed=seed)


def folder_of(source: str | Path) -> Path | None:
    """The folder that data lies in; None for data that is drawn."""
    return None if source == "synthetic" else expanded(source).resolve()
