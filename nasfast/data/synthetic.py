"""Procedural street scenes: a segmentation set that needs no download.

A pinhole camera looks down a street between two rows of house fronts. Everything is placed in
metres, so that size, texture and haze follow the distance; classes share colours (grey road,
pavement, poles, cars and skies; green trees and house fronts), so that context has to tell
them apart.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nasfast.data.base import Sample, SegmentationDataset, digest
from nasfast.utils.errors import UserError

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

VERSION = 1  # part of the fingerprint: raise it with every change of what is drawn
CLASSES = {
    "sky": (70, 130, 180),
    "building": (128, 0, 0),
    "road": (128, 64, 128),
    "pavement": (244, 35, 232),
    "tree": (107, 142, 35),
    "car": (0, 0, 142),
    "person": (220, 20, 60),
    "pole": (192, 192, 128),
}
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR, PERSON, POLE = range(len(CLASSES))
IGNORE = 255
SIGNS = np.array([[190, 40, 40], [40, 70, 170], [210, 180, 50], [200, 200, 200]], np.float32)
LAMPS = np.array([[200, 40, 30], [235, 230, 200]], np.float32)
STREAMS = ("train", "val", "pretrain")


def require_drawable(
    data: object, seed: int, size: tuple[int, int], least: int, stream: str, **count: int
) -> None:
    """Refuse what no data set is drawn from.

    Args:
        data: a data set, for its name.
        seed: from 0 on.
        size: (height, width) of its images, at least ``least`` each.
        least: in pixels.
        stream: one of `STREAMS`.
        count: how many are drawn, at least 1, by the name of the argument.
    """
    name, ((counted, number),) = type(data).__name__, count.items()
    if number < 1:
        raise UserError(f"{name}: expected {counted} >= 1, got {number}")
    if seed < 0:
        raise UserError(f"{name}: expected seed >= 0, got {seed}")
    if min(size) < least:
        raise ValueError(f"{name}: expected size of at least {least}x{least}, got {size}")
    if stream not in STREAMS:
        raise ValueError(f"{name}: expected stream of {STREAMS}, got {stream!r}")


class SyntheticStreets(SegmentationDataset):
    """Street scenes, sample i determined by (seed, stream, i) alone.

    size: (height, width) in pixels, at least 32 each.
    stream: "train", "val" or "pretrain"; streams share no sample at any seed.
    cache_in_memory: keep each sample once drawn.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 0,
        size: tuple[int, int] = (96, 128),
        *,
        stream: str = "train",
        cache_in_memory: bool = False,
    ) -> None:
        require_drawable(self, seed, size, 32, stream, num_samples=num_samples)
        self.name, self.classes = "synthetic", tuple(CLASSES)
        self.ignore_index, self.colors = IGNORE, tuple(CLASSES.values())
        self._num_samples, self._seed, self._size, self._stream = num_samples, seed, size, stream
        self._cache: dict[int, Sample] | None = {} if cache_in_memory else None

    def __len__(self) -> int:
        return self._num_samples

    def sizes(self) -> list[tuple[int, int]]:
        return [self._size] * self._num_samples

    def __getitem__(self, index: int) -> Sample:
        index = range(self._num_samples)[index]
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        scene = street(self._seed, self._stream, index, self._size)
        sample = Sample(torch.from_numpy(scene.photograph()), torch.from_numpy(scene.mask))
        if self._cache is not None:
            self._cache[index] = sample
        return sample

    def fingerprint(self) -> str:
        identity = (self._seed, self._stream, self._num_samples, tuple(self._size))
        return digest("synthetic streets", VERSION, identity)


def street(seed: int, stream: str, index: int, size: tuple[int, int]) -> Street:
    """Scene `index` of a stream, in pixels (height, width)."""
    return Street(np.random.default_rng((seed, STREAMS.index(stream), index)), *size)


class Canvas:
    """Light of a scene, `light` [3, H, W], and what is drawn at random for it."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.y, self.x = np.ogrid[:height, :width]
        self.light = np.empty((3, height, width), np.float32)

    def photograph(self) -> NDArray[np.uint8]:
        """Exposure, colour cast, vignette, blur and sensor noise. uint8 [3, H, W]"""
        rng, light = self.rng, self.light
        if rng.random() < 0.3:
            light[:, 1:] = (light[:, 1:] + light[:, :-1]) / 2
            light[:, :, 1:] = (light[:, :, 1:] + light[:, :, :-1]) / 2
        light *= (rng.uniform(0.55, 1.25) * rng.uniform(0.92, 1.08, (3, 1, 1))).astype(np.float32)
        light *= 1 + 0.12 * self.smooth(2, 3)
        noise = rng.standard_normal(light.shape, np.float32)
        noise *= rng.uniform(2, 9)
        light += noise
        return np.clip(light, 0, 255, out=light).astype(np.uint8)

    def smooth(self, rows: int, columns: int) -> Array:
        """Smooth noise in [-1, 1] with that many control points. [H, W]"""
        points = self.rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
        return _hat(self.height, rows) @ points @ _hat(self.width, columns).T

    def color(self, low: float, high: float, tint: float) -> Array:
        """A grey of `low`..`high` with channels varied by the factor 1 +- `tint`. [3]"""
        rng = self.rng
        grey, cast = rng.uniform(low, high), rng.uniform(1 - tint, 1 + tint, 3)
        return np.asarray(grey * cast, np.float32)


class Street(Canvas):
    """One scene: `light`, `mask` and `depth` [H, W], painted far to near.

    Metres: X to the right, Z ahead, ground `camera` metres below the eye. A thing at distance Z
    measures focal / Z pixels per metre.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        super().__init__(rng, height, width)
        self.focal = rng.uniform(0.75, 1.1) * width
        self.camera = rng.uniform(1.6, 3.2)
        self.horizon = rng.uniform(0.38, 0.52) * height
        self.vanishing = rng.uniform(0.3, 0.7) * width
        self.road = -rng.uniform(2.5, 6.0), rng.uniform(2.5, 6.0)  # X of the kerbs
        self.front = (  # X of the house fronts
            self.road[0] - rng.uniform(1.5, 4.5),
            self.road[1] + rng.uniform(1.5, 4.5),
        )
        self.sun = rng.uniform(0.55, 1.0, 2)  # brightness of the fronts left and right
        self.haze_color = self.color(150, 230, 0.08)
        self.haze = rng.uniform(60, 300)  # metres until 63 % haze
        self.mask = np.empty((height, width), np.uint8)
        self.depth = np.full((height, width), np.inf, np.float32)  # Z in metres; of the sky, inf
        self.grain = self.smooth(24, 32)
        self._sky()
        self._ground()
        self._fronts()
        self._things()
        if rng.random() < 0.5:
            self._leave_outlines()

    def _paint(
        self, where: Mask, color: Array, label: int, distance: float, top: int = 0, left: int = 0
    ) -> None:
        """Cover the pixels `where` [h, w], at (top, left), by hazy `color` [3] or [3, h, w]."""
        window = (slice(top, top + where.shape[0]), slice(left, left + where.shape[1]))
        haze = 1 - np.exp(-distance / self.haze)
        shape = (3, 1, 1) if color.ndim == 1 else color.shape
        hazy = color.reshape(shape) * (1 - haze) + self.haze_color[:, None, None] * haze
        light = self.light[(slice(None), *window)]
        np.copyto(light, hazy, where=where, casting="same_kind")
        self.mask[window][where] = label
        self.depth[window][where] = distance

    def _sky(self) -> None:
        rng = self.rng
        overcast = rng.random() < 0.5
        zenith = self.color(140, 235, 0.03) if overcast else np.array([80, 130, 210], np.float32)
        fall = np.clip(self.y / self.horizon, 0, 1).astype(np.float32)
        clouds = np.clip(self.smooth(4, 5) + rng.uniform(-0.7, 0.3), 0, 1) * rng.uniform(20, 110)
        self.light[:] = zenith[:, None, None] * (1 - fall) + self.haze_color[:, None, None] * fall
        self.light += clouds
        self.mask[:] = SKY

    def _ground(self) -> None:
        rng, (left, right) = self.rng, self.road
        first = int(self.horizon) + 1
        below = self.y[first:] - np.float32(self.horizon)  # [h, 1], pixels under the horizon
        z = np.float32(self.focal * self.camera) / below
        x = (self.x - np.float32(self.vanishing)) * (z / np.float32(self.focal))  # [h, W]
        is_road = (x > left) & (x < right)
        asphalt, stone = self.color(60, 130, 0.05), self.color(85, 175, 0.1)
        color = np.where(is_road, asphalt[:, None, None], stone[:, None, None])
        near = np.clip(below / self.height * 4, 0, 1)  # details fade out with distance
        slabs = ((x % 1.0 < 0.12) | (z % 1.0 < 0.12)) & ~is_road
        kerb = (np.abs(x - left) < 0.15) | (np.abs(x - right) < 0.15)
        middle = (left + right) / 2 + rng.uniform(-1, 1)
        dashes = (np.abs(x - middle) < 0.12) & ((z + rng.uniform(0, 6)) % 6 < 3)
        crossing = rng.uniform(8, 40) if rng.random() < 0.35 else np.inf
        stripes = (np.abs(z - crossing) < 1.6) & (x % 1.1 < 0.55) & is_road
        color += (35 * kerb - 28 * slabs).astype(np.float32) * near
        color += (rng.uniform(60, 120) * (dashes | stripes)) * np.clip(near, 0.3, 1)
        reach = rng.uniform(-0.6, 0.8) * (right - left)  # the houses' shadow on the ground
        shadow = x < left + reach if self.sun[0] < self.sun[1] else x > right - reach
        color *= np.where(shadow, np.float32(0.6), np.float32(1))
        color += 10 * self.grain[first:] + 8 * self.smooth(5, 5)[first:]
        haze = 1 - np.exp(-z / self.haze)
        self.light[:, first:] = color + (self.haze_color[:, None, None] - color) * haze
        self.mask[first:] = np.where(is_road, ROAD, PAVEMENT)
        self.depth[first:] = z

    def _fronts(self) -> None:
        """House fronts, hedges and gaps along both kerbs, and a skyline at the street's end."""
        rng = self.rng
        skyline = np.repeat(rng.uniform(0, 0.12, 16), -(-self.width // 16))[: self.width]
        end = (self.y > self.horizon - skyline * self.height) & (self.y < self.horizon + 1)
        self._paint(end, self.color(60, 170, 0.1), BUILDING, 90)
        count = 24  # plots on each side
        side = (self.x[0] > self.vanishing).astype(np.intp)  # [W]
        lateral = np.abs(np.asarray(self.front, np.float32))[side]
        z = self.focal * lateral / np.maximum(np.abs(self.x[0] - self.vanishing), 0.25)
        ends = np.cumsum(rng.uniform(5, 16, (2, count)), 1) + rng.uniform(-12, 0, (2, 1))
        plot = np.where(side, *(np.searchsorted(e, z) for e in ends[::-1])).clip(max=count - 1)
        kind = rng.choice(3, (2, count), p=(0.74, 0.14, 0.12))[side, plot]  # front, hedge, gap
        tall = rng.uniform(4, 9 + 9 * rng.random(), (2, count))[side, plot]
        tall = np.where(kind == 0, tall, np.where(kind == 1, 0.35 * tall, 0))
        tall = np.where(z < 120, tall, 0).astype(np.float32)
        scale = (self.focal / z).astype(np.float32)  # [W], pixels per metre
        up = self.camera + (np.float32(self.horizon) - self.y) / scale  # [H, W], metres
        bushy = np.where(kind == 1, 0.25 * tall, 0).astype(np.float32)
        wall = (up > 0) & (up < tall + bushy * (self.grain + self.smooth(12, 40)))

        def per_plot(low: float, high: float) -> Array:
            values = rng.uniform(low, high, (2, count)).astype(np.float32)
            return np.asarray(values[side, plot])

        paint = per_plot(70, 200) * np.stack([per_plot(0.82, 1.12) for _ in range(3)])  # [3, W]
        leaf = self.color(40, 110, 0.1) * np.array([0.75, 1.15, 0.55], np.float32)
        paint = np.where(kind == 1, leaf[:, None], paint)[:, None]
        storey, bay = per_plot(2.6, 3.6), per_plot(1.4, 3.2)
        glass = (up % storey > per_plot(0.25, 0.5) * storey) & (
            z % bay < per_plot(0.35, 0.65) * bay
        )
        glass &= (up < tall - 0.5) & (kind == 0)
        courses = (up % 0.6 < 0.2).astype(np.float32)
        texture = np.where(kind == 0, 6, 26).astype(np.float32) * self.grain + 10 * courses
        color = paint * np.where(glass, per_plot(0.3, 1.25), 1) + texture
        color *= np.where(side, self.sun[1], self.sun[0]).astype(np.float32)
        haze = (1 - np.exp(-z / self.haze)).astype(np.float32)
        color += (self.haze_color[:, None, None] - color) * haze
        np.copyto(self.light, color, where=wall, casting="same_kind")
        np.copyto(self.mask, np.where(kind == 1, TREE, BUILDING), where=wall, casting="unsafe")
        np.copyto(self.depth, z, where=wall, casting="same_kind")

    def _things(self) -> None:
        rng, (left, right) = self.rng, self.road
        things = []
        for draw, count, width, height in (
            (self._tree, rng.integers(0, 6), 5.0, 8.0),
            (self._car, rng.integers(1, 8), 5.0, 3.2),
            (self._person, rng.integers(2, 11), 1.0, 2.0),
            (self._pole, rng.integers(2, 8), 2.4, 7.0),
        ):
            for _ in range(count):
                z = 5 * (60 / 5) ** rng.random()
                kerb, front = (
                    (left, self.front[0]) if rng.random() < 0.5 else (right, self.front[1])
                )
                if draw == self._car:
                    lateral = kerb * rng.choice([0.3, 0.5, 0.72])
                elif draw == self._person and rng.random() < 0.25:
                    lateral = rng.uniform(left, right)
                elif draw == self._pole:
                    lateral = kerb + 0.4 * np.sign(kerb)
                else:
                    lateral = kerb + (front - kerb) * rng.uniform(0.2, 0.8)
                things.append((z, lateral, draw, width, height))
        for z, lateral, draw, width, height in sorted(things, key=lambda thing: -thing[0]):
            scale = self.focal / z
            foot = self.horizon + self.camera * scale
            middle = self.vanishing + lateral * scale
            top, bottom = int(max(foot - height * scale, 0)), int(min(foot + 2, self.height))
            start = int(max(middle - width / 2 * scale, 0))
            stop = int(min(middle + width / 2 * scale + 1, self.width))
            if bottom <= top or stop <= start:
                continue
            up = ((foot - self.y[top:bottom]) / scale).astype(np.float32)  # [h, 1], metres
            across = ((self.x[:, start:stop] - middle) / scale).astype(np.float32)  # [1, w]
            draw(up, across, z, top, start)

    def _shade(self, up: Array, across: Array, width: float, top: int, left: int) -> None:
        """A soft shadow on the ground under a thing."""
        shadow = (across / width) ** 2 + (up / 0.28) ** 2 < 1
        window = self.light[:, top : top + up.shape[0], left : left + across.shape[1]]
        window *= 1 - 0.45 * shadow

    def _leave_outlines(self) -> None:
        """Ignore the outlines of foliage, as human annotators do."""
        tree = self.mask == TREE
        edge = np.zeros_like(tree)
        edge[:, 1:] |= tree[:, 1:] != tree[:, :-1]
        edge[1:] |= tree[1:] != tree[:-1]
        self.mask[edge] = IGNORE

    def _tree(self, up: Array, across: Array, z: float, top: int, left: int) -> None:
        rng = self.rng
        centre, radius = rng.uniform(3.4, 5.0), rng.uniform(1.2, 2.3)
        trunk = (np.abs(across) < 0.16) & (up < centre) & (up > 0)
        grain = self.grain[: up.shape[0], : across.shape[1]] + 0.4 * rng.uniform(
            -1, 1, (up.shape[0], across.shape[1])
        )
        distance = np.hypot(across, (up - centre) * 0.85) / radius
        crown = distance + 0.3 * grain < 1
        leaf = self.color(45, 120, 0.15) * np.array([0.8, 1.15, 0.5], np.float32)
        sunny = 1 + 0.3 * (up - centre) / radius
        self._paint(trunk, self.color(35, 85, 0.15), TREE, z, top, left)
        self._paint(crown, leaf[:, None, None] * sunny + 28 * grain, TREE, z, top, left)

    def _car(self, up: Array, across: Array, z: float, top: int, left: int) -> None:
        rng = self.rng
        van = rng.random() < 0.15
        long = rng.random() < 0.2  # seen from the side
        half = 2.1 if long else rng.uniform(0.8, 0.95)
        waist, roof = (1.2, 2.6) if van else (0.85, rng.uniform(1.35, 1.6))
        slope = 0.05 if van else (0.9 if long else 0.35)
        across_abs = np.abs(across)
        body = (across_abs < half) & (up > 0.22) & (up < waist)
        cabin = (across_abs < half * 0.95 - slope * (up - waist)) & (up >= waist) & (up < roof)
        wheels = (np.abs(across_abs - half * 0.72) < 0.22) & (up > 0) & (up < 0.35)
        glass = cabin & (up > waist + 0.08) & (up < roof - 0.12)
        glass &= across_abs < half * 0.82 - slope * (up - waist)
        lamps = body & (across_abs > half * 0.7) & (up > 0.5) & (up < 0.7) & (not long)
        color = self.color(30, 225, 0.05 if rng.random() < 0.6 else 0.55)
        self._shade(up, across, half * 1.15, top, left)
        self._paint(wheels, self.color(15, 40, 0.05), CAR, z, top, left)
        self._paint(
            body | cabin, color[:, None, None] * (0.75 + 0.25 * (up / roof)), CAR, z, top, left
        )
        self._paint(glass, self.color(25, 150, 0.1), CAR, z, top, left)
        lamp = LAMPS[rng.integers(len(LAMPS))]
        self._paint(lamps, lamp, CAR, z, top, left)

    def _person(self, up: Array, across: Array, z: float, top: int, left: int) -> None:
        rng = self.rng
        tall, stride = rng.uniform(1.4, 1.9), rng.uniform(0.02, 0.14)
        hip, neck = 0.48 * tall, 0.83 * tall
        leg = stride * (1 - up / hip)
        legs = (np.abs(np.abs(across) - leg - 0.06) < 0.1) & (up > 0) & (up < hip)
        torso = (np.abs(across) < 0.2 + 0.06 * (up - hip)) & (up >= hip) & (up < neck)
        head = np.hypot(across, up - 0.92 * tall) < 0.08 * tall
        self._shade(up, across, 0.4, top, left)
        self._paint(legs, self.color(20, 110, 0.25), PERSON, z, top, left)
        self._paint(torso, self.color(30, 210, 0.5), PERSON, z, top, left)
        skin = np.array([1.15, 0.9, 0.75], np.float32) * rng.uniform(70, 200)
        self._paint(head, skin, PERSON, z, top, left)

    def _pole(self, up: Array, across: Array, z: float, top: int, left: int) -> None:
        rng = self.rng
        tall, half = rng.uniform(3.5, 6.8), max(rng.uniform(0.05, 0.1), 0.45 * z / self.focal)
        pole = (np.abs(across) < half) & (up > 0) & (up < tall)
        color = self.color(40, 190, 0.06)
        self._paint(pole, color, POLE, z, top, left)
        if rng.random() < 0.5:
            arm = (np.abs(up - tall) < half) & (across * rng.choice([-1, 1]) > 0)
            self._paint(arm & (np.abs(across) < 1.1), color, POLE, z, top, left)
        else:
            sign = np.hypot(across, up - 0.6 * tall) < 0.38
            self._paint(sign, SIGNS[rng.integers(len(SIGNS))], POLE, z, top, left)


@lru_cache(maxsize=64)
def _hat(size: int, points: int) -> Array:
    """Linear interpolation from `points` control points to `size` pixels. [size, points]"""
    position = np.linspace(0, points - 1, size, dtype=np.float32)[:, None]
    hat: Array = np.maximum(1 - np.abs(position - np.arange(points, dtype=np.float32)), 0)
    return hat
