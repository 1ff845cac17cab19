"""What a keypoint dataset is: people in images, with named joints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nasfast.data.base import Division, digest, hold_out
from nasfast.utils.errors import UserError, did_you_mean

SIGMAS = {
    "nose": 0.026,
    "left_eye": 0.025,
    "right_eye": 0.025,
    "left_ear": 0.035,
    "right_ear": 0.035,
    "left_shoulder": 0.079,
    "right_shoulder": 0.079,
    "left_elbow": 0.072,
    "right_elbow": 0.072,
    "left_wrist": 0.062,
    "right_wrist": 0.062,
    "left_hip": 0.107,
    "right_hip": 0.107,
    "left_knee": 0.087,
    "right_knee": 0.087,
    "left_ankle": 0.089,
    "right_ankle": 0.089,
}
"""COCO's 17 joints, in its order, with its constants of OKS: how far annotators are off, as a share
of the square root of the person's area."""
MPII_JOINTS = (
    *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle"),
    *("pelvis", "thorax", "upper_neck", "head_top", "right_wrist", "right_elbow"),
    *("right_shoulder", "left_shoulder", "left_elbow", "left_wrist"),
)
"""MPII's 16 joints, in its order."""
BONES = (
    ("left_ankle", "left_knee"),
    ("left_knee", "left_hip"),
    ("right_ankle", "right_knee"),
    ("right_knee", "right_hip"),
    ("left_hip", "right_hip"),
    ("left_hip", "left_shoulder"),
    ("right_hip", "right_shoulder"),
    ("left_shoulder", "right_shoulder"),
    ("left_shoulder", "left_elbow"),
    ("left_elbow", "left_wrist"),
    ("right_shoulder", "right_elbow"),
    ("right_elbow", "right_wrist"),
    ("nose", "left_eye"),
    ("nose", "right_eye"),
    ("left_eye", "left_ear"),
    ("right_eye", "right_ear"),
    ("pelvis", "thorax"),
    ("thorax", "upper_neck"),
    ("upper_neck", "head_top"),
)
"""Lines of a skeleton, drawn where both joints are there."""
LEFT, RIGHT, MIDDLE = (255, 140, 0), (0, 170, 255), (60, 220, 60)
"""Colours of joints and bones, by the person's side."""


@dataclass(frozen=True)
class Skeleton:
    """The joints that are learned.

    Raises:
        UserError: a joint is neither one of COCO nor of MPII, or is there twice.
    """

    joints: tuple[str, ...]

    def __post_init__(self) -> None:
        known = dict.fromkeys([*SIGMAS, *MPII_JOINTS])
        for index, name in enumerate(self.joints):
            if name not in known:
                raise UserError(
                    f"expected joints of COCO or MPII ({', '.join(known)}), got {name!r}"
                    f"{did_you_mean(name, known) or '; rename it'}"
                )
            if name in self.joints[:index]:
                raise UserError(f"expected each joint once, got {name!r} twice; rename one")
        if not self.joints:
            raise UserError("expected names of joints, got none; name them")

    def __len__(self) -> int:
        return len(self.joints)

    @property
    def mirrored(self) -> tuple[int, ...]:
        """Index of the joint that each becomes in a mirror image: left and right are exchanged."""
        swap = {"left": "right", "right": "left"}
        names = []
        for name in self.joints:
            side, _, rest = name.partition("_")
            other = f"{swap[side]}_{rest}" if side in swap else name
            names.append(other if other in self.joints else name)
        return tuple(self.joints.index(name) for name in names)

    @property
    def sigmas(self) -> tuple[float, ...] | None:
        """COCO's constants of OKS; None where it has none for a joint, as for MPII's pelvis."""
        if any(name not in SIGMAS for name in self.joints):
            return None
        return tuple(SIGMAS[name] for name in self.joints)

    @property
    def bones(self) -> tuple[tuple[int, int], ...]:
        """Pairs of joints to join by a line."""
        return tuple(
            (self.joints.index(a), self.joints.index(b))
            for a, b in BONES
            if a in self.joints and b in self.joints
        )

    @property
    def colors(self) -> tuple[tuple[int, int, int], ...]:
        """RGB of each joint, by its side."""
        sides = {"left": LEFT, "right": RIGHT}
        return tuple(sides.get(name.partition("_")[0], MIDDLE) for name in self.joints)


COCO = Skeleton(tuple(SIGMAS))
MPII = Skeleton(MPII_JOINTS)


@dataclass(frozen=True, eq=False)
class Person:
    """A person as annotated. Points are in pixels of the image, whose edges are 0 and W, 0 and H:
    the centre of the first pixel is at 0.5."""

    image: int
    """Index of the image among those of the data."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    joints: Tensor
    """float32 ``[J, 2]``: x, y."""
    visible: Tensor
    """uint8 ``[J]``: 0 not labelled, 1 labelled but hidden, 2 labelled and to be seen."""
    area: float
    """Of the person, in square pixels: the scale of OKS."""
    head: float = 0.0
    """The head's size in pixels, the scale of PCKh: 0.6 times the diagonal of its box, as MPII
    defines it. 0 where the data do not say it."""


@dataclass(frozen=True, eq=False)
class PersonSample:
    """A person in its image."""

    image: Tensor
    """uint8 ``[3, H, W]``, RGB."""
    person: Person


class KeypointDataset(ABC):
    """A finite, indexable set of people with labelled joints: `len(d)`, `d[i]`, iteration."""

    name: str
    skeleton: Skeleton
    head_from: str = ""
    """What the sizes of heads are; empty where there are none."""

    @abstractmethod
    def people(self) -> Sequence[Person]:
        """All of them, without reading their images."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """An image of the data, uint8 ``[3, H, W]``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that determines the samples; equal in every process."""

    def __len__(self) -> int:
        return len(self.people())

    def __getitem__(self, index: int) -> PersonSample:
        """Negative indices count from the end; IndexError outside."""
        person = self.people()[index]
        return PersonSample(self.image(person.image), person)

    def __iter__(self) -> Iterator[PersonSample]:
        return (self[i] for i in range(len(self)))

    def subset(self, indices: Sequence[int]) -> KeypointDataset:
        """The people at `indices`, in that order. IndexError outside."""
        return PeopleSubset(self, indices)


class PeopleSubset(KeypointDataset):
    """A view of some people of `dataset`."""

    def __init__(self, dataset: KeypointDataset, indices: Sequence[int]) -> None:
        self.name, self.skeleton = dataset.name, dataset.skeleton
        self.head_from = dataset.head_from
        self._dataset = dataset
        self._indices = tuple(range(len(dataset))[i] for i in indices)
        people = dataset.people()
        self._people = tuple(people[i] for i in self._indices)

    def people(self) -> Sequence[Person]:
        return self._people

    def image(self, index: int) -> Tensor:
        return self._dataset.image(index)

    def fingerprint(self) -> str:
        return digest("subset", self._dataset.fingerprint(), self._indices)


def labelled(joints: Tensor, visible: Tensor, size: tuple[int, int]) -> Tensor:
    """`visible` uint8 ``[J]``, 0 where a joint lies outside of the image of size (H, W)."""
    edges = torch.tensor([size[1], size[0]])
    inside = ((joints >= 0) & (joints <= edges)).all(-1)
    return visible * inside.to(torch.uint8)


class KeypointParts(NamedTuple):
    """What a folder is divided in; as `nasfast.data.base.Parts`."""

    train: KeypointDataset
    val: KeypointDataset
    open_test: Callable[[], KeypointDataset] | None = None
    aside: tuple[str, ...] = ()
    home: Path | None = None


class KeypointSplits(Division[KeypointDataset]):
    """The parts of a keypoint dataset."""


def halves_by_image(
    train: KeypointDataset, *, seed: int, fraction: float = 0.1
) -> tuple[KeypointDataset, KeypointDataset]:
    """The people that candidates learn from, and those in the seeded `fraction` of the images, at
    least one, that they are scored on. UserError for less than two images."""
    images = list(dict.fromkeys(person.image for person in train.people()))
    learned, held_out = (
        {images[i] for i in chosen}
        for chosen in hold_out(train.name, len(images), seed=seed, fraction=fraction)
    )
    rows = [
        [i for i, person in enumerate(train.people()) if person.image in chosen]
        for chosen in (learned, held_out)
    ]
    return train.subset(rows[0]), train.subset(rows[1])


def divide(parts: KeypointParts, *, seed: int, fraction: float = 0.1) -> KeypointSplits:
    """Keep the people in a seeded `fraction` of the images of `train`, at least one, to validate
    candidates on."""
    return KeypointSplits(
        *halves_by_image(parts.train, seed=seed, fraction=fraction),
        parts.train,
        parts.val,
        parts.open_test,
        parts.aside,
        parts.home,
    )
