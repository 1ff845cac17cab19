"""What a segmentation dataset is, and how one is divided for a search."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from nasfast.utils.errors import UserError

D = TypeVar("D")
D_co = TypeVar("D_co", covariant=True)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class UnknownLayout(UserError):
    """A folder that is not laid out as any reader of the task knows it."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One frame and its labels."""

    image: Tensor  # uint8 [3, H, W], RGB
    mask: Tensor  # uint8 [H, W], class index or the dataset's ignore index

    def seen(self, image: Tensor, mask: Tensor, zoom: float = 1.0) -> Self:
        """This frame after a change of its pixels, which enlarged it by a factor."""
        return dataclasses.replace(self, image=image, mask=mask)


class Samples(Protocol):
    """What crops are cut from."""

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each sample."""

    def load(self, indices: Sequence[int]) -> Sequence[Sample]:
        """The samples at `indices`, in that order."""


class SegmentationDataset(ABC):
    """A finite, indexable set of samples: `len(d)`, `d[i]`, iteration."""

    name: str
    classes: tuple[str, ...]
    ignore_index: int  # mask value that no loss and no metric counts
    colors: tuple[tuple[int, int, int], ...]  # RGB, one per class

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Negative indices count from the end; IndexError outside."""

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that determines the samples; equal in every process."""

    def load(self, indices: Sequence[int]) -> list[Sample]:
        """The samples at `indices`, in that order; files are read in threads."""
        return [self[i] for i in indices]

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each sample."""
        return [(sample.mask.shape[0], sample.mask.shape[1]) for sample in self]

    def label_counts(self) -> Tensor:
        """Pixels of each label in each mask, int64 [N, 256]."""
        masks = (sample.mask.flatten() for sample in self)
        return torch.stack([torch.bincount(mask, minlength=256) for mask in masks])

    def subset(self, indices: Sequence[int]) -> SegmentationDataset:
        """The samples at `indices`, in that order. IndexError outside."""
        return Subset(self, indices)


class Subset(SegmentationDataset):
    """A view of some samples of `dataset`."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.name, self.classes = dataset.name, dataset.classes
        self.ignore_index, self.colors = dataset.ignore_index, dataset.colors
        self._dataset = dataset
        self._indices = tuple(range(len(dataset))[i] for i in indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._indices[index]]

    def load(self, indices: Sequence[int]) -> list[Sample]:
        return self._dataset.load([self._indices[i] for i in indices])

    def sizes(self) -> list[tuple[int, int]]:
        sizes = self._dataset.sizes()
        return [sizes[i] for i in self._indices]

    def label_counts(self) -> Tensor:
        return self._dataset.label_counts()[list(self._indices)]

    def fingerprint(self) -> str:
        return digest("subset", self._dataset.fingerprint(), self._indices)


class Parts(NamedTuple):
    """What a folder is divided in."""

    train: SegmentationDataset
    val: SegmentationDataset
    open_test: Callable[[], SegmentationDataset] | None = None
    """Reads the test part, where there is one."""
    aside: tuple[str, ...] = ()
    """Patterns (`fnmatch`) of paths in the folder that the layout has for other uses."""
    home: Path | None = None
    """The folder, where it lies below the one that was given."""


@dataclass(frozen=True)
class Division(Generic[D]):
    """The parts of a dataset. `search_train` and `search_val` divide `train`; a search never
    sees `val`, and neither it nor a training reads `test`."""

    search_train: D
    search_val: D
    train: D
    val: D
    open_test: Callable[[], D] | None = None
    aside: tuple[str, ...] = ()
    home: Path | None = None
    """Both as in `Parts`."""

    @functools.cached_property
    def test(self) -> D | None:
        """Read when first asked for; None where the data has no test part."""
        return self.open_test and self.open_test()


class Splits(Division[SegmentationDataset]):
    """The parts of a segmentation dataset."""


def hold_out(name: str, count: int, *, seed: int, fraction: float) -> tuple[list[int], list[int]]:
    """Indices of `count` samples to learn from, and the seeded `fraction` of them, at least one, to
    validate candidates on.

    Raises:
        UserError: less than two samples cannot be divided.
    """
    if count < 2:
        raise UserError(
            f"{name}: expected at least 2 training samples, which a search divides in two, "
            f"got {count}; add samples"
        )
    held_out = min(max(1, round(fraction * count)), count - 1)
    order = random.Random(seed).sample(range(count), count)
    return sorted(order[held_out:]), sorted(order[:held_out])


class Divisible(Protocol[D_co]):
    """A part of a dataset that can be divided further."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def subset(self, indices: Sequence[int]) -> D_co: ...


def halves(train: Divisible[D], *, seed: int, fraction: float = 0.1) -> tuple[D, D]:
    """What candidates learn from, and the seeded `fraction` of the samples, at least one, that they
    are scored on. UserError for less than two samples."""
    learned, held_out = hold_out(train.name, len(train), seed=seed, fraction=fraction)
    return train.subset(learned), train.subset(held_out)


def split_for_search(
    train: SegmentationDataset,
    val: SegmentationDataset,
    open_test: Callable[[], SegmentationDataset] | None = None,
    aside: tuple[str, ...] = (),
    home: Path | None = None,
    *,
    seed: int,
    fraction: float = 0.1,
) -> Splits:
    """Keep a seeded `fraction` of `train` (at least one sample) to validate candidates on:
    90/10 in Fast NAS (CVPR 2019)."""
    learned, held_out = halves(train, seed=seed, fraction=fraction)
    return Splits(
        search_train=learned,
        search_val=held_out,
        train=train,
        val=val,
        open_test=open_test,
        aside=aside,
        home=home,
    )


def shorter_side(dataset: Samples) -> int:
    """The smallest height or width of all samples, in pixels."""
    return min(map(min, dataset.sizes()))


def digest(*parts: object) -> str:
    """SHA-256 (hex) of the representation of `parts`: strings, numbers and tuples of them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def default_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """The PASCAL VOC colour map: bit k of each channel comes from bits 3k, 3k+1, 3k+2 of the
    index, most significant first."""

    def channel(index: int, shift: int) -> int:
        return sum((index >> 3 * k + shift & 1) << 7 - k for k in range(8))

    return tuple((channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(count))


@functools.cache  # a tensor made on a GPU waits for it
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).view(2, 3, 1, 1)
    return mean, std


def normalize(images: Tensor) -> Tensor:
    """Images of 0..255 (any dtype) [N, 3, H, W] -> float32 with ImageNet mean and deviation."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"normalize: expected images [N, 3, H, W], got {list(images.shape)}")
    mean, std = _imagenet(images.device)
    return (images.to(torch.float32) - 255 * mean) / (255 * std)  # [N, 3, H, W]
