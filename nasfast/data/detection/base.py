"""What a detection dataset is: images with boxes."""

from __future__ import annotations

import colorsys
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nasfast.data.base import Division, digest, hold_out

LEAST = 0.01
"""Pixels: a box with a shorter side has no area. Smaller ones get lost in float32."""


@dataclass(frozen=True, eq=False)
class BoxSample:
    """One image and the objects in it."""

    image: Tensor
    """uint8 ``[3, H, W]``, RGB."""
    boxes: Tensor
    """float32 ``[M, 4]``: left, top, right, bottom in pixels; the edges of the image are 0 and W,
    0 and H."""
    labels: Tensor
    """int64 ``[M]``, index of the class."""
    ignored: Tensor
    """bool ``[M]``: difficult objects and crowds, which are neither learned nor counted against a
    network that finds them."""
    areas: Tensor
    """float32 ``[M]``, in square pixels of the image: of the object where the data say it, as COCO
    does, else of its box. Scores divide objects by it in small, medium and large."""
    image_id: int | str
    """What the data call the image: COCO's id, or the name of the file without its suffix."""


class Objects(NamedTuple):
    """The objects of a data set, image by image."""

    sample: Tensor
    """int64 ``[T]``, index of the image's sample; ascending."""
    boxes: Tensor
    """float32 ``[T, 4]``, as of `BoxSample`; so are the others."""
    labels: Tensor
    ignored: Tensor
    areas: Tensor


class DetectionDataset(ABC):
    """A finite, indexable set of samples: `len(d)`, `d[i]`, iteration."""

    name: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    """Of the classes in the data, for predictions that are written back: COCO's are sparse."""
    colors: tuple[tuple[int, int, int], ...]
    """RGB, one per class."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> BoxSample:
        """Negative indices count from the end; IndexError outside."""

    def __iter__(self) -> Iterator[BoxSample]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that determines the samples; equal in every process."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each sample, without reading all of its pixels."""

    def objects(self) -> Objects:
        """Of all samples, in their order."""
        samples = list(self)
        counts = torch.tensor([len(sample.labels) for sample in samples])
        return Objects(
            torch.arange(len(samples)).repeat_interleave(counts),
            torch.cat([sample.boxes for sample in samples]),
            torch.cat([sample.labels for sample in samples]),
            torch.cat([sample.ignored for sample in samples]),
            torch.cat([sample.areas for sample in samples]),
        )

    def counts(self) -> list[int]:
        """Objects in each sample, ignored ones included."""
        return torch.bincount(self.objects().sample, minlength=len(self)).tolist()

    def load(self, indices: Sequence[int]) -> list[BoxSample]:
        """The samples at `indices`, in that order; files are read in threads."""
        return [self[i] for i in indices]

    def subset(self, indices: Sequence[int]) -> DetectionDataset:
        """The samples at `indices`, in that order. IndexError outside."""
        return BoxSubset(self, indices)


class BoxSubset(DetectionDataset):
    """A view of some samples of `dataset`."""

    def __init__(self, dataset: DetectionDataset, indices: Sequence[int]) -> None:
        self.name, self.classes = dataset.name, dataset.classes
        self.category_ids, self.colors = dataset.category_ids, dataset.colors
        self._dataset = dataset
        self._indices = tuple(range(len(dataset))[i] for i in indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> BoxSample:
        return self._dataset[self._indices[index]]

    def load(self, indices: Sequence[int]) -> list[BoxSample]:
        return self._dataset.load([self._indices[i] for i in indices])

    def sizes(self) -> list[tuple[int, int]]:
        sizes = self._dataset.sizes()
        return [sizes[i] for i in self._indices]

    def objects(self) -> Objects:
        found = self._dataset.objects()
        counts = torch.bincount(found.sample, minlength=len(self._dataset))
        ends = counts.cumsum(0)
        chosen = list(self._indices)
        each = [torch.arange(int(ends[i] - counts[i]), int(ends[i])) for i in chosen]
        rows = torch.cat(each) if each else torch.zeros(0, dtype=torch.int64)
        return Objects(
            torch.arange(len(chosen)).repeat_interleave(counts[chosen]),
            *(values[rows] for values in found[1:]),
        )

    def counts(self) -> list[int]:
        return self._counts

    @functools.cached_property
    def _counts(self) -> list[int]:
        counts = self._dataset.counts()
        return [counts[i] for i in self._indices]

    def fingerprint(self) -> str:
        return digest("subset", self._dataset.fingerprint(), self._indices)


def box_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """RGB of classes whose boxes are drawn: bright, and neighbours are far apart in hue."""
    hues = (k * (5**0.5 - 1) / 2 for k in range(count))
    bright = [colorsys.hsv_to_rgb(hue % 1, 0.85, 1) for hue in hues]
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in bright)


class DetectionParts(NamedTuple):
    """What a folder is divided in; as `nasfast.data.base.Parts`."""

    train: DetectionDataset
    val: DetectionDataset
    open_test: Callable[[], DetectionDataset] | None = None
    aside: tuple[str, ...] = ()
    home: Path | None = None


class DetectionSplits(Division[DetectionDataset]):
    """The parts of a detection dataset."""


def divide(parts: DetectionParts, *, seed: int, fraction: float) -> DetectionSplits:
    """Keep a seeded `fraction` of `train`, at least one sample, to validate candidates on."""
    train, val, open_test, aside, home = parts
    learned, held_out = hold_out(train.name, len(train), seed=seed, fraction=fraction)
    return DetectionSplits(
        train.subset(learned), train.subset(held_out), train, val, open_test, aside, home
    )
