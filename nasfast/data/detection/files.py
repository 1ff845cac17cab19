"""Detection data on disk: image files and what an annotation says of each, checked when opened."""

from __future__ import annotations

import hashlib
import math
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nasfast.data.base import digest
from nasfast.data.detection.base import LEAST, BoxSample, DetectionDataset, Objects, box_colors
from nasfast.data.folder import KEPT, some
from nasfast.data.images import (
    FaultyFiles,
    Header,
    for_each,
    identity,
    measure,
    read_image,
    require_eight_bits,
)
from nasfast.utils.errors import UserError, did_you_mean

T = TypeVar("T")
PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What files and folders of each part are called."""


class Box(NamedTuple):
    """An object as it is annotated: edges in pixels of the image, from 0."""

    left: float
    top: float
    right: float
    bottom: float
    label: int
    ignored: bool = False
    area: float = math.nan
    """In square pixels; NaN is that of the box."""


@dataclass(frozen=True)
class Annotated:
    """What the annotations say of an image."""

    image: Path
    image_id: int | str
    source: str
    """The file that says it, and where in it, for errors."""
    boxes: Sequence[Box]
    size: tuple[int, int] | None = None
    """(height, width); None where it is not said."""


class BoxFiles(DetectionDataset):
    """Images in files with their boxes.

    Boxes without an area are dropped, those that cross the border of the image are clipped;
    `dropped`, `clipped` and `resized` say where, for `nasfast check`. With `cache_in_memory`,
    images are decoded now and kept, where all take at most `KEPT` bytes; else they are measured,
    and decoded at each access. FaultyFiles names what cannot be used.

    Args:
        name: of the data.
        classes: names, in the order of the labels.
        annotated: the images.
        category_ids: of the classes in the data; default: 1, 2, ..
        cache_in_memory: keep decoded images.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        annotated: Sequence[Annotated],
        *,
        category_ids: Sequence[int] | None = None,
        cache_in_memory: bool = True,
    ) -> None:
        self.name, self.classes = name, tuple(classes)
        self.category_ids = tuple(category_ids or range(1, len(classes) + 1))
        self.colors = box_colors(len(classes))
        self.annotated = tuple(annotated)
        self._fingerprint: str | None = None
        self._sizes = for_each(self._size, self.annotated)
        self.resized = tuple(
            f"{each.source} ({sized(each.size)}, the image {sized(size)})"
            for each, size in zip(self.annotated, self._sizes, strict=True)
            if each.size not in (None, size)
        )
        """Annotations made for an image of another size."""
        self._objects, dropped, clipped = self._settled()
        self.dropped, self.clipped = tuple(dropped), tuple(clipped)
        """Boxes without an area, and those that cross the border by more than a pixel."""
        counts = torch.bincount(self._objects.sample, minlength=len(self.annotated))
        self._counts, self._ends = counts.tolist(), counts.cumsum(0).tolist()
        kept = cache_in_memory and sum(3 * h * w for h, w in self._sizes) <= KEPT
        self._images = for_each(self._read, range(len(self))) if kept else []

    def _size(self, annotated: Annotated) -> tuple[int, int]:
        header = measure(annotated.image)
        require_eight_bits(annotated.image, header.mode)
        require_upright(annotated, header)
        return header.size

    def _settled(self) -> tuple[Objects, list[str], list[str]]:
        """Boxes inside their images, and what was done to them."""
        owners = [i for i, each in enumerate(self.annotated) for _ in each.boxes]
        boxes = [box for each in self.annotated for box in each.boxes]
        edges = np.array([box[:4] for box in boxes], np.float64).reshape(-1, 4)
        limits = np.array(self._sizes, np.float64).reshape(-1, 2)[owners][:, [1, 0, 1, 0]]
        finite = np.isfinite(edges).all(1)
        with np.errstate(invalid="ignore"):
            sides = edges[:, 2:] - edges[:, :2]
        inverted = finite & (sides < 0).any(1)
        empty = finite & ~inverted & (sides < LEAST).any(1)
        inside = np.clip(edges, 0, limits)
        outside = finite & ~inverted & ~empty & (inside[:, 2:] - inside[:, :2] < LEAST).any(1)
        faults = [
            f"{self._where(owners[k], boxes[k])}: expected {expected}, got {_edges(boxes[k])} in "
            f"an image of {sized(self._sizes[owners[k]])}; correct it or remove it"
            for wrong, expected in (
                (~finite, "finite edges"),
                (inverted, "left < right and top < bottom"),
                (outside, "a box that meets its image"),
            )
            for k in np.flatnonzero(wrong)
        ]
        if faults:
            raise FaultyFiles(faults)
        crossing = ~empty & (np.abs(inside - edges) > 1).any(1)
        dropped, clipped = (
            [self._where(owners[k], boxes[k]) + f" ({_edges(boxes[k])})" for k in np.flatnonzero(w)]
            for w in (empty, crossing)
        )
        kept = np.flatnonzero(~empty)
        inside = inside[kept]
        areas = np.array([box.area for box in boxes], np.float64)[kept]
        sides = inside[:, 2:] - inside[:, :2]
        areas = np.where(np.isnan(areas), sides[:, 0] * sides[:, 1], areas)
        objects = Objects(
            torch.tensor(owners, dtype=torch.int64)[kept],
            torch.from_numpy(inside).float(),
            torch.tensor([boxes[k].label for k in kept], dtype=torch.int64),
            torch.tensor([boxes[k].ignored for k in kept], dtype=torch.bool),
            torch.from_numpy(areas).float(),
        )
        return objects, dropped, clipped

    def _where(self, owner: int, box: Box) -> str:
        return f"{self.annotated[owner].source}: box of {self.classes[box.label]!r}"

    def _read(self, index: int) -> Tensor:
        return read_image(self.annotated[index].image)

    def __len__(self) -> int:
        return len(self.annotated)

    def __getitem__(self, index: int) -> BoxSample:
        index = range(len(self))[index]
        end = self._ends[index]
        rows = slice(end - self._counts[index], end)
        _, boxes, labels, ignored, areas = self._objects
        return BoxSample(
            self._images[index] if self._images else self._read(index),
            boxes[rows],
            labels[rows],
            ignored[rows],
            areas[rows],
            self.annotated[index].image_id,
        )

    def load(self, indices: Sequence[int]) -> list[BoxSample]:
        return super().load(indices) if self._images else for_each(self.__getitem__, indices)

    def read_all(self) -> None:
        """Read every image that is not kept. FaultyFiles names those that cannot be read."""
        if not self._images:
            for_each(lambda index: self._read(index).shape, range(len(self)))

    def sizes(self) -> list[tuple[int, int]]:
        return self._sizes

    def objects(self) -> Objects:
        return self._objects

    def counts(self) -> list[int]:
        return self._counts

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            files = for_each(lambda each: identity(each.image), self.annotated)
            ids = [each.image_id for each in self.annotated]
            objects = hashlib.sha256()
            for values in self._objects:
                objects.update(values.numpy().tobytes())
            self._fingerprint = digest(
                "boxes", self.classes, self.category_ids, ids, files, objects.hexdigest()
            )
        return self._fingerprint


def require_boxes(train: DetectionDataset, val: DetectionDataset) -> None:
    """Refuse data that nothing can be learned from, or scored on.

    Raises:
        UserError: `train` or `val` has no box that counts.
    """
    for part, dataset in (("train", train), ("val", val)):
        ignored = dataset.objects().ignored
        if ignored.all():
            only = f", only {len(ignored)} that are difficult or crowds" * (len(ignored) > 0)
            raise UserError(
                f"{dataset.name}: expected boxes in the {len(dataset)} images of {part}, got none"
                f"{only}; annotate some"
            )


def label_of(name: str, classes: Sequence[str], source: object, origin: object) -> int:
    """The index of a class. UserError where it is none of those that `origin` lists."""
    if name not in classes:
        raise UserError(
            f"{source}: expected a class of {origin} ({some(classes)}), got {name!r}"
            f"{did_you_mean(name, classes) or '; correct it, or add it there'}"
        )
    return list(classes).index(name)


def require_names(classes: Sequence[str], source: object) -> None:
    """Raise UserError where two classes have one name, or one has none that can be written."""
    for name in classes:
        if not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
            raise UserError(
                f"{source}: expected names of classes in one line of text, got {name!r}; rename it"
            )
    twice = next((name for i, name in enumerate(classes) if name in classes[:i]), None)
    if twice is not None:
        raise UserError(f"{source}: expected each class once, got {twice!r} twice; remove one")


def part_by_hash(
    items: Sequence[T], names: Sequence[str], source: object
) -> tuple[list[T], list[T]]:
    """`train`, and the 20 % of the items that have the smallest hash of the name, `val`.

    Raises:
        UserError: there are less than two.
    """
    if len(items) < 2:
        raise UserError(f"{source}: expected at least 2 images, got {len(items)}; add some")

    def rank(index: int) -> str:
        return hashlib.sha256(os.fsencode(names[index])).hexdigest()

    ranked = sorted(range(len(items)), key=rank)
    count = max(1, round(0.2 * len(items)))
    return [items[i] for i in sorted(ranked[count:])], [items[i] for i in sorted(ranked[:count])]


def require_upright(annotated: Annotated, header: Header) -> None:
    """Raise UserError where an annotation is of the image as it is stored, which reading turns."""
    if header.turned and annotated.size == header.size[::-1] != header.size:
        raise UserError(
            f"{annotated.source}: expected boxes of the upright image, {sized(header.size)} by "
            f"the EXIF orientation of {annotated.image}, got those of {sized(annotated.size)}; "
            "turn the boxes too, or remove the orientation"
        )


def sized(size: tuple[int, int] | None) -> str:
    """A size (height, width) as text."""
    return "?" if size is None else f"{size[0]}x{size[1]}"


def _edges(box: Box) -> str:
    left, top, right, bottom = (f"{edge:g}" for edge in box[:4])
    return f"left {left}, top {top}, right {right}, bottom {bottom}"
