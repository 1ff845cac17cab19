"""Datasets on disk: a frame and an 8-bit index mask per sample, checked when opened."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nasfast.data.base import Parts, Sample, SegmentationDataset, default_colors, digest
from nasfast.data.images import IMAGE_SUFFIXES, image_files, open_image
from nasfast.utils.errors import UserError, about
from nasfast.utils.files import read_text

FOLDER_LAYOUT = "images/ + masks/ + classes.txt"


class FileDataset(SegmentationDataset):
    """Frames and masks in files, `pairs` of (image path, mask path).

    Opening it reads every mask and keeps them; frames are decoded now and kept
    (`cache_in_memory`), or only measured now and decoded at each access. UserError names the first
    file that is missing, unreadable or inconsistent.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        pairs: Sequence[tuple[Path, Path]],
        *,
        ignore_index: int = 255,
        colors: Sequence[tuple[int, int, int]] | None = None,
        cache_in_memory: bool = True,
    ) -> None:
        self.name, self.classes, self.ignore_index = name, tuple(classes), ignore_index
        self.colors = default_colors(len(classes)) if colors is None else tuple(colors)
        self._pairs = tuple(pairs)
        self._images: list[Tensor] | None = None
        self._fingerprint: str | None = None
        with ThreadPoolExecutor() as pool:
            self._masks = list(pool.map(self._read_mask, [mask for _, mask in pairs]))
            images = [image for image, _ in pairs]
            if cache_in_memory:
                self._images = list(pool.map(_read_image, images))
                sizes = [(i.shape[1], i.shape[2]) for i in self._images]
            else:
                sizes = list(pool.map(_image_size, images))
        for (image, mask), (height, width), labels in zip(pairs, sizes, self._masks, strict=True):
            if (height, width) != tuple(labels.shape):
                raise UserError(
                    f"image and mask differ in size: {image} is {height}x{width}, "
                    f"{mask} is {labels.shape[0]}x{labels.shape[1]} (height x width)"
                )

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        image = self._images[index] if self._images else _read_image(self._pairs[index][0])
        return Sample(image, self._masks[index])

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            files = tuple(
                (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
                for pair in self._pairs
                for path in pair
            )
            self._fingerprint = digest("files", self.classes, self.ignore_index, files)
        return self._fingerprint

    def _read_mask(self, path: Path) -> Tensor:
        image = open_image(path, "mask")
        if image.mode not in ("1", "L", "P"):
            raise UserError(
                f"mask {path} has mode {image.mode}: expected an 8-bit index mask (grey or palette "
                "PNG whose pixel values are class indices)"
            )
        labels = np.array(image, dtype=np.uint8)  # [H, W]
        present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
        unknown = [v for v in present if v >= len(self.classes) and v != self.ignore_index]
        if unknown:
            raise UserError(
                f"mask {path} has the value {unknown[0]}: expected 0..{len(self.classes) - 1} "
                f"or {self.ignore_index} (ignore)"
            )
        return torch.from_numpy(labels)


def open_folder(root: Path, *, cache_in_memory: bool = True) -> Parts:
    """The parts of a folder `images/` + `masks/` + `classes.txt`.

    Masks carry the stems of their images and 8-bit class indices, 255 = ignore; `classes.txt`
    has one class name per line, in the order of the indices. `train.txt` and `val.txt` (a stem
    per line) divide the images; without them the 20 % with the smallest hash of the stem
    validate. Images of `test.txt`, where there is one, are the test part and no other.
    """
    classes = read_lines(root / "classes.txt")
    if len(classes) > 255:
        raise UserError(f"{root / 'classes.txt'}: expected at most 255 classes, got {len(classes)}")
    images, masks, listed = root / "images", root / "masks", root / "test.txt"
    lists = [root / "train.txt", root / "val.txt"]

    def dataset(pairs: Sequence[tuple[Path, Path]]) -> SegmentationDataset:
        name = root.resolve().name
        return FileDataset(name, classes, pairs, cache_in_memory=cache_in_memory)

    if all(path.is_file() for path in lists):
        parts = [listed_pairs(path, images, masks) for path in lists]
    elif any(path.is_file() for path in lists):
        raise UserError(
            f"{root}: expected both train.txt and val.txt or neither, got one; add the other"
        )
    else:
        stems = set(files_by_stem(images))
        if listed.is_file():
            stems -= {id_of(line) for line in read_lines(listed)}
        if len(stems) < 2:
            raise UserError(f"{images}: expected at least 2 images, got {len(stems)}; add some")
        ranked = sorted(stems, key=lambda stem: hashlib.sha256(stem.encode()).hexdigest())
        held_out = max(1, round(0.2 * len(ranked)))
        halves = ranked[held_out:], ranked[:held_out]
        parts = [pair_files(sorted(stems), images, masks) for stems in halves]
    train, val = map(dataset, parts)
    return Parts(
        train,
        val,
        (lambda: dataset(listed_pairs(listed, images, masks))) if listed.is_file() else None,
    )


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a list, without empty ones. UserError for an empty list."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: expected one entry per line; add them")
    return lines


def listed_pairs(path: Path, image_folder: Path, mask_folder: Path) -> list[tuple[Path, Path]]:
    """(image, mask) per line of a list."""
    ids = [id_of(line) for line in read_lines(path)]
    with about(path):
        return pair_files(ids, image_folder, mask_folder)


def id_of(line: str) -> str:
    """The id in a line of a list: an id, or a path, or several paths of which the first counts."""
    name = line.split()[0].rsplit("/", 1)[-1]
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in IMAGE_SUFFIXES else name


def files_by_stem(folder: Path) -> dict[str, Path]:
    """Stem -> path of the images in a folder."""
    return {path.stem: path for path in image_files(folder)}


def pair_files(
    ids: Sequence[str], image_folder: Path, mask_folder: Path
) -> list[tuple[Path, Path]]:
    """(image, mask) per id. UserError names the file that is missing."""
    found = []
    for kind, folder in (("image", image_folder), ("mask", mask_folder)):
        files = files_by_stem(folder)
        missing = [i for i in ids if i not in files]
        if missing:
            name = missing[0][:40]
            raise UserError(
                f"no {kind} for id {name!r}: expected {str(folder / name)!r} with the suffix "
                f"{' or '.join(IMAGE_SUFFIXES)} ({len(missing)} of {len(ids)} missing); add it"
            )
        found.append([files[i] for i in ids])
    return list(zip(*found, strict=True))


def _read_image(path: Path) -> Tensor:
    pixels = np.array(open_image(path).convert("RGB"))  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _image_size(path: Path) -> tuple[int, int]:
    image = open_image(path, decode=False)
    return image.height, image.width
