"""Keypoints in the format of COCO (Lin et al., ECCV 2014): one file of JSON for each part."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasfast.data.detection.coco import (
    Lists,
    coco_file,
    image_paths,
    is_finite,
    is_number,
    number,
    read_lists,
    stated_size,
)
from nasfast.data.detection.files import Annotated
from nasfast.data.folder import some
from nasfast.data.images import FaultyFiles
from nasfast.data.keypoints.base import KeypointParts, Skeleton
from nasfast.data.keypoints.files import PeopleFiles, Pose, halves
from nasfast.utils.errors import UserError, about

COCO_LAYOUT = (
    "annotations/person_keypoints_train*.json and person_keypoints_val*.json, or train.json and "
    "val.json, whose category has keypoints, images beside or in images/"
)
PATTERNS = (
    "annotations/person_keypoints_{}[0-9]*.json",
    "annotations/person_keypoints_{}.json",
    "person_keypoints_{}.json",
    "annotations/{}.json",
    "{}.json",
    "{}/_annotations.coco.json",
)


@dataclass(frozen=True)
class _File:
    path: Path
    skeleton: Skeleton
    images: Sequence[Annotated]
    poses: Sequence[Pose]
    jointless: int


def is_coco(root: Path) -> bool:
    """Whether a folder has annotations of train."""
    return coco_file(root, "train", PATTERNS) is not None


def open_coco(root: Path, cache_in_memory: bool = True) -> KeypointParts:
    """The parts of a folder with keypoints in the format of COCO.

    Crowds and people without a labelled joint are left out. COCO counts pixels from 0: to a point
    0.5 is added, which is then the centre of its pixel. Annotations of train alone are divided.
    """
    paths = [coco_file(root, part, PATTERNS) for part in ("train", "val")]
    files = [_read(root, path) for path in paths if path is not None]
    first = files[0]

    def part(images: Sequence[Annotated], poses: Sequence[Pose], jointless: int = 0) -> PeopleFiles:
        return PeopleFiles(
            root.resolve().name,
            first.skeleton,
            images,
            poses,
            jointless=jointless,
            cache_in_memory=cache_in_memory,
        )

    def whole(file: _File) -> PeopleFiles:
        if file.skeleton != first.skeleton:
            raise UserError(
                f"{file.path}: expected the joints of {first.path} "
                f"({some(first.skeleton.joints, 20)}), got {some(file.skeleton.joints, 20)}; give "
                "all parts the same"
            )
        return part(file.images, file.poses, file.jointless)

    test = coco_file(root, "test", PATTERNS)
    opened = None if test is None else functools.partial(_opened, root, test, whole)
    if len(files) == 2:
        return KeypointParts(whole(files[0]), whole(files[1]), opened)
    train, val = halves(first.images, first.poses, first.path)
    return KeypointParts(part(*train, first.jointless), part(*val), opened)


def _opened(root: Path, path: Path, whole: Any) -> PeopleFiles:
    found: PeopleFiles = whole(_read(root, path))
    return found


def _read(root: Path, path: Path) -> _File:
    lists = read_lists(path)
    category, skeleton = _category(path, lists)
    files = image_paths(root, path, [each["file_name"] for each in lists.images.values()])
    images = [
        Annotated(file, i, f"{path}, image {i!r}", (), stated_size(each))
        for (i, each), file in zip(lists.images.items(), files, strict=True)
    ]
    poses, jointless = _poses(path, lists, category, skeleton)
    return _File(path, skeleton, images, poses, jointless)


def _category(path: Path, lists: Lists) -> tuple[int, Skeleton]:
    """The category that has keypoints, and its joints."""
    found = [each for each in lists.categories if each.get("keypoints")]
    if len(found) != 1:
        raise UserError(
            f"{path}: expected one category with the names of its joints as 'keypoints', got "
            f"{len(found)} of {len(lists.categories)} categories; add them, or give annotations of "
            "people with joints"
        )
    names = found[0]["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{path}: expected a list of names as 'keypoints' of the category, got "
            f"{str(names)[:40]}; correct it"
        )
    with about(f"{path}, category {found[0]['name']!r}"):
        return int(found[0]["id"]), Skeleton(tuple(names))


def _poses(path: Path, lists: Lists, category: int, skeleton: Skeleton) -> tuple[list[Pose], int]:
    """The people with joints, and how many have none. FaultyFiles names the annotations that are
    not as the format has it."""
    others = {int(each["id"]) for each in lists.categories} - {category}
    places = {image: index for index, image in enumerate(lists.images)}
    poses, faults, jointless = list[Pose](), list[str](), 0
    for place, each in enumerate(lists.annotations):
        known: Mapping[str, Any] = each if isinstance(each, dict) else {}
        kind = known.get("category_id")
        if isinstance(kind, int) and kind in others:
            continue
        box, joints, image, area = map(known.get, ("bbox", "keypoints", "image_id", "area"))
        crowd = known.get("iscrowd") in (1, "1")
        source = f"{path}: annotation {known.get('id', f'at {place}')}"
        if not isinstance(image, int | str) or image not in places:
            wrong = f"the id of one of the {len(places)} images, got image_id {image!r}"
        elif kind != category:
            wrong = (
                f"category_id {category}, that of the joints, or of another category, got {kind!r}"
            )
        elif not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
            wrong = f"bbox [left, top, width, height], got {str(box)[:40]}"
        elif area is not None and not crowd and not (is_finite(area) and area >= 0):
            wrong = f"an area in pixels, or none, got {area!r}"
        elif not isinstance(joints, list) or len(joints) != 3 * len(skeleton):
            got = f"{len(joints)} numbers" if isinstance(joints, list) else repr(joints)
            wrong = (
                f"keypoints of {3 * len(skeleton)} numbers, x, y and visibility of "
                f"{len(skeleton)} joints, got {got}"
            )
        elif not all(map(is_number, joints)) or set(joints[2::3]) - {0, 1, 2}:
            wrong = f"keypoints [x, y, 0, 1 or 2, ..], got {str(joints)[:40]}"
        else:
            if crowd:
                continue
            triples = list(zip(*(joints[k::3] for k in range(3)), strict=True))
            if not any(seen for _, _, seen in triples):
                jointless += 1
                continue
            left, top, width, height = box
            poses.append(
                Pose(
                    source,
                    places[image],
                    (left, top, left + width, top + height),
                    [(x + 0.5, y + 0.5, int(seen)) for x, y, seen in triples],
                    number(area) or math.nan,
                )
            )
            continue
        faults.append(f"{source}: expected {wrong}; correct it or remove it")
    if faults:
        raise FaultyFiles(faults)
    return poses, jointless
