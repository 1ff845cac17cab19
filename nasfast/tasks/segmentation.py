"""Semantic segmentation: cross-entropy with auxiliary and distillation terms, IoU-based reward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.data import SegmentationDataset, Splits, Transform, batch, normalize
from nasfast.models.layers import resize
from nasfast.models.segmenter import Segmenter
from nasfast.training.loop import NonFiniteLossError, Runtime, in_order
from nasfast.training.metrics import ConfusionMatrix, SegmentationScores

T = TypeVar("T")


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of labels ``[N, H, W]`` to ``size`` = (H, W)."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(labels.dtype)


def prepare_images(images: Tensor, runtime: Runtime) -> Tensor:
    """uint8 ``[N, 3, H, W]`` to normalised channels-last float images on the device."""
    images = normalize(runtime.move(images))
    return images.contiguous(memory_format=torch.channels_last)


def image_batches(
    dataset: SegmentationDataset,
    indices: Iterable[Tensor],
    transform: Transform,
    runtime: Runtime,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Prepared images ``[N, 3, h, w]`` and labels ``[N, h, w]`` on the device, batch by batch."""
    for chunk in indices:
        images, labels = batch(dataset, chunk.tolist(), transform, generator)
        yield prepare_images(images, runtime), runtime.move(labels)


@dataclass(frozen=True)
class SegmentationTask:
    """What a segmentation network is trained on and judged by."""

    splits: Splits
    omit: tuple[int, ...] = ()
    """Classes left out of the reward (class 0, the background, in the paper's VOC search)."""

    def __post_init__(self) -> None:
        for index in self.omit:
            if not 0 <= index < self.num_classes:
                raise ValueError(
                    f"omit: expected classes from 0 to {self.num_classes - 1}, got {index}"
                )

    @property
    def num_classes(self) -> int:
        return len(self.splits.train.classes)

    @property
    def ignore_index(self) -> int:
        """Label that neither loss nor metrics see."""
        return self.splits.train.ignore_index

    def cross_entropy(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of ``[N, K, h, w]`` at the labels' resolution ``[N, H, W]``.

        A batch without a single labelled pixel gives zero, not NaN.
        """
        scores = resize(logits.float(), (labels.shape[-2], labels.shape[-1]))
        # one row a pixel, as channels-last maps lie in memory: on [N, K, H, W] it would copy them
        # to planes, and hand the resizing a gradient in planes, ten times as slow
        rows = scores.permute(0, 2, 3, 1).flatten(0, 2)
        labels = labels.long().flatten()
        total = F.cross_entropy(
            rows, labels, weight, ignore_index=self.ignore_index, reduction="sum"
        )
        counted = labels != self.ignore_index
        if weight is not None:
            pixels = (weight[labels.masked_fill(~counted, 0)] * counted).sum()
        else:
            pixels = counted.sum()
        return total / (pixels + (pixels == 0))

    def loss(
        self,
        logits: Tensor,
        aux: Sequence[Tensor],
        labels: Tensor,
        *,
        aux_weight: float,
        teacher: Tensor | None = None,
        kd_weight: float = 0.0,
        class_weight: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy + ``aux_weight`` * the auxiliary heads' + ``kd_weight`` * distillation.

        Distillation is the mean squared error between logits and the teacher's logits, without
        softmax or temperature (section 3.3 of Fast NAS).
        """
        if teacher is not None and teacher.shape[-2:] == labels.shape[-2:]:
            logits = resize(logits.float(), (labels.shape[-2], labels.shape[-1]))  # once for both
        loss = self.cross_entropy(logits, labels, class_weight)
        for map_ in aux:
            loss = loss + aux_weight * self.cross_entropy(map_, labels, class_weight)
        if teacher is not None:
            student = resize(logits.float(), (teacher.shape[-2], teacher.shape[-1]))
            loss = loss + kd_weight * F.mse_loss(student, teacher.float())
        return loss

    @torch.inference_mode()
    def score(
        self, batches: Iterable[tuple[T, Tensor]], predict: Callable[[T], Tensor], runtime: Runtime
    ) -> SegmentationScores:
        """Scores of logits, bilinearly resized to the labels' full resolution.

        Args:
            batches: pairs of an input of ``predict`` and labels ``[N, H, W]``.
            predict: gives logits ``[N, K, h, w]``.
            runtime: device and precision.

        Raises:
            NonFiniteLossError: logits are NaN or infinite; their argmax would look like a score.
        """
        matrix = ConfusionMatrix(self.num_classes, self.ignore_index, runtime.device)
        finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        for inputs, labels in batches:
            runtime.heartbeat()
            with runtime.autocast():
                logits = predict(inputs)
            finite &= logits.isfinite().all()
            size = (labels.shape[-2], labels.shape[-1])
            # on a CPU an image at a time: a batch of full-size logits would not stay in its caches
            run = 1 if logits.device.type == "cpu" else len(logits)
            parts = (torch.split(maps, run) for maps in (logits, runtime.move(labels)))
            for some, wanted in zip(*parts, strict=True):
                matrix.update(resize(some.float(), size).argmax(1), wanted)
        if not finite.item():
            raise NonFiniteLossError("the network's logits are not finite")
        return matrix.compute(self.omit)

    def score_images(
        self,
        model: Segmenter,
        dataset: SegmentationDataset,
        transform: Transform,
        runtime: Runtime,
        batch_size: int = 8,
    ) -> SegmentationScores:
        """Scores of a network, put in evaluation mode, on a dataset."""
        model.eval()
        pairs = image_batches(dataset, in_order(len(dataset), batch_size), transform, runtime)
        return self.score(pairs, lambda images: model(images)[0], runtime)
