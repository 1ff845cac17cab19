"""Patches that restoration networks are trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nasfast.data.restoration import ImagePair, ImageSet
from nasfast.tasks.restoration.base import RestorationTask
from nasfast.utils.errors import UserError

RESCALE = (0.8, 1.2)


def patch_side(side: int, reduction: int, images: ImageSet) -> int:
    """The side of patches for a network that reduces images: so many times as long, as far as the
    smallest image goes. UserError where that is no more than a block."""
    least = min(map(min, images.sizes), default=side)
    found = max(side, min(reduction * side, least))
    if 1 < reduction >= found:
        raise UserError(
            f"network.reduction: expected blocks smaller than the patches of {found} pixels, got "
            f"{reduction}; lower it"
        )
    return found


class ImagePatches:
    """Random patches of images, as pairs of a degraded input and a clean target.

    With ``augment``, as IR-NAS trains: with probability 1/2 the image is rescaled by a factor
    from U(0.8, 1.2) (bicubic; raised where the crop would not fit), a random crop is turned by a
    multiple of 90 degrees and with probability 1/2 mirrored left to right. Pairs are not turned:
    rain falls. Without ``augment``, only the random crop. The caller's generator draws everything.

    Args:
        images: where the patches are cut.
        task: degrades them.
        crop: side of the target patches in pixels, a multiple of the task's scale.
        augment: rescale, turn and mirror.
        crops: patches of each image in an epoch (IR-NAS: 1).
    """

    def __init__(
        self,
        images: ImageSet,
        task: RestorationTask,
        crop: int,
        *,
        augment: bool = True,
        crops: int = 1,
    ) -> None:
        if crop < 1 or crop % task.scale:
            raise UserError(
                f"crop: expected a positive multiple of the scale {task.scale}, got {crop}"
            )
        if crops < 1:
            raise UserError(f"crops: expected at least 1 patch of each image, got {crops}")
        for name, size in zip(images.names, images.sizes, strict=True):
            if min(size) < crop:
                raise UserError(
                    f"crop: expected images of at least {crop}x{crop} pixels, the size of "
                    f"a patch, got {name} of {size[0]}x{size[1]} (height x width); choose a "
                    "smaller patch or leave the image out"
                )
        task.check(images)
        self.images, self.task, self.crop = images, task, crop
        self.augment, self.crops = augment, crops

    def __len__(self) -> int:
        """Patches of an epoch; patch i is of image i modulo the number of images."""
        return len(self.images) * self.crops

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Shuffled batches of indices; the last may be smaller."""
        yield from torch.split(torch.randperm(len(self), generator=generator), batch_size)

    def batch(
        self, indices: Sequence[int] | Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Inputs ``[N, c, crop / scale, crop / scale]`` and targets ``[N, c, crop, crop]``,
        float32, channels last."""
        draws = torch.rand(len(indices), 6, generator=generator, dtype=torch.float64).tolist()
        pairs = []
        for index, draw in zip(torch.as_tensor(indices).tolist(), draws, strict=True):
            patch = self._patch(self.images[index % len(self.images)], draw)
            pairs.append(self.task.pair(patch, generator))
        inputs, targets = (torch.stack(images) for images in zip(*pairs, strict=True))
        last = torch.channels_last
        return inputs.contiguous(memory_format=last), targets.contiguous(memory_format=last)

    def _patch(self, images: ImagePair, draw: Sequence[float]) -> ImagePair:
        """The same patch ``[c, crop, crop]`` of the clean image and what comes with it."""
        height, width = images.clean.shape[-2:]
        scale = 1.0
        if self.augment and draw[0] < 0.5:
            low, high = RESCALE
            scale = max(low + (high - low) * draw[1], self.crop / min(height, width))
        top = int(draw[2] * (round(scale * height) - self.crop + 1))
        left = int(draw[3] * (round(scale * width) - self.crop + 1))
        turns = int(4 * draw[4]) if self.augment and images.degraded is None else 0
        mirrored = self.augment and draw[5] < 0.5

        def cut(image: Tensor) -> Tensor:
            patch = rescaled_crop(image, scale, top, left, self.crop).rot90(turns, (1, 2))
            return patch.flip(2) if mirrored else patch

        return images.map(cut)


def rescaled_crop(image: Tensor, scale: float, top: int, left: int, crop: int) -> Tensor:
    """The window at (top, left) of an image rescaled by ``scale`` (bicubic, antialiased).

    uint8, or float32 as depth is, ``[c, H, W]`` to ``[c, crop, crop]``. Only the pixels that the
    window depends on are read, so that the cost does not grow with the image.
    """
    if scale == 1:
        return image[:, top : top + crop, left : left + crop]
    height, width = image.shape[-2:]
    rows, down = _bicubic(height, round(scale * height), top, crop)
    columns, across = _bicubic(width, round(scale * width), left, crop)
    window: Tensor = down @ image[:, rows, columns].float() @ across.T
    return window if image.is_floating_point() else window.round().clamp(0, 255).byte()


def _bicubic(side: int, scaled: int, start: int, count: int) -> tuple[slice, Tensor]:
    """Pixels of a side, and their weights ``[count, n]`` in those from ``start`` on after it was
    rescaled: Keys' kernel with a = -0.5, widened by the factor of a reduction, as in PIL."""
    step = side / scaled
    reach = 2 * max(step, 1.0)
    centers = (start + 0.5 + torch.arange(count, dtype=torch.float64)) * step - 0.5
    first = max(0, math.floor(centers[0].item() - reach))
    last = min(side, math.ceil(centers[-1].item() + reach) + 1)
    t = (torch.arange(first, last) - centers[:, None]).abs() * (2 / reach)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
    return slice(first, last), (weights / weights.sum(1, keepdim=True)).float()
