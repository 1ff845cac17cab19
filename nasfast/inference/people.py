"""Prediction on the people of an image: crops of their boxes, and the joints brought back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nasfast.data.detection.coco import is_number
from nasfast.data.keypoints import cropped, inverse, mapped, person_map
from nasfast.data.keypoints.transforms import PADDING
from nasfast.tasks.keypoints import KeypointProcessor, Poses
from nasfast.tasks.keypoints.heatmaps import decode
from nasfast.tasks.processor import STRIDE
from nasfast.utils.errors import UserError
from nasfast.utils.files import read_json

Box = tuple[float, float, float, float]
"""Left, top, right, bottom of a person, in pixels of the image."""
PERSON = 1
"""Category of people in files of boxes, as in COCO."""


def joints_of(
    network: Callable[[Tensor], Tensor],
    processor: KeypointProcessor,
    size: tuple[int, int],
    image: Tensor,
    boxes: Sequence[Box] | None,
    batch: int,
) -> Poses:
    """The joints of the people in an image.

    Args:
        network: crops uint8 ``[N, 3, H, W]`` to heatmaps ``[N, J, h, w]`` that cover them, padded
            to multiples of `STRIDE`.
        processor: of the network.
        size: (H, W) of its crops.
        image: uint8 ``[3, H, W]``.
        boxes: of the people; None: one person, and the image shows what a crop does: the person
            with a tenth of its box more on each side.
        batch: most crops at once.

    Raises:
        UserError: a box has no area in the image.
    """
    height, width = image.shape[1:]
    if boxes is None:
        given: list[Box] = [(0.0, 0.0, float(width), float(height))]
        x, y = (side * (1 - 1 / PADDING) / 2 for side in (width, height))
        used = [(x, y, width - x, height - y)]
    else:
        given = used = [require_box(box, (height, width)) for box in boxes]
    maps = [person_map(box, size) for box in used]
    points, confidence = [], []
    for start in range(0, len(maps), batch):
        some = maps[start : start + batch]
        output = network(torch.stack([cropped(image, each, size) for each in some])).cpu()
        cells = [(s + -s % STRIDE) / n for s, n in zip(size, output.shape[-2:], strict=True)]
        rows, columns = (math.ceil(s / cell) for s, cell in zip(size, cells, strict=True))
        covered = rows * cells[0], columns * cells[1]  # without the network's padding
        found, heights = decode(output[..., :rows, :columns], covered)
        back = torch.stack([inverse(each) for each in some])
        points.append(mapped(found.double(), back).float())
        confidence.append(heights)
    joints = len(processor.skeleton)
    return processor.poses(
        torch.cat([torch.zeros(0, joints, 2), *points]),
        torch.cat([torch.zeros(0, joints), *confidence]),
        given,
        image,
    )


def require_box(box: Sequence[float], size: tuple[int, int]) -> Box:
    """A box as it is; UserError where it has no area in an image of (H, W)."""
    numbers = [float(edge) for edge in box] if len(box) == 4 else []
    finite = len(numbers) == 4 and all(map(math.isfinite, numbers))
    if finite:
        left, top, right, bottom = numbers
        if min(right, size[1]) - max(left, 0) > 0 < min(bottom, size[0]) - max(top, 0):
            return left, top, right, bottom
    raise UserError(
        f"boxes: expected left, top, right and bottom of some area in the image of "
        f"{size[0]}x{size[1]}, got {list(box)}; correct it or remove it"
    )


def read_boxes(path: Path, threshold: float) -> dict[str, list[Box]]:
    """Boxes of people by the name of their image without folder and suffix.

    The file is JSON: a list of objects with "bbox" [left, top, width, height] and "image", a name,
    or "image_id", a name or a number, as in COCO's result files and those of ``nasfast predict``
    with a detector. Where they have a "category_id" it is 1, other objects are left out; so are
    those with a "score" below a threshold.

    Raises:
        UserError: another form; a box without area.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(
            f"{path}: expected a list of boxes, got {str(entries)[:40]!r}; give objects with "
            '"image" and "bbox" [left, top, width, height]'
        )
    boxes: dict[str, list[Box]] = {}
    for place, entry in enumerate(entries):
        known: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
        name, edges = known.get("image", known.get("image_id")), known.get("bbox")
        if not isinstance(name, str | int):
            wrong = f'"image" or "image_id", got {str(entry)[:60]}'
        elif not isinstance(edges, list) or len(edges) != 4 or not all(map(is_number, edges)):
            wrong = f'"bbox" [left, top, width, height], got {str(edges)[:60]}'
        elif not (edges[2] > 0 < edges[3]):
            wrong = f'"bbox" of some area, got {edges}'
        else:
            score = known.get("score", 1.0)
            if known.get("category_id", PERSON) == PERSON and score >= threshold:
                left, top, wide, high = edges
                boxes.setdefault(image_key(name), []).append((left, top, left + wide, top + high))
            continue
        raise UserError(f"{path}, entry {place}: expected {wrong}; correct it or remove it")
    return boxes


def image_key(name: str | int) -> str:
    """What images and boxes are joined by: the name without folder and suffix, of a number without
    leading zeros, as COCO's ids are."""
    stem = str(name) if isinstance(name, int) else Path(name.replace("\\", "/")).name
    if not stem.isdecimal():
        stem = Path(stem).stem
    return str(int(stem)) if stem.isascii() and stem.isdecimal() else stem
