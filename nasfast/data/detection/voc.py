"""Boxes in the format of PASCAL VOC (Everingham et al., 2010): a file of XML for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from nasfast.data.detection.base import DetectionDataset, DetectionParts
from nasfast.data.detection.files import Annotated, Box, BoxFiles, label_of, part_by_hash
from nasfast.data.folder import files_by_stem, read_ids, read_lines
from nasfast.data.images import for_each
from nasfast.data.voc import CLASSES as WITH_BACKGROUND
from nasfast.utils.errors import UserError, about

BOXES_LAYOUT = "Annotations/*.xml + JPEGImages/ + ImageSets/Main/, here or in VOC20??/"
CLASSES = WITH_BACKGROUND[1:]
NAMES = ("classes.txt", "labels.txt")
"""Lists of classes, a name a line, in the folder or in the one of the lists."""
IMAGES, ANNOTATIONS = ("JPEGImages", "images"), ("Annotations", "annotations")
ASIDE = ("SegmentationObject/*", "SegmentationClass/*", "SegmentationClassAug/*")
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


def box_folders(root: Path) -> list[Path]:
    """The folders with boxes in a folder: itself, or those of years in it or in its VOCdevkit."""
    found = [root, *sorted(root.glob("VOC20??")), *sorted(root.glob("VOCdevkit/VOC20??"))]
    return [
        folder
        for folder in found
        if _first(folder, IMAGES) is not None
        and any(next((folder / name).glob("*.xml"), None) for name in ANNOTATIONS)
    ]


def open_boxes_voc(root: Path, cache_in_memory: bool = True) -> DetectionParts:
    """The parts of a VOC folder, or of the folder that it is in.

    Lists of ImageSets/Main divide the images: train.txt, else trainval.txt without those of
    val.txt; val.txt; test.txt, where its annotations are there. Without val.txt, or without lists,
    20 % of the images, by a hash of the name, validate. An id of a list is the name of the image
    and of the annotation; what the annotation says of names and folders is not read.

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
    images, annotations = _first(root, IMAGES), _first(root, ANNOTATIONS)
    assert images is not None
    assert annotations is not None
    lists = root / "ImageSets/Main"
    pictures, marks = files_by_stem(images), {path.stem: path for path in annotations.glob("*.xml")}
    train_ids, val_ids = _divided(lists, marks, annotations)
    read = _read(annotations, marks, [*train_ids, *val_ids])
    classes, origin = _classes((root, lists), train_ids, read)

    def part(ids: Sequence[str], read: Mapping[str, _File]) -> DetectionDataset:
        missing = [i for i in ids if i not in pictures]
        if missing:
            raise UserError(
                f"{marks[missing[0]]}: expected its image in {images}, got none of the name "
                f"{missing[0]!r} ({len(missing)} of {len(ids)} missing); add it"
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
            for_each(annotated, ids),
            cache_in_memory=cache_in_memory,
        )

    def open_test() -> DetectionDataset:
        ids = read_ids(test)
        return part(ids, _read(annotations, marks, ids))

    test = lists / "test.txt"
    tested = test.is_file() and read_ids(test)[0] in marks
    return DetectionParts(
        part(train_ids, read), part(val_ids, read), open_test if tested else None, ASIDE, home
    )


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _divided(
    lists: Path, marks: Mapping[str, Path], annotations: Path
) -> tuple[Sequence[str], Sequence[str]]:
    """Ids of train and of val."""
    ids = {
        name: read_ids(lists / f"{name}.txt")
        for name in ("train", "trainval", "val", "test")
        if (lists / f"{name}.txt").is_file()
    }
    both = ids.get("train") or ids.get("trainval")
    if both is None:
        if "val" in ids:
            raise UserError(
                f"{lists}: expected train.txt or trainval.txt beside val.txt, got neither; add one"
            )
        tested = set(ids.get("test", ()))
        both = sorted(set(marks) - tested)
        if tested and not both:
            raise UserError(f"{lists}: expected train.txt or trainval.txt, got test.txt; add one")
    if "val" not in ids:
        return part_by_hash(both, both, annotations)
    val = ids["val"]
    return (both if "train" in ids else [i for i in both if i not in set(val)]), val


def _read(folder: Path, marks: Mapping[str, Path], ids: Sequence[str]) -> dict[str, _File]:
    """What the annotations of some ids say. UserError where one is missing or cannot be read."""
    missing = [i for i in ids if i not in marks]
    if missing:
        raise UserError(
            f"no annotation for id {missing[0]!r}: expected {folder / missing[0]}.xml "
            f"({len(missing)} of {len(ids)} missing); add it, or take the id out of the list"
        )
    return dict(zip(ids, for_each(lambda i: _parsed(marks[i]), ids), strict=True))


def _classes(
    folders: Sequence[Path], train_ids: Sequence[str], read: Mapping[str, _File]
) -> tuple[Sequence[str], str]:
    """Names of classes, and where they are from."""
    listed = [folder / name for folder in folders for name in NAMES]
    for path in listed:
        if path.is_file():
            names = read_lines(path)
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:
                raise UserError(
                    f"{path}: expected each class once, got {twice!r} twice; remove one"
                )
            return names, str(path)
    if all(o.name in CLASSES for file in read.values() for o in file.objects):
        return CLASSES, "PASCAL VOC"
    return sorted({o.name for i in train_ids for o in read[i].objects}), "the boxes of train"


def _parsed(path: Path) -> _File:
    """An annotation. UserError names the file and what of it is not as the format has it."""
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise UserError(
            f"{path}: expected XML, got a fault in it ({error}); restore it from a copy"
        ) from error
    with about(path):
        objects = [_object(each) for each in tree.findall("object")]
        sides = [_text(tree, f"size/{side}") for side in ("height", "width")]
        height, width = (_number("size", side) if side else 0 for side in sides)
    known = height > 0 and width > 0  # tools that do not know the size write 0
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
