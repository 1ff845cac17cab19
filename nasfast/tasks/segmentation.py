"""Semantic segmentation: cross-entropy, and a reward made of IoU and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from nasfast.data import SegmentationDataset, Splits, Transform, batch
from nasfast.models.layers import resize
from nasfast.tasks.base import DenseTask, Frames, Targets
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.training.metrics import ConfusionMatrix, SegmentationScores
from nasfast.utils.errors import UserError

T = TypeVar("T")

OPACITY = 0.6
"""Of the classes' colours over the image."""


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of labels ``[N, H, W]`` to ``size`` = (H, W)."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(labels.dtype)


@dataclass(frozen=True)
class SegmentationTask(DenseTask[SegmentationScores]):
    """A class for every pixel. Its one target is "labels", ``[N, H, W]``: class indices and the
    ignore index, which neither loss nor metrics see."""

    name: ClassVar[str] = "segmentation"

    splits: Splits
    omit: tuple[int, ...] = ()
    """Classes left out of the reward (class 0, the background, in the paper's VOC search)."""
    class_weight: Tensor | None = field(default=None, compare=False)  # [K]
    """Factor of each class in the loss, on the runtime's device; None weighs all alike."""

    def __post_init__(self) -> None:
        for index in self.omit:
            if not 0 <= index < self.outputs:
                raise UserError(
                    f"omit: expected classes from 0 to {self.outputs - 1}, got {index}; "
                    "leave it out"
                )

    @property
    def outputs(self) -> int:
        """One logit a class."""
        return len(self.splits.train.classes)

    @property
    def search_train(self) -> SegmentationDataset:
        return self.splits.search_train

    @property
    def search_val(self) -> SegmentationDataset:
        return self.splits.search_val

    @property
    def ignore_index(self) -> int:
        """Label that neither loss nor metrics see."""
        return self.splits.train.ignore_index

    def load_batch(
        self,
        frames: Frames,
        indices: Sequence[int],
        transform: Transform,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Targets]:
        """Images and "labels", uint8."""
        images, labels = batch(cast(SegmentationDataset, frames), indices, transform, generator)
        return images, {"labels": labels}

    def resize_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """Nearest labels."""
        return {"labels": resize_labels(targets["labels"], size)}

    def criterion(self, output: Tensor, targets: Targets) -> Tensor:
        """Mean cross-entropy at the labels' resolution; a batch without a single labelled pixel
        gives zero, not NaN."""
        labels, weight = targets["labels"], self.class_weight
        scores = resize(output.float(), (labels.shape[-2], labels.shape[-1]))
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

    @torch.inference_mode()
    def score(
        self, batches: Iterable[tuple[T, Targets]], predict: Callable[[T], Tensor], runtime: Runtime
    ) -> SegmentationScores:
        """Scores of logits, bilinearly resized to the labels' full resolution."""
        matrix = ConfusionMatrix(self.outputs, self.ignore_index, runtime.device)
        finite = torch.ones((), dtype=torch.bool, device=runtime.device)
        for inputs, targets in batches:
            runtime.heartbeat()
            with runtime.autocast():
                logits = predict(inputs)
            finite &= logits.isfinite().all()
            labels = runtime.move(targets["labels"])
            size = (labels.shape[-2], labels.shape[-1])
            # on a CPU an image at a time: a batch of full-size logits would not stay in its caches
            step = 1 if logits.device.type == "cpu" else len(logits)
            parts = (torch.split(maps, step) for maps in (logits, labels))
            for some, expected in zip(*parts, strict=True):
                matrix.update(resize(some.float(), size).argmax(1), expected)
        if not finite.item():
            raise NonFiniteLossError("the network's logits are not finite")
        return matrix.compute(self.omit)

    def draw(self, image: Tensor, output: Tensor) -> Tensor:
        """The classes' colours over the image."""
        size = (image.shape[-2], image.shape[-1])
        classes = resize(output[None].float(), size)[0].argmax(0).cpu()  # [H, W]
        colors = torch.tensor(self.splits.train.colors, dtype=torch.float32)[classes]  # [H, W, 3]
        drawn = OPACITY * colors.permute(2, 0, 1) + (1 - OPACITY) * image.float()
        return drawn.round().byte()
