"""Segmentation datasets, their splits and their transforms."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from nasfast.data.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Parts,
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
from nasfast.data.cityscapes import CITYSCAPES_LAYOUT, IMAGES, MASKS, open_cityscapes
from nasfast.data.folder import FOLDER_LAYOUT, FileDataset, open_folder
from nasfast.data.reduced import reduced
from nasfast.data.synthetic import SyntheticStreets
from nasfast.data.transforms import TrainTransform, Transform, ValTransform, batch
from nasfast.data.voc import MASK_FOLDERS, VOC_LAYOUT, open_voc, voc_folders
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
    "open_cityscapes",
    "open_folder",
    "open_voc",
    "shorter_side",
    "split_for_search",
]


class AnyLayout(Protocol):
    """A kind of folder, whatever the data."""

    @property
    def text(self) -> str:
        """What it holds, for errors."""

    @property
    def fits(self) -> Callable[[Path], bool]:
        """Whether a folder is of this kind; it may lack something still."""


L = TypeVar("L", bound=AnyLayout)


class Opener(Protocol):
    """Reads the parts of a folder."""

    def __call__(
        self, root: Path, *, cache_in_memory: bool = True, mask_values: str | None = None
    ) -> Parts: ...


class Layout(NamedTuple):
    """A kind of folder; as `AnyLayout`, and what reads it."""

    text: str
    fits: Callable[[Path], bool]
    open: Opener


LAYOUTS = {
    "CamVid": Layout(
        CAMVID_LAYOUT,
        lambda root: (root / "train.txt").is_file() and (root / "trainannot").is_dir(),
        open_camvid,
    ),
    "a folder pair": Layout(
        FOLDER_LAYOUT,
        lambda root: all((root / name).exists() for name in ("images", "masks", "classes.txt")),
        open_folder,
    ),
    "Cityscapes": Layout(
        CITYSCAPES_LAYOUT,
        lambda root: any((root / name).is_dir() for name in (IMAGES, MASKS)),
        open_cityscapes,
    ),
    "PASCAL VOC": Layout(
        VOC_LAYOUT,
        lambda root: any(
            (voc / name).is_dir() for voc in voc_folders(root) for name in MASK_FOLDERS
        ),
        open_voc,
    ),
}


def load_splits(
    source: str | Path,
    *,
    seed: int = 0,
    cache_in_memory: bool = True,
    mask_values: str | None = None,
    resize_longer: int | None = None,
) -> Splits:
    """Open a dataset and divide it; `seed` decides only what of `train` validates a search.

    `source` is "synthetic" (512 + 128 frames of 96x128), or a folder of one of `LAYOUTS`, which is
    recognised by what it holds. `mask_values`, such as "0,255", are the values of the classes in
    its masks, where they are not 0, 1, .. (`FileDataset`). Images whose longer side is above
    `resize_longer` pixels are reduced to it (`Reduced`).
    """
    root = Path(source)
    if source == "synthetic":
        if mask_values is not None:
            raise UserError("mask-values: expected a folder of masks, got synthetic; leave it out")
        train, val = (
            reduced(
                SyntheticStreets(count, stream=stream, cache_in_memory=cache_in_memory),
                resize_longer,
            )
            for count, stream in ((512, "train"), (128, "val"))
        )
        return split_for_search(train, val, seed=seed)
    parts = layout_in(root, LAYOUTS).open(
        root, cache_in_memory=cache_in_memory, mask_values=mask_values
    )
    require_classes(parts.train, parts.val)
    open_test = parts.open_test
    return split_for_search(
        reduced(parts.train, resize_longer),
        reduced(parts.val, resize_longer),
        open_test and (lambda: reduced(open_test(), resize_longer)),
        parts.aside,
        parts.home,
        seed=seed,
    )


def layout_of(root: Path, layouts: Mapping[str, L]) -> L | None:
    """The first of the layouts that a folder fits."""
    return next((layout for layout in layouts.values() if layout.fits(root)), None)


def layout_in(root: Path, layouts: Mapping[str, L]) -> L:
    """The same; UserError where it is no folder, or fits none."""
    if not root.is_dir():
        raise UserError(
            f"data: expected 'synthetic' or a folder, got {str(root)!r}; give an existing folder"
        )
    layout = layout_of(root, layouts)
    if layout is None:
        raise _unknown_layout(root, layouts)
    return layout


def _unknown_layout(root: Path, layouts: Mapping[str, AnyLayout]) -> UnknownLayout:
    """Says what is known, what is there, and which folder nearby is of a known kind."""
    inside = sorted(root.iterdir())
    known = " or ".join(f"{name} ({layout.text})" for name, layout in layouts.items())
    found = ", ".join(path.name for path in inside[:8]) or "nothing"
    folders = [p for p in (root.resolve().parent, *inside) if p.is_dir() and os.access(p, os.X_OK)]
    near = [path for path in folders if layout_of(path, layouts)]
    hint = f"; give {near[0]}, which is of a known kind" if near else ""
    return UnknownLayout(f"data: {root} has no known layout: expected {known}, found {found}{hint}")


def folder_of(source: str | Path) -> Path | None:
    """The folder that data lies in; None for data that is drawn."""
    return None if source == "synthetic" else expanded(source).resolve()
