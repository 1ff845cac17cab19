"""Procedural scenes with boxes: a detection set that needs no download.

Shapes of four kinds lie on ground of smooth colours, in sizes over a factor of eight, turned at
random and partly behind each other, among bars and blots that are none. Kinds share colours, so
that the outline alone tells them apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from nasfast.data.base import digest
from nasfast.data.detection.base import BoxSample, DetectionDataset, box_colors
from nasfast.data.synthetic import STREAMS, Array, Canvas, Mask, require_drawable

VERSION = 2  # part of the fingerprint: raise it with every change of what is drawn
CLASSES = ("disc", "ring", "square", "triangle")
FEWEST, MOST = 2, 9
"""Objects in a scene."""
CLUTTER = 6
"""Most things in a scene that are no objects."""
HIDDEN = 0.25
"""Objects of which less is to be seen are ignored."""
HOLE, SIDE = 0.55, 0.8
"""Radius of a ring's hole and half a side of a square, in radii of their shapes."""


class SyntheticShapes(DetectionDataset):
    """Scenes with 2 to 9 shapes, sample i determined by (seed, stream, i) alone.

    size: (height, width) in pixels, at least 64 each.
    stream: "train", "val" or "pretrain"; streams share no sample at any seed.
    cache_in_memory: keep each sample once drawn.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        size: tuple[int, int] = (128, 160),
        *,
        stream: str = "train",
        cache_in_memory: bool = False,
    ) -> None:
        require_drawable(self, seed, size, 64, stream, num_samples=num_samples)
        self.name, self.classes = "synthetic", CLASSES
        self.category_ids = tuple(range(1, len(CLASSES) + 1))
        self.colors = box_colors(len(CLASSES))
        self._num_samples, self._seed, self._size, self._stream = num_samples, seed, size, stream
        self._cache: dict[int, BoxSample] | None = {} if cache_in_memory else None

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> BoxSample:
        index = range(self._num_samples)[index]
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        sample = _Shapes(self._generator(index), *self._size).sample(index)
        if self._cache is not None:
            self._cache[index] = sample
        return sample

    def sizes(self) -> list[tuple[int, int]]:
        return [self._size] * self._num_samples

    def counts(self) -> list[int]:
        return self._counts

    @functools.cached_property
    def _counts(self) -> list[int]:
        return [_count(self._generator(index)) for index in range(self._num_samples)]

    def fingerprint(self) -> str:
        identity = (self._seed, self._stream, self._num_samples, tuple(self._size))
        return digest("synthetic shapes", VERSION, identity)

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, STREAMS.index(self._stream), index))


def _count(rng: np.random.Generator) -> int:
    """Objects of a scene: the first number that is drawn for it."""
    return int(rng.integers(FEWEST, MOST + 1))


class _Shapes(Canvas):
    """One scene: `light`, and the index of the object that is seen, -1 for none, `seen` [H, W]."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        super().__init__(rng, height, width)
        count = _count(rng)
        self.seen = np.full((height, width), -1, np.int8)
        self.boxes = np.empty((count, 4), np.float32)
        self.areas = np.empty(count, np.float32)
        first = rng.integers(len(CLASSES))  # as many of each kind as there can be
        self.labels = rng.permutation((first + np.arange(count)) % len(CLASSES))
        self.light[:] = self.color(60, 190, 0.25)[:, None, None]
        self.light += 30 * self.smooth(3, 4) + 12 * self.smooth(16, 20)
        clutter = rng.integers(0, CLUTTER + 1)
        for index in rng.permutation(count + clutter):
            self._object(index) if index < count else self._clutter()

    def sample(self, image_id: int) -> BoxSample:
        areas = np.bincount(self.seen[self.seen >= 0], minlength=len(self.labels))
        return BoxSample(
            torch.from_numpy(self.photograph()),
            torch.from_numpy(self.boxes),
            torch.from_numpy(self.labels),
            torch.from_numpy(areas < HIDDEN * self.areas),
            torch.from_numpy(self.areas),
            image_id,
        )

    def _object(self, index: int) -> None:
        rng = self.rng
        least, most = 5.0, 0.32 * min(self.height, self.width)
        radius = least * (most / least) ** rng.random()
        x, y = rng.uniform(0.05, 0.95, 2) * (self.width, self.height)
        turn = rng.uniform(0, 2 * np.pi)
        reach = np.sqrt(2) * SIDE * radius  # of the corners of a square
        left, top = np.maximum(0, [x - reach, y - reach]).astype(int)
        window = (slice(top, int(y + reach) + 1), slice(left, int(x + reach) + 1))
        across = (self.x[:, window[1]] + 0.5 - x) / radius
        down = (self.y[window[0]] + 0.5 - y) / radius
        u = across * np.cos(turn) + down * np.sin(turn)
        v = down * np.cos(turn) - across * np.sin(turn)
        where = OUTLINES[CLASSES[self.labels[index]]](u, v)
        self._fill(where, window, 1 + 0.25 * u * rng.uniform(-1, 1))
        self.seen[window][where] = index
        rows, columns = np.nonzero(where)
        rows, columns = rows + top, columns + left
        self.boxes[index] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        self.areas[index] = len(rows)

    def _clutter(self) -> None:
        """A bar, or a blot without an edge."""
        rng = self.rng
        x, y = rng.random(2) * (self.width, self.height)
        turn = rng.uniform(0, np.pi)
        across, down = self.x + 0.5 - x, self.y + 0.5 - y
        u = across * np.cos(turn) + down * np.sin(turn)
        v = down * np.cos(turn) - across * np.sin(turn)
        if rng.random() < 0.6:
            where = (np.abs(u) < rng.uniform(8, 60)) & (np.abs(v) < rng.uniform(0.7, 3))
            self._fill(where, (slice(None), slice(None)), np.ones_like(u))
            self.seen[where] = -1
        else:
            wide, high = rng.uniform(5, 20, 2)
            blot = np.exp(-((u / wide) ** 2) - (v / high) ** 2)
            self.light += (rng.uniform(-70, 70) * blot).astype(np.float32)

    def _fill(self, where: Mask, window: tuple[slice, slice], shade: Array) -> None:
        """Cover the pixels `where` of a window by a colour that stands out from what they were."""
        rng, light = self.rng, self.light[(slice(None), *window)]
        behind = float(light.mean())
        step = rng.uniform(30, 90)
        darker = behind > 200 or (behind > 60 and rng.random() < 0.5)
        grey = behind - step if darker else behind + step
        color = self.color(grey, grey, 0.25)[:, None, None] * shade
        np.copyto(light, color, where=where, casting="same_kind")


OUTLINES: dict[str, Callable[[Array, Array], Mask]] = {
    "disc": lambda u, v: u**2 + v**2 < 1,
    "ring": lambda u, v: (u**2 + v**2 < 1) & (u**2 + v**2 > HOLE**2),
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < SIDE,
    "triangle": lambda u, v: (u > -0.5) & (u + np.sqrt(3) * np.abs(v) < 1),
}
"""Whether a point is inside, in radii; the first corner of a triangle lies at u = 1."""
