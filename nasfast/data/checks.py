"""What a data set holds, and what about it would mislead a search."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from nasfast.data.base import SegmentationDataset, Splits
from nasfast.data.folder import FileDataset, some
from nasfast.data.images import IMAGE_SUFFIXES, FaultyFiles
from nasfast.data.reduced import Reduced
from nasfast.data.restoration import ImageSet, RestorationData
from nasfast.utils.errors import UserError

NO_IMAGES = {".csv", ".db", ".html", ".ini", ".json", ".md", ".mat", ".txt", ".xml", ".yaml"}
"""Suffixes of files that lie beside images for other reasons than being images."""
MUCH_VOID = 0.5
LOSSY = (".jpeg", ".jpg")
TILES = 12
OPACITY = 0.6
"""Of the classes' colours over an image."""
TEST_FOLDERS = ("test/*", "images/test*/*", "test20??/*")
"""Patterns of what the layouts of detection and key points have for a test part."""

Row = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class Findings:
    """What a look at a data set shows.

    Attributes:
        facts: tables by title; a number from 0 to 1 is a share, and rows have the same columns.
        warnings: what may mislead a search or a training, a sentence each.
        errors: what keeps it from being used.
        tiles: images to look at, uint8 [3, h, w], by caption.
        legend: what their colours mean.
    """

    facts: Mapping[str, Sequence[Row]] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    tiles: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    legend: Mapping[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)

    def require(self) -> None:
        """Raise UserError for the first error."""
        if self.errors:
            raise FaultyFiles(self.errors)


def check_splits(
    splits: Splits, root: Path | None = None, omit: Sequence[int] = (), *, test: bool = False
) -> Findings:
    """Findings about data for segmentation, from what its opening has read.

    Args:
        splits: the data.
        root: its folder; None for data that is drawn.
        omit: classes that the reward leaves out.
        test: read the test part too, count everything and draw some, for facts and tiles.
    """
    train, val = splits.train, splits.val
    parts = {"train": train, "val": val}
    if test and splits.test is not None:
        parts["test"] = splits.test
    errors, broken = _unscorable(splits, omit), list[str]()
    warnings = few(len(splits.search_val))
    files: dict[str, list[Path]] = {}
    on_disk = {part: found for part, each in parts.items() if (found := _on_disk(each))}
    for part, dataset in on_disk.items():
        files[part] = [image for image, _ in dataset.pairs]
        warnings += _labels(part, dataset)
    warnings += overlaps(files)
    facts: dict[str, Sequence[Row]] = {}
    if test:
        broken = broken_files(on_disk.values())
        facts["parts"] = [_part(part, dataset) for part, dataset in parts.items()]
        facts["classes"] = _histogram(parts)
    root = splits.home or root
    masks = [mask for dataset in on_disk.values() for _, mask in dataset.pairs]
    images = [path for part in files.values() for path in part]
    aside = (*splits.aside, *(() if test else ("test/*", "testannot/*")))
    if root is not None and files:
        warnings += _orphans(root, images, masks, aside)
    unread, more = beside(root, [*images, *masks], aside, test)
    facts, warnings = {**facts, **unread}, [*warnings, *more]
    findings = Findings(facts, tuple(warnings), (*errors, *broken))
    if not test or broken:
        return findings
    legend = dict(zip(train.classes, train.colors, strict=True))
    return dataclasses.replace(findings, tiles=_overlays(parts), legend=legend)


def check_images(
    data: RestorationData, root: Path | None = None, *, test: bool = False
) -> Findings:
    """Findings about data for restoration, from headers and names.

    Args:
        data: the images.
        root: their folder; None for images that are drawn.
        test: read every image, count everything and draw some, for facts and tiles.
    """
    parts = {"train": data.train, "val": data.val, "test": data.test}
    warnings = few(len(data.val))
    files = {part: [paths[0] for paths in images.files] for part, images in parts.items()}
    warnings += overlaps(files)
    both = [paths for images in parts.values() for paths in images.files]
    read = [path for paths in both for path in paths]
    if len(both) == len(read):
        warnings += _twice(read)
    depths = {part: images.depths for part, images in parts.items()}
    read += [path for paths in depths.values() for path in paths]
    equal = sum(len(paths) > 1 and _same(*paths) for paths in both)
    if equal:
        warnings.append(
            f"{equal} of {len(both)} pairs hold the same file as clean and as degraded image"
        )
    errors: list[str] = []
    facts: dict[str, Sequence[Row]] = {}
    if test:
        facts["parts"] = [
            {
                "part": part,
                "images": len(images),
                "pairs": sum(len(paths) > 1 for paths in images.files),
                **({"with depth": len(depths[part])} if any(depths.values()) else {}),
                "height x width": range_of_sizes(images.sizes),
            }
            for part, images in parts.items()
        ]
        errors += broken_files(parts.values())
    unread, more = beside(root, read, (), test)
    facts, warnings = {**facts, **unread}, [*warnings, *more]
    tiles = _pairs(parts) if test and not errors else {}
    return Findings(facts, tuple(warnings), tuple(errors), tiles)


def require_classes(train: SegmentationDataset, val: SegmentationDataset) -> None:
    """Refuse masks that nothing can be learned from, or scored on.

    Raises:
        UserError: fewer than two classes occur in `train`, or none in `val`.
    """
    for part, dataset, least in (("train", train, 2), ("val", val, 1)):
        counts = dataset.label_counts().sum(0)
        present = _present(dataset, counts)
        if len(present) < least:
            remedy = dataset.remedy() if isinstance(dataset, FileDataset) else ""
            raise UserError(
                f"{dataset.name}: expected at least {least} of the {len(dataset.classes)} classes "
                f"in the masks of {part}, got {some([dataset.classes[k] for k in present])}"
                f"{'' if present else 'none'}; {_void(dataset, counts)}{remedy}"
            )


def _on_disk(dataset: SegmentationDataset) -> FileDataset | None:
    """The files behind a data set, as they are; None for drawn ones."""
    whole = dataset.dataset if isinstance(dataset, Reduced) else dataset
    return whole if isinstance(whole, FileDataset) else None


def _present(dataset: SegmentationDataset, counts: Tensor) -> list[int]:
    """Classes that occur in the counted labels [256]."""
    return [k for k in range(len(dataset.classes)) if counts[k] and k != dataset.ignore_index]


def _void(dataset: SegmentationDataset, counts: Tensor) -> str:
    share = counts[dataset.ignore_index].item() / max(1, counts.sum().item())
    return f"void ({dataset.ignore_index}) covers {share:.1%} of the pixels"


def _unscorable(splits: Splits, omit: Sequence[int]) -> list[str]:
    val = splits.search_val
    present = _present(val, val.label_counts().sum(0))
    names = some([val.classes[k] for k in present]) or "none"
    if len(present) < 2:
        return [
            f"{val.name}: expected at least 2 classes in the {len(val)} images that a search holds "
            f"out of train to score candidates, got {names}; add images, or give another --seed"
        ]
    if not set(present) - set(omit):
        return [
            f"omit: expected to leave one of the classes in the {len(val)} images that score "
            f"candidates ({names}), got all of them; the reward would have nothing to count"
        ]
    return []


class ReadsAll(Protocol):
    """Data in files."""

    def read_all(self) -> None:
        """Read every file that is not kept. FaultyFiles names those that cannot be read."""


def broken_files(data: Iterable[ReadsAll]) -> list[str]:
    """Errors about files that cannot be read."""
    found: list[str] = []
    for each in data:
        try:
            each.read_all()
        except FaultyFiles as error:
            found += error.faults
    return found


def few(count: int) -> list[str]:
    if count > 1:
        return []
    return ["candidates are scored on one image, so that rewards say little; add images"]


def _labels(part: str, dataset: FileDataset) -> list[str]:
    """Warnings about classes that never occur, and about void."""
    counts = dataset.label_counts().sum(0)
    present = _present(dataset, counts)
    absent = [
        name
        for k, name in enumerate(dataset.classes)
        if k not in present and k != dataset.ignore_index
    ]
    found = []
    if absent and counts[dataset.ignore_index]:
        found.append(f"{_never(part, absent)}; {_void(dataset, counts)}{dataset.meaning()}")
    elif absent:
        found.append(_never(part, absent))
    elif counts[dataset.ignore_index] > MUCH_VOID * counts.sum():
        found.append(f"in the masks of {part}, {_void(dataset, counts)}")
    lossy = [mask for _, mask in dataset.pairs if mask.suffix.lower() in LOSSY]
    if lossy:
        found.append(
            f"{len(lossy)} masks of {part} are JPEG, which changes values to those of other "
            f"classes: {file_names(lossy)}; save them as PNG from their source"
        )
    if dataset.mask_values is not None:
        values = torch.nonzero(dataset.value_counts.sum(0)).flatten().tolist()
        unlisted = [v for v in values if v not in (*dataset.mask_values, dataset.ignore_index)]
        if unlisted:
            share = dataset.value_counts[:, unlisted].sum() / dataset.value_counts.sum()
            found.append(
                f"masks of {part} hold {some(unlisted)}, which --mask-values does not list: void, "
                f"{share:.1%} of the pixels"
            )
    return found


def _never(part: str, absent: Sequence[str]) -> str:
    plural = len(absent) > 1
    return (
        f"the class{'es' * plural} {some(absent)} never occur{'s' * (not plural)} in the masks "
        f"of {part}"
    )


def overlaps(files: Mapping[str, Sequence[Path]]) -> list[str]:
    """Warnings about images that are in two parts, or twice in one."""
    found, names = [], list(files)
    for part in names:
        twice = [path for path, count in Counter(files[part]).items() if count > 1]
        if twice:
            found.append(
                f"{len(twice)} images are in {part} more than once: {file_names(twice)}; a search "
                "may score candidates on what they were trained on"
            )
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = set(files[first]) & set(files[second])
            copies = _copies(set(files[first]) - shared, set(files[second]) - shared)
            for paths, how in ((shared, ""), (copies, " under other names, by content")):
                if paths:
                    found.append(
                        f"{len(paths)} images are both in {first} and in {second}{how}: "
                        f"{file_names(sorted(paths))}; scores on {second} will be too good"
                    )
    return found


def _copies(first: Iterable[Path], second: Iterable[Path]) -> set[Path]:
    """Files of `second` with the bytes of one of `first`; only files of equal size are read."""
    by_size: defaultdict[int, list[Path]] = defaultdict(list)
    for path in first:
        by_size[path.stat().st_size].append(path)
    return {
        path
        for path in second
        if any(_same(other, path) for other in by_size.get(path.stat().st_size, ()))
    }


def _same(first: Path, second: Path) -> bool:
    return first.stat().st_size == second.stat().st_size and _hash(first) == _hash(second)


def _hash(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _twice(files: Iterable[Path]) -> list[str]:
    stems = Counter(path.with_suffix("") for path in files)
    twice = [path.name for path, count in stems.items() if count > 1]
    if not twice:
        return []
    return [
        f"{len(twice)} names come with several suffixes: {some(twice, 4, 60)}; if they are the "
        "same images, a test may hold what was trained on"
    ]


def _fits(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    within = os.path.relpath(path, root)
    return any(fnmatch(within, pattern) for pattern in patterns)


def _orphans(
    root: Path, images: Sequence[Path], masks: Sequence[Path], aside: Sequence[str]
) -> list[str]:
    """A warning about masks without an image, in the folders of these."""
    used, stems = set(masks), {p.stem for folder in _parents(images) for p in folder.iterdir()}
    orphans = [
        path
        for folder in _parents(masks)
        for path in sorted(folder.iterdir())
        if _is_image(path) and path not in used and path.stem not in stems
        if not _fits(path, root, aside)
    ]
    return [f"{len(orphans)} masks have no image: {file_names(orphans)}"] if orphans else []


def left_out(part: str, *kinds: tuple[Sequence[str], str]) -> list[str]:
    """A warning for each kind of places that there are some of; its text says "of {}", the part."""
    return [
        f"{len(places)} {text.format(part)}: {some(places, 2, 200)}"
        for places, text in kinds
        if places
    ]


def beside(
    root: Path | None, read: Sequence[Path], aside: Sequence[str], test: bool
) -> tuple[dict[str, Sequence[Row]], list[str]]:
    """The table of the files of a folder that are not read, where a ``test`` wants one, and what
    about them may mislead; neither for data that is drawn."""
    if root is None or not read:
        return {}, []
    unread, warnings = _unread_files(root, read, aside)
    return {"not read": unread} if test and unread else {}, warnings


def _unread_files(
    root: Path, read: Sequence[Path], aside: Sequence[str]
) -> tuple[list[Row], list[str]]:
    """Files under a folder that no part holds and whose path none of the patterns fits, by why:
    rows, and warnings about those that look like images."""
    used, folders = set(read), set(_parents(read))
    why: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for place, inner, names in os.walk(root):
        folder = Path(place)
        inner.sort()
        for name in sorted(names):
            path = folder / name
            if path in used or _fits(path, root, aside):
                continue
            if name.startswith("."):
                reason = "hidden"
            elif folder in folders and not _is_image(path):
                reason = "no image" if path.suffix.lower() in NO_IMAGES else "unknown suffix"
            elif folder in folders:
                reason = "in no part"
            elif _is_image(path):
                reason = "another folder"
            else:
                continue
            why[reason, os.path.relpath(folder, root)].append(name)
    rows: list[Row] = [
        {"why": reason, "folder": folder, "files": len(names), "names": some(names)}
        for (reason, folder), names in why.items()
    ]
    warnings = []
    for reason, text in (
        ("another folder", "images lie in folders that are not read"),
        ("unknown suffix", f"files beside images are of a kind that is not read ({_KINDS})"),
    ):
        folders_of = {place: names for (why_, place), names in why.items() if why_ == reason}
        if folders_of:
            counted = [f"{place} ({len(n)}: {some(n, 2, 60)})" for place, n in folders_of.items()]
            total = sum(map(len, folders_of.values()))
            warnings.append(f"{total} {text}: {some(counted, 4, 200)}; move or convert them")
    return rows, warnings


_KINDS = ", ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


def _part(part: str, dataset: SegmentationDataset) -> Row:
    counts = dataset.label_counts()
    return {
        "part": part,
        "images": len(dataset),
        "height x width": range_of_sizes(dataset.sizes()),
        "void": (counts[:, dataset.ignore_index].sum() / counts.sum()).item(),
    }


def _histogram(parts: Mapping[str, SegmentationDataset]) -> list[Row]:
    """Share of the labelled pixels that each class has, and of the images with it."""
    rows: list[dict[str, str | int | float | None]] = []
    train = parts["train"]
    counts = {part: dataset.label_counts() for part, dataset in parts.items()}
    for k, name in enumerate(train.classes):
        row: dict[str, str | int | float | None] = {"class": f"{k} {name}"}
        for part, each in counts.items():
            labelled = each.sum() - each[:, train.ignore_index].sum()
            row[f"pixels, {part}"] = (each[:, k].sum() / labelled.clamp(min=1)).item()
            row[f"images, {part}"] = (each[:, k] > 0).float().mean().item()
        rows.append(row)
    return list(rows)


def range_of_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    each = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    first, last = (f"{height}x{width}" for height, width in (each[0], each[-1]))
    return first if len(each) == 1 else f"{len(each)} sizes, {first} to {last}"


def _overlays(parts: Mapping[str, SegmentationDataset]) -> dict[str, Tensor]:
    """A dozen images with the colours of their classes; void is left as it is."""
    tiles = {}
    for part, dataset, index in dozen(parts):
        sample = dataset[index]
        colors = torch.zeros(256, 3)
        colors[: len(dataset.colors)] = torch.tensor(dataset.colors, dtype=torch.float32)
        drawn = OPACITY * colors[sample.mask.long()].movedim(-1, 0) + (1 - OPACITY) * sample.image
        drawn = drawn.where(sample.mask != dataset.ignore_index, sample.image)
        files = _on_disk(dataset)
        name = files.pairs[index][0].name if files else str(index)
        tiles[f"{part}: {name}"] = drawn.round().byte()
    return tiles


def _pairs(parts: Mapping[str, ImageSet]) -> dict[str, Tensor]:
    """A dozen images, a degraded one to the left of its clean one, depth to the right."""
    tiles = {}
    for part, images, index in dozen(parts):
        pair = images[index]
        depth = None if pair.depth is None else (255 * pair.depth).byte().expand_as(pair.clean)
        panels = [panel for panel in (pair.degraded, pair.clean, depth) if panel is not None]
        tiles[f"{part}: {pair.name}"] = torch.cat(panels, -1).expand(3, -1, -1)
    return tiles


P = TypeVar("P", bound=Sized)


def dozen(parts: Mapping[str, P]) -> Iterator[tuple[str, P, int]]:
    """(part, images, index) of twelve images, as many of each part where it has them, from all over
    it."""
    counts: dict[str, int] = {}
    for part in sorted(parts, key=lambda part: len(parts[part])):
        share = (TILES - sum(counts.values())) // (len(parts) - len(counts))
        counts[part] = min(len(parts[part]), share)
    for part, images in parts.items():
        step = len(images) / max(1, counts[part])
        yield from ((part, images, int((k + 0.5) * step)) for k in range(counts[part]))


def _parents(paths: Iterable[Path]) -> list[Path]:
    return sorted({path.parent for path in paths})


def file_names(paths: Sequence[Path]) -> str:
    return some([path.name for path in paths], 4, 60)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
