"""Procedural scenes with people: a keypoint set that needs no download.

One or two stick figures, seen from the front, stand or jump before ground of smooth colours and
bars that are none. The colours of trunk and limbs say nothing: the place in the body alone tells
them apart. Later figures and bars hide joints.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nasfast.data.base import digest
from nasfast.data.keypoints.base import KeypointDataset, Person, Skeleton, labelled
from nasfast.data.keypoints.mpii import BOXED, HEAD
from nasfast.data.synthetic import STREAMS, Array, Canvas, Mask, require_drawable

VERSION = 1  # part of the fingerprint: raise it with every change of what is drawn
JOINTS = (
    *("nose", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow"),
    *("left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)
LIMBS = (
    ("left_shoulder", "left_elbow", "left_wrist"),
    ("right_shoulder", "right_elbow", "right_wrist"),
    ("left_hip", "left_knee", "left_ankle"),
    ("right_hip", "right_knee", "right_ankle"),
)
LEAST_SEEN = 4
"""Labelled joints of a figure, at least; one with fewer is drawn again."""


class _Scene(NamedTuple):
    image: Tensor
    people: list[Person]


class SyntheticPeople(KeypointDataset):
    """Scenes with 1 or 2 figures, scene i determined by (seed, stream, i) alone.

    size: (height, width) in pixels, at least 64 each.
    stream: "train", "val" or "pretrain"; streams share no scene at any seed.
    """

    def __init__(
        self,
        num_scenes: int,
        seed: int = 0,
        size: tuple[int, int] = (128, 160),
        *,
        stream: str = "train",
    ) -> None:
        require_drawable(self, seed, size, 64, stream, num_scenes=num_scenes)
        self.name, self.skeleton, self.head_from = "synthetic", Skeleton(JOINTS), BOXED
        self._identity = (seed, stream, num_scenes, tuple(size))
        drawn = [
            _Figures(np.random.default_rng((seed, STREAMS.index(stream), i)), *size).scene(i)
            for i in range(num_scenes)
        ]
        self._images = [scene.image for scene in drawn]
        self._people = tuple(person for scene in drawn for person in scene.people)

    def people(self) -> Sequence[Person]:
        return self._people

    def image(self, index: int) -> Tensor:
        return self._images[index]

    def fingerprint(self) -> str:
        return digest("synthetic people", VERSION, self._identity)


class _Figures(Canvas):
    """One scene: `light`, and the index of the figure that is seen, -1 for none, `seen` [H, W]."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        super().__init__(rng, height, width)
        self.seen = np.full((height, width), -1, np.int8)
        self.light[:] = self.color(60, 190, 0.25)[:, None, None]
        self.light += 30 * self.smooth(3, 4) + 15 * self.smooth(16, 20)
        for _ in range(rng.integers(0, 4)):
            self._bar()
        count = int(rng.integers(1, 3))
        self.figures = [self._figure(index, (index + 0.5) / count) for index in range(count)]
        if rng.random() < 0.3:
            self._bar()

    def scene(self, number: int) -> _Scene:
        """The photograph, and the people in it."""
        people = []
        size = (self.height, self.width)
        for index, (joints, radius, drawn) in enumerate(self.figures):
            places = torch.from_numpy(joints).float()
            x, y = (places.long().T).clamp(min=0)
            there = self.seen[y.clamp(max=size[0] - 1), x.clamp(max=size[1] - 1)] == index
            visible = labelled(places, torch.from_numpy(1 + there.astype(np.uint8)), size)
            rows, columns = np.nonzero(drawn)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            left, top, right, bottom = map(float, box)
            head = HEAD * 2 * radius * 2**0.5
            person = Person(
                number, (left, top, right, bottom), places, visible, float(len(rows)), head
            )
            people.append(person)
        return _Scene(torch.from_numpy(self.photograph()), people)

    def _figure(self, index: int, place: float) -> tuple[Array, float, Mask]:
        """Draw a figure about a share of the image's width; its joints [J, 2], the radius of its
        head, and its pixels [H, W]."""
        rng = self.rng
        while True:
            tall = rng.uniform(0.5, 1.0) * self.height
            joints = self._pose(tall, place)
            inside = (joints >= 0).all(1) & (joints <= (self.width, self.height)).all(1)
            if inside.sum() >= LEAST_SEEN:
                break
        at = dict(zip(JOINTS, joints, strict=True))
        radius = 0.085 * tall
        thick = rng.uniform(0.028, 0.04) * tall
        behind = float(self.light.mean())
        darker = behind > 120
        drawn = np.zeros((self.height, self.width), bool)

        def paint(where: Mask) -> None:
            step = rng.uniform(50, 110)
            grey = behind - step if darker else behind + step
            color = np.clip(self.color(grey, grey, 0.3), 5, 250)
            self.light[:, where] = color[:, None]
            self.seen[where] = index
            np.logical_or(drawn, where, out=drawn)

        for chain in LIMBS:
            where = np.zeros_like(drawn)
            for a, b in itertools.pairwise(chain):
                where |= self._capsule(at[a], at[b], thick)
            paint(where)
        where = np.zeros_like(drawn)
        middle = (at["left_hip"] + at["right_hip"]) / 2
        for side in ("left", "right"):
            where |= self._capsule(at[f"{side}_shoulder"], at[f"{side}_hip"], 1.6 * thick)
        where |= self._capsule(
            (at["left_shoulder"] + at["right_shoulder"]) / 2, middle, 2.2 * thick
        )
        paint(where)
        paint(self._capsule(at["nose"], at["nose"], radius))
        return joints, radius, drawn

    def _pose(self, tall: float, place: float) -> Array:
        """Joints of a figure of that height in pixels. [J, 2]"""
        rng = self.rng
        across, down = np.array([1.0, 0.0]), np.array([0.0, 1.0])
        middle = rng.uniform((place - 0.2, 0.45), (place + 0.2, 0.55)) * (self.width, self.height)
        found = {"nose": middle - 0.4 * tall * down}
        for side, sign in (("left", 1.0), ("right", -1.0)):  # seen from the front
            shoulder = middle - 0.26 * tall * down + sign * 0.11 * tall * across
            hip = middle + sign * 0.07 * tall * across
            arm, fore = rng.uniform(-0.3, 2.6), rng.uniform(-0.6, 1.2)
            leg, shin = rng.uniform(-0.15, 0.9), rng.uniform(-0.9, 0.2)
            elbow = shoulder + 0.17 * tall * self._towards(sign, arm)
            knee = hip + 0.23 * tall * self._towards(sign, leg)
            found |= {
                f"{side}_shoulder": shoulder,
                f"{side}_hip": hip,
                f"{side}_elbow": elbow,
                f"{side}_wrist": elbow + 0.16 * tall * self._towards(sign, arm + fore),
                f"{side}_knee": knee,
                f"{side}_ankle": knee + 0.23 * tall * self._towards(sign, leg + shin),
            }
        lean = rng.uniform(-0.35, 0.35)
        cos, sin = np.cos(lean), np.sin(lean)
        joints = np.stack([found[name] for name in JOINTS]) - middle
        return np.asarray(joints @ np.array([[cos, sin], [-sin, cos]]) + middle)

    @staticmethod
    def _towards(sign: float, angle: float) -> Array:
        """Down at 0, outwards at a quarter turn."""
        return np.array([sign * np.sin(angle), np.cos(angle)])

    def _bar(self) -> None:
        rng = self.rng
        ends = rng.random((2, 2)) * (self.width, self.height)
        where = self._capsule(ends[0], ends[1], rng.uniform(1, 4))
        self.light[:, where] = self.color(40, 220, 0.3)[:, None]
        self.seen[where] = -1

    def _capsule(self, start: Array, end: Array, radius: float) -> Mask:
        """The pixels within a distance of a line. [H, W]"""
        where = np.zeros((self.height, self.width), bool)
        low = np.maximum(np.minimum(start, end) - radius, 0).astype(int)
        high = np.maximum(np.maximum(start, end) + radius + 1, 0).astype(int)
        window = (slice(low[1], high[1]), slice(low[0], high[0]))
        x, y = self.x[:, window[1]] + 0.5 - start[0], self.y[window[0]] + 0.5 - start[1]
        along = end - start
        share = np.clip((x * along[0] + y * along[1]) / max(float(along @ along), 1e-9), 0, 1)
        where[window] = (x - share * along[0]) ** 2 + (y - share * along[1]) ** 2 <= radius**2
        return where
