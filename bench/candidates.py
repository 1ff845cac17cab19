"""Candidates of Fast NAS to time: ours, ours with one thing taken away, and the plain formulation.

All of them train the same architectures on the same features in the same order.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import plain
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nasfast.evaluation.stages
import nasfast.models.layers
from nasfast.cache import CacheConfig, FeatureCache
from nasfast.data import Splits, SyntheticStreets, TrainTransform, ValTransform
from nasfast.encoders import MobileNetV2
from nasfast.evaluation.candidate import CandidateEvaluator
from nasfast.evaluation.frozen_encoder import FrozenEncoder
from nasfast.evaluation.stages import DecoderOnFeatures, Stage0Config
from nasfast.models.build import build_segmenter
from nasfast.models.decoders import Decoder, DecoderConfig, EncoderDecoder
from nasfast.spaces.fast_nas import FastNASGenotype, FastNASSpace
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.loop import Runtime
from nasfast.training.metrics import SegmentationScores
from nasfast.training.polyak import PolyakAverage
from nasfast.utils.seeding import derive_seed

TRAINING = nasfast.evaluation.stages  # the module that uses what variants replace
SPACE = FastNASSpace()
PUBLISHED = {
    "arch0": [[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]],
    "arch1": [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]],
    "arch2": [[5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], [[1, 3], [4, 3], [2, 2]]],
}
CHEAP = SPACE.from_json([[9, *[[0, 0, 9, 9]] * 3], [[3, 3], [2, 2], [2, 3]]])  # skips alone
SEED = 0


def architectures(count: int) -> dict[str, FastNASGenotype]:
    """The three published ones, then uniform ones; the first ``count`` of them."""
    rng = random.Random(SEED)
    found = {name: SPACE.from_json(genotype) for name, genotype in PUBLISHED.items()}
    found |= {f"random{i}": SPACE.sample(rng) for i in range(max(count - len(found), 0))}
    return dict(list(found.items())[:count])


@dataclass(frozen=True)
class Scale:
    """Size of the problem; the defaults are the published search."""

    samples: int = 4000
    """Crops to train on."""
    val_samples: int = 1024
    """Crops to score on."""
    crop: int = 256
    val_crop: int = 400
    batch_size: int = 64
    epochs: int = 5
    agg_size: int = 48
    width: float = 1.0
    """Of the encoder."""
    classes: int = 21

    @classmethod
    def of(cls, samples: int, **sizes: Any) -> Scale:
        """Fewer crops, in the published proportion of training to scoring."""
        whole = cls()
        val_samples = round(samples * whole.val_samples / whole.samples)
        return cls(samples=samples, val_samples=max(val_samples, 1), **sizes)

    @property
    def steps(self) -> int:
        return self.epochs * max(self.samples // self.batch_size, 1)

    @property
    def stage0(self) -> Stage0Config:
        return Stage0Config(
            samples=self.samples, crop=self.crop, epochs=self.epochs, batch_size=self.batch_size
        )

    @property
    def decoder(self) -> DecoderConfig:
        return DecoderConfig(agg_size=self.agg_size)

    def extrapolate(self, seconds: Mapping[str, float]) -> float:
        """Seconds of a published candidate: building as it is, training by steps, scoring by
        crops."""
        whole = Scale()
        return (
            seconds["build"]
            + seconds["stage0_train"] * whole.steps / self.steps
            + seconds["stage0_validate"] * whole.val_samples / self.val_samples
        )


# to try the benchmarks
TINY = Scale(8, 3, crop=32, val_crop=64, batch_size=4, epochs=2, agg_size=8, width=0.35, classes=8)


class Streets(SyntheticStreets):
    """Generated street scenes of as many classes as needed; those without a thing never occur."""

    def __init__(self, count: int, size: tuple[int, int], stream: str, classes: int) -> None:
        super().__init__(count, SEED, size, stream=stream, cache_in_memory=True)
        self.classes += tuple(f"class {i}" for i in range(len(self.classes), classes))


class Problem:
    """Data, a frozen encoder and a teacher of random weights, and the places of their features."""

    def __init__(self, scale: Scale, device: torch.device, folder: Path) -> None:
        self.scale, self.device, self.folder = scale, device, folder
        train, val = (
            Streets(min(count, 64), (300, 400), stream, scale.classes)
            for stream, count in (("train", scale.samples), ("val", scale.val_samples))
        )
        repeated = val.subset([i % len(val) for i in range(scale.val_samples)])
        self.splits = Splits(search_train=train, search_val=repeated, train=train, val=val)
        torch.manual_seed(SEED)
        self.encoder = MobileNetV2(scale.width)
        teacher = Decoder(
            SPACE.from_json(PUBLISHED["arch0"]),  # its logits have stride 4, as the published ones
            self.encoder.feature_info,
            scale.classes,
            DecoderConfig(aux_cell=False),
        )
        self.teacher = EncoderDecoder(self.encoder, teacher)
        self.files: tuple[plain.Files, plain.Files] | None = None
        """For training and for scoring; a plain candidate needs them."""

    def write_files(self, train: FeatureCache, val: FeatureCache) -> None:
        self.files = (
            plain.Files.write(self.folder / "train", samples_of(train)),
            plain.Files.write(self.folder / "val", samples_of(val)),
        )


def samples_of(cache: FeatureCache) -> Iterator[dict[str, Tensor]]:
    for i in range(cache.count):
        yield {name: x[0] for name, x in cache.batch(torch.tensor([i])).items()}


class Float32(Runtime):
    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class ContiguousFloat32(Float32):
    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)


class Contiguous(Runtime):
    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)


class ReadLoss(SegmentationTask):
    """Reads the loss at every step, as a progress bar does."""

    def loss(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().loss(*arguments, **options)
        loss.item()
        return loss


class ScoreOnHost(SegmentationTask):
    """Full-size logits on the host, argmax and confusion matrix in NumPy."""

    def score(self, batches: Any, predict: Any, runtime: Runtime) -> SegmentationScores:
        def logits_of(taps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            with runtime.autocast():
                return predict(taps).float(), []

        pairs = ((taps, targets["labels"]) for taps, targets in batches)
        reward = plain.confusion_reward(pairs, logits_of, self.outputs)
        return SegmentationScores(reward, reward, reward, ())


class LoopedAverage(PolyakAverage):
    """Parameter by parameter."""

    @torch.no_grad()
    def update(self) -> None:
        for average, live in zip(self._average, self._live):
            average.mul_(self.decay).add_(live, alpha=1 - self.decay)


def looped_optimizer() -> AbstractContextManager[Any]:
    adam = torch.optim.Adam

    def looped(
        parameters: Any, lr: float, weight_decay: float, fused: bool, capturable: bool
    ) -> torch.optim.Adam:
        return adam(parameters, lr, weight_decay=weight_decay, foreach=False, capturable=capturable)

    return mock.patch.multiple(torch.optim, Adam=looped)


def looped_average() -> AbstractContextManager[Any]:
    return mock.patch.object(TRAINING, "PolyakAverage", LoopedAverage)


def without_graphs() -> AbstractContextManager[Any]:
    def eager(device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    return mock.patch.object(TRAINING, "graphed_step", eager)


def plain_depthwise(x: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
    """Of PyTorch; a dilated one in float32, as its bfloat16 gradients are wrong on a CPU."""
    options = None, 1, padding, dilation, len(weight)
    if x.device.type != "cpu" or dilation == 1:
        return F.conv2d(x, weight, *options)
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x.to(weight.dtype), weight, *options).to(x.dtype)


def without_sep_conv(**others: Any) -> AbstractContextManager[Any]:
    def apart(x: Tensor, depthwise: nn.Module, pointwise: nn.Module) -> Any:
        return pointwise(depthwise(x))

    return mock.patch.multiple(nasfast.models.layers, separable=apart, **others)


def without_depthwise() -> AbstractContextManager[Any]:
    return without_sep_conv(depthwise_conv2d=plain_depthwise)


def without_norm_relu() -> AbstractContextManager[Any]:
    def apart(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        return F.relu(norm(x), inplace=True)

    return without_sep_conv(norm_relu=apart)


class FromFiles:
    """A cache's samples, read from files of float32 maps by a DataLoader."""

    def __init__(self, files: plain.Files, device: torch.device) -> None:
        self.files, self.device, self.count = files, device, len(files)

    def batches(
        self, order: Iterable[Tensor], dtype: torch.dtype | None = None, ahead: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        loader = DataLoader(
            self.files,
            batch_sampler=[indices.tolist() for indices in order],
            num_workers=2,
            prefetch_factor=max(ahead, 1),
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            yield {
                name: x.to(self.device, dtype, memory_format=torch.channels_last)
                if x.dim() == 4
                else x.to(self.device)
                for name, x in batch.items()
            }


class NCHW:
    """A cache whose maps come contiguous."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache, self.count = cache, cache.count

    def batches(self, order: Iterable[Tensor], *options: Any, **more: Any) -> Iterator[Any]:
        return map(contiguous, self.cache.batches(order, *options, **more))


def contiguous(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.contiguous() for name, x in batch.items()}


@dataclass(frozen=True)
class Variant:
    """Ours with something taken away."""

    runtime: type[Runtime] = Runtime
    task: type[SegmentationTask] = SegmentationTask
    cache: Callable[[FeatureCache, plain.Files, torch.device], Any] = lambda cache, *_: cache
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext


OURS = Variant()
ABLATIONS: dict[str, Variant] = {
    "float32": Variant(Float32),
    "NCHW": Variant(Contiguous, cache=lambda cache, *_: NCHW(cache)),
    "float32, NCHW": Variant(ContiguousFloat32, cache=lambda cache, *_: NCHW(cache)),
    "features by DataLoader": Variant(cache=lambda _, files, device: FromFiles(files, device)),
    "loss read at every step": Variant(task=ReadLoss),
    "logits to the host": Variant(task=ScoreOnHost),
    "optimizer in a loop": Variant(patch=looped_optimizer),
    "average in a loop": Variant(patch=looped_average),
    "separable convolutions apart": Variant(patch=without_sep_conv),
    "PyTorch's depthwise": Variant(patch=without_depthwise),
    "BatchNorm, then ReLU": Variant(patch=without_norm_relu),
}
if torch.cuda.is_available():
    ABLATIONS["CUDA graphs"] = Variant(patch=without_graphs)
"""What each saves: the time without it, divided by ours."""


@dataclass(frozen=True)
class Timed:
    """What a candidate took and gave."""

    reward: float
    seconds: dict[str, float]
    """build, stage0_train, stage0_validate"""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


Evaluator = CandidateEvaluator[FastNASGenotype, EncoderDecoder]


def make_features(problem: Problem, variant: Variant) -> FrozenEncoder:
    scale = problem.scale
    return FrozenEncoder(
        variant.task(problem.splits),
        problem.encoder,
        scale.samples,
        (
            TrainTransform(scale.stage0.crop, scale.stage0.shorter_side),
            ValTransform(scale.val_crop),
        ),
        variant.runtime(problem.device),
        seed=SEED,
        cache=CacheConfig(problem.folder / "cache"),
        teacher=problem.teacher,
    )


def make_evaluator(scale: Scale, features: FrozenEncoder) -> Evaluator:
    """Of stage 0 alone."""
    return CandidateEvaluator(
        partial(
            build_segmenter,
            features.encoder,
            outputs=features.task.outputs,
            config=scale.decoder,
        ),
        features.costs,
        [
            DecoderOnFeatures(
                scale.stage0,
                features,
                aux_weight=scale.stage0.aux_weight,
                kd_weight=scale.stage0.kd_weight,
            )
        ],
        features.runtime,
        image=(3, *features.val_size),
        processor=lambda genotype: features.task.processor,
        seed=SEED,
        inputs=features.inputs,
        remedy="",
        seconds=features.seconds,
    )


def caches_of(features: FrozenEncoder) -> tuple[FeatureCache, FeatureCache]:
    """For training and for scoring."""
    return features._train_cache, features._val_cache


def replace_caches(features: FrozenEncoder, train: Any, val: Any) -> None:
    features._train_cache, features._val_cache = train, val


class Ours:
    """Candidates as the search evaluates them, without stage 1."""

    def __init__(
        self, problem: Problem, variant: Variant = OURS, *, with_files: bool = True
    ) -> None:
        self.variant = variant
        features = make_features(problem, variant)
        self.evaluator = make_evaluator(problem.scale, features)
        if not with_files:
            return
        caches = caches_of(features)
        if problem.files is None:
            problem.write_files(*caches)
        assert problem.files is not None
        replace_caches(
            features,
            *(variant.cache(c, files, problem.device) for c, files in zip(caches, problem.files)),
        )

    def __call__(self, genotype: FastNASGenotype, index: int) -> Timed:
        start = time.perf_counter()
        with self.variant.patch():
            evaluation = self.evaluator(genotype, index, {})
        total = time.perf_counter() - start
        if evaluation.failure:
            raise RuntimeError(f"candidate {index}: {evaluation.failure}")
        seconds = {name: evaluation.seconds[name] for name in ("stage0_train", "stage0_validate")}
        return Timed(
            evaluation.rewards["stage0"], {"build": total - sum(seconds.values()), **seconds}
        )


class Plain:
    """Candidates in the plain formulation, on the files of the problem.

    They run in a process of their own, in which the C library gives freed memory back as it does
    without nasfast.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        # started by the first candidate
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __call__(self, genotype: FastNASGenotype, index: int) -> Timed:
        problem = self.problem
        assert problem.files is not None
        with mock.patch.dict(os.environ, GLIBC_TUNABLES=DEFAULT_MEMORY):
            found = self._pool.submit(
                _plain,
                genotype,
                problem.scale,
                problem.files,
                problem.device,
                index,
                torch.get_num_threads(),
            )
        return found.result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


DEFAULT_MEMORY = "glibc.malloc.tcache_count=7"
"""The default, said so that `nasfast.utils.memory` changes nothing."""


def _plain(
    genotype: FastNASGenotype,
    scale: Scale,
    files: tuple[plain.Files, plain.Files],
    device: torch.device,
    index: int,
    threads: int,
) -> Timed:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    reward, seconds = plain.candidate(
        genotype,
        scale.classes,
        scale.decoder,
        scale.stage0,
        *files,
        device,
        seed=derive_seed(SEED, index),
        order_seed=derive_seed(SEED, index, "stage0"),
    )
    total = time.perf_counter() - start
    return Timed(reward, {"build": total - sum(seconds.values()), **seconds})


def evaluator_of(scale: Scale, folder: Path, device: str) -> Evaluator:
    """What a worker evaluates candidates with, on features that lie in the folder."""
    return Ours(Problem(scale, torch.device(device), folder), with_files=False).evaluator
