"""Samples of large images, reduced before anything else sees them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import interpolate

from nasfast.data.base import Sample, SegmentationDataset, digest
from nasfast.utils.errors import UserError

SHORTEST = 32
"""Least longer side that images can be brought to."""


class Reduced(SegmentationDataset):
    """A view of `dataset` whose images have no side above `longer` pixels.

    A larger image is reduced to that longer side, bilinearly and antialiased, and its mask to the
    nearest labels, both with half-pixel centres; others stay as they are.
    """

    def __init__(self, dataset: SegmentationDataset, longer: int) -> None:
        self.name, self.classes = f"{dataset.name} reduced to {longer}", dataset.classes
        self.ignore_index, self.colors = dataset.ignore_index, dataset.colors
        self.dataset, self.longer = dataset, longer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        return self._reduce(self.dataset[index])

    def load(self, indices: Sequence[int]) -> list[Sample]:
        return [self._reduce(sample) for sample in self.dataset.load(indices)]

    def _reduce(self, sample: Sample) -> Sample:
        height, width = sample.mask.shape
        size = reduced_size((height, width), self.longer)
        if size == (height, width):
            return sample
        return Sample(
            interpolate(sample.image[None], size, mode="bilinear", antialias=True)[0],
            interpolate(sample.mask[None, None], size, mode="nearest-exact")[0, 0],
        )

    def sizes(self) -> list[tuple[int, int]]:
        return [reduced_size(size, self.longer) for size in self.dataset.sizes()]

    def label_counts(self) -> Tensor:
        """Of the masks as they are in the files."""
        return self.dataset.label_counts()

    def fingerprint(self) -> str:
        return digest("reduced", self.dataset.fingerprint(), self.longer)


def reduced_size(size: tuple[int, int], longer: int) -> tuple[int, int]:
    """(height, width) of an image whose longer side is brought down to at most `longer`."""
    height, width = size
    most = max(size)
    if most <= longer:
        return size
    return max(1, round(height * longer / most)), max(1, round(width * longer / most))


def reduced(dataset: SegmentationDataset, longer: int | None) -> SegmentationDataset:
    """The data with no side above `longer`: the data themselves where none is.

    Raises:
        UserError: `longer` is too small to leave anything to see.
    """
    if longer is not None and longer < SHORTEST:
        raise UserError(f"resize-longer: expected at least {SHORTEST} pixels, got {longer}")
    if longer is None or max(map(max, dataset.sizes())) <= longer:
        return dataset
    return Reduced(dataset, longer)
