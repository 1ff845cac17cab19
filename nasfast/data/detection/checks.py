"""What a detection data set holds, and what about it would mislead a search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from nasfast.data.checks import (
    TEST_FOLDERS,
    Findings,
    Row,
    beside,
    broken_files,
    dozen,
    few,
    left_out,
    overlaps,
    range_of_sizes,
)
from nasfast.data.detection.base import BoxSample, DetectionDataset, DetectionSplits, Objects
from nasfast.data.detection.files import BoxFiles
from nasfast.data.detection.transforms import resized
from nasfast.data.folder import some
from nasfast.data.sheet import HEIGHT, WIDTH

SMALL, MEDIUM = 32**2, 96**2
"""Areas in square pixels that divide COCO's small, medium and large objects."""
FINEST, COARSEST = 8, 512
"""Pixels: an object below the stride of the finest level may lie between its points; the coarsest
level takes all that reach further than this from a point."""
MUCH = 0.25
"""Share of objects that are too small or too large, or of images without boxes, worth a warning."""
COUNTED = 100
"""Detections in an image that AP counts, at most."""
IGNORED = (255, 255, 255)


def check_detection(
    splits: DetectionSplits, root: Path | None = None, *, test: bool = False
) -> Findings:
    """Findings about data for detection, from what its opening has read.

    Args:
        splits: the data.
        root: its folder; None for data that is drawn.
        test: read the test part and all images too, count everything and draw some, for facts and
            tiles.
    """
    parts = {"train": splits.train, "val": splits.val}
    if test and splits.test is not None:
        parts["test"] = splits.test
    warnings, errors = few(len(splits.search_val)), _unscorable(splits.search_val)
    objects = {part: dataset.objects() for part, dataset in parts.items()}
    for part, dataset in parts.items():
        warnings += _classes(part, dataset, objects[part])
        warnings += _boxes(part, dataset, objects[part])
    on_disk = {part: each for part, each in parts.items() if isinstance(each, BoxFiles)}
    files = {part: [each.image for each in data.annotated] for part, data in on_disk.items()}
    warnings += overlaps(files)
    facts: dict[str, Sequence[Row]] = {}
    if test:
        facts["parts"] = [_part(part, data, objects[part]) for part, data in parts.items()]
        facts["classes"] = _histogram(parts, objects)
        errors += broken_files(on_disk.values())
    read = [path for each in files.values() for path in each]
    aside = (*splits.aside, *(() if test else TEST_FOLDERS))
    unread, more = beside(splits.home or root, read, aside, test)
    facts, warnings = {**facts, **unread}, [*warnings, *more]
    findings = Findings(facts, tuple(warnings), tuple(errors))
    if not test or errors:
        return findings
    legend = dict(zip(splits.train.classes, splits.train.colors, strict=True))
    return dataclasses.replace(findings, tiles=_drawn(parts), legend={**legend, "ignored": IGNORED})


def _unscorable(val: DetectionDataset) -> list[str]:
    if not val.objects().ignored.all():
        return []
    return [
        f"{val.name}: expected boxes in the {len(val)} images that a search holds out of train to "
        "score candidates, got none; add images, or give another --seed"
    ]


def _classes(part: str, dataset: DetectionDataset, objects: Objects) -> list[str]:
    counts = torch.bincount(objects.labels, minlength=len(dataset.classes)).tolist()
    absent = [name for name, count in zip(dataset.classes, counts, strict=True) if not count]
    if not absent:
        return []
    plural = len(absent) > 1
    return [
        f"the class{'es' * plural} {some(absent)} ha{'ve' if plural else 's'} no box in {part}"
        f"{f' ({len(absent)} classes)' * (len(absent) > 8)}"
    ]


def _boxes(part: str, dataset: DetectionDataset, objects: Objects) -> list[str]:
    """Warnings about boxes that were mended, that are many, or that do not suit the strides."""
    found = []
    if isinstance(dataset, BoxFiles):
        found += left_out(
            part,
            (dataset.dropped, "boxes of {} have no area and are left out"),
            (dataset.clipped, "boxes of {} cross the border of the image and are clipped"),
            (dataset.resized, "annotations of {} are of another size than the image, which counts"),
        )
    counts = torch.tensor(dataset.counts())
    empty = (counts == 0).float().mean().item()
    if empty > MUCH:
        found.append(
            f"{empty:.0%} of the images of {part} have no box: all of them is learned as "
            "background; leave out those that were not annotated"
        )
    if int(counts.max()) > COUNTED:
        found.append(
            f"{int((counts > COUNTED).sum())} images of {part} have more than {COUNTED} boxes, up "
            f"to {int(counts.max())}; AP counts {COUNTED} detections in an image"
        )
    longer = (objects.boxes[:, 2:] - objects.boxes[:, :2]).amax(1)
    for wrong, text, remedy in (
        (longer < FINEST, f"smaller than {FINEST} pixels, the finest stride", "enlarge"),
        (longer > COARSEST, f"larger than {COARSEST} pixels, for one level", "reduce"),
    ):
        share = wrong.float().mean().item()
        if share > MUCH:
            found.append(
                f"{share:.0%} of the boxes of {part} are {text}, in images of "
                f"{range_of_sizes(dataset.sizes())}; {remedy} the images by the shorter side"
            )
    return found


def _part(part: str, dataset: DetectionDataset, objects: Objects) -> Row:
    counts = dataset.counts()
    small, large = objects.areas < SMALL, objects.areas >= MEDIUM
    return {
        "part": part,
        "images": len(dataset),
        "without a box": counts.count(0),
        "height x width": range_of_sizes(dataset.sizes()),
        "boxes": len(objects.labels),
        "ignored": int(objects.ignored.sum()),
        "small (<32²)": small.float().mean().item(),
        "medium": (~small & ~large).float().mean().item(),
        "large (>96²)": large.float().mean().item(),
    }


def _histogram(parts: Mapping[str, DetectionDataset], objects: Mapping[str, Objects]) -> list[Row]:
    """Boxes of each class, the share of the images with it, and the usual size."""
    rows: list[Row] = []
    for k, name in enumerate(parts["train"].classes):
        row: dict[str, str | int | float | None] = {"class": f"{k} {name}"}
        for part, each in objects.items():
            of_class = each.labels == k
            row[f"boxes, {part}"] = int(of_class.sum())
            row[f"images, {part}"] = len({*each.sample[of_class].tolist()}) / len(parts[part])
        sides = (objects["train"].areas[objects["train"].labels == k]).sqrt()
        row["median side, train"] = f"{sides.median():.0f} px" if len(sides) else "none"
        rows.append(row)
    return rows


def _drawn(parts: Mapping[str, DetectionDataset]) -> dict[str, Tensor]:
    """A dozen images with the boxes in the colours of their classes."""
    tiles = {}
    for part, dataset, index in dozen(parts):
        sample = dataset[index]
        tiles[f"{part}: {sample.image_id}"] = _with_boxes(sample, dataset.colors)
    return tiles


def _with_boxes(sample: BoxSample, colors: Sequence[tuple[int, int, int]]) -> Tensor:
    """An image at the size of a tile, so that lines keep their width. uint8 [3, h, w]"""
    height, width = sample.image.shape[1:]
    scale = min(WIDTH / width, HEIGHT / height)
    sample = resized(sample, (max(2, round(height * scale)), max(2, round(width * scale))))
    picture = Image.fromarray(np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy()))
    draw = ImageDraw.Draw(picture)
    for box, label, ignored in zip(
        sample.boxes.tolist(), sample.labels.tolist(), sample.ignored.tolist(), strict=True
    ):
        draw.rectangle(box, outline=IGNORED if ignored else colors[label], width=2)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
