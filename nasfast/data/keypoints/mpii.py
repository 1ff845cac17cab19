"""MPII Human Pose (Andriluka et al., CVPR 2014), as JSON: the form that conversions of its MATLAB
file share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nasfast.data.detection.coco import image_paths, is_number
from nasfast.data.detection.files import Annotated
from nasfast.data.images import FaultyFiles
from nasfast.data.keypoints.base import MPII, MPII_JOINTS, KeypointParts
from nasfast.data.keypoints.files import PeopleFiles, Pose, halves
from nasfast.utils.errors import UserError
from nasfast.utils.files import read_json

MPII_LAYOUT = (
    "annot/train.json and annot/valid.json, lists of people with image, joints, joints_vis, "
    "center, scale and, for PCKh, head_box, images in images/"
)
HEIGHT = 200
"""Pixels of a person of scale 1."""
LOWERED = 15
"""Pixels, for scale 1, by which the middle of a person lies below its `center`."""
HEAD = 0.6
"""Size of a head, in diagonals of its box."""
NAMES = {"train": ("train",), "val": ("valid", "val"), "test": ("test",)}
KEYS = ("image", "joints", "joints_vis", "center", "scale")
BOXED = "0.6 x the diagonal of the head's box"
SEGMENT = "distance of upper_neck and head_top, as the data have no head_box"


def mpii_file(root: Path, part: str) -> Path | None:
    """The annotations of a part."""
    paths = (root / "annot" / f"{name}.json" for name in NAMES[part])
    return next((path for path in paths if path.is_file()), None)


def is_mpii(root: Path) -> bool:
    """Whether a folder has annotations of train."""
    return mpii_file(root, "train") is not None


def open_mpii(root: Path, cache_in_memory: bool = True) -> KeypointParts:
    """The parts of a folder of MPII.

    A person has the keys "image", a file in images/; "joints" ``[[x, y], ..]``, 16 in MPII's order;
    "joints_vis", 1 or 0 each; "center" [x, y] and "scale", by which its box is a square of 200
    times the scale, about 15 times the scale below the centre; and it may have "head_box" [left,
    top, right, bottom]. All count pixels from 1, as MATLAB does: of each 0.5 is taken, so that a
    point is the centre of its pixel.

    Where not all people have a "head_box", the size of a head is the distance of upper neck and
    head top, where both are labelled: `head_from` says which. Annotations of train alone are
    divided.
    """
    first = mpii_file(root, "train")
    assert first is not None
    files = [_read(root, path) for path in (first, mpii_file(root, "val")) if path is not None]

    def part(images: Sequence[Annotated], poses: Sequence[Pose], *, boxed: bool) -> PeopleFiles:
        return PeopleFiles(
            root.resolve().name,
            MPII,
            images,
            poses if boxed else [pose._replace(head=_segment(pose)) for pose in poses],
            head_from=BOXED if boxed else SEGMENT,
            cache_in_memory=cache_in_memory,
        )

    if len(files) == 1:
        images, poses = files[0]
        files = halves(images, poses, first)
    boxed = all(pose.head > 0 for _, poses in files for pose in poses)
    test = mpii_file(root, "test")

    def open_test() -> PeopleFiles:
        assert test is not None
        return part(*_read(root, test), boxed=boxed)

    train, val = (part(*file, boxed=boxed) for file in files)
    return KeypointParts(train, val, open_test if test else None)


def _segment(pose: Pose) -> float:
    (x, y, a), (u, v, b) = (pose.joints[MPII_JOINTS.index(n)] for n in ("upper_neck", "head_top"))
    return math.dist((x, y), (u, v)) if a and b else 0.0


def _read(root: Path, path: Path) -> tuple[list[Annotated], list[Pose]]:
    """Images and people. FaultyFiles names those that are not as the format has it."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(
            f"{path}: expected a list of people, got {str(entries)[:40]!r}; give {MPII_LAYOUT}"
        )
    faults = [
        f"{path}, person {place}: expected {wrong}; correct it or remove it"
        for place, entry in enumerate(entries)
        if (wrong := _wrong(entry)) is not None
    ]
    if faults:
        raise FaultyFiles(faults)
    names = list(dict.fromkeys(entry["image"] for entry in entries))
    places = {name: index for index, name in enumerate(names)}
    files = image_paths(root, path, names)
    images = [
        Annotated(file, name, f"{path}, image {name!r}", ())
        for file, name in zip(files, names, strict=True)
    ]
    poses = [
        _pose(f"{path}, person {place}", places[entry["image"]], entry)
        for place, entry in enumerate(entries)
        if any(entry["joints_vis"])
    ]
    return images, poses


def _wrong(entry: Any) -> str | None:
    """What an entry should have, and has not."""
    if not isinstance(entry, dict) or any(key not in entry for key in KEYS):
        has = ", ".join(entry) if isinstance(entry, dict) else repr(entry)[:40]
        return f"the keys {', '.join(KEYS)}, got {has}"
    joints, seen, count = entry["joints"], entry["joints_vis"], len(MPII_JOINTS)
    if not isinstance(entry["image"], str):
        return f"the name of a file as image, got {entry['image']!r}"
    for name, values in (("joints", joints), ("joints_vis", seen)):
        if not isinstance(values, list) or len(values) != count:
            got = len(values) if isinstance(values, list) else repr(values)
            return f"{name} of {count} joints, got {got}"
    if not all(_numbers(joint, 2) for joint in joints):
        return f"joints [[x, y], ..], got {str(joints)[:40]}"
    if not all(value in (0, 1) for value in seen):
        return f"joints_vis of 0 and 1, got {str(seen)[:40]}"
    for name, joint, known in zip(MPII_JOINTS, joints, seen, strict=True):
        if known and not all(map(math.isfinite, joint)):
            return f"finite coordinates of {name}, got {joint}"
    if not _numbers(entry["center"], 2):
        return f"center [x, y], got {entry['center']!r}"
    if not is_number(entry["scale"]) or not 0 < entry["scale"] < math.inf:
        return f"a scale above 0, got {entry['scale']!r}"
    head = entry.get("head_box")
    if head is not None and not (_numbers(head, 4) and head[0] < head[2] and head[1] < head[3]):
        return f"head_box [left, top, right, bottom] of some area, got {head!r}"
    return None


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(is_number, values))


def _pose(source: str, image: int, entry: Mapping[str, Any]) -> Pose:
    half = HEIGHT * entry["scale"] / 2
    x, y = entry["center"][0] - 0.5, entry["center"][1] - 0.5 + LOWERED * entry["scale"]
    head = entry.get("head_box")
    return Pose(
        source,
        image,
        (x - half, y - half, x + half, y + half),
        [
            (across - 0.5, down - 0.5, 2 * int(seen))
            for (across, down), seen in zip(entry["joints"], entry["joints_vis"], strict=True)
        ],
        head=HEAD * math.dist(head[:2], head[2:]) if head else 0.0,
    )
