"""Image restoration: degraded inputs and clean targets, loss, and evaluation on whole images."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.data.restoration import Picture, Pictures
from nasfast.tasks.restoration.fidelity import psnr, ssim
from nasfast.training.loop import Runtime

Predict = Callable[[Tensor], Tensor]
"""Degraded images ``[N, c, h, w]`` to restored images ``[N, c, scale * h, scale * w]``."""
Protocol = Literal["whole", "overlap"]
SSIM_FLOOR = 1e-3
RESCALE = (0.8, 1.2)
PATCH, STRIDE = 64, 48


@dataclass(frozen=True)
class RestorationTask(ABC):
    """How clean images become the inputs of a network. A subclass is a frozen dataclass with the
    task's settings as fields and a line in ``nasfast.tasks.restoration.TASKS``."""

    name: ClassVar[str]
    takes_pairs: ClassVar[bool] = False
    """Whether the task also learns from real degraded images."""

    @property
    def scale(self) -> int:
        """Factor from the input's to the target's sides."""
        return 1

    @property
    @abstractmethod
    def label(self) -> str:
        """The task and its settings in a few words, for tables."""

    @abstractmethod
    def degrade(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """A degraded copy of a clean image: float32 ``[c, H, W]`` in [0, 1] to ``[c, h, w]``."""

    def baselines(self) -> dict[str, Predict]:
        """Methods without training to compare with, by the name in tables."""
        return {"identity": lambda images: images}

    def conditions(self) -> tuple[RestorationTask, ...]:
        """The tasks of one fixed difficulty that a table has a column for."""
        return (self,)

    def describe(self) -> dict[str, Any]:
        """The task as JSON; ``nasfast.tasks.restoration.task_from_json`` reads it."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"task": self.name} | settings

    def check(self, pictures: Pictures) -> None:
        """Raise ValueError where the task cannot learn from these pictures."""
        if pictures.paired and not self.takes_pairs:
            raise ValueError(
                f"{self.name}: expected clean images, which it degrades itself, got the pairs of "
                f"{pictures.name}; give the folder of the clean images alone"
            )

    def pair(
        self, clean: Tensor, degraded: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Input ``[c, h, w]`` and target ``[c, scale * h, scale * w]``, float32, of uint8 images.

        The target is cut at the bottom and right to a multiple of the scale. ``degraded``, where
        there is a real one, is the input, divided by 255 and no more.
        """
        height, width = (side - side % self.scale for side in clean.shape[-2:])
        target = clean[:, :height, :width].float() / 255
        if degraded is None:
            return self.degrade(target, generator), target
        return degraded.float() / 255, target


class ImagePatches:
    """Random patches of images, as pairs of a degraded input and a clean target.

    With ``augment``, as IR-NAS trains: with probability 1/2 the image is rescaled by a factor
    from U(0.8, 1.2) (bicubic; raised where the crop would not fit), a random crop is turned by a
    multiple of 90 degrees and with probability 1/2 mirrored left to right. Pairs are not turned:
    rain falls. Without ``augment``, the random crop alone. All chance comes from the caller's
    generator.

    Args:
        images: where the patches are cut.
        task: degrades them.
        crop: side of the target patches in pixels, a multiple of the task's scale.
        augment: rescale, turn and mirror.
        crops: patches of each image in an epoch (IR-NAS: 1).
    """

    def __init__(
        self,
        images: Pictures,
        task: RestorationTask,
        crop: int,
        *,
        augment: bool = True,
        crops: int = 1,
    ) -> None:
        if crop < 1 or crop % task.scale:
            raise ValueError(
                f"ImagePatches: expected crop to be a positive multiple of the scale "
                f"{task.scale}, got {crop}"
            )
        if crops < 1:
            raise ValueError(f"ImagePatches: expected crops of at least 1, got {crops}")
        for name, size in zip(images.names, images.sizes, strict=True):
            if min(size) < crop:
                raise ValueError(
                    f"ImagePatches: expected images of at least {crop}x{crop} pixels, the size of "
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
            planes = self._patch(self.images[index % len(self.images)], draw)
            pairs.append(self.task.pair(planes[0], planes[1] if planes[1:] else None, generator))
        inputs, targets = (torch.stack(images) for images in zip(*pairs, strict=True))
        last = torch.channels_last
        return inputs.contiguous(memory_format=last), targets.contiguous(memory_format=last)

    def _patch(self, picture: Picture, draw: Sequence[float]) -> list[Tensor]:
        """The same patch, uint8 ``[c, crop, crop]``, of the clean and any degraded image."""
        height, width = picture.clean.shape[-2:]
        scale = 1.0
        if self.augment and draw[0] < 0.5:
            low, high = RESCALE
            scale = max(low + (high - low) * draw[1], self.crop / min(height, width))
        top = int(draw[2] * (round(scale * height) - self.crop + 1))
        left = int(draw[3] * (round(scale * width) - self.crop + 1))
        planes = [picture.clean] if picture.degraded is None else [picture.clean, picture.degraded]
        patches = [rescaled_crop(image, scale, top, left, self.crop) for image in planes]
        if self.augment and picture.degraded is None:
            patches = [patch.rot90(int(4 * draw[4]), (1, 2)) for patch in patches]
        if self.augment and draw[5] < 0.5:
            patches = [patch.flip(2) for patch in patches]
        return patches


def rescaled_crop(image: Tensor, scale: float, top: int, left: int, crop: int) -> Tensor:
    """The window at (top, left) of an image rescaled by ``scale`` (bicubic, antialiased).

    uint8 ``[c, H, W]`` to ``[c, crop, crop]``. Only the pixels that the window depends on are
    read, so that the cost does not grow with the image.
    """
    if scale == 1:
        return image[:, top : top + crop, left : left + crop]
    height, width = image.shape[-2:]
    rows, down = _bicubic(height, round(scale * height), top, crop)
    columns, across = _bicubic(width, round(scale * width), left, crop)
    window: Tensor = down @ image[:, rows, columns].float() @ across.T
    return window.round().clamp(0, 255).byte()


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


@dataclass(frozen=True)
class RestorationLoss:
    """(mean squared error + ``ssim_weight`` * log10(1 / SSIM)) / 2, the loss of IR-NAS.

    The two terms are averaged, not added, as the published learning rates were tuned with it; a
    weight of 0 still halves the error. SSIM is the mean over the batch, with zero padding. Below
    1e-3, where the logarithm would grow without bound or be undefined, it counts as 1e-3 and only
    the squared error teaches.
    """

    ssim_weight: float = 0.6
    """lambda of the paper: 0.6 or 0.5 for denoising, 0 for a squared error alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.ssim_weight < math.inf:
            raise ValueError(
                f"RestorationLoss: expected ssim_weight (lambda) of at least 0 and finite, got "
                f"{self.ssim_weight}"
            )

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Loss of images ``[N, C, H, W]``, a float32 scalar, also under autocast."""
        prediction = prediction.float()
        loss = F.mse_loss(prediction, target)
        if self.ssim_weight:
            similarity = ssim(prediction, target, padding=True).mean().clamp(min=SSIM_FLOOR)
            loss = loss - self.ssim_weight * similarity.log10()
        return loss / 2


@dataclass(frozen=True)
class ImageScore:
    """Metrics of one image."""

    name: str
    psnr: float
    ssim: float


@dataclass(frozen=True, eq=False)
class Restored:
    """One evaluated image, each ``[c, H, W]`` float32; restored clamped to [0, 1]."""

    name: str
    clean: Tensor
    degraded: Tensor
    restored: Tensor


@dataclass(frozen=True)
class Scores:
    """Metrics of a restoration method on a set of images."""

    protocol: str
    images: tuple[ImageScore, ...]
    pictures: tuple[Restored, ...] = ()
    """The images that were asked for, in the order asked."""

    @property
    def psnr(self) -> float:
        """Mean of the images' PSNR, dB."""
        return math.fsum(image.psnr for image in self.images) / len(self.images)

    @property
    def ssim(self) -> float:
        """Mean of the images' SSIM."""
        return math.fsum(image.ssim for image in self.images) / len(self.images)

    def as_dict(self) -> dict[str, Any]:
        """Means and values of each image, as JSON."""
        return {
            "protocol": self.protocol,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "images": [asdict(image) for image in self.images],
        }


@torch.inference_mode()
def evaluate(
    predict: Predict,
    task: RestorationTask,
    images: Pictures,
    *,
    protocol: Protocol = "whole",
    seed: int = 0,
    channels: int | None = None,
    runtime: Runtime | None = None,
    keep: Sequence[int] = (),
) -> Scores:
    """PSNR and SSIM of a method, per image, then their means.

    "whole": one degraded version of each whole image, drawn from (seed, name of the image), so
    that it depends on no other image and on no order; SSIM of the windows inside the image.

    "overlap", for comparison with the figures of IR-NAS only: patches of 64x64 at a stride of
    48, each with its own degradation, averaged where they overlap. Averaging over independent
    noise flatters PSNR by about 0.5 dB. SSIM is zero-padded there, as IR-NAS has it.

    In both the restored image is clamped to [0, 1] and not rounded, the degraded one is as the
    task gives it, and metrics cover all channels and every pixel.

    Args:
        predict: the method; in evaluation mode if it is a network.
        task: degrades the images.
        images: clean images or pairs.
        protocol: "whole" or "overlap".
        seed: of the degradation.
        channels: image channels that the method was made for; None where it takes any.
        runtime: device and precision that the method runs with; None: the CPU, float32.
        keep: indices of the images to give back.

    Raises:
        ValueError: no images, grey where colour is expected or the reverse, unknown protocol, an
            "overlap" that the task or the size of an image does not allow, or a result of
            another size than the clean image.
    """
    if protocol not in ("whole", "overlap"):
        raise ValueError(f"evaluate: expected protocol 'whole' or 'overlap', got {protocol!r}")
    if channels is not None and images.channels != channels:
        raise ValueError(
            f"evaluate: expected images of {_channels(channels)}, which the method was made for, "
            f"got {_channels(images.channels)}; open {images.name} with {_channels(channels)}"
        )
    if not len(images):
        raise ValueError("evaluate: expected at least one image, got none")
    if protocol == "overlap" and task.scale > 1:
        raise ValueError(
            f"evaluate: the protocol 'overlap' wants a task of scale 1, got {task.name} of scale "
            f"{task.scale}; use 'whole'"
        )
    task.check(images)
    run = _runner(predict, runtime)
    restore = _restore_whole if protocol == "whole" else _restore_overlapping
    keep = [range(len(images))[index] for index in keep]
    scores, kept = [], {}
    for index in range(len(images)):
        picture = images[index]
        generator = image_generator(seed, picture.name)
        degraded, restored, clean = restore(run, task, picture, generator)
        if restored.shape != clean.shape:
            raise ValueError(
                f"evaluate: expected a restored image {list(clean.shape)} for {picture.name}, got "
                f"{list(restored.shape)}"
            )
        restored = restored.clamp(0, 1)
        similarity = ssim(restored[None], clean[None], padding=protocol == "overlap")
        ratio = psnr(restored[None], clean[None])
        scores.append(ImageScore(picture.name, ratio.item(), similarity.item()))
        if index in keep:
            kept[index] = Restored(picture.name, clean, degraded, restored)
    return Scores(protocol, tuple(scores), tuple(kept[index] for index in keep))


def image_generator(seed: int, name: str) -> torch.Generator:
    """The chance of one image: a CPU generator that (seed, name) alone determine."""
    value = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(value, "big") >> 1)


Restoration = tuple[Tensor, Tensor, Tensor]  # degraded, restored, clean: float32 [c, H, W]


def _restore_whole(
    run: Predict, task: RestorationTask, picture: Picture, generator: torch.Generator
) -> Restoration:
    degraded, clean = task.pair(picture.clean, picture.degraded, generator)
    return degraded, run(degraded[None])[0], clean


def _restore_overlapping(
    run: Predict, task: RestorationTask, picture: Picture, generator: torch.Generator
) -> Restoration:
    height, width = picture.clean.shape[-2:]
    if min(height, width) < PATCH:
        raise ValueError(
            f"evaluate: the protocol 'overlap' wants images of at least {PATCH}x{PATCH} pixels, "
            f"got {picture.name} of {height}x{width} (height x width); use 'whole'"
        )
    windows = [
        (..., slice(top, top + PATCH), slice(left, left + PATCH))
        for top in _starts(height)
        for left in _starts(width)
    ]
    pairs = [
        task.pair(
            picture.clean[window],
            None if picture.degraded is None else picture.degraded[window],
            generator,
        )
        for window in windows
    ]
    restored = run(torch.stack([degraded for degraded, _ in pairs]))
    clean = picture.clean.float() / 255
    sums, input_sums, count = (torch.zeros_like(clean) for _ in range(3))
    for window, patch, (degraded, _) in zip(windows, restored, pairs, strict=True):
        sums[window] += patch
        input_sums[window] += degraded
        count[window] += 1
    return input_sums / count, sums / count, clean


def _starts(side: int) -> list[int]:
    """Where the patches along a side begin; the last one ends at the border."""
    return [*range(0, side - PATCH, STRIDE), side - PATCH]


def _runner(predict: Predict, runtime: Runtime | None) -> Predict:
    """``predict`` on the runtime's device and in its precision, float32 results on the CPU."""

    def run(images: Tensor) -> Tensor:
        if runtime is None:
            return predict(images).float().cpu()
        runtime.heartbeat()
        images = images.to(runtime.device).contiguous(memory_format=torch.channels_last)
        with runtime.autocast():
            return predict(images).float().cpu()

    return run


def _channels(count: int) -> str:
    return "1 channel (grey)" if count == 1 else f"{count} channels"
