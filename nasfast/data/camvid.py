"""CamVid in the layout of SegNet: 11 classes and void (Brostow et al., 2008 and 2009)."""

from __future__ import annotations

from pathlib import Path

from nasfast.data.base import Parts, SegmentationDataset
from nasfast.data.folder import FileDataset, listed_pairs
from nasfast.utils.errors import UserError
from nasfast.utils.files import read_json

Color = tuple[int, int, int]
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
    root: Path, *, cache_in_memory: bool = True, mask_values: str | None = None
) -> Parts:
    """The parts of a CamVid folder; test.txt, test/ and testannot/, where it has them, are the test
    part.

    `classes.json` (`{"classes": [{"name", "color"}, ...], "ignore_index"}`), where present,
    replaces the 11 standard classes with void = 11 as ignore index. `mask_values`: `FileDataset`.
    """
    classes, ignore_index = CLASSES, len(CLASSES)
    if (root / "classes.json").is_file():
        classes, ignore_index = _read_classes(root / "classes.json")

    def part(split: str) -> SegmentationDataset:
        folders = root / split, root / f"{split}annot"
        for path in (root / f"{split}.txt", *folders):
            if not path.exists():
                raise UserError(f"{path} is missing: a CamVid folder is {CAMVID_LAYOUT}")
        pairs = listed_pairs(root / f"{split}.txt", *folders)
        return FileDataset(
            "camvid",
            tuple(classes),
            pairs,
            ignore_index=ignore_index,
            colors=tuple(classes.values()),
            mask_values=mask_values,
            cache_in_memory=cache_in_memory,
        )

    tested = all((root / name).exists() for name in ("test.txt", "test", "testannot"))
    return Parts(part("train"), part("val"), (lambda: part("test")) if tested else None)


def _read_classes(path: Path) -> tuple[dict[str, Color], int]:
    described = read_json(path)
    try:
        named = [(str(c["name"]), _color(*c["color"])) for c in described["classes"]]
        ignore_index = int(described["ignore_index"])
        if not 2 <= len(dict(named)) == len(named) < 256:
            raise ValueError(f"{len(named)} classes of {len(dict(named))} names")
        if not 0 <= ignore_index <= 255:
            raise ValueError(f"the ignore_index {ignore_index}, which is not of 0..255")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"{path}: expected an object with 'ignore_index' and 'classes', a list of 2 to 255 "
            f"{{'name', 'color'}} of different names; got {type(error).__name__}: {error}"
        ) from error
    return dict(named), ignore_index


def _color(red: int, green: int, blue: int) -> Color:
    if not {red, green, blue} <= set(range(256)):
        raise ValueError(f"the color {[red, green, blue]}, which is not of 0..255")
    return red, green, blue
