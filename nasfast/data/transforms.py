"""Joint augmentation of image and mask (Fast NAS, CVPR 2019: training of candidates)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nasfast.data.base import Sample, Samples
from nasfast.utils.errors import UserError

Size = int | tuple[int, int]


class Transform(Protocol):
    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample: ...


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, mirror, crop and colours; never pads.

    The scale, drawn from `scale_range`, is raised where the shorter side would fall below
    `shorter_side` or a side below the crop. Sizes are pixels, (height, width) or one number.
    Brightness, contrast and saturation are multiplied, in this order, by factors from 1 - `jitter`
    to 1 + `jitter`.
    """

    crop: Size
    shorter_side: int
    scale_range: tuple[float, float] = (0.7, 1.4)
    mirror: bool = True
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_size("TrainTransform", "crop", self.crop)
        check_size("TrainTransform", "shorter_side", self.shorter_side)
        low, high = self.scale_range
        if not 0 < low <= high < float("inf"):
            raise ValueError(
                f"TrainTransform: expected scale_range (low, high) with 0 < low <= high, "
                f"got {self.scale_range}"
            )
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"TrainTransform: expected jitter from 0 to 1, got {self.jitter}")

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        if generator is None:
            raise ValueError("TrainTransform: expected a torch.Generator, got None")
        draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        low, high = self.scale_range
        crop_h, crop_w = pair(self.crop)
        height, width = sample.mask.shape
        scale = max(
            low + (high - low) * draw[0],
            self.shorter_side / min(height, width),
            crop_h / height,
            crop_w / width,
        )
        sample = _resize(sample, scale)
        height, width = sample.mask.shape
        top = int(draw[1] * (height - crop_h + 1))
        left = int(draw[2] * (width - crop_w + 1))
        flip = self.mirror and draw[3] < 0.5
        sample = _crop(sample, top, left, crop_h, crop_w, flip)
        if not self.jitter:
            return sample
        factors = 1 + self.jitter * (2 * torch.rand(3, generator=generator) - 1)
        return sample.seen(colored(sample.image, *factors.tolist()), sample.mask)


@dataclass(frozen=True)
class ValTransform:
    """Centre crop of `size` pixels; a smaller image is enlarged first. None: the whole image."""

    size: Size | None

    def __post_init__(self) -> None:
        if self.size is not None:
            check_size("ValTransform", "size", self.size)

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        if self.size is None:
            return sample
        crop_h, crop_w = pair(self.size)
        height, width = sample.mask.shape
        sample = _resize(sample, max(1.0, crop_h / height, crop_w / width))
        height, width = sample.mask.shape
        return _crop(sample, (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w)


def batch(
    dataset: Samples,
    indices: Sequence[int],
    transform: Transform,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Transformed samples as images uint8 [N, 3, h, w] and masks [N, h, w]."""
    samples = [transform(sample, generator) for sample in dataset.load(indices)]
    sizes = sorted({tuple(s.mask.shape) for s in samples})
    if len(sizes) != 1:
        raise ValueError(
            f"batch: expected one or more samples of one size, got {len(samples)} samples of sizes "
            f"{sizes}; crop them, or take one at a time"
        )
    return torch.stack([s.image for s in samples]), torch.stack([s.mask for s in samples])


def _resize(sample: Sample, scale: float) -> Sample:
    """Bilinear image (no antialiasing) and nearest mask, both with half-pixel centres."""
    size = [round(side * scale) for side in sample.mask.shape]
    if size == list(sample.mask.shape):
        return sample
    image = interpolate(sample.image[None], size, mode="bilinear", align_corners=False)[0]
    mask = interpolate(sample.mask[None, None], size, mode="nearest-exact")[0, 0]
    return sample.seen(image, mask, scale)


def _crop(
    sample: Sample, top: int, left: int, height: int, width: int, flip: bool = False
) -> Sample:
    window = (..., slice(top, top + height), slice(left, left + width))
    image, mask = sample.image[window], sample.mask[window]
    return sample.seen(image.flip(-1), mask.flip(-1)) if flip else sample.seen(image, mask)


def colored(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """An image uint8 ``[3, H, W]``: distances to black, to its mean grey and to each pixel's grey
    (ITU-R 601 luma) are multiplied by the factors."""

    def grey(pixels: Tensor) -> Tensor:  # [H, W]
        return 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]

    pixels = (image.float() * brightness).clamp_(0, 255)
    mean = grey(pixels).mean(dtype=torch.float64).float()  # whatever the number of threads
    pixels = torch.lerp(mean, pixels, contrast).clamp_(0, 255)
    pixels = torch.lerp(grey(pixels), pixels, saturation).clamp_(0, 255)
    return pixels.round_().byte()


def pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def check_size(owner: str, argument: str, size: Size) -> None:
    if min(pair(size)) < 2:  # torch resizes no uint8 image to 1x1
        raise UserError(f"{owner}: expected {argument} of at least 2 pixels, got {size}")
