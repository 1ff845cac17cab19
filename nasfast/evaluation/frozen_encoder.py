"""Features of a frozen encoder, computed once for all candidates of a dense task."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nasfast.cache import CacheConfig, FeatureCache, tensors_fingerprint
from nasfast.encoders import Encoder
from nasfast.evaluation.candidate import timed
from nasfast.models.decoders import DenseNetwork
from nasfast.tasks.base import DenseTask, Targets, prepare_images
from nasfast.tasks.processor import STRIDE
from nasfast.training.cost import measured_costs
from nasfast.training.loop import Runtime, in_order
from nasfast.utils.config import Bounded, Count, Pixels
from nasfast.utils.seeding import derive_seed

Caches = tuple[FeatureCache, FeatureCache]
"""Features that candidates are trained on, and that they are scored on."""

TEACHER = "teacher"
FINEST = 4
"""Stride of the maps at whose resolution the targets of training are kept."""


@dataclasses.dataclass(frozen=True)
class FrozenEncoderConfig(Bounded):
    """What features are computed of."""

    samples: Count = 4000
    """Crops in the cache, each augmented once for the whole search."""
    crop: Pixels = 256
    """Side of a crop, in pixels."""
    shorter_side: Pixels = 300
    """Images are enlarged so that their shorter side has at least this many pixels."""


@dataclasses.dataclass(frozen=True)
class FeatureBatch:
    """Features of some samples, valid until the next batch is asked for."""

    taps: list[Tensor]  # [N, C_i, H_i, W_i] each
    targets: Targets
    teacher: Tensor | None  # [N, outputs, h, w]
    """Output of the network to imitate."""


class FrozenEncoder:
    """An encoder that no candidate of a search changes, and the cache of what it gives.

    Args:
        task: data and targets.
        encoder: gives the features; it is frozen and placed on the device.
        samples: how many crops there are to train on.
        transforms: to crops to train on, with the side or (height, width) of them as ``crop``, and
            of the images that candidates are scored on, which must then share one size;
            dataclasses, whose text says what they do.
        runtime: device and precision.
        seed: decides the crops.
        cache: where and how the features are kept; its bound holds for those of training and of
            validation together.
        caches: those features, of another object with the same arguments (`caches_on`).
        teacher: network whose output candidates imitate.

    Attributes:
        inputs: SHA-256 of everything that was read: encoder, data, teacher.
        samples: how many crops there are to train on.
        seconds: wall time, by step.
    """

    def __init__(
        self,
        task: DenseTask[Any],
        encoder: Encoder,
        samples: int,
        transforms: tuple[Any, Any],
        runtime: Runtime,
        *,
        seed: int,
        cache: CacheConfig,
        caches: Caches | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.task, self.runtime = task, runtime
        self.encoder = encoder
        self.train_transform, self.val_transform = transforms
        self.samples, self._seed, self._teacher = samples, seed, teacher
        for network in (self.encoder, teacher):
            if network is not None:
                runtime.place(network).eval().requires_grad_(False)
        self._taps = [f"tap{i}" for i in range(len(encoder.feature_info))]
        self.inputs = {
            "encoder": tensors_fingerprint(encoder.state_dict()),
            "training data": task.search_train.fingerprint(),
            "validation data": task.search_val.fingerprint(),
            "teacher": tensors_fingerprint(teacher.state_dict()) if teacher else "none",
        }
        crop = self.train_transform.crop
        sides = (crop,) if isinstance(crop, int) else crop
        if any(side % STRIDE for side in (*sides, *self.val_size)):
            self.inputs["padding of the images"] = str(STRIDE)
        self.seconds: dict[str, float] = {}
        with timed(self.seconds, "encode"):
            self._train_cache, self._val_cache = caches or self._fill(cache)

    def _fill(self, cache: CacheConfig) -> Caches:
        half = torch.bfloat16 if self.runtime.dtype == torch.bfloat16 else torch.float16
        self._dtype = half if cache.storage == "auto" else torch.float32
        key = {
            "encoder": self.inputs["encoder"],
            "dtype": str(self._dtype).removeprefix("torch."),
            "precision": self.runtime.precision,
            "padded to": str(STRIDE),
        }
        if self.task.assignment:
            key["assignment"] = self.task.assignment
        train_key = key | {
            "data": self.inputs["training data"],
            "preprocessing": (
                f"{self.samples} frames drawn, {self.train_transform}, seed {self._seed}"
            ),
            "teacher": self.inputs["teacher"],
        }
        val_key = key | {
            "data": self.inputs["validation data"],
            "preprocessing": str(self.val_transform),
        }
        load, device = FeatureCache.load_or_build, self.runtime.device
        beat, count = self.runtime.heartbeat, len(self.task.search_val)
        val = load(val_key, count, self._encode_val, cache, beat, chunk=8).to(device)
        if cache.memory_bytes is not None:  # the rest is for the training features
            rest = max(0, cache.memory_bytes - val.resident_bytes)
            cache = dataclasses.replace(cache, memory=f"{rest}B")
        train = load(train_key, self.samples, self._encode_train, cache, beat).to(device)
        return train, val

    @functools.cached_property
    def _order(self) -> Tensor:
        """Frames in the order in which crops are taken from them."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "crops"))
        return torch.randperm(len(self.task.search_train), generator=generator)

    @torch.inference_mode()
    def _encode_train(self, indices: Tensor) -> dict[str, Tensor]:
        loaded = []
        for index in indices.tolist():
            # of its own, so that a crop does not depend on who encodes it
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "crop", index))
            frame = int(self._order[index % len(self._order)])
            frames = self.task.search_train
            loaded.append(self.task.load_padded(frames, [frame], self.train_transform, generator))
        images = torch.cat([images for images, _ in loaded])
        targets = {
            name: torch.cat([targets[name] for _, targets in loaded]) for name in loaded[0][1]
        }
        arrays = self._encode(images)
        height, width = arrays["tap0"].shape[-2:]
        scale = self.encoder.feature_info[0].stride // FINEST
        arrays |= self.task.resize_targets(targets, (height * scale, width * scale))
        if self._teacher is not None:
            with self.runtime.autocast():
                output, _ = self._teacher(prepare_images(images, self.runtime))
            arrays[TEACHER] = output.to(self._dtype)
        return arrays

    @torch.inference_mode()
    def _encode_val(self, indices: Tensor) -> dict[str, Tensor]:
        frames, chosen = self.task.search_val, indices.tolist()
        images, targets = self.task.load_padded(frames, chosen, self.val_transform)
        return self._encode(images) | self.task.uniform_targets(frames, targets)

    def _encode(self, images: Tensor) -> dict[str, Tensor]:
        self.runtime.heartbeat()
        with self.runtime.autocast():
            taps = self.encoder(prepare_images(images, self.runtime))
        return {name: tap.to(self._dtype) for name, tap in zip(self._taps, taps, strict=True)}

    def train_batches(self, order: Iterable[Tensor]) -> Iterator[dict[str, Tensor]]:
        """Arrays of the training crops, by name; `split` reads them. Each batch is valid until the
        next is asked for."""
        yield from self._batches(self._train_cache, order)

    def val_batches(self, batch_size: int = 8) -> Iterator[tuple[list[Tensor], Targets]]:
        """Taps and targets of the validation images, in order."""
        order = in_order(self._val_cache.count, batch_size)
        for arrays in self._batches(self._val_cache, order):
            batch = self.split(arrays)
            yield batch.taps, batch.targets

    def _batches(self, cache: FeatureCache, order: Iterable[Tensor]) -> Iterable[dict[str, Tensor]]:
        # on a CPU the candidates keep the processors busy
        ahead = 0 if self.runtime.device.type == "cpu" else 1
        return cache.batches(order, self.runtime.dtype, ahead)

    def split(self, arrays: dict[str, Tensor]) -> FeatureBatch:
        """The cache's arrays by their meaning."""
        rest = {name: array for name, array in arrays.items() if name not in self._taps}
        teacher = rest.pop(TEACHER, None)
        return FeatureBatch([arrays[name] for name in self._taps], rest, teacher)

    @functools.cached_property
    def val_size(self) -> tuple[int, int]:
        """(H, W) of the images that candidates are scored on."""
        images, _ = self.task.load_batch(self.task.search_val, [0], self.val_transform)
        return images.shape[-2], images.shape[-1]

    def costs(self, model: DenseNetwork) -> dict[str, float]:
        """Costs of a network on this encoder for one image of `val_size`: see `measured_costs`."""
        return measured_costs(model, self.val_size)

    def caches_on(self, device: torch.device) -> Caches:
        """The features on a device; sent to a process of the same GPU, they are the same memory."""
        return self._train_cache.to(device), self._val_cache.to(device)

    def __str__(self) -> str:
        """How many bytes the features take, and where."""
        caches = (self._train_cache, self._val_cache)
        size = sum(cache.count * cache.layout.sample_bytes for cache in caches)
        resident = sum(cache.resident_bytes for cache in caches)
        where = sorted({str(path.parent) for cache in caches for path in cache.paths})
        text = f"{size / 1e6:.0f} MB in {', '.join(where)}"
        if resident and self.runtime.device.type == "cuda":
            text += f", {resident / 1e6:.0f} MB of them on {self.runtime.device}"
        return text
