"""Datasets on disk: a frame and an 8-bit index mask per sample, checked when opened."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nasfast.data.base import Parts, Sample, SegmentationDataset, default_colors, digest
from nasfast.data.images import (
    IMAGE_SUFFIXES,
    FaultyFiles,
    by_stem,
    for_each,
    identity,
    list_folder,
    measure,
    open_image,
    read_image,
    require_eight_bits,
)
from nasfast.utils.errors import UserError, about
from nasfast.utils.files import read_text

KEPT = 2**31
"""Bytes that a part keeps of its decoded files, at most."""
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Value of each of the 19 classes in the masks ``*_labelIds.png`` of Cityscapes, whose values go
from 0 to 33."""
FOLDER_LAYOUT = "images/ + masks/ + classes.txt"
FIRST_COLUMN = re.compile(
    rf"[^\t]*?({'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?=\s|$)|[^\t]*", re.IGNORECASE
)


class FileDataset(SegmentationDataset):
    """Frames and masks in files, `pairs` of (image path, mask path).

    Opening it reads every mask. They are kept, and with `cache_in_memory` the frames too, where
    all take at most `KEPT` bytes; else frames are only measured now, and both are decoded at each
    access. UserError names the first file that is missing, unreadable or inconsistent, and counts
    the others.

    Args:
        name: of the data.
        classes: names, in the order of the indices.
        pairs: the files.
        ignore_index: label that no loss and no metric counts.
        colors: RGB of each class; default: those of PASCAL VOC.
        mask_values: "0,255": the value in the masks of class 0, of class 1, ..; pixels of other
            values are ignored. Default: the indices themselves.
        labels: the label of every value that masks may hold, where the format says it.
        hint: what is wrong with masks of other values, where the format says it, as the end of a
            sentence.
        cache_in_memory: keep decoded frames.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        pairs: Sequence[tuple[Path, Path]],
        *,
        ignore_index: int = 255,
        colors: Sequence[tuple[int, int, int]] | None = None,
        mask_values: str | None = None,
        labels: Mapping[int, int] | None = None,
        hint: str = "",
        cache_in_memory: bool = True,
    ) -> None:
        self.name, self.classes, self.ignore_index = name, tuple(classes), ignore_index
        self.colors = default_colors(len(classes)) if colors is None else tuple(colors)
        self.pairs = tuple(pairs)
        self.mask_values = parse_mask_values(mask_values, self.classes)
        self.hint = hint
        self._table = self._labels_of_values(labels)
        self._fingerprint: str | None = None
        images, masks = [image for image, _ in pairs], [mask for _, mask in pairs]
        self._sizes = for_each(_image_size, images)
        kept = sum(4 * height * width for height, width in self._sizes) <= KEPT  # RGB and label

        def read(path: Path) -> tuple[Tensor, tuple[int, int], Tensor | None]:
            mask = _read_mask(path)
            return _count(mask), (mask.shape[0], mask.shape[1]), self._label(mask) if kept else None

        found = for_each(read, masks)
        self.value_counts = torch.stack([counts for counts, _, _ in found])  # int64 [N, 256]
        """Pixels of each value in each mask file."""
        self._check_values(labels)
        faults = [
            _misfit(*pair, size, shape)
            for pair, size, (_, shape, _) in zip(pairs, self._sizes, found, strict=True)
            if size != shape
        ]
        if faults:
            raise FaultyFiles(faults)
        self._masks = [mask for _, _, mask in found if mask is not None]
        self._images = for_each(read_image, images) if kept and cache_in_memory else []

    def _labels_of_values(self, labels: Mapping[int, int] | None) -> Tensor | None:
        """Label of each value in a mask, uint8 [256]; None where they are the same."""
        if self.mask_values is not None:
            labels = {value: label for label, value in enumerate(self.mask_values)}
        if labels is None:
            return None
        table = torch.full((256,), self.ignore_index, dtype=torch.uint8)
        table[list(labels)] = torch.tensor(list(labels.values()), dtype=torch.uint8)
        return table

    def _label(self, mask: Tensor) -> Tensor:
        return mask if self._table is None else self._table[mask.long()]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self.pairs[index]
        return Sample(
            self._images[index] if self._images else read_image(image),
            self._masks[index] if self._masks else self._label(_read_mask(mask)),
        )

    def load(self, indices: Sequence[int]) -> list[Sample]:
        return super().load(indices) if self._images else for_each(self.__getitem__, indices)

    def read_all(self) -> None:
        """Read every frame that is not kept. FaultyFiles names those that cannot be read."""
        if not self._images:
            for_each(lambda pair: read_image(pair[0]).shape, self.pairs)

    def sizes(self) -> list[tuple[int, int]]:
        return self._sizes

    def label_counts(self) -> Tensor:
        if self._table is None:
            return self.value_counts
        counts = torch.zeros_like(self.value_counts)
        return counts.index_add_(1, self._table.long(), self.value_counts)

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            paths = [path for pair in self.pairs for path in pair]
            files = tuple(zip([path.name for path in paths], for_each(identity, paths)))
            values: tuple[object, ...] = ()
            if self.mask_values is not None:
                values = (self.mask_values,)
            elif self._table is not None:
                values = (tuple(self._table.tolist()),)
            self._fingerprint = digest("files", self.classes, self.ignore_index, files, *values)
        return self._fingerprint

    def _check_values(self, labels: Mapping[int, int] | None) -> None:
        if self.mask_values is not None:  # says what every value means
            return
        known = torch.zeros(256, dtype=torch.bool)
        if labels is None:
            known[: len(self.classes)] = known[self.ignore_index] = True
            expected = f"0..{len(self.classes) - 1} or {self.ignore_index} (ignore)"
        else:
            known[list(labels)] = True
            expected = f"{min(labels)}..{max(labels)}"
        for (_, mask), unknown in zip(self.pairs, (self.value_counts > 0) & ~known, strict=True):
            if unknown.any():
                cause = "; JPEG changes values" * (mask.suffix.lower() in (".jpg", ".jpeg"))
                raise UserError(
                    f"mask {mask} has the value {int(unknown.nonzero()[0])}: expected {expected}"
                    f"{cause}{self.remedy()}"
                )

    def meaning(self) -> str:
        """What values that are no indices of classes may mean, as the end of a sentence."""
        if self.mask_values is not None or self.hint:
            return ""
        found = torch.nonzero(self.value_counts.sum(0)).flatten().tolist()
        indices = range(len(self.classes))
        others = [value for value in found if value not in (*indices, self.ignore_index)]
        if others and len(indices) == len(CITYSCAPES_IDS) and max(others) <= max(CITYSCAPES_IDS):
            ids = ",".join(map(str, CITYSCAPES_IDS))
            return f"; if the values are label ids of Cityscapes, give --mask-values {ids}"
        text = ""
        if 0 in found and others and others == list(range(len(indices), others[-1] + 1)):
            text = f"; if the classes are 0..{others[-1]}, the list of classes lacks names"
        if 0 in found and len(others) == 1 and len(set(found) & set(indices)) > 1:
            text += f"; if {others[0]} is void, give --mask-values {','.join(map(str, indices))}"
        for void in ((), (self.ignore_index,), (0,), (0, self.ignore_index)):
            values = [value for value in found if value not in void]
            if len(values) == len(indices) and values != list(indices):
                meant = ",".join(map(str, values))
                return f"{text}; if {meant} mean {some(self.classes)}, give --mask-values {meant}"
        return text

    def remedy(self) -> str:
        """The same, or else what the masks hold and what to do."""
        found = torch.nonzero(self.value_counts.sum(0)).flatten().tolist()
        return (
            self.hint
            or self.meaning()
            or f"; the masks hold {some(found)}: save class indices, or give --mask-values and the "
            f"value of each class, {some(self.classes)}"
        )


def some(items: Sequence[object], most: int = 8, width: int = 20) -> str:
    """The first of a list, each cut to a width in characters, for an error or a warning."""
    texts = [
        text if len(text) <= width else f"{text[: width - 2]}.." for text in map(str, items[:most])
    ]
    return ", ".join([*texts, ".."] if len(items) > most else texts)


def parse_mask_values(text: str | None, classes: Sequence[str]) -> tuple[int, ...] | None:
    """The values in "0,255", one a class.

    Raises:
        UserError: another form or number, or two classes of one value.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    values = [int(word) for word in words if re.fullmatch("[0-9]{1,3}", word)]
    if len(values) != len(words) or len({v for v in values if v < 256}) != len(classes):
        raise UserError(
            f"mask-values: expected {len(classes)} different numbers of 0..255, one a class "
            f"({some(classes)}), such as 0,255 for two, got {text!r}"
        )
    return tuple(values)


def open_folder(
    root: Path, *, cache_in_memory: bool = True, mask_values: str | None = None
) -> Parts:
    """The parts of a folder `images/` + `masks/` + `classes.txt`.

    Masks carry the stems of their images and 8-bit class indices, 255 = ignore, or `mask_values`
    (`FileDataset`); `classes.txt` has one class name per line, in the order of the indices.
    `train.txt` and `val.txt` (a stem per line) divide the images; without them the 20 % with the
    smallest hash of the stem validate. Images of `test.txt`, where there is one, are the test part
    and no other.
    """
    classes = read_classes(root / "classes.txt")
    images, masks, listed = root / "images", root / "masks", root / "test.txt"
    lists = [root / "train.txt", root / "val.txt"]

    def dataset(pairs: Sequence[tuple[Path, Path]]) -> SegmentationDataset:
        return FileDataset(
            root.resolve().name,
            classes,
            pairs,
            mask_values=mask_values,
            cache_in_memory=cache_in_memory,
        )

    if all(path.is_file() for path in lists):
        parts = [listed_pairs(path, images, masks) for path in lists]
    elif any(path.is_file() for path in lists):
        raise UserError(
            f"{root}: expected both train.txt and val.txt or neither, got one; add the other"
        )
    else:
        stems = set(files_by_stem(images))
        if listed.is_file():
            stems -= set(read_ids(listed))
        parts = [pair_files(part, images, masks) for part in divided(stems, images)]
    train, val = map(dataset, parts)
    return Parts(
        train,
        val,
        (lambda: dataset(listed_pairs(listed, images, masks))) if listed.is_file() else None,
    )


def divided(stems: Iterable[str], folder: Path) -> tuple[list[str], list[str]]:
    """Those to learn from, and the 20 % with the smallest hash, which validate.

    Raises:
        UserError: the folder has fewer than two.
    """
    ranked = sorted(stems, key=lambda stem: hashlib.sha256(os.fsencode(stem)).hexdigest())
    if len(ranked) < 2:
        raise UserError(f"{folder}: expected at least 2 images, got {len(ranked)}; add some")
    held_out = max(1, round(0.2 * len(ranked)))
    return sorted(ranked[held_out:]), sorted(ranked[:held_out])


def read_classes(path: Path) -> list[str]:
    """Names of classes, a line each. UserError for one, more than 255 or a name that comes
    twice."""
    classes = read_lines(path)
    if not 2 <= len(classes) <= 255:
        raise UserError(
            f"{path}: expected 2 to 255 classes, a line each, background too, got {len(classes)}"
        )
    name, count = Counter(classes).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: expected each class once, got {name!r} {count} times; rename one")
    return classes


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a list in UTF-8, without empty ones. UserError for an empty list."""
    text = read_text(path)
    if "\0" in text:
        raise UserError(f"{path}: expected text in UTF-8, got zero bytes, as in UTF-16; save it so")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: expected one entry per line; add them")
    return lines


def read_ids(path: Path) -> list[str]:
    """The ids in a list, line by line."""
    return [id_of(line) for line in read_lines(path)]


def listed_pairs(path: Path, image_folder: Path, mask_folder: Path) -> list[tuple[Path, Path]]:
    """(image, mask) per line of a list; a mask of another name is in a second column."""
    lines = read_lines(path)
    with about(path):
        return pair_files(
            [id_of(line) for line in lines], image_folder, mask_folder, list(map(mask_id_of, lines))
        )


def id_of(line: str) -> str:
    """The id in a line of a list: the line itself or the first of its columns, which end at a tab
    or at an image's suffix, without folders and suffix."""
    column = FIRST_COLUMN.match(line)
    assert column is not None
    name = re.split(r"[/\\]", column[0].strip())[-1]
    return name[: -len(column[1])] if column[1] else name


def mask_id_of(line: str) -> str:
    """The id of the mask: that of the second column where it is an image's name, else the first."""
    column = FIRST_COLUMN.match(line)
    assert column is not None
    rest = line[column.end() :].strip()
    second = FIRST_COLUMN.match(rest)
    return id_of(rest) if second is not None and second[1] else id_of(line)


def files_by_stem(folder: Path) -> dict[str, Path]:
    """Stem -> path of the images in a folder."""
    return by_stem(list_folder(folder).images)


def pair_files(
    ids: Sequence[str], image_folder: Path, mask_folder: Path, mask_ids: Sequence[str] | None = None
) -> list[tuple[Path, Path]]:
    """(image, mask) per id; masks have ids of their own where they are given. UserError names the
    file that is missing."""
    found = []
    kinds = (("image", image_folder, ids), ("mask", mask_folder, mask_ids or ids))
    for kind, folder, ids in kinds:
        files = files_by_stem(folder)
        missing = [i for i in ids if i not in files]
        if missing:
            name = missing[0][:40]
            columns = " (columns of a list end at a tab or a suffix)" if " " in name else ""
            raise UserError(
                f"no {kind} for id {name!r}: expected {str(folder / name)!r} with the suffix "
                f"{', '.join(IMAGE_SUFFIXES[:-1])} or {IMAGE_SUFFIXES[-1]} ({len(missing)} of "
                f"{len(ids)} missing); add it{columns}"
            )
        found.append([files[i] for i in ids])
    return list(zip(*found, strict=True))


def _read_mask(path: Path) -> Tensor:
    image = open_image(path, "mask")
    if image.mode not in ("1", "L", "P"):
        raise UserError(
            f"mask {path} has mode {image.mode}: expected an 8-bit index mask (grey or palette "
            "PNG whose pixel values are class indices); replace each colour by its class's index"
        )
    return torch.from_numpy(np.array(image, dtype=np.uint8))  # [H, W]


def _misfit(image: Path, mask: Path, size: tuple[int, int], shape: tuple[int, int]) -> str:
    turned = "; the image is upright by its EXIF orientation, turn the mask too"
    return (
        f"image and mask differ in size: {image} is {size[0]}x{size[1]}, {mask} is "
        f"{shape[0]}x{shape[1]} (height x width){turned if measure(image).turned else ''}"
    )


def _count(mask: Tensor) -> Tensor:
    return torch.bincount(mask.flatten(), minlength=256)


def _image_size(path: Path) -> tuple[int, int]:
    header = measure(path)
    require_eight_bits(path, header.mode)
    return header.size
