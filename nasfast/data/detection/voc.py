"""Boxes in the format of PASCAL VOC (Everingham et al., 2010): a file of XML for each image."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from nasfast.data.detection.base import DetectionDataset, DetectionParts
from nasfast.data.detection.files import (
    PARTS,
    Annotated,
    Box,
    BoxFiles,
    label_of,
    part_by_hash,
    require_names,
)
from nasfast.data.folder import files_by_stem, read_ids, read_lines
from nasfast.data.images import for_each
from nasfast.data.voc import CLASSES as WITH_BACKGROUND
from nasfast.utils.errors import UserError, about

BOXES_LAYOUT = (
    "Annotations/*.xml + JPEGImages/ + ImageSets/Main/, here or in VOC20??/, or images with their "
    "*.xml beside them, in train/ and valid/"
)
CLASSES = WITH_BACKGROUND[1:]
NAMES = ("classes.txt", "labels.txt")
"""Lists of classes, a name a line, in the folder or in the one of the lists."""
IMAGES, ANNOTATIONS = ("JPEGImages", "images"), ("Annotations", "annotations", "images", "")
LISTS = "ImageSets/Main"
ASIDE = ("SegmentationObject/*", "SegmentationClass/*", "SegmentationClassAug/*")
OF_CLASS = re.compile(r"\s+(-1|0|1)$")
"""The second column of the lists of one class: absent, difficult, present."""
EDGES = ("xmin", "ymin", "xmax", "ymax")
NO, YES = ("", "0", "false", "no"), ("1", "true", "yes")


@dataclass(frozen=True)
class _Object:
    name: str
    edges: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class _File:
    path: Path
    objects: Sequence[_Object]
    size: tuple[int, int] | None


class _Part(NamedTuple):
    """Images and annotations by id, and the ids that are meant."""

    images: Path
    annotations: Path
    ids: Sequence[str]


def box_folders(root: Path) -> list[Path]:
    """The folders with boxes in a folder: itself, or those of years in it or in its VOCdevkit."""
    found = [root, *sorted(root.glob("VOC20??")), *sorted(root.glob("VOCdevkit/VOC20??"))]
    return [folder for folder in found if _beside(folder) or _places(folder)]


def open_boxes_voc(root: Path, cache_in_memory: bool = True) -> DetectionParts:
    """The parts of a VOC folder, or of the folder that it is in.

    Lists of ImageSets/Main divide the images: train.txt, else trainval.txt without those of
    val.txt; val.txt; test.txt, where its annotations are there. Or folders do, train/, valid/ and
    test/, of images and annotations. Without a val, 20 % of the images, by a hash of the name,
    validate. An id of a list is the name of the image and of the annotation; what the annotation
    says of names and folders is not read.

    Classes are those of classes.txt or labels.txt, else the 20 of VOC, where all boxes are of them,
    else the names in the annotations of train, sorted.
    """
    folders = box_folders(root)
    if len(folders) > 1:
        raise UserError(
            f"data: expected one folder of VOC in {root}, got "
            f"{', '.join(str(folder.relative_to(root)) for folder in folders)}; give one of them"
        )
    home = folders[0] if folders[0] != root else None
    root = folders[0]
    train, val, test = _divided(root)
    read = _read(train), _read(val)
    classes, origin = _classes((root, root / LISTS), *read)

    def dataset(part: _Part, read: Mapping[str, _File]) -> DetectionDataset:
        pictures = files_by_stem(part.images)
        missing = [i for i in part.ids if i not in pictures]
        if missing:
            raise UserError(
                f"{read[missing[0]].path}: expected its image in {part.images}, got none of the "
                f"name {missing[0]!r} ({len(missing)} of {len(part.ids)} missing); add it"
            )

        def annotated(i: str) -> Annotated:
            file = read[i]
            boxes = [
                Box(*o.edges, label_of(o.name, classes, file.path, origin), o.difficult)
                for o in file.objects
            ]
            return Annotated(pictures[i], i, str(file.path), boxes, file.size)

        return BoxFiles(
            root.resolve().name,
            classes,
            for_each(annotated, part.ids),
            cache_in_memory=cache_in_memory,
        )

    return DetectionParts(
        dataset(train, read[0]),
        dataset(val, read[1]),
        None if test is None else lambda: dataset(test, _read(test)),
        ASIDE,
        home,
    )


def _places(root: Path) -> tuple[Path, Path] | None:
    """The folders of images and of annotations in a folder."""
    images = next((root / name for name in IMAGES if (root / name).is_dir()), root)
    annotations = next((root / n for n in ANNOTATIONS if any((root / n).glob("*.xml"))), None)
    return None if annotations is None else (images, annotations)


def _beside(root: Path) -> dict[str, Path]:
    """The folders of parts that hold images and annotations side by side."""
    found = {
        part: root / word
        for part, words in PARTS.items()
        for word in words
        if any((root / word).glob("*.xml"))
    }
    return found if "train" in found else {}


def _ids(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.xml"))


def _divided(root: Path) -> tuple[_Part, _Part, _Part | None]:
    """Train, val and, where there is one, test."""
    beside = _beside(root)
    if beside:
        parts = {part: _Part(folder, folder, _ids(folder)) for part, folder in beside.items()}
        train, val = parts["train"], parts.get("val")
        if val is None:
            train, val = _halves(train)
        return train, val, parts.get("test")
    places = _places(root)
    assert places is not None
    every = _ids(places[1])
    lists = {
        name: _listed(root / LISTS / f"{name}.txt", set(every))
        for name in ("train", "trainval", "val", "test")
        if (root / LISTS / f"{name}.txt").is_file()
    }
    tested = lists.get("test", [])
    test = _Part(*places, tested) if tested and tested[0] in set(every) else None
    if "val" in lists and "train" not in lists and "trainval" not in lists:
        raise UserError(
            f"{root / LISTS}: expected train.txt or trainval.txt beside val.txt, got neither; add "
            "one"
        )
    rest = [i for i in every if i not in set(tested)]
    train = _Part(*places, lists.get("train") or lists.get("trainval") or rest)
    if "val" not in lists:
        return *_halves(train), test
    val = _Part(*places, lists["val"])
    if "train" not in lists:
        train = train._replace(ids=[i for i in train.ids if i not in set(val.ids)])
    return train, val, test


def _listed(path: Path, every: Set[str]) -> list[str]:
    """The ids in a list, which may have the column of the lists of one class."""
    return [i if i in every else OF_CLASS.sub("", i) for i in read_ids(path)]


def _halves(part: _Part) -> tuple[_Part, _Part]:
    train, val = part_by_hash(part.ids, part.ids, part.annotations)
    return part._replace(ids=train), part._replace(ids=val)


def _read(part: _Part) -> dict[str, _File]:
    """What the annotations say. UserError where one is missing or cannot be read."""
    there = set(_ids(part.annotations))
    missing = [i for i in part.ids if i not in there]
    if missing:
        raise UserError(
            f"no annotation for id {missing[0]!r}: expected {part.annotations / missing[0]}.xml "
            f"({len(missing)} of {len(part.ids)} missing); add it, or take the id out of the list"
        )
    found = for_each(lambda i: _parsed(part.annotations / f"{i}.xml"), part.ids)
    return dict(zip(part.ids, found, strict=True))


def _classes(
    folders: Sequence[Path], train: Mapping[str, _File], val: Mapping[str, _File]
) -> tuple[Sequence[str], str]:
    """Names of classes, and where they are from."""
    listed = [folder / name for folder in folders for name in NAMES]
    for path in listed:
        if path.is_file():
            names = read_lines(path)
            require_names(names, path)
            return names, str(path)
    trained, scored = (
        {o.name for file in read.values() for o in file.objects} for read in (train, val)
    )
    if trained | scored <= set(CLASSES):
        return CLASSES, "PASCAL VOC"
    require_names(sorted(trained), folders[0])
    return sorted(trained), "the boxes of train"


def _parsed(path: Path) -> _File:
    """An annotation. UserError names the file and what of it is not as the format has it."""
    try:
        tree = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: encodings
        raise UserError(
            f"{path}: expected XML, got a fault in it ({error}); restore it from a copy, "
            "or save it as UTF-8"
        ) from error
    with about(path):
        objects = [_object(each) for each in tree.findall("object")]
        sides = [_text(tree, f"size/{side}") for side in ("height", "width")]
        height, width = (_number("size", side) if side else 0 for side in sides)
    known = (
        0 < height < math.inf and 0 < width < math.inf
    )  # tools that do not know the size write 0
    return _File(path, objects, (round(height), round(width)) if known else None)


def _object(element: ElementTree.Element) -> _Object:
    """An object, without its parts; coordinates count pixels from 1, the last one included."""
    name = _text(element, "name")
    if not name:
        raise UserError("expected a <name> in each <object>, got none; add it")
    difficult = _text(element, "difficult").lower()
    if difficult not in (*NO, *YES):
        raise UserError(f"expected <difficult> 0 or 1 of {name!r}, got {difficult!r}; correct it")
    texts = [_text(element, f"bndbox/{edge}") for edge in EDGES]
    if not all(texts):
        raise UserError(
            f"expected a <bndbox> with {', '.join(EDGES)} for each <object>, got none, or a part "
            f"of it, for {name!r}; add it"
        )
    left, top, right, bottom = (
        _number(edge, text) for edge, text in zip(EDGES, texts, strict=True)
    )
    # from one pixel to itself no box was drawn; other tools write edges, of which this is empty
    left, top = left - (left < right), top - (top < bottom)
    return _Object(name, (left, top, right, bottom), difficult in YES)


def _text(element: ElementTree.Element, path: str) -> str:
    """The stripped text of an element below; "" where there is none."""
    return (element.findtext(path) or "").strip()


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"expected a number for <{what}>, got {text!r}; correct it") from None
