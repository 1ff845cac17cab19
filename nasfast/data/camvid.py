"""CamVid in the layout of SegNet: 11 classes and void (Brostow et al., 2008 and 2009)."""

from __future__ import annotations

import json
from pathlib import Path

from nasfast.data.base import SegmentationDataset
from nasfast.data.folder import FileDataset, id_of, pair_files, read_lines

CAMVID_LAYOUT = "train.txt + train/ + trainannot/ + val.txt + val/ + valannot/"
CLASSES = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}


def open_camvid(
    root: Path, *, cache_in_memory: bool = True
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation set of a CamVid folder.

    `classes.json` (`{"classes": [{"name", "color"}, ...], "ignore_index"}`), where present,
    replaces the 11 standard classes with void = 11 as ignore index.
    """
    classes, ignore_index = CLASSES, len(CLASSES)
    if (root / "classes.json").is_file():
        try:
            described = json.loads((root / "classes.json").read_text())
            classes = {c["name"]: tuple(c["color"]) for c in described["classes"]}
            ignore_index = int(described["ignore_index"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{root / 'classes.json'}: expected an object with 'ignore_index' and 'classes', a "
                f"list of {{'name', 'color'}}; got {type(error).__name__}: {error}"
            ) from error

    def part(split: str) -> SegmentationDataset:
        folders = root / split, root / f"{split}annot"
        for path in (root / f"{split}.txt", *folders):
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: a CamVid folder is {CAMVID_LAYOUT}")
        ids = [id_of(line) for line in read_lines(root / f"{split}.txt")]
        pairs = pair_files(ids, *folders)
        return FileDataset(
            "camvid",
            tuple(classes),
            pairs,
            ignore_index=ignore_index,
            colors=tuple(classes.values()),
            cache_in_memory=cache_in_memory,
        )

    return part("train"), part("val")
