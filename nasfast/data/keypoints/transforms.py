"""Crops of people: an affine map of the surroundings of a box to a fixed size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.data.base import IMAGENET_MEAN
from nasfast.data.keypoints.base import KeypointDataset, PersonSample
from nasfast.data.transforms import Size, check_size, colored, pair

FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
"""Colour of what lies beyond the image: 0, within a hundredth, once normalised."""
PADDING = 1.25
"""Sides of what a crop shows, in sides of the person's box."""


CELL = 32
"""Of the coarsest maps of encoders, in pixels."""


class PersonCrop(NamedTuple):
    """A person, cut out."""

    image: Tensor
    """uint8 ``[3, h, w]``."""
    joints: Tensor
    """float32 ``[J, 2]``: x, y in pixels of the crop; left and right joints of a mirrored crop are
    exchanged."""
    visible: Tensor
    """uint8 ``[J]``, as of `Person`."""
    to_image: Tensor
    """float32 ``[2, 3]``: the affine map from the crop's pixels to those of the image."""


class PersonTransform(Protocol):
    def __call__(
        self, sample: PersonSample, mirrored: Sequence[int], generator: torch.Generator | None
    ) -> PersonCrop: ...


@dataclass(frozen=True)
class PersonTrainTransform:
    """A crop of a person, scaled, turned and mirrored at random about the centre of its box.

    The box is widened to the shape of the crop and to `PADDING` times its size. The person is then
    larger by a factor that is drawn from `scale_range`, and turned by up to `turn` degrees.
    Brightness, contrast and saturation are multiplied, in this order, by factors from 1 - `jitter`
    to 1 + `jitter`.
    """

    crop: Size
    scale_range: tuple[float, float] = (0.7, 1.4)
    turn: float = 40.0
    flip: float = 0.5
    """Probability of mirroring left and right."""
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_size("PersonTrainTransform", "crop", self.crop)
        low, high = self.scale_range
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"PersonTrainTransform: expected scale_range (low, high) with 0 < low <= high, "
                f"got {self.scale_range}"
            )
        for name, most in (("turn", 180.0), ("flip", 1.0), ("jitter", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(
                    f"PersonTrainTransform: expected {name} from 0 to {most:g}, got {value}"
                )

    def __call__(
        self,
        sample: PersonSample,
        mirrored: Sequence[int],
        generator: torch.Generator | None = None,
    ) -> PersonCrop:
        if generator is None:
            raise ValueError("PersonTrainTransform: expected a torch.Generator, got None")
        draw = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        low, high = self.scale_range
        factor = low + (high - low) * draw[0]
        angle = math.radians(self.turn) * (2 * draw[1] - 1)
        to_crop = person_map(sample.person.box, pair(self.crop), factor, angle)
        crop = _cut(sample, to_crop, pair(self.crop))
        if draw[2] < self.flip:
            crop = flipped(crop, mirrored)
        if self.jitter:
            factors = 1 + self.jitter * (2 * torch.rand(3, generator=generator) - 1)
            crop = crop._replace(image=colored(crop.image, *factors.tolist()))
        return crop


@dataclass(frozen=True)
class PersonValTransform:
    """A crop of a person as it is: the box, widened to the shape of the crop and to `PADDING` times
    its size."""

    crop: Size

    def __post_init__(self) -> None:
        check_size("PersonValTransform", "crop", self.crop)

    def __call__(
        self,
        sample: PersonSample,
        mirrored: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> PersonCrop:
        size = pair(self.crop)
        return _cut(sample, person_map(sample.person.box, size), size)


class PersonBatch(NamedTuple):
    """Crops of people; each but the images as of `PersonCrop`, with the batch's axis first."""

    images: Tensor
    """uint8 ``[N, 3, h, w]``."""
    joints: Tensor
    visible: Tensor
    to_image: Tensor


def person_size(height: int) -> tuple[int, int]:
    """(H, W) of crops of about a height: three quarters as wide, as in Simple Baselines, and both
    the nearest multiples of 32, which networks need no padding for."""
    rows = max(1, round(height / CELL))
    return CELL * rows, CELL * max(1, round(0.75 * rows))


def batch(
    dataset: KeypointDataset,
    indices: Sequence[int],
    transform: PersonTransform,
    generator: torch.Generator | None = None,
) -> PersonBatch:
    """Crops of some people, all of one size."""
    mirrored = dataset.skeleton.mirrored
    crops = [transform(dataset[index], mirrored, generator) for index in indices]
    return PersonBatch(*(torch.stack(values) for values in zip(*crops, strict=True)))


def person_map(
    box: Sequence[float], size: tuple[int, int], factor: float = 1.0, angle: float = 0.0
) -> Tensor:
    """The affine map from an image to the crop of a person, float64 ``[2, 3]``.

    Args:
        box: left, top, right, bottom in pixels of the image.
        size: (height, width) of the crop.
        factor: of the crop's scale, beside what fits the box.
        angle: by which the image is turned about the box's centre, in radians, clockwise.
    """
    left, top, right, bottom = box
    height, width = size
    scale = factor / PADDING * min(width / (right - left), height / (bottom - top))
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    x, y = (left + right) / 2, (top + bottom) / 2
    return torch.tensor(
        [
            [cos, -sin, width / 2 - cos * x + sin * y],
            [sin, cos, height / 2 - sin * x - cos * y],
        ],
        dtype=torch.float64,
    )


def inverse(affine: Tensor) -> Tensor:
    """Of an affine map ``[2, 3]``."""
    turned = torch.linalg.inv(affine[:, :2])
    return torch.cat([turned, -turned @ affine[:, 2:]], 1)


def mapped(points: Tensor, affine: Tensor) -> Tensor:
    """Points ``[.., K, 2]`` by affine maps ``[.., 2, 3]``."""
    return points @ affine[..., :2].mT + affine[..., 2][..., None, :]


def cropped(image: Tensor, to_crop: Tensor, size: tuple[int, int]) -> Tensor:
    """The crop of an image uint8 ``[3, H, W]`` by an affine map, uint8 ``[3, h, w]``.

    Pixels are bilinear; an image that shrinks to less than half is averaged first. What lies beyond
    the image is filled with `FILL`.
    """
    to_image = inverse(to_crop)
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    places = mapped(torch.cartesian_prod(y, x).flip(1), to_image)  # [h * w, 2]
    reduction = max(1, int(to_image[:, :2].det().sqrt()))
    edges = torch.tensor([image.shape[2], image.shape[1]])
    low = (places.amin(0) - reduction - 1).floor().long().clamp(min=0).minimum(edges - 1)
    high = (places.amax(0) + reduction + 1).ceil().long().clamp(min=1).minimum(edges)
    high = high.maximum(low + 1)
    fill = torch.tensor(FILL, dtype=torch.float32)[:, None, None]
    part = image[:, low[1] : high[1], low[0] : high[0]].float() - fill
    if reduction > 1:
        part = F.avg_pool2d(part, reduction, ceil_mode=True)
    sides = torch.tensor([part.shape[2], part.shape[1]])
    grid = 2 * (places - low) / reduction / sides - 1
    sampled = F.grid_sample(part[None], grid.float().view(1, *size, 2), align_corners=False)[0]
    return (sampled + fill).round_().clamp_(0, 255).byte()


def flipped(crop: PersonCrop, mirrored: Sequence[int]) -> PersonCrop:
    """Left and right exchanged, of the picture and of the joints' names."""
    width = crop.image.shape[2]
    x, y = crop.joints.unbind(1)
    mirror = torch.tensor([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    order = list(mirrored)
    return PersonCrop(
        crop.image.flip(-1),
        torch.stack([width - x, y], 1)[order],
        crop.visible[order],
        crop.to_image @ mirror,
    )


def _cut(sample: PersonSample, to_crop: Tensor, size: tuple[int, int]) -> PersonCrop:
    person = sample.person
    return PersonCrop(
        cropped(sample.image, to_crop, size),
        mapped(person.joints.double(), to_crop).float(),
        person.visible,
        inverse(to_crop).float(),
    )
