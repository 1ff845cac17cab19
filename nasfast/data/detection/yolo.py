"""Boxes in the format of YOLO: a text for each image, a line for each object."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nasfast.data.detection.base import DetectionDataset, DetectionParts
from nasfast.data.detection.files import (
    PARTS,
    Annotated,
    Box,
    BoxFiles,
    part_by_hash,
    require_names,
)
from nasfast.data.folder import read_lines, some
from nasfast.data.images import for_each, list_folder, measure
from nasfast.utils.errors import UserError
from nasfast.utils.files import read_text

YOLO_LAYOUT = "images/train/ + labels/train/, or train/images/ + train/labels/, val, and data.yaml"
CLASSES = ("data.yaml", "dataset.yaml", "data.yml", "classes.txt", "labels/classes.txt")
"""Files that may name the classes: of YAML, the list `names`; or a name a line."""
ITEM = re.compile(r"""\s*((?:\d+\s*:\s*)?(?:"[^"]*"|'[^']*'|[^,]+))""")
"""An entry of a list or mapping in brackets."""


def yolo_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folders of images and of labels of each part that there is."""
    found: dict[str, tuple[Path, Path]] = {}
    for part, words in PARTS.items():
        for word in words:
            for pattern in ("{}/" + word, word + "/{}"):
                images, labels = (root / pattern.format(name) for name in ("images", "labels"))
                if images.is_dir() and labels.is_dir():
                    found.setdefault(part, (images, labels))
    if not found and all((root / name).is_dir() for name in ("images", "labels")):
        found["train"] = root / "images", root / "labels"
    return found


def open_yolo(root: Path, cache_in_memory: bool = True) -> DetectionParts:
    """The parts of a YOLO folder; without a val, 20 % of train, by a hash of the name, validate.

    An image without a text has no objects. A line is the class, and centre, width and height in
    shares of the image's; or the class and the corners of a polygon, whose box is taken.
    """
    folders = yolo_folders(root)
    path = next((root / name for name in CLASSES if (root / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{root}: expected data.yaml or classes.txt with the names of the classes, got "
            "neither; add one"
        )
    classes = read_lines(path) if path.suffix == ".txt" else names_in(path)
    require_names(classes, path)

    def dataset(images: Sequence[Path], labels: Path) -> DetectionDataset:
        return BoxFiles(
            root.resolve().name,
            classes,
            for_each(lambda image: _annotated(image, labels, classes), images),
            cache_in_memory=cache_in_memory,
        )

    def part(name: str) -> DetectionDataset:
        images, labels = folders[name]
        return dataset(_images(images, labels), labels)

    test = (lambda: part("test")) if "test" in folders else None
    if "val" in folders:
        return DetectionParts(part("train"), part("val"), test)
    images, labels = folders["train"]
    found = _images(images, labels)
    train, val = part_by_hash(found, [image.name for image in found], images)
    return DetectionParts(dataset(train, labels), dataset(val, labels), test)


def names_in(path: Path) -> list[str]:
    """The names of classes in a file of YAML: a list, or by their numbers.

    Raises:
        UserError: it has none, or their numbers are not 0, 1, ..
    """
    found = re.search(r"^names[ \t]*:(.*)", read_text(path), re.MULTILINE | re.DOTALL)
    text = found[1] if found else ""
    brackets = re.match(r"\s*[\[{](.*?)[\]}]", text, re.DOTALL)
    if brackets:
        items = [item for item in ITEM.findall(brackets[1]) if item.strip()]
    else:
        items = []
        for line in text.splitlines()[1:]:
            entry = re.match(r"\s*-\s+(.+)|\s+(\d+\s*:.+)", line)
            if entry is None and line.partition("#")[0].strip():
                break  # the next key
            items += [] if entry is None else [entry[1] or entry[2]]
    names: dict[int, str] = {}
    for place, item in enumerate(items):
        numbered = re.match(r"(\d+)\s*:(.*)", item.strip(), re.DOTALL)
        number, name = (int(numbered[1]), numbered[2]) if numbered else (place, item)
        names[number] = _plain(name)
    if not names or sorted(names) != list(range(len(items))):
        raise UserError(
            f"{path}: expected 'names', a list of the classes or their names by the numbers 0, 1, "
            f".., got {some(items) or 'none'}; correct it"
        )
    return [names[k] for k in range(len(names))]


def _plain(text: str) -> str:
    """A scalar of YAML without quotes and comment."""
    text = text.strip()
    if text[:1] in ("'", '"'):
        return text[1:].partition(text[0])[0]
    return text.partition(" #")[0].strip()


def _images(images: Path, labels: Path) -> Sequence[Path]:
    """The images of a part. UserError where there is none, or none for a text."""
    found = list_folder(images).images
    if not found:
        raise UserError(f"{images}: expected images, got none; add them")
    stems = {image.stem for image in found} | {"classes"}
    alone = sorted(path for path in labels.glob("*.txt") if path.stem not in stems)
    if alone:
        raise UserError(
            f"{alone[0]}: expected its image in {images}, got none of the name {alone[0].stem!r} "
            f"({len(alone)} missing); add it"
        )
    return found


def _annotated(image: Path, labels: Path, classes: Sequence[str]) -> Annotated:
    path = labels / f"{image.stem}.txt"
    lines = read_text(path).splitlines() if path.is_file() else []
    height, width = measure(image).size
    boxes = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            label, values = -1, []
        polygon = len(values) >= 6 and len(values) % 2 == 0
        if not (polygon or len(values) == 4) or label not in range(len(classes)):
            raise UserError(
                f"{path}, line {number}: expected a class of 0..{len(classes) - 1} and the centre, "
                f"width and height of a box in shares of the image, got {line[:40]!r}; correct it"
            )
        if polygon:
            across, down = values[0::2], values[1::2]
            edges = min(across), min(down), max(across), max(down)
        else:
            x, y, w, h = values
            edges = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        left, top, right, bottom = edges
        boxes.append(Box(left * width, top * height, right * width, bottom * height, label))
    return Annotated(image, image.stem, str(path), boxes)
