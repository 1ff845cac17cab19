"""What a depth dataset is, which of its pixels count, and how one is divided for a search."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nasfast.data.base import Division, Sample, digest, halves
from nasfast.data.folder import KEPT
from nasfast.data.reduced import SHORTEST, reduced_size
from nasfast.utils.config import Bound, Bounded, from_mapping
from nasfast.utils.errors import UserError

Crop = Literal["none", "eigen", "garg"]
CROPS: Mapping[Crop, tuple[float, float, float, float]] = {
    "none": (0, 1, 0, 1),
    "eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}
"""First and last row, first and last column, as shares of height and width: Eigen et al. (2014) on
the 480x640 images of NYU Depth v2, Garg et al. (2016) on KITTI."""


@dataclass(frozen=True)
class DepthReading(Bounded):
    """How depth files are read, and which of their pixels count."""

    scale: Annotated[float, Bound(0, open="low")] | None = None
    """Values a metre in the depth files: 1000 for millimetres, 256 for KITTI. Default: 1000 for
    7-Scenes, 1 for .npy of floats; other files do not say it."""
    crop: Crop | None = None
    """Pixels that count, in training and in scores: eigen, those of NYU Depth v2 without their
    border; garg, of KITTI; default: none is left out."""
    cap: Annotated[float, Bound(0, open="low")] | None = None
    """Greatest depth that counts, in metres, such as 10 for NYU Depth v2 or 80 for KITTI;
    predictions are cut to it before they are scored. Default: no limit."""

    def over(self, other: Mapping[str, Any] | DepthReading) -> Self:
        """These settings, and where they are open those of others."""
        base = other if isinstance(other, Mapping) else dataclasses.asdict(other)
        names = {field.name for field in dataclasses.fields(self)}
        merged = {name: base[name] for name in names & base.keys() if base[name] is not None}
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return from_mapping(type(self), {**merged, **given}, "depth")

    @property
    def counted(self) -> str:
        """Which pixels count, where not all do; else nothing."""
        crop = f"{self.crop.capitalize()} crop" if self.crop not in (None, "none") else ""
        cap = f"depths up to {self.cap:g} m" if self.cap is not None else ""
        return ", ".join(filter(None, (crop, cap)))


@dataclass(frozen=True, eq=False)
class DepthSample(Sample):
    """One frame and its depths; `mask` is float32 [H, W], in metres along the optical axis, 0 where
    it is not known."""

    def seen(self, image: Tensor, mask: Tensor, zoom: float = 1.0) -> Self:
        """What is enlarged by a factor is as many times nearer (Eigen et al., section 3.4)."""
        return dataclasses.replace(self, image=image, mask=mask if zoom == 1 else mask / zoom)


class DepthDataset(ABC):
    """A finite, indexable set of `DepthSample`: `len(d)`, `d[i]`."""

    name: str
    per_metre: float
    """Values a metre of 16-bit files that fit the depths."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> DepthSample:
        """Negative indices count from the end; IndexError outside."""

    @abstractmethod
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each sample."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that determines the samples; equal in every process."""

    @property
    def pairs(self) -> tuple[tuple[Path, Path], ...]:
        """(image, depth) of each sample; none where it is drawn."""
        return ()

    def load(self, indices: Sequence[int]) -> list[DepthSample]:
        """The samples at `indices`, in that order."""
        return [self[index] for index in indices]

    def subset(self, indices: Sequence[int]) -> DepthDataset:
        """The samples at `indices`, in that order. IndexError outside."""
        return DepthSubset(self, indices)


class DepthSubset(DepthDataset):
    """A view of some samples of `dataset`."""

    def __init__(self, dataset: DepthDataset, indices: Sequence[int]) -> None:
        self.name, self.per_metre = dataset.name, dataset.per_metre
        self._dataset = dataset
        self._indices = tuple(range(len(dataset))[i] for i in indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> DepthSample:
        return self._dataset[self._indices[index]]

    def sizes(self) -> list[tuple[int, int]]:
        sizes = self._dataset.sizes()
        return [sizes[i] for i in self._indices]

    def fingerprint(self) -> str:
        return digest("subset", self._dataset.fingerprint(), self._indices)


class Counted(DepthDataset):
    """A view of `dataset` as settings read it: images whose longer side is above `longer` pixels
    are reduced to it (image bilinearly and antialiased, depth to the nearest), and depths that do
    not count become 0. Samples are kept in memory where all take at most 2 GiB."""

    def __init__(
        self, dataset: DepthDataset, reading: DepthReading, longer: int | None, *, keep: bool
    ) -> None:
        if longer is not None and longer < SHORTEST:
            raise UserError(f"resize-longer: expected at least {SHORTEST} pixels, got {longer}")
        self.name, self.per_metre = dataset.name, dataset.per_metre
        self._dataset, self._reading = dataset, reading
        sizes = dataset.sizes()
        self._sizes = [reduced_size(size, longer) if longer else size for size in sizes]
        self._longer = longer if self._sizes != sizes else None
        if self._longer:
            self.name += f" reduced to {longer}"
        if reading.counted:
            self.name += f" ({reading.counted})"
        bytes_ = sum(7 * height * width for height, width in self._sizes)
        self._kept: dict[int, DepthSample] | None = {} if keep and bytes_ <= KEPT else None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> DepthSample:
        index = range(len(self))[index]
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        sample = self._read(index)
        if self._kept is not None:
            self._kept[index] = sample
        return sample

    def _read(self, index: int) -> DepthSample:
        sample, size = self._dataset[index], self._sizes[index]
        image, depth = sample.image, sample.mask
        if tuple(depth.shape) != size:
            image = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
            depth = interpolate(depth[None, None], size, mode="nearest-exact")[0, 0]
        return DepthSample(image, depth * self._counts(depth))

    def _counts(self, depth: Tensor) -> Tensor:
        height, width = depth.shape
        shares = CROPS[self._reading.crop or "none"]
        top, bottom, left, right = (
            round(share * side) for share, side in zip(shares, (height, height, width, width))
        )
        counts = torch.zeros_like(depth, dtype=torch.bool)
        counts[top:bottom, left:right] = True
        return counts if self._reading.cap is None else counts & (depth <= self._reading.cap)

    def sizes(self) -> list[tuple[int, int]]:
        return self._sizes

    @property
    def pairs(self) -> tuple[tuple[Path, Path], ...]:
        return self._dataset.pairs

    def fingerprint(self) -> str:
        counted = (self._reading.crop or "none", self._reading.cap, self._longer)
        return digest("depth", self._dataset.fingerprint(), *counted)


class DepthParts(NamedTuple):
    """What a folder is divided in."""

    train: DepthDataset
    val: DepthDataset
    open_test: Callable[[], DepthDataset] | None = None
    """Reads the test part, where there is one."""
    aside: tuple[str, ...] = ()
    """Patterns (`fnmatch`) of paths in the folder that the layout has for other uses."""


class DepthSplits(Division[DepthDataset]):
    """The parts of a depth dataset."""


def divide(parts: DepthParts, *, seed: int, fraction: float = 0.1) -> DepthSplits:
    """Keep a seeded `fraction` of `train` (at least one sample) to validate candidates on."""
    learned, held_out = halves(parts.train, seed=seed, fraction=fraction)
    return DepthSplits(
        search_train=learned,
        search_val=held_out,
        train=parts.train,
        val=parts.val,
        open_test=parts.open_test,
        aside=parts.aside,
    )
