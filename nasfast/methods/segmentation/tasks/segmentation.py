"""Segmentation with decoders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from nasfast.data import SegmentationDataset, Splits, load_splits
from nasfast.data.checks import Findings, check_splits
from nasfast.inference.model import Model
from nasfast.methods.segmentation.tasks.base import Binding, Opened, Reading
from nasfast.tasks.base import DenseTask
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.training.loop import Runtime
from nasfast.training.metrics import SegmentationScores
from nasfast.utils.errors import UserError


class SegmentationBinding(Binding[SegmentationScores]):
    """A class for every pixel."""

    metric = ("miou", "mIoU")
    terms = MappingProxyType(
        {
            "reward": "Geometric mean of mIoU, mean accuracy and frequency-weighted IoU on "
            "training images held out to score candidates, 0 to 1.",
            "mIoU": "Intersection over union of prediction and truth, averaged over the classes.",
        }
    )
    views = "softmax summed"
    foreign = ("depth", "turn")

    def open(self, reading: Reading) -> Opened[SegmentationScores]:
        splits = load_splits(
            reading.data,
            seed=reading.seed,
            cache_in_memory=reading.keep,
            mask_values=reading.mask_values,
            resize_longer=reading.resize_longer,
        )
        about = f"{len(splits.train.classes)} classes"
        return Opened(splits, SegmentationTask(splits, reading.omit), about)

    def check(
        self,
        opened: Opened[SegmentationScores],
        reading: Reading,
        root: Path | None,
        test: bool,
    ) -> Findings:
        assert isinstance(opened.splits, Splits)
        return check_splits(opened.splits, root, reading.omit, test=test)

    def training(
        self, opened: Opened[SegmentationScores], settings: Any, runtime: Runtime
    ) -> DenseTask[Any]:
        """With the weights of the classes."""
        task = opened.task
        assert isinstance(task, SegmentationTask)
        weight = class_weight(task, settings.class_balance).to(runtime.device)
        return dataclasses.replace(task, class_weight=weight)

    def measured(
        self, opened: Opened[SegmentationScores], scores: SegmentationScores
    ) -> dict[str, Any]:
        return {"class_iou": _by_class(opened.splits.val, scores)}

    def described(
        self, opened: Opened[SegmentationScores], scores: SegmentationScores, settings: Any
    ) -> dict[str, Any]:
        val = opened.splits.val
        return {
            "classes": list(val.classes),
            "colors": list(val.colors),
            "mask_values": settings.mask_values,
            "resize_longer": settings.resize_longer,
            "miou": scores.miou,
        }

    def text(
        self, opened: Opened[SegmentationScores], scores: SegmentationScores, split: str
    ) -> str:
        lines = [
            f"  {name:<16} {'absent' if iou is None else f'{iou:.3f}'}"
            for name, iou in _by_class(opened.splits.val, scores).items()
        ]
        return "\n".join([*lines, f"mIoU {scores.miou:.4f} on {split}"])

    def of_model(self, model: Model, reading: Reading) -> Reading:
        return dataclasses.replace(
            reading,
            mask_values=reading.mask_values or model.description.get("mask_values"),
            resize_longer=reading.resize_longer or model.description.get("resize_longer"),
        )

    def require_fit(
        self, model: Model, opened: Opened[SegmentationScores], part: Any, data: str
    ) -> None:
        """It must have the network's classes."""
        if model.classes != tuple(part.classes):
            raise UserError(
                f"evaluate: expected data of the network's classes {', '.join(model.classes)}, "
                f"got {', '.join(part.classes)} in {data}; give the data it was trained for by "
                "--data"
            )

    def view(self, output: Tensor, factor: float, views: int) -> Tensor:
        """Class probabilities."""
        return output.softmax(1)

    def better(self, scores: SegmentationScores) -> dict[str, float]:
        return {
            "mIoU": scores.miou,
            "mean accuracy": scores.mean_accuracy,
            "frequency-weighted IoU": scores.fw_iou,
        }

    def evaluated(self, part: Any, scores: SegmentationScores, reading: Reading) -> dict[str, Any]:
        return {**scores.as_dict(), "class_iou": _by_class(part, scores)}

    def tabulate(self, table: Table, part: Any, scores: SegmentationScores) -> None:
        for name, iou in _by_class(part, scores).items():
            table.add_row(escape(f"IoU {name}"), "absent" if iou is None else f"{iou:.3f}")
        table.add_section()
        for name, value in self.better(scores).items():
            table.add_row(name, f"{value:.4f}")


def _by_class(part: SegmentationDataset, scores: SegmentationScores) -> dict[str, float | None]:
    return dict(zip(part.classes, scores.class_iou, strict=True))


def class_weight(task: SegmentationTask, balance: float) -> Tensor:
    """Weight of each class [K] from the training masks, 1 on average over pixels: its frequency to
    the power of minus ``balance``."""
    counts = task.splits.train.label_counts().sum(0)
    frequency = counts[: task.outputs].double()
    frequency /= frequency.sum()
    weight = frequency.clamp(min=1e-4) ** -balance
    return (weight / (weight * frequency).sum()).float()
