"""Genotype to evaluation: a pure function of genotype, data, configuration and seed."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasfast.cache import CacheConfig, FeatureCache, tensors_fingerprint
from nasfast.data import TrainTransform, ValTransform, batch
from nasfast.encoders import MobileNetV2
from nasfast.models.segmenter import Decoder, DecoderConfig, Segmenter
from nasfast.runs.records import Evaluation
from nasfast.spaces.fast_nas import FastNASGenotype
from nasfast.tasks.segmentation import (
    SegmentationTask,
    image_batches,
    prepare_images,
    resize_labels,
)
from nasfast.training.cost import count_macs, count_macs_on, count_parameters
from nasfast.training.graphs import graphed_step
from nasfast.training.loop import (
    Group,
    NonFiniteLossError,
    Runtime,
    epoch_indices,
    in_order,
    train_epoch,
)
from nasfast.training.metrics import SegmentationScores
from nasfast.training.polyak import PolyakAverage
from nasfast.utils.seeding import derive_seed


@dataclass(frozen=True)
class Stage0Config:
    """Decoder alone, on cached features of the frozen encoder."""

    samples: int = 4000
    """Crops in the cache, each augmented once for the whole search."""
    crop: int = 256
    """Side of a crop, in pixels."""
    shorter_side: int = 300
    """Images are enlarged so that their shorter side has at least this many pixels."""
    epochs: int = 5
    """Passes over the cache."""
    batch_size: int = 64
    """Crops a step."""
    lr: float = 3e-3
    """Adam's learning rate."""
    weight_decay: float = 1e-5
    """Adam's L2 penalty."""
    max_grad_norm: float = 3.0
    """Gradients are scaled down to this L2 norm."""
    polyak_decay: float = 0.9
    """Decay a step of the weight average, which replaces the weights after every epoch."""
    aux_weight: float = 0.15
    """Weight of each auxiliary head's loss."""
    kd_weight: float = 0.3
    """Weight of the distillation loss where a teacher is given."""


@dataclass(frozen=True)
class Stage1Config:
    """Encoder and decoder end to end, for candidates that pass the gate."""

    epochs: int = 1
    """Passes over the training images; 0 leaves the stage out."""
    crop: int = 350
    """Side of a crop, in pixels."""
    shorter_side: int = 400
    """Images are enlarged so that their shorter side has at least this many pixels."""
    batch_size: int = 32
    """Crops a step."""
    encoder_lr: float = 1e-3
    """Learning rate of the encoder's SGD (momentum 0.9)."""
    decoder_lr: float = 3e-3
    """Learning rate of the decoder's Adam."""
    weight_decay: float = 1e-5
    """L2 penalty of both."""
    max_grad_norm: float = 3.0
    """Gradients of encoder and of decoder are scaled down to this L2 norm each."""
    polyak_decay: float = 0.99
    """Decay a step of the weight average, which replaces the weights at the end."""
    aux_weight: float = 0.15
    """Weight of each auxiliary head's loss."""


Caches = tuple[FeatureCache, FeatureCache]
"""Features that candidates are trained on, and that they are scored on."""


def build_segmenter(
    encoder: MobileNetV2, genotype: FastNASGenotype, num_classes: int, config: DecoderConfig
) -> Segmenter:
    """A network of the space on (not a copy of) an encoder."""
    return Segmenter(encoder, Decoder(genotype, encoder.feature_info, num_classes, config))


class SegmentationEvaluator:
    """Trains and scores one candidate at a time (section 3.3 of Fast NAS).

    Stage 0 trains the decoder on cached features; only when its reward beats ``gate``, the running
    mean of earlier stage-0 rewards, stage 1 trains the whole network. The rewards of the two
    stages are kept apart: they are not on one scale.

    Args:
        task: data, loss and reward.
        encoder: frozen encoder; candidates fine-tune copies.
        decoder: size of the candidates' decoders.
        stage0, stage1: training of the two stages.
        runtime: device and precision.
        seed: decides crops, initial weights and order, together with the candidate's index.
        cache: where and how the features of the frozen encoder are kept; its bound holds for the
            features of training and of validation together.
        caches: those features, of another evaluator with the same arguments (`caches_on`).
        val_crop: side of the centre crop that candidates are scored on; None takes whole images,
            which must then share one size.
        teacher: network whose logits candidates imitate in stage 0.

    Attributes:
        inputs: SHA-256 of everything that was read: encoder, data, teacher.
        remedy: what to change where candidates fail.
        val_size: (H, W) of the frames that candidates are scored on.
        seconds: wall time of the preparation, by step.
    """

    remedy = (
        "make --stage0.batch-size, --stage1.batch-size or the crops smaller, or lower the "
        "learning rates"
    )

    def __init__(
        self,
        task: SegmentationTask,
        encoder: MobileNetV2,
        decoder: DecoderConfig,
        stage0: Stage0Config,
        stage1: Stage1Config,
        runtime: Runtime,
        *,
        seed: int,
        cache: CacheConfig,
        caches: Caches | None = None,
        val_crop: int | None = None,
        teacher: Segmenter | None = None,
    ) -> None:
        self.task = task
        self.decoder = decoder
        self.stage0 = stage0
        self.stage1 = stage1
        self.runtime = runtime
        self.seed = seed
        self._val_transform = ValTransform(val_crop)
        self._encoder = encoder.eval().requires_grad_(False)
        runtime.place(self._encoder)
        self.seconds: dict[str, float] = {}
        with _timed(self.seconds, "encode"):
            self._train_cache, self._val_cache = self._fill(cache, caches, teacher)
        labels = self._val_cache.batch(torch.tensor([0]))["labels"]
        self.val_size: tuple[int, int] = (labels.shape[-2], labels.shape[-1])
        self._encoder_macs = count_macs(self._encoder, self.val_size)
        image = torch.empty(1, 3, *self.val_size, device="meta")
        self._meta_taps = copy.deepcopy(self._encoder).to("meta")(image)

    def _fill(self, cache: CacheConfig, caches: Caches | None, teacher: Segmenter | None) -> Caches:
        splits, config = self.task.splits, self.stage0
        half = torch.bfloat16 if self.runtime.dtype == torch.bfloat16 else torch.float16
        dtype = half if cache.storage == "auto" else torch.float32
        transform = TrainTransform(config.crop, config.shorter_side)
        key = {
            "encoder": tensors_fingerprint(self._encoder.state_dict()),
            "dtype": str(dtype).removeprefix("torch."),
            "precision": self.runtime.precision,
        }
        if teacher is not None:
            self.runtime.place(teacher).eval().requires_grad_(False)

        generator = torch.Generator().manual_seed(derive_seed(self.seed, "crops"))
        order = torch.randperm(len(splits.search_train), generator=generator)

        @torch.inference_mode()
        def encode_train(indices: Tensor) -> dict[str, Tensor]:
            crops = []
            for index in indices.tolist():
                # of its own, so that a crop does not depend on who encodes it
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "crop", index))
                frame = int(order[index % len(order)])
                crops.append(batch(splits.search_train, [frame], transform, generator))
            images, labels = (torch.cat(parts) for parts in zip(*crops))
            arrays = self._encode(images, dtype)
            size = (arrays["tap0"].shape[-2], arrays["tap0"].shape[-1])
            arrays["labels"] = resize_labels(labels, size)
            if teacher is not None:
                with self.runtime.autocast():
                    logits, _ = teacher(prepare_images(images, self.runtime))
                arrays["teacher"] = logits.to(dtype)
            return arrays

        @torch.inference_mode()
        def encode_val(indices: Tensor) -> dict[str, Tensor]:
            images, labels = batch(splits.search_val, indices.tolist(), self._val_transform)
            return self._encode(images, dtype) | {"labels": labels}

        teacher_hash = tensors_fingerprint(teacher.state_dict()) if teacher else "none"
        train_key = key | {
            "data": splits.search_train.fingerprint(),
            "preprocessing": f"{config.samples} frames drawn, {transform}, seed {self.seed}",
            "teacher": teacher_hash,
        }
        val_key = key | {
            "data": splits.search_val.fingerprint(),
            "preprocessing": str(self._val_transform),
        }
        self.inputs = {
            "encoder": key["encoder"],
            "training data": train_key["data"],
            "validation data": val_key["data"],
            "teacher": teacher_hash,
        }
        if caches is not None:
            return caches
        load, device = FeatureCache.load_or_build, self.runtime.device
        heartbeat, frames = self.runtime.heartbeat, len(splits.search_val)
        val = load(val_key, frames, encode_val, cache, heartbeat, chunk=8).to(device)
        if cache.memory_bytes is not None:  # the rest is for the training features
            rest = max(0, cache.memory_bytes - val.resident_bytes)
            cache = dataclasses.replace(cache, memory=f"{rest}B")
        train = load(train_key, config.samples, encode_train, cache, heartbeat).to(device)
        return train, val

    def caches_on(self, device: torch.device) -> Caches:
        """The features on a device; sent to a process of the same GPU, they are the same memory."""
        return self._train_cache.to(device), self._val_cache.to(device)

    @property
    def features(self) -> str:
        """How many bytes they take, and where."""
        caches = (self._train_cache, self._val_cache)
        size = sum(cache.count * cache.layout.sample_bytes for cache in caches)
        resident = sum(cache.resident_bytes for cache in caches)
        where = sorted({str(path.parent) for cache in caches for path in cache.paths})
        text = f"{size / 1e6:.0f} MB in {', '.join(where)}"
        if resident and self.runtime.device.type == "cuda":
            text += f", {resident / 1e6:.0f} MB of them on {self.runtime.device}"
        return text

    def _encode(self, images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        self.runtime.heartbeat()
        with self.runtime.autocast():
            taps = self._encoder(prepare_images(images, self.runtime))
        return {f"tap{i}": tap.to(dtype) for i, tap in enumerate(taps)}

    def _batches(
        self, cache: FeatureCache, order: Iterable[Tensor]
    ) -> Iterator[tuple[Tensor, ...]]:
        """Taps, labels and, where there is one, the teacher's logits; each batch is valid until the
        next is asked for."""
        # on a CPU the candidates keep the processors busy
        ahead = 0 if self.runtime.device.type == "cpu" else 1
        for arrays in cache.batches(order, self.runtime.dtype, ahead):
            yield tuple(arrays.values())

    def cost(self, genotype: FastNASGenotype) -> tuple[int, int]:
        """Parameters and multiply-accumulates of a candidate at `val_size`, without training it."""
        with torch.random.fork_rng([]):
            return self._cost(self._build(genotype))

    def _build(self, genotype: FastNASGenotype) -> Decoder:
        return Decoder(genotype, self._encoder.feature_info, self.task.num_classes, self.decoder)

    def _cost(self, decoder: Decoder) -> tuple[int, int]:
        macs = self._encoder_macs + count_macs_on(decoder, self._meta_taps)
        return count_parameters(self._encoder) + count_parameters(decoder), macs

    def __call__(self, genotype: FastNASGenotype, index: int, gate: float | None) -> Evaluation:
        """Evaluate a candidate.

        Args:
            genotype: the architecture.
            index: the candidate's number in the search; with the seed it decides all chance.
            gate: reward that stage 0 has to beat for stage 1; None passes every candidate.

        Returns:
            Rewards and metrics by stage. Running out of memory and a loss that is not finite are
            told in ``failure``; any other error is a defect and is raised.
        """
        seconds: dict[str, float] = {}
        rewards: dict[str, float] = {}
        metrics: dict[str, dict[str, float]] = {}
        stage, failure, params, macs = "build", None, 0, 0
        device = self.runtime.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, index))
            try:
                decoder = self._build(genotype)
                params, macs = self._cost(decoder)
                model = Segmenter(self._encoder, decoder)
                decoder.with_aux = self.stage0.aux_weight > 0
                self.runtime.place(decoder)
                stages = {"stage0": self._run_stage0, "stage1": self._run_stage1}
                for stage, run in stages.items():
                    scores = run(model, index, seconds)
                    rewards[stage], metrics[stage] = scores.reward, scores.as_dict()
                    if self.stage1.epochs == 0 or (gate is not None and scores.reward <= gate):
                        break
            except (RuntimeError, MemoryError, NonFiniteLossError) as error:
                failure = _cause(error)
                if failure is None:
                    raise
                failure = f"{stage}: {failure}"
        return Evaluation(
            rewards=rewards,
            metrics=metrics,
            gate=gate,
            params=params,
            macs=macs,
            seconds=seconds,
            failure=failure,
        )

    def _adam(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float
    ) -> torch.optim.Adam:
        graphs = self.runtime.device.type == "cuda"
        return torch.optim.Adam(
            parameters, lr, weight_decay=weight_decay, fused=True, capturable=graphs
        )

    def _run_stage0(
        self, model: Segmenter, index: int, seconds: dict[str, float]
    ) -> SegmentationScores:
        config, decoder = self.stage0, model.decoder
        parameters = list(decoder.parameters())
        optimizer = self._adam(parameters, config.lr, config.weight_decay)
        average = PolyakAverage(parameters, config.polyak_decay)
        group = Group(parameters, optimizer, config.max_grad_norm)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, index, "stage0"))

        taps = len(self._encoder.feature_info)

        def loss_of(batch: tuple[Tensor, ...]) -> Tensor:
            labels, *teacher = batch[taps:]
            with self.runtime.autocast():
                logits, aux = decoder(batch[:taps])
            return self.task.loss(
                logits,
                aux,
                labels,
                aux_weight=config.aux_weight,
                teacher=teacher[0] if teacher else None,
                kd_weight=config.kd_weight,
            )

        with _timed(seconds, "stage0_train"), graphed_step(self.runtime.device) as graph:
            decoder.train()
            for _ in range(config.epochs):
                order = epoch_indices(config.samples, config.batch_size, generator)
                batches = self._batches(self._train_cache, order)
                train_epoch(batches, loss_of, [group], self.runtime, average, graph)
                average.copy_to_parameters()
            optimizer.zero_grad(set_to_none=True)

        with _timed(seconds, "stage0_validate"):
            decoder.eval()
            batches = self._batches(self._val_cache, in_order(self._val_cache.count, 8))
            pairs = ((batch[:taps], batch[taps]) for batch in batches)
            return self.task.score(pairs, lambda features: decoder(features)[0], self.runtime)

    def _run_stage1(
        self, model: Segmenter, index: int, seconds: dict[str, float]
    ) -> SegmentationScores:
        config, task = self.stage1, self.task
        model = copy.deepcopy(model)
        model.decoder.with_aux = config.aux_weight > 0
        model.encoder.requires_grad_(True)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, index, "stage1"))
        transform = TrainTransform(config.crop, config.shorter_side)
        parts = {
            "decoder": self._adam(
                list(model.decoder.parameters()), config.decoder_lr, config.weight_decay
            ),
            "encoder": torch.optim.SGD(
                model.encoder.parameters(),
                config.encoder_lr,
                momentum=0.9,
                weight_decay=config.weight_decay,
                fused=True,
            ),
        }
        average = PolyakAverage(model.parameters(), config.polyak_decay)
        groups = [
            Group(list(model.get_submodule(part).parameters()), optimizer, config.max_grad_norm)
            for part, optimizer in parts.items()
        ]

        def loss_of(pair: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = pair
            with self.runtime.autocast():
                logits, aux = model(images)
            labels = resize_labels(labels, (logits.shape[-2], logits.shape[-1]))
            return task.loss(logits, aux, labels, aux_weight=config.aux_weight)

        with _timed(seconds, "stage1_train"), graphed_step(self.runtime.device) as graph:
            model.train()
            data = task.splits.search_train
            for _ in range(config.epochs):
                indices = epoch_indices(len(data), config.batch_size, generator)
                pairs = image_batches(data, indices, transform, self.runtime, generator)
                train_epoch(pairs, loss_of, groups, self.runtime, average, graph)
            average.copy_to_parameters()
            model.zero_grad(set_to_none=True)

        with _timed(seconds, "stage1_validate"):
            return task.score_images(
                model, task.splits.search_val, self._val_transform, self.runtime
            )


def _cause(error: Exception) -> str | None:
    """Why a candidate failed, or None for an error that is not the candidate's."""
    if isinstance(error, NonFiniteLossError):
        return str(error)
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    # torch's CPU allocator raises a plain RuntimeError
    signs = ("allocate memory", "out of memory", "alloc_failed")
    if exhausted or any(sign in text.lower() for sign in signs):
        return f"out of memory ({text})"
    return None


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
