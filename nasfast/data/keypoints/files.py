"""Keypoint data on disk: image files and the people in them, checked when opened."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nasfast.data.base import digest
from nasfast.data.detection.base import LEAST
from nasfast.data.detection.files import Annotated, part_by_hash, require_upright, sized
from nasfast.data.folder import KEPT
from nasfast.data.images import (
    FaultyFiles,
    for_each,
    identity,
    measure,
    read_image,
    require_eight_bits,
)
from nasfast.data.keypoints.base import KeypointDataset, Person, Skeleton, labelled
from nasfast.utils.errors import UserError

FILLED = 0.53
"""Share of a box that a person covers, where the data say no area."""


class Pose(NamedTuple):
    """A person as the data say it, with at least one labelled joint."""

    source: str
    """The file that says it, and where in it, for errors."""
    image: int
    """Index of the image."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom; the edges of the image are 0 and W, 0 and H."""
    joints: Sequence[tuple[float, float, int]]
    """x, y and visibility: 0, 1 or 2."""
    area: float = math.nan
    """NaN is `FILLED` times that of the box."""
    head: float = 0.0
    """Size; 0 where it is not said."""


class PeopleFiles(KeypointDataset):
    """People in image files.

    Joints outside of the image count as not labelled; people whose box has no area in the image, or
    who have no labelled joint, are left out. `outside`, `flat` and `jointless` say where, for
    `nasfast check`, `resized` which images have another size than is said. With
    `cache_in_memory`, images are decoded now and kept, where all take at most `KEPT` bytes.

    Args:
        name: of the data.
        skeleton: the joints.
        images: files with what the data call them; without boxes.
        poses: the people.
        jointless: how many people are annotated without any joint.
        head_from: what the sizes of heads are.
        cache_in_memory: keep decoded images.

    Raises:
        FaultyFiles: coordinates that are no finite numbers; images that cannot be read.
    """

    def __init__(
        self,
        name: str,
        skeleton: Skeleton,
        images: Sequence[Annotated],
        poses: Sequence[Pose],
        *,
        jointless: int = 0,
        head_from: str = "",
        cache_in_memory: bool = True,
    ) -> None:
        self.name, self.skeleton, self.head_from = name, skeleton, head_from
        self.annotated = tuple(images)
        self.sizes = for_each(_size, self.annotated)
        """(height, width) of each image."""
        self.resized = tuple(
            f"{each.source} ({sized(each.size)}, the image {sized(size)})"
            for each, size in zip(self.annotated, self.sizes, strict=True)
            if each.size not in (None, size)
        )
        self.jointless, self.outside, self.flat = jointless, list[str](), list[str]()
        self._settle(poses)
        self._fingerprint: str | None = None
        kept = cache_in_memory and sum(3 * h * w for h, w in self.sizes) <= KEPT
        self._images = for_each(self._read, range(len(self.annotated))) if kept else []

    def _settle(self, poses: Sequence[Pose]) -> None:
        """The people that can be used."""
        faults, people = list[str](), list[Person]()
        for pose in poses:
            seen = {
                f"of {name}": (x, y)
                for name, (x, y, known) in zip(self.skeleton.joints, pose.joints, strict=True)
                if known
            }
            places = {"of the box": pose.box, **seen}
            endless = [name for name, place in places.items() if not all(map(math.isfinite, place))]
            if endless:
                got = ", ".join(f"{value:g}" for value in places[endless[0]])
                faults.append(
                    f"{pose.source}: expected finite coordinates {endless[0]}, got {got}; correct "
                    "it or remove it"
                )
                continue
            size = self.sizes[pose.image]
            left, top, right, bottom = pose.box
            seen_sides = min(right, size[1]) - max(left, 0), min(bottom, size[0]) - max(top, 0)
            if min(seen_sides) < LEAST:
                self.flat.append(pose.source)
                continue
            joints = torch.tensor(pose.joints, dtype=torch.float32).nan_to_num()
            said = joints[:, 2].to(torch.uint8)
            visible = labelled(joints[:, :2], said, size)
            self.outside += [
                f"{pose.source}: {self.skeleton.joints[k]} ({joints[k, 0]:g}, {joints[k, 1]:g}) in "
                f"{sized(size)}"
                for k in torch.nonzero(said != visible).flatten().tolist()
            ]
            if not visible.any():
                self.jointless += 1
                continue
            area = pose.area if pose.area > 0 else FILLED * (right - left) * (bottom - top)
            people.append(Person(pose.image, pose.box, joints[:, :2], visible, area, pose.head))
        if faults:
            raise FaultyFiles(faults)
        self._people = tuple(people)

    def _read(self, index: int) -> Tensor:
        return read_image(self.annotated[index].image)

    def people(self) -> Sequence[Person]:
        return self._people

    def image(self, index: int) -> Tensor:
        return self._images[index] if self._images else self._read(index)

    def read_all(self) -> None:
        """Read every image that is not kept. FaultyFiles names those that cannot be read."""
        if not self._images:
            for_each(lambda index: self._read(index).shape, range(len(self.annotated)))

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            files = for_each(lambda each: identity(each.image), self.annotated)
            people = hashlib.sha256()
            for each in self._people:
                people.update(repr((each.image, each.box, each.area, each.head)).encode())
                people.update(each.joints.numpy().tobytes() + each.visible.numpy().tobytes())
            self._fingerprint = digest("people", self.skeleton.joints, files, people.hexdigest())
        return self._fingerprint


def _size(annotated: Annotated) -> tuple[int, int]:
    header = measure(annotated.image)
    require_eight_bits(annotated.image, header.mode)
    require_upright(annotated, header)
    return header.size


def require_people(dataset: KeypointDataset, part: str) -> None:
    """Raise UserError where a part of the data has nobody to learn from, or to score on."""
    if not len(dataset):
        others = list[str]()
        if isinstance(dataset, PeopleFiles):
            counts = {"without joints": dataset.jointless, "without a box": len(dataset.flat)}
            others = [f"only {count} {what}" for what, count in counts.items() if count]
        got = ", ".join(["none", *others])
        raise UserError(
            f"{dataset.name}: expected people with labelled joints in {part}, got {got}; label some"
        )


def halves(
    images: Sequence[Annotated], poses: Sequence[Pose], source: Path
) -> list[tuple[list[Annotated], list[Pose]]]:
    """Images and people of data that are not divided, as those of train and of val: 20 % of the
    images with people, by a hash of the name, validate."""
    used = sorted({pose.image for pose in poses})
    if len(used) < 2:
        raise UserError(
            f"{source}: expected people with labelled joints in at least 2 images, got {len(used)} "
            f"of {len(images)}; label some"
        )
    names = [images[i].image.name for i in used]
    parts = []
    for chosen in part_by_hash(used, names, source):
        numbers = {old: new for new, old in enumerate(chosen)}
        some = [p._replace(image=numbers[p.image]) for p in poses if p.image in numbers]
        parts.append(([images[i] for i in chosen], some))
    return parts
