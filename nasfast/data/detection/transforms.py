"""Joint augmentation of an image and its boxes, and batches of images of different sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nasfast.data.base import IMAGENET_MEAN
from nasfast.data.detection.base import LEAST, BoxSample
from nasfast.data.transforms import Size, check_size, colored, pair

FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
"""Colour of padding: 0, within a hundredth, once normalised."""
PADDING = -1
"""Label where an image has fewer boxes than another of its batch. An ignored box of class k has the
label -2 - k."""


class BoxTransform(Protocol):
    def __call__(
        self, sample: BoxSample, generator: torch.Generator | None = None
    ) -> BoxSample: ...


@dataclass(frozen=True)
class BoxTrainTransform:
    """Random scale, mirror, crop and colours.

    The shorter side becomes `shorter_side` times a scale that is drawn from `scale_range`, as far
    as the longer side stays within `longer_side`; None leaves each out. The crop, of exactly
    `crop` pixels, (height, width) or one number, lies anywhere in the image; a smaller image is
    padded at the right and at the bottom. None is the whole image. Brightness, contrast and
    saturation are multiplied, in this order, by factors from 1 - `jitter` to 1 + `jitter`.

    Boxes are clipped to the crop. Those of which it holds less than the share `visible` become
    ignored ones; those outside are dropped. An image may be left without any.
    """

    crop: Size | None
    shorter_side: int | None = None
    longer_side: int | None = None
    scale_range: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.5
    """Probability of mirroring left and right."""
    jitter: float = 0.0
    visible: float = 0.25

    def __post_init__(self) -> None:
        _check_sizes(self, "crop", "shorter_side", "longer_side")
        low, high = self.scale_range
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"BoxTrainTransform: expected scale_range (low, high) with 0 < low <= high, "
                f"got {self.scale_range}"
            )
        for name in ("flip", "jitter", "visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"BoxTrainTransform: expected {name} from 0 to 1, got {getattr(self, name)}"
                )

    def __call__(self, sample: BoxSample, generator: torch.Generator | None = None) -> BoxSample:
        if generator is None:
            raise ValueError("BoxTrainTransform: expected a torch.Generator, got None")
        draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        low, high = self.scale_range
        factor = low + (high - low) * draw[0]
        sample = _scaled(sample, self.shorter_side, self.longer_side, factor)
        if self.crop is not None:
            sample = _cropped(sample, self.crop, draw[1], draw[2], self.visible)
        if draw[3] < self.flip:
            sample = flipped(sample)
        if self.jitter:
            factors = 1 + self.jitter * (2 * torch.rand(3, generator=generator) - 1)
            sample = replace(sample, image=colored(sample.image, *factors.tolist()))
        return sample


@dataclass(frozen=True)
class BoxValTransform:
    """The image with its shorter side at `shorter_side`, as far as the longer one stays within
    `longer_side` pixels; without `shorter_side`, larger images are reduced to `longer_side`, others
    stay. `crop` takes the centre of it as `BoxTrainTransform` takes a crop. None leaves each out.
    """

    crop: Size | None = None
    shorter_side: int | None = None
    longer_side: int | None = None
    visible: float = 0.25

    def __post_init__(self) -> None:
        _check_sizes(self, "crop", "shorter_side", "longer_side")

    def __call__(self, sample: BoxSample, generator: torch.Generator | None = None) -> BoxSample:
        sample = _scaled(sample, self.shorter_side, self.longer_side, 1.0)
        if self.crop is None:
            return sample
        return _cropped(sample, self.crop, 0.5, 0.5, self.visible)


class BoxBatch(NamedTuple):
    """Images with their boxes, as `DetectionTask` takes them."""

    images: Tensor
    """uint8 ``[N, 3, H, W]``, padded at the right and at the bottom with `FILL`."""
    boxes: Tensor
    """float32 ``[N, M, 4]``: left, top, right, bottom; M is the most of an image, or more."""
    labels: Tensor
    """int64 ``[N, M]``: the class, `PADDING`, or -2 - class for an ignored box."""
    areas: Tensor
    """float32 ``[N, M]``."""
    sizes: Tensor
    """int64 ``[N, 2]``: height and width of each image before the padding."""


def batch(
    samples: Sequence[BoxSample],
    transform: BoxTransform,
    generator: torch.Generator | None = None,
    *,
    size: tuple[int, int] | None = None,
    most: int = 0,
) -> BoxBatch:
    """Transformed samples, padded to the largest height and width of them, or to `size`, and to
    `most` boxes, if no image has more."""
    samples = [transform(sample, generator) for sample in samples]
    sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in samples]
    height, width = size or (max(h for h, _ in sizes), max(w for _, w in sizes))
    most = max(most, *(len(sample.labels) for sample in samples), 0)
    images = torch.tensor(FILL, dtype=torch.uint8).view(1, 3, 1, 1)
    images = images.repeat(len(samples), 1, height, width)
    boxes = torch.zeros(len(samples), most, 4)
    labels = torch.full((len(samples), most), PADDING)
    areas = torch.zeros(len(samples), most)
    for i, (sample, (h, w)) in enumerate(zip(samples, sizes, strict=True)):
        count = len(sample.labels)
        images[i, :, :h, :w] = sample.image
        boxes[i, :count] = sample.boxes
        labels[i, :count] = torch.where(sample.ignored, -2 - sample.labels, sample.labels)
        areas[i, :count] = sample.areas
    return BoxBatch(images, boxes, labels, areas, torch.tensor(sizes))


def resized(sample: BoxSample, size: tuple[int, int]) -> BoxSample:
    """An image of `size` = (height, width), bilinear, antialiased where it shrinks, with its
    boxes."""
    height, width = sample.image.shape[1:]
    if size == (height, width):
        return sample
    image = interpolate(sample.image[None], size, mode="bilinear", antialias=True)[0]
    x, y = size[1] / width, size[0] / height
    edges = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
    return replace(
        sample,
        image=image,
        boxes=torch.minimum(sample.boxes * torch.tensor([x, y, x, y]), edges),  # as rounded
        areas=sample.areas * (x * y),
    )


def flipped(sample: BoxSample) -> BoxSample:
    """Left and right exchanged."""
    width = sample.image.shape[2]
    left, top, right, bottom = sample.boxes.unbind(1)
    return replace(
        sample,
        image=sample.image.flip(-1),
        boxes=torch.stack([width - right, top, width - left, bottom], 1),
    )


def _scaled(
    sample: BoxSample, shorter_side: int | None, longer_side: int | None, factor: float
) -> BoxSample:
    height, width = sample.image.shape[1:]
    return resized(sample, scaled_size((height, width), shorter_side, longer_side, factor))


def scaled_size(
    size: tuple[int, int], shorter_side: int | None, longer_side: int | None, factor: float = 1.0
) -> tuple[int, int]:
    """(H, W) of an image with its shorter side at `shorter_side` times a factor, as far as the
    longer one stays within `longer_side`."""
    scale = factor if shorter_side is None else factor * shorter_side / min(size)
    if longer_side is not None:
        scale = min(scale, longer_side / max(size))
    # torch resizes no uint8 image to 1x1
    return max(2, round(size[0] * scale)), max(2, round(size[1] * scale))


def _cropped(
    sample: BoxSample, crop: Size, down: float, across: float, visible: float
) -> BoxSample:
    """A crop that lies `down` and `across`, from 0 to 1, in the room that it has."""
    height, width = pair(crop)
    image = sample.image
    top = int(down * (max(0, image.shape[1] - height) + 1))
    left = int(across * (max(0, image.shape[2] - width) + 1))
    image = image[:, top : top + height, left : left + width]
    shape = image.shape[1:]
    if shape != (height, width):
        padded = torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)
        padded[:, : shape[0], : shape[1]] = image
        image = padded
    boxes = sample.boxes - torch.tensor([left, top, left, top])
    boxes = torch.stack(
        [boxes[:, 0::2].clamp(0, shape[1]), boxes[:, 1::2].clamp(0, shape[0])], 2
    ).flatten(1)
    share = _area(boxes) / _area(sample.boxes)
    kept = (boxes[:, 2:] - boxes[:, :2] >= LEAST).all(1)
    return replace(
        sample,
        image=image,
        boxes=boxes[kept],
        labels=sample.labels[kept],
        ignored=(sample.ignored | (share < visible))[kept],
        areas=(sample.areas * share)[kept],
    )


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _check_sizes(owner: object, *names: str) -> None:
    for name in names:
        size = getattr(owner, name)
        if size is not None:
            check_size(type(owner).__name__, name, size)
