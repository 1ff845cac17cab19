"""PSNR and SSIM of a restoration method on whole images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nasfast.data.restoration import ImagePair, ImageSet
from nasfast.tasks.restoration.base import Predict, RestorationTask
from nasfast.tasks.restoration.fidelity import psnr, ssim
from nasfast.training.cost import measured_costs
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.utils.errors import UserError

EvalProtocol = Literal["whole", "overlap"]
PATCH, STRIDE = 64, 48


def reward(psnr: float, ssim: float) -> float:
    """SSIM + PSNR / 100, as published."""
    return ssim + psnr / 100


def costs(network: nn.Module, task: RestorationTask, images: ImageSet) -> dict[str, float]:
    """Costs for an input of the size that the first image has: see `measured_costs`."""
    return measured_costs(network, input_size(task, images), channels=images.channels)


def input_size(task: RestorationTask, images: ImageSet) -> tuple[int, int]:
    """Height and width of the input that the first image gives."""
    height, width = images.sizes[0]
    return height // task.scale, width // task.scale


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
    kept: tuple[Restored, ...] = ()
    """The images to keep, in the order given."""

    @property
    def psnr(self) -> float:
        """Mean of the images' PSNR, dB."""
        return math.fsum(image.psnr for image in self.images) / len(self.images)

    @property
    def ssim(self) -> float:
        """Mean of the images' SSIM."""
        return math.fsum(image.ssim for image in self.images) / len(self.images)

    @property
    def reward(self) -> float:
        """What a search maximises."""
        return reward(self.psnr, self.ssim)

    def as_dict(self) -> dict[str, float]:
        """The means by name."""
        return {"psnr": self.psnr, "ssim": self.ssim}

    def to_json(self) -> dict[str, Any]:
        """Means and values of each image, as JSON."""
        return {
            "protocol": self.protocol,
            **self.as_dict(),
            "images": [asdict(image) for image in self.images],
        }


@torch.inference_mode()
def evaluate(
    predict: Predict,
    task: RestorationTask,
    images: ImageSet,
    *,
    protocol: EvalProtocol = "whole",
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
    noise overestimates PSNR by about 0.5 dB. SSIM is zero-padded there, as IR-NAS has it.

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
        keep: indices of the images to return.

    Raises:
        UserError: no images, grey where colour is expected or the reverse, or an "overlap" that the
            task or the size of an image does not allow.
        NonFiniteLossError: a result is NaN or infinite.
        ValueError: a result of another size than the clean image.
    """
    if channels is not None and images.channels != channels:
        raise UserError(
            f"evaluate: expected images of {_channels(channels)}, which the method was made for, "
            f"got {_channels(images.channels)}; open {images.name} with {_channels(channels)}"
        )
    if not len(images):
        raise UserError("evaluate: expected at least one image, got none; choose another split")
    if protocol == "overlap" and task.scale > 1:
        raise UserError(
            f"evaluate: the protocol 'overlap' needs a task of scale 1, got {task.task} of scale "
            f"{task.scale}; use 'whole'"
        )
    task.check(images)
    run = _runner(predict, runtime)
    restore = {"whole": _restore_whole, "overlap": _restore_overlapping}[protocol]
    keep = [range(len(images))[index] for index in keep]
    scores, kept = [], {}
    for index in range(len(images)):
        pair = images[index]
        degraded, restored, clean = restore(run, task, pair, image_generator(seed, pair.name))
        if restored.shape != clean.shape:
            raise ValueError(
                f"evaluate: expected a restored image {list(clean.shape)} for {pair.name}, got "
                f"{list(restored.shape)}"
            )
        if not restored.isfinite().all():  # infinity would be clamped to white
            raise NonFiniteLossError(f"the network's output for {pair.name} is not finite")
        restored = restored.clamp(0, 1)
        similarity = ssim(restored[None], clean[None], padding=protocol == "overlap")
        ratio = psnr(restored[None], clean[None])
        scores.append(ImageScore(pair.name, ratio.item(), similarity.item()))
        if index in keep:
            kept[index] = Restored(pair.name, clean, degraded, restored)
    return Scores(protocol, tuple(scores), tuple(kept[index] for index in keep))


def image_generator(seed: int, name: str) -> torch.Generator:
    """CPU generator of one image, seeded by (seed, name) alone."""
    value = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(value, "big") >> 1)


Restoration = tuple[Tensor, Tensor, Tensor]  # degraded, restored, clean: float32 [c, H, W]


def _restore_whole(
    run: Predict, task: RestorationTask, pair: ImagePair, generator: torch.Generator
) -> Restoration:
    degraded, clean = task.pair(pair, generator)
    return degraded, run(degraded[None])[0], clean


def _restore_overlapping(
    run: Predict, task: RestorationTask, pair: ImagePair, generator: torch.Generator
) -> Restoration:
    height, width = pair.clean.shape[-2:]
    if min(height, width) < PATCH:
        raise UserError(
            f"evaluate: the protocol 'overlap' needs images of at least {PATCH}x{PATCH} pixels, "
            f"got {pair.name} of {height}x{width} (height x width); use 'whole'"
        )
    windows = [
        (..., slice(top, top + PATCH), slice(left, left + PATCH))
        for top in _starts(height)
        for left in _starts(width)
    ]
    pairs = [task.pair(pair.map(itemgetter(window)), generator) for window in windows]
    restored = run(torch.stack([degraded for degraded, _ in pairs]))
    clean = pair.clean.float() / 255
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
