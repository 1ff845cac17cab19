"""Cityscapes (Cordts et al., CVPR 2016): 19 classes, streets of 1024x2048."""

from __future__ import annotations

from pathlib import Path

from nasfast.data.base import Parts, SegmentationDataset
from nasfast.data.folder import CITYSCAPES_IDS, FileDataset, some
from nasfast.data.images import FaultyFiles, by_stem, list_folder
from nasfast.utils.errors import UserError

IMAGES, MASKS = "leftImg8bit", "gtFine"
ARCHIVES = {IMAGES: "leftImg8bit_trainvaltest.zip", MASKS: "gtFine_trainvaltest.zip"}
CITYSCAPES_LAYOUT = (
    f"{IMAGES}/ + {MASKS}/ with train/<city>/ and val/<city>/, *_{IMAGES}.png and "
    f"*_{MASKS}_labelIds.png"
)
CLASSES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
IGNORE = 255
LABELS = dict.fromkeys(range(34), IGNORE) | {
    value: label for label, value in enumerate(CITYSCAPES_IDS)
}
"""The label of each value in ``*_labelIds.png``; the values that no benchmark counts are
ignored."""
LABEL_IDS, TRAIN_IDS = f"_{MASKS}_labelIds", f"_{MASKS}_labelTrainIds"
HINTS = {
    LABEL_IDS: f"; if the masks hold the labels 0..18 and 255, name them *{TRAIN_IDS}.png",
    TRAIN_IDS: f"; if the masks hold the label ids 0..33, name them *{LABEL_IDS}.png",
}
ASIDE = (
    *(f"{tree}/{part}/*" for tree in (IMAGES, MASKS) for part in ("test", "train_extra")),
    *(f"{MASKS}/*_{kind}.*" for kind in ("color", "instanceIds", "labelIds", "polygons")),
    *(f"{MASKS}/*_{kind}.*" for kind in ("labelTrainIds", "instanceTrainIds")),
    "gtCoarse/*",
)


def open_cityscapes(
    root: Path, *, cache_in_memory: bool = True, mask_values: str | None = None
) -> Parts:
    """The parts of a Cityscapes folder, as its archives unpack.

    Masks are ``*_gtFine_labelIds.png``, whose ids become the 19 labels of the benchmark and
    ignore = 255; or ``*_gtFine_labelTrainIds.png``, which hold these, where a part has no others.
    The benchmark keeps the labels of test to itself: there is a test part where masks of it hold
    some.
    """
    if mask_values is not None:
        raise UserError(
            f"mask-values: expected none for Cityscapes, whose ids are known, got {mask_values!r}; "
            "leave it out"
        )

    def part(split: str) -> SegmentationDataset:
        ending, pairs = _pairs(root, split)
        return FileDataset(
            "cityscapes",
            tuple(CLASSES),
            pairs,
            ignore_index=IGNORE,
            colors=tuple(CLASSES.values()),
            labels=LABELS if ending == LABEL_IDS else None,
            hint=HINTS[ending],
            cache_in_memory=cache_in_memory,
        )

    def test() -> SegmentationDataset:
        dataset = part("test")
        if not dataset.label_counts()[:, : len(CLASSES)].any():
            raise UserError(
                f"{root / MASKS / 'test'}: expected masks with labels, got none: the benchmark "
                "keeps those of test to itself; use val"
            )
        return dataset

    tested = all((root / tree / "test").is_dir() for tree in (IMAGES, MASKS))
    return Parts(part("train"), part("val"), test if tested else None, ASIDE)


def _pairs(root: Path, split: str) -> tuple[str, list[tuple[Path, Path]]]:
    """How the names of the masks end, and (image, mask) of all cities.

    Raises:
        UserError: a folder is missing, or a city lacks images or masks.
    """
    images = _cities(root, IMAGES, split, f"_{IMAGES}")
    masks: dict[str, dict[str, Path]] = {}
    for ending in (LABEL_IDS, TRAIN_IDS):
        masks = _cities(root, MASKS, split, ending)
        if any(masks.values()):
            break
    faults, pairs = [], []
    for city in sorted(images.keys() | masks.keys()):
        shown, drawn = images.get(city, {}), masks.get(city, {})
        pairs += [(shown[name], drawn[name]) for name in sorted(shown.keys() & drawn.keys())]
        for kind, tree, missing, of in (
            ("image", IMAGES, drawn.keys() - shown.keys(), len(drawn)),
            ("mask", MASKS, shown.keys() - drawn.keys(), len(shown)),
        ):
            if missing:
                name = min(missing) + (f"_{IMAGES}" if kind == "image" else ending)
                faults.append(
                    f"{len(missing)} of {of} {'masks' if kind == 'image' else 'images'} of {split} "
                    f"in {city} have no {kind}: expected {root / tree / split / city / name}.png; "
                    f"unpack {ARCHIVES[tree]} again, or remove what has none"
                )
        if not shown and not drawn:
            faults.append(
                f"{root / IMAGES / split / city}: expected images *_{IMAGES}.png, got none; unpack "
                f"{ARCHIVES[IMAGES]} again, or remove the folder"
            )
    if faults:
        raise FaultyFiles(faults)
    return ending, pairs


def _cities(root: Path, tree: str, split: str, ending: str) -> dict[str, dict[str, Path]]:
    """By city, its files by their names less the ending."""
    folder = root / tree / split
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: Cityscapes is {CITYSCAPES_LAYOUT}; unpack {ARCHIVES[tree]} in "
            f"{root}"
        )
    listing = list_folder(folder)
    if not listing.folders:
        loose = some([path.name for path in listing.images], 2, 60) or "nothing"
        raise UserError(
            f"{folder}: expected a folder of each city, such as aachen, got {loose}; unpack "
            f"{ARCHIVES[tree]} in {root}"
        )
    return {
        city.name: by_stem(list_folder(city).images, ending)
        for city in listing.folders
        if not city.name.startswith(".")
    }
