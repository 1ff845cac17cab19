"""Semantic segmentation: cross-entropy, and a reward made of IoU and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from nasfast.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SegmentationDataset,
    Splits,
    Transform,
    batch,
)
from nasfast.data.checks import OPACITY
from nasfast.models.layers import in_planes, resize
from nasfast.tasks.base import ClassScore, DenseTask, Frames, Targets, enlarged
from nasfast.tasks.processor import Prediction, Preprocessing, Processor
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.training.metrics import ConfusionMatrix, SegmentationScores
from nasfast.utils.errors import UserError
from nasfast.utils.files import atomic_file

T = TypeVar("T")
VECTOR = 16
"""Classes from which on a CPU takes the softmax of a pixel by vectors (of 512 bits), where its
logits lie side by side; of fewer it takes one value at a time, four to six times as slow."""


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of labels ``[N, H, W]`` to ``size`` = (H, W)."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].to(labels.dtype)


@dataclass(frozen=True, eq=False)
class Segmentation(Prediction):
    """A class for every pixel."""

    image: Tensor  # uint8 [3, H, W]
    mask: Tensor  # uint8 [H, W]
    """Index of the class with the greatest logit. No pixel is left out: the ignore index of the
    training data is no class."""
    confidence: Tensor  # uint8 [H, W]
    """Probability (softmax) of that class, in 255ths. An export with ``--argmax`` knows none."""
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels that each class has, by its name; classes without any are left
        out."""
        counts = torch.bincount(self.mask.flatten(), minlength=len(self.classes)).tolist()
        pixels = self.mask.numel()
        return {name: count / pixels for name, count in zip(self.classes, counts) if count}

    def draw(self) -> Tensor:
        """The classes' colours over the image."""
        table = torch.tensor(self.colors, dtype=torch.float32).T  # [3, K]
        drawn = torch.empty_like(self.image)
        for row, mask in enumerate(self.mask):  # a whole image of floats would be large
            colors = table[:, mask.long()]  # [3, W]
            mixed = OPACITY * colors + (1 - OPACITY) * self.image[:, row].float()
            drawn[:, row] = mixed.round().byte()
        return drawn

    def to_json(self) -> dict[str, Any]:
        """Size, shares of the classes, and the mean of the confidence in 0..1."""
        return {
            "size": list(self.mask.shape),
            "classes": self.shares,
            "confidence": self.confidence.sum(dtype=torch.int64).item() / 255 / self.mask.numel(),
        }

    def save(self, folder: Path, stem: str) -> list[Path]:
        """``stem.png``, a palette image of class indices, and ``stem-overlay.png``."""
        mask = Image.fromarray(self.mask.numpy())
        mask.putpalette([value for color in self.colors for value in color])
        overlay = Image.fromarray(self.draw().permute(1, 2, 0).contiguous().numpy())
        paths = [folder / f"{stem}{suffix}" for suffix in SegmentationProcessor.suffixes]
        for path, image in zip(paths, (mask, overlay), strict=True):
            with atomic_file(path) as file:
                image.save(file, "png")
        return paths


@dataclass(frozen=True)
class SegmentationProcessor(Processor):
    """Of ``outputs`` = one logit a class."""

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]

    suffixes = (".png", "-overlay.png")
    task = "segmentation"
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.names

    def reduce(self, output: Tensor) -> Tensor:
        """The class with the greatest logit, and its probability in 255ths: uint8, k = 2."""
        best, index = output.max(-3, keepdim=True)
        confidence = 1 / (output - best).exp_().sum(-3, keepdim=True)
        return torch.cat([index.byte(), (255 * confidence).round_().byte()], -3)

    def result(self, reduced: Tensor, image: Tensor) -> Segmentation:
        mask, confidence = reduced
        return Segmentation(image, mask, confidence, self.classes, self.colors)


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

    def pad_targets(self, targets: Targets, size: tuple[int, int]) -> Targets:
        """With the ignore index."""
        return {"labels": enlarged(targets["labels"], size, self.ignore_index)}

    def criterion(self, output: Tensor, targets: Targets) -> Tensor:
        """Mean cross-entropy at the labels' resolution; a batch without a single labelled pixel
        gives zero, not NaN."""
        labels, weight = targets["labels"], self.class_weight
        scores = resize(output.float(), (labels.shape[-2], labels.shape[-1]))
        labels = labels.long()
        if scores.device.type == "cpu" and scores.shape[1] < VECTOR:
            logits, target = in_planes(scores), labels
        else:
            # one row a pixel, as channels-last maps lie in memory: on [N, K, H, W] it would copy
            # them to planes, and hand the resizing a gradient in planes, ten times as slow
            logits, target = scores.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten()
        total = F.cross_entropy(
            logits, target, weight, ignore_index=self.ignore_index, reduction="sum"
        )
        pixels = self._pixels(labels)
        return total / (pixels + (pixels == 0))

    def weight(self, targets: Targets) -> Tensor:
        """The labelled pixels, by the weights of their classes."""
        return self._pixels(targets["labels"].long()).float()

    def _pixels(self, labels: Tensor) -> Tensor:
        counted = labels != self.ignore_index
        if self.class_weight is None:
            return counted.sum()
        return (self.class_weight[labels.masked_fill(~counted, 0)] * counted).sum()

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

    @property
    def processor(self) -> SegmentationProcessor:
        train = self.splits.train
        return SegmentationProcessor(train.classes, train.colors)

    def truth(self, targets: Targets, image: Tensor) -> Segmentation:
        """The labels; black where there is none."""
        train, labels = self.splits.train, targets["labels"]
        colors = (*train.colors, *[(0, 0, 0)] * (256 - len(train.colors)))
        return Segmentation(image, labels, torch.full_like(labels, 255), train.classes, colors)

    def class_scores(self, scores: SegmentationScores) -> list[ClassScore]:
        """Intersection over union."""
        train = self.splits.train
        entries = zip(train.classes, scores.class_iou, train.colors, strict=True)
        return [ClassScore(name, "IoU", iou, color) for name, iou, color in entries]
