"""Boxes in the format of COCO (Lin et al., ECCV 2014): one file of JSON for each part."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from nasfast.data.detection.base import DetectionDataset, DetectionParts
from nasfast.data.detection.files import (
    PARTS,
    Annotated,
    Box,
    BoxFiles,
    part_by_hash,
    require_names,
)
from nasfast.data.folder import some
from nasfast.data.images import FaultyFiles
from nasfast.utils.errors import UserError
from nasfast.utils.files import read_object

COCO_LAYOUT = (
    "annotations/instances_train*.json and instances_val*.json, train.json and val.json, or "
    "train/_annotations.coco.json and valid/_annotations.coco.json, images beside or in images/"
)
PATTERNS = (
    "annotations/instances_{}[0-9]*.json",
    "annotations/instances_{}.json",
    "annotations/person_keypoints_{}[0-9]*.json",
    "annotations/{}.json",
    "instances_{}.json",
    "{}.json",
    "{}/_annotations.coco.json",
)
SINGLE = (
    "annotations/instances_default.json",
    "annotations/annotations.json",
    "_annotations.coco.json",
    "annotations.json",
    "result.json",
)
"""Files of data that are not divided."""
LISTS = ("images", "annotations", "categories")
Id = int | str


class _Image(NamedTuple):
    id: Id
    path: Path
    size: tuple[int, int] | None


class _Category(NamedTuple):
    name: str
    above: str
    """The supercategory."""


class Lists(NamedTuple):
    """What a file of annotations holds."""

    images: Mapping[Id, Mapping[str, Any]]
    """By id, which is unique; each has a "file_name"."""
    annotations: Sequence[Any]
    """As they are."""
    categories: Sequence[Mapping[str, Any]]
    """Each has a whole number as "id", which is unique, and a "name"."""


@dataclass(frozen=True)
class _File:
    """A file of annotations, its images found."""

    path: Path
    categories: Mapping[int, _Category]
    images: Sequence[_Image]
    boxes: Mapping[Id, Sequence[Box]]
    """By id of the image; their label is the id of the category."""


def coco_file(root: Path, part: str, patterns: Sequence[str] = PATTERNS) -> Path | None:
    """The annotations of a part, by the first of the patterns that has some.

    Raises:
        UserError: it has several.
    """
    for pattern in patterns:
        found = sorted(path for word in PARTS[part] for path in root.glob(pattern.format(word)))
        if len(found) > 1:
            raise UserError(
                f"data: expected one file of annotations of {part} in {root}, got "
                f"{', '.join(str(path.relative_to(root)) for path in found)}; move the others away"
            )
        if found:
            return found[0]
    return None


def single_file(root: Path) -> Path | None:
    """The annotations of data that are not divided."""
    return next((root / name for name in SINGLE if (root / name).is_file()), None)


def is_coco(root: Path) -> bool:
    """Whether a folder has annotations of train, or of all."""
    return coco_file(root, "train") is not None or single_file(root) is not None


def open_coco(root: Path, cache_in_memory: bool = True) -> DetectionParts:
    """The parts of a folder with annotations in the format of COCO.

    Crowds are ignored boxes; images without boxes stay. Classes are the categories of train and of
    val, by id. Annotations of train alone, or of data that are not divided, are divided: 20 % of
    the images, by a hash of the name, validate. Of files of key points the boxes are read.
    """
    first = coco_file(root, "train") or single_file(root)
    assert first is not None
    files = [_read(root, path) for path in (first, coco_file(root, "val")) if path is not None]
    names = _classes(files)
    labels = {category: label for label, category in enumerate(names)}

    def part(file: _File, images: Sequence[_Image]) -> DetectionDataset:
        annotated = [
            Annotated(
                image.path,
                image.id,
                f"{file.path}, image {image.id!r}",
                [box._replace(label=labels[box.label]) for box in file.boxes.get(image.id, ())],
                image.size,
            )
            for image in images
        ]
        return BoxFiles(
            root.resolve().name,
            tuple(names.values()),
            annotated,
            category_ids=tuple(names),
            cache_in_memory=cache_in_memory,
        )

    def open_test(path: Path) -> DetectionDataset:
        file = _read(root, path)
        _classes([*files, file])
        unknown = sorted({box.label for boxes in file.boxes.values() for box in boxes} - set(names))
        if unknown:
            raise UserError(
                f"{path}: expected boxes of the categories of {first}, got "
                f"{unknown[0]} ({file.categories[unknown[0]].name!r}); add it there, or remove them"
            )
        return part(file, file.images)

    test = coco_file(root, "test")
    opened = None if test is None else functools.partial(open_test, test)
    if len(files) == 2:
        train, val = (part(file, file.images) for file in files)
        return DetectionParts(train, val, opened)
    images = files[0].images
    halves = part_by_hash(images, [image.path.name for image in images], first)
    return DetectionParts(part(files[0], halves[0]), part(files[0], halves[1]), opened)


def _classes(files: Sequence[_File]) -> dict[int, str]:
    """Names of the categories by id, in the order of the ids.

    Left out is one without boxes whose own supercategory is "none" and which is that of another:
    Roboflow puts the name of the project before the classes.

    Raises:
        UserError: files disagree on the name of an id, or two ids have one name.
    """
    merged: dict[int, _Category] = {}
    for file in files:
        for category, named in file.categories.items():
            other = merged.setdefault(category, named)
            if other.name != named.name:
                raise UserError(
                    f"{file.path}: expected the category {category} to be {other.name!r} as in "
                    f"{files[0].path}, got {named.name!r}; give all parts the same categories"
                )
    used = {box.label for file in files for boxes in file.boxes.values() for box in boxes}
    groups = {named.above for named in merged.values()}
    names = {
        category: named.name
        for category, named in sorted(merged.items())
        if category in used or named.above != "none" or named.name not in groups
    }
    twice = next((n for n in names.values() if list(names.values()).count(n) > 1), None)
    if twice is not None or not names:
        got = "none" if twice is None else f"{twice!r} twice"
        raise UserError(
            f"{files[0].path}: expected categories of different names, got {got}; correct them"
        )
    require_names(tuple(names.values()), files[0].path)
    return names


def _read(root: Path, path: Path) -> _File:
    """A file of annotations; errors as of `read_lists`."""
    lists = read_lists(path)
    categories = {
        int(each["id"]): _Category(str(each["name"]), str(each.get("supercategory", "")))
        for each in lists.categories
    }
    paths = image_paths(root, path, [each["file_name"] for each in lists.images.values()])
    found = [
        _Image(i, file, stated_size(each))
        for (i, each), file in zip(lists.images.items(), paths, strict=True)
    ]
    return _File(path, categories, found, _boxes(path, lists.annotations, lists.images, categories))


def read_lists(path: Path) -> Lists:
    """The lists of a file of annotations.

    Raises:
        UserError: it is not as the format has it.
    """
    content = read_object(path)
    lacking = [key for key in LISTS if not isinstance(content.get(key), list)]
    if lacking:
        raise UserError(
            f"{path}: expected the lists {', '.join(LISTS)}, got no {lacking[0]!r} (but "
            f"{some(list(content))}); give annotations of COCO's format"
        )
    if not content["images"]:
        raise UserError(f"{path}: expected images, got an empty list; add them")
    try:
        categories = {int(each["id"]): each["name"] for each in content["categories"]}
        images = {
            each["id"]: {**each, "file_name": str(each["file_name"])} for each in content["images"]
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: expected images with 'id' and 'file_name' and categories with 'id' and "
            f"'name', got {type(error).__name__}: {error}; correct it"
        ) from error
    other = next((c["id"] for c in content["categories"] if c["id"] not in categories), None)
    if other is not None:
        raise UserError(
            f"{path}: expected whole numbers as ids of categories, got {other!r}; renumber them"
        )
    for key, kept in (("images", images), ("categories", categories)):
        if len(kept) < len(content[key]):
            raise UserError(
                f"{path}: expected different ids of {key}, got {len(kept)} of {len(content[key])}; "
                "renumber them"
            )
    return Lists(images, content["annotations"], content["categories"])


def _boxes(
    path: Path, annotations: Sequence[Any], images: Mapping[Id, Any], categories: Mapping[int, Any]
) -> dict[Id, list[Box]]:
    """The boxes of each image. FaultyFiles names the annotations that hold none."""
    boxes: dict[Id, list[Box]] = {}
    faults = []
    for place, each in enumerate(annotations):
        known: dict[str, Any] = each if isinstance(each, dict) else {}
        edges, image, category = map(known.get, ("bbox", "image_id", "category_id"))
        if not isinstance(image, int | str) or image not in images:
            wrong = f"the id of one of the {len(images)} images, got image_id {image!r}"
        elif not isinstance(category, int) or category not in categories:
            wrong = (
                f"a category of {some(list(categories)) or 'none'}, got category_id {category!r}"
            )
        elif not isinstance(edges, list) or len(edges) != 4 or not all(map(is_finite, edges)):
            wrong = f"bbox [left, top, width, height], got {str(edges)[:40]}"
        else:
            left, top, width, height = edges
            ignored = any(known.get(key) in (1, "1") for key in ("iscrowd", "ignore"))
            area = number(known.get("area"))
            area = area if area > 0 else math.nan
            box = Box(left, top, left + width, top + height, category, ignored, area)
            boxes.setdefault(image, []).append(box)
            continue
        name = known.get("id", f"at {place}")
        faults.append(f"{path}: annotation {name}: expected {wrong}; correct it or remove it")
    if faults:
        raise FaultyFiles(faults)
    return boxes


def image_paths(root: Path, annotations: Path, names: Sequence[str]) -> list[Path]:
    """The files of images, in one of the folders where they may be: as named, or without the
    folders in the name. UserError where some are missing."""
    kind = annotations.stem.removeprefix("instances_").removeprefix("person_keypoints_")
    folders = [
        folder
        for folder in (
            annotations.parent,
            root / kind,
            root / "images" / kind,
            root / "images",
            root / "data",
            root,
        )
        if folder.is_dir()
    ]
    found, missing = [], []
    for name in names:
        path = next((path for path in _places(folders, name) if path.is_file()), None)
        if path is None:
            missing.append(name)
            continue
        found.append(path)
        if path.parent in folders:  # most likely that of the next
            folders.remove(path.parent)
            folders.insert(0, path.parent)
    if missing:
        raise UserError(
            f"{annotations}: expected its images in {', '.join(str(f) for f in sorted(folders))}, "
            f"got no {missing[0]!r} ({len(missing)} of {len(names)} missing); add them"
        )
    return found


def _places(folders: Sequence[Path], name: str) -> Iterator[Path]:
    named = name.replace("\\", "/")
    for text in dict.fromkeys((named, named.rsplit("/", 1)[-1])):
        yield from (folder / text for folder in folders)


def stated_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) by the entry of an image; None where it does not say it."""
    sides = [number(image.get(side)) for side in ("height", "width")]
    height, width = (side if 0 < side < math.inf else 0 for side in sides)
    return (round(height), round(width)) if height and width else None


def number(value: object) -> float:
    """NaN for what is no number."""
    return float(value) if is_number(value) else math.nan


def is_finite(value: object) -> bool:
    """Whether it is a number, and not infinite."""
    return is_number(value) and math.isfinite(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number that a float can hold."""
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1000)
