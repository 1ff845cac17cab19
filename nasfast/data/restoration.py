"""Images for restoration: clean ones, or pairs of a degraded and a clean image of one scene."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nasfast.data.base import UnknownLayout, digest
from nasfast.data.depth_maps import files_of_depth, read_depth
from nasfast.data.images import (
    MODES,
    by_stem,
    for_each,
    identity,
    list_folder,
    measure,
    planes,
    read_image,
    require_eight_bits,
)
from nasfast.utils.errors import UserError

GREY_MODES = ("1", "L", "LA")
CLEAN_FOLDER, DEPTH_FOLDER = "clean", "depth"
ANY_TASK = "degraded"
DEGRADED_FOLDERS = ("rainy", "hazy", "noisy", ANY_TASK)
CLEAN_SUFFIX, DEGRADED_SUFFIX = "ground_truth", "rain"
DRAWN = {"train": 100, "test": 10}  # images of a stream
SYNTHETIC_VERSION = 1  # part of the fingerprint: raise it with every change of what is drawn
LAYOUTS = (
    "train/ + test/ (+ val/) at the top or in images/ (BSDS500), a folder of images, pairs in "
    f"{CLEAN_FOLDER}/ + {' or '.join(f'{f}/' for f in DEGRADED_FOLDERS)} under equal names, or "
    f"pairs named <k>{DEGRADED_SUFFIX} and <k>{CLEAN_SUFFIX}; for haze, depth in {DEPTH_FOLDER}/ "
    f"beside the clean images or beside {CLEAN_FOLDER}/, under equal names"
)


@dataclass(frozen=True, eq=False)
class ImagePair:
    """A clean image, and a degraded image of the same scene, or its depth, where the data set has
    one."""

    name: str
    clean: Tensor  # uint8 [c, H, W]
    degraded: Tensor | None = None  # uint8 [c, H, W]
    depth: Tensor | None = None  # float32 [1, H, W], 1 at the farthest point of the whole image

    def map(self, change: Callable[[Tensor], Tensor]) -> ImagePair:
        """The same change of all of them."""
        degraded = None if self.degraded is None else change(self.degraded)
        depth = None if self.depth is None else change(self.depth)
        return ImagePair(self.name, change(self.clean), degraded, depth)


class ImageSource(ABC):
    """Where a pair comes from; it is read at the first use and kept, a byte a value."""

    name: str
    size: tuple[int, int]  # height, width
    degradation: str | None = None
    """Name of the folder of the degraded image; None where there is none."""

    @cached_property
    def pair(self) -> ImagePair:
        return self.read()

    @cached_property
    def identity(self) -> str:
        return self.identify()

    @abstractmethod
    def read(self) -> ImagePair: ...

    @abstractmethod
    def identify(self) -> str:
        """SHA-256 (hex) over all that determines the pair."""


class ImageSet(Sequence[ImagePair]):
    """Images of one number of channels (1: grey, 3: RGB), read at their first use.

    Slices and subsets are `ImageSet` too and share what has been read.
    """

    def __init__(self, name: str, channels: int, sources: Sequence[ImageSource]) -> None:
        if channels not in MODES:
            raise ValueError(f"channels: expected 1 (grey) or 3 (RGB), got {channels}")
        self.name, self.channels, self._sources = name, channels, tuple(sources)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self._sources)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each image, known without reading it."""
        return tuple(source.size for source in self._sources)

    @property
    def files(self) -> tuple[tuple[Path, ...], ...]:
        """(clean,) or (clean, degraded) of each image that is a file."""
        return tuple(source.paths for source in self._sources if isinstance(source, _Files))

    @property
    def depths(self) -> tuple[Path, ...]:
        """The files of depth."""
        files = (source.depth for source in self._sources if isinstance(source, _Files))
        return tuple(path for path in files if path is not None)

    def read_all(self) -> None:
        """Read every file and keep none. FaultyFiles names those that cannot be read."""
        for_each(
            lambda source: source.read().name,
            [source for source in self._sources if isinstance(source, _Files)],
        )

    @property
    def degradations(self) -> frozenset[str | None]:
        """Names of the folders of degraded images; None among them: a clean image has none."""
        return frozenset(source.degradation for source in self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> ImagePair: ...

    @overload
    def __getitem__(self, index: slice) -> ImageSet: ...

    def __getitem__(self, index: int | slice) -> ImagePair | ImageSet:
        """The pair at an index, or the `ImageSet` of a slice. IndexError outside."""
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        return self._sources[index].pair

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The pairs at `indices`, in that order. IndexError outside."""
        return ImageSet(self.name, self.channels, [self._sources[i] for i in indices])

    def __add__(self, other: ImageSet) -> ImageSet:
        """Both sets in one, sorted by name."""
        sources = sorted([*self._sources, *other._sources], key=lambda source: source.name)
        return ImageSet(self.name, self.channels, sources)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that determines the images; equal in every process."""
        return digest("pictures", self.channels, *(source.identity for source in self._sources))


@dataclass(frozen=True)
class RestorationData:
    """The parts of a data set. A search and a training read `train` and `val`; `test` is for the
    table at the end."""

    train: ImageSet
    val: ImageSet
    test: ImageSet

    @property
    def channels(self) -> int:
        return self.train.channels

    def halves(self) -> tuple[ImageSet, ImageSet]:
        """`train` divided for a bilevel search: images for the weights, for the architecture."""
        middle = (len(self.train) + 1) // 2
        if middle == len(self.train):
            raise UserError(
                f"{self.train.name}: a search divides the training images in two and needs at "
                f"least 2, got {len(self.train)}; add some"
            )
        return self.train[:middle], self.train[middle:]

    def fingerprint(self) -> str:
        """SHA-256 (hex) over all parts."""
        parts = (self.train, self.val, self.test)
        return digest("restoration", *(part.fingerprint() for part in parts))


def open_images(
    source: str | Path, channels: int, *, depth: bool = False, pairs: str | None = None
) -> RestorationData:
    """Open a data set for restoration and divide it.

    `source` is "synthetic" (110 drawn images) or a folder: `train/` and `test/` (and `val/`,
    which is added to `train/`) at its top or in `images/`, as BSDS500 has them, or images alone,
    of which the 20 % with the smallest hash of the name are the test. A folder of images holds
    clean ones, or pairs: in two folders under equal names, or side by side as `<k>rain` and
    `<k>ground_truth`. Clean ones may have depth in `depth/`: npy, or images of 16 bits. Of the
    training images sorted by name the last 2 %, at least one, validate (split of the IR-NAS
    search).

    Args:
        source: "synthetic" or a folder.
        channels: 1 converts to grey (ITU-R 601 luma, PIL's "L"), 3 to RGB.
        depth: read `depth/` where it is.
        pairs: which folder of degraded images to take where there are several.

    Raises:
        UserError: no such folder, unknown layout, unreadable or unfit file, an image without its
            partner, a pair that does not fit, or too few images.
    """
    if source == "synthetic":
        return _divide(*(_draw_all(channels, stream) for stream in DRAWN))
    root = Path(source)
    if not os.path.isdir(root):
        raise UserError(
            f"data: expected 'synthetic' or a folder, got {str(source)!r}; check the path and its "
            "permissions"
        )
    for top in (root, root / "images"):
        if os.path.isdir(top / "train") and os.path.isdir(top / "test"):
            name = root.resolve().name
            opened = partial(open_folder, channels=channels, name=name, depth=depth, pairs=pairs)
            train = opened(top / "train")
            if os.path.isdir(top / "val"):
                train += opened(top / "val")
            return _divide(train, opened(top / "test"))
    images = open_folder(root, channels, depth=depth, pairs=pairs)
    if len(images) < 3:
        raise UserError(
            f"{root}: expected at least 3 images (training, validation, test), got {len(images)}; "
            "add some"
        )
    ranked = sorted(range(len(images)), key=lambda index: _hash(images.names[index]))
    count = max(1, round(0.2 * len(images)))
    train, test = (images.subset(sorted(part)) for part in (ranked[count:], ranked[:count]))
    return _divide(train, test)


def open_folder(
    folder: Path,
    channels: int,
    *,
    name: str | None = None,
    depth: bool = False,
    pairs: str | None = None,
) -> ImageSet:
    """All images or pairs of one folder, sorted by name; for errors see `open_images`."""
    files, clean = list_folder(folder).images, folder / CLEAN_FOLDER
    depths = folder / DEPTH_FOLDER if depth and os.path.isdir(folder / DEPTH_FOLDER) else None
    kind = _degraded_in(folder, pairs) if os.path.isdir(clean) else None
    if not files and kind is None and os.path.isdir(clean):
        files = list_folder(clean).images
    groups: list[tuple[Path, ...]]
    if kind:
        inner = by_stem(list_folder(clean).images), by_stem(list_folder(folder / kind).images)
        groups = _partners(*inner, "degraded")
    elif any(path.stem.endswith(CLEAN_SUFFIX) for path in files):
        kind = DEGRADED_FOLDERS[0]
        beside = by_stem(files, CLEAN_SUFFIX), by_stem(files, DEGRADED_SUFFIX)
        groups = _partners(*beside, "degraded")
    elif depths:
        groups = _partners(by_stem(files), by_stem(files_of_depth(depths)), "depth")
    else:
        groups = [(path,) for path in files]
    if not groups:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UnknownLayout(f"data: {folder} holds no images: expected {LAYOUTS}; found {held}")
    opened = partial(_Files, channels=channels, degradation=kind)
    return ImageSet(name or folder.resolve().name, channels, for_each(opened, groups))


def _degraded_in(folder: Path, wanted: str | None) -> str | None:
    """Name of the folder of degraded images in a folder; UserError where there are two, and none is
    the wanted one."""
    found = [name for name in DEGRADED_FOLDERS if os.path.isdir(folder / name)]
    if wanted in found:
        return wanted
    if len(found) > 1:
        raise UserError(
            f"data: expected one folder of degraded images beside {folder / CLEAN_FOLDER}, got "
            f"{' and '.join(f'{name}/' for name in found)}; name the task of one of "
            "them, or move one elsewhere"
        )
    return found[0] if found else None


class _Files(ImageSource):
    """A clean image file, and the file of its degraded one or of its depth where there is one;
    opening reads headers only.

    Args:
        paths: (clean,) or (clean, degraded), or (clean, depth) where there is no `degradation`.
        channels: see `open_images`.
        degradation: see `ImageSource`.
    """

    def __init__(self, paths: tuple[Path, ...], channels: int, degradation: str | None) -> None:
        count = 2 if degradation else 1
        self.name, self.degradation = paths[0].name, degradation
        self.paths, self._channels = paths[:count], channels
        self.depth = paths[count] if len(paths) > count else None
        sizes = [_measure(path, channels) for path in self.paths]
        self.size = sizes[0]
        self._require_size(self.paths[-1], sizes[-1])

    def _require_size(self, path: Path, size: tuple[int, ...]) -> None:
        if size != self.size:
            pairs = ((self.paths[0], self.size), (path, size))
            first, second = (f"{path} of {height}x{width}" for path, (height, width) in pairs)
            raise UserError(
                f"data: expected pairs of one size, got {first} and {second} (height x width); "
                "replace or remove this pair"
            )

    def read(self) -> ImagePair:
        images = [read_image(path, self._channels) for path in self.paths]
        depth = relative_depth(self.depth) if self.depth else None
        if self.depth and depth is not None:
            self._require_size(self.depth, depth.shape[1:])
        return ImagePair(self.name, images[0], images[1] if self.degradation else None, depth)

    def identify(self) -> str:
        depth = [hashlib.sha256(self.depth.read_bytes()).hexdigest()] if self.depth else []
        return digest("files", self.name, *map(identity, self.paths), *depth)


def relative_depth(path: Path) -> Tensor:
    """Depth relative to the farthest point, float32 ``[1, H, W]``, so that its unit is of no
    matter.

    Raises:
        UserError: the file cannot be read, or a pixel has no depth.
    """
    depth = read_depth(path, 1)[None]
    if holes := int((depth == 0).sum()):
        raise UserError(
            f"depth {path}: expected values above 0, got {holes} of {depth.numel()} pixels "
            "without; fill these holes"
        )
    return depth / depth.max()


class _Drawing(ImageSource):
    """A drawn image of 96x128 or 128x96, determined by (stream, index) alone.

    Smooth shapes with sharp outlines over a gradient; some carry stripes or grain, so that a
    filter cannot win by smoothing alone.
    """

    def __init__(self, channels: int, stream: str, index: int) -> None:
        self.name, self._channels = f"{stream}{index:03d}", channels
        self._stream, self._index = stream, index
        self.size = (96, 128) if index % 3 else (128, 96)

    def read(self) -> ImagePair:
        rng = np.random.default_rng((list(DRAWN).index(self._stream), self._index))
        canvas = _gradient(rng, self.size)
        for _ in range(rng.integers(8, 20)):
            canvas = np.where(_outline(rng, self.size), _gradient(rng, self.size), canvas)
        pixels = (255 * canvas.clip(0, 1)).round().astype(np.uint8).transpose(1, 2, 0)
        return ImagePair(self.name, planes(Image.fromarray(pixels), self._channels))

    def identify(self) -> str:
        return digest("drawing", SYNTHETIC_VERSION, self._stream, self._index)


def _draw_all(channels: int, stream: str) -> ImageSet:
    sources = [_Drawing(channels, stream, index) for index in range(DRAWN[stream])]
    return ImageSet("synthetic", channels, sources)


def _grid(size: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y [H, 1] and x [1, W] in units of the shorter side."""
    y, x = np.ogrid[: size[0], : size[1]]
    return y / min(size), x / min(size)


def _gradient(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """A colour that changes linearly, with stripes, grain or neither. [3, H, W]"""
    y, x = _grid(size)
    color = rng.uniform(0.1, 0.9) + rng.uniform(-0.12, 0.12, (3, 1, 1))
    slope = rng.uniform(-0.2, 0.2, (2, 3, 1, 1))
    texture: NDArray[np.float64] | float = 0.0
    kind = rng.random()
    if kind < 0.35:
        angle, period = rng.uniform(0, np.pi), rng.uniform(0.03, 0.15)
        texture = np.sin(2 * np.pi * (y * np.sin(angle) + x * np.cos(angle)) / period)
    elif kind < 0.6:
        texture = rng.standard_normal(size)
        texture = (texture + np.roll(texture, 1, 0) + np.roll(texture, 1, 1)) / 3
    strength = rng.uniform(0.03, 0.15)
    return np.asarray(color + slope[0] * (y - 0.5) + slope[1] * (x - 0.5) + strength * texture)


def _outline(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.bool_]:
    """An ellipse or a rectangle, turned. [H, W]"""
    y, x = _grid(size)
    angle = rng.uniform(0, np.pi)
    y, x = y - rng.uniform(0, size[0] / min(size)), x - rng.uniform(0, size[1] / min(size))
    u = (np.cos(angle) * x + np.sin(angle) * y) / rng.uniform(0.04, 0.4)
    v = (np.cos(angle) * y - np.sin(angle) * x) / rng.uniform(0.04, 0.4)
    inside = np.hypot(u, v) if rng.random() < 0.5 else np.maximum(np.abs(u), np.abs(v))
    return np.asarray(inside < 1)


def _divide(train: ImageSet, test: ImageSet) -> RestorationData:
    if len(train) < 2:
        raise UserError(
            f"{train.name}: expected at least 2 training images (one validates), got {len(train)}; "
            "add some"
        )
    held_out = max(1, len(train) // 50)
    return RestorationData(train=train[:-held_out], val=train[-held_out:], test=test)


def _hash(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def _partners(clean: dict[str, Path], others: dict[str, Path], kind: str) -> list[tuple[Path, ...]]:
    """(clean, other) by key; UserError names the first file without its partner."""
    for key in sorted(clean.keys() ^ others.keys()):
        found, missing = (clean, kind) if key in clean else (others, "clean")
        raise UserError(f"data: {found[key]} has no {missing} partner; expected {LAYOUTS}")
    return [(clean[key], others[key]) for key in sorted(clean)]


def _measure(path: Path, channels: int) -> tuple[int, int]:
    header = measure(path)
    require_eight_bits(path, header.mode)
    if channels == 3 and header.mode in GREY_MODES:
        raise UserError(
            f"image {path} is grey: expected a colour image for 3 channels; take it out, or use 1 "
            "channel, which converts colour images, where the task is not about colour"
        )
    return header.size
