"""Joints of people with decoders."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from nasfast.data.checks import Findings
from nasfast.data.keypoints import (
    KeypointDataset,
    KeypointSplits,
    PersonTrainTransform,
    PersonValTransform,
    halves_by_image,
    load_keypoint_splits,
    person_size,
)
from nasfast.data.keypoints.checks import check_keypoints
from nasfast.data.keypoints.transforms import CELL, PADDING
from nasfast.inference.model import Model
from nasfast.methods.segmentation.tasks.base import Binding, Opened, Reading
from nasfast.tasks.keypoints import KeypointScores, KeypointTask
from nasfast.tasks.keypoints.heatmaps import flip_tested
from nasfast.utils.errors import UserError

HEIGHT = 256
"""Pixels of a crop, at most, where it is not given: 256 x 192, as in Simple Baselines."""
LABELS = {
    "ap": "AP",
    "ap50": "AP at OKS 0.5",
    "ap75": "AP at OKS 0.75",
    "ap_medium": "AP, medium people",
    "ap_large": "AP, large people",
    "ar": "AR",
    "ar50": "AR at OKS 0.5",
    "ar75": "AR at OKS 0.75",
    "ar_medium": "AR, medium people",
    "ar_large": "AR, large people",
    "oks": "mean OKS",
    "pckh@0.5": "PCKh@0.5",
    "pckh@0.1": "PCKh@0.1",
}


class KeypointBinding(Binding[KeypointScores]):
    """A heatmap for every joint, of crops of people."""

    metric = ("score", "mean OKS")
    terms = MappingProxyType(
        {
            "reward": "Mean object keypoint similarity of people in training images held out to "
            "score candidates, 0 to 1; of data without it, as MPII, PCKh@0.5.",
            "mean OKS": "How near estimated joints are to the true ones, relative to the person's "
            "size and to how far annotators are off; of MPII, PCKh@0.5.",
            "ap": "Average precision over thresholds of OKS from 0.5 to 0.95; boxes are given.",
            "pckh@0.5": "Share of the joints within half the size of the head.",
        }
    )
    views = "heatmaps averaged"
    foreign = ("mask_values", "resize_longer", "omit", "class_balance", "depth")

    def open(self, reading: Reading) -> Opened[KeypointScores]:
        splits = load_keypoint_splits(reading.data, seed=reading.seed, cache_in_memory=reading.keep)
        return Opened(splits, KeypointTask(splits), f"{len(splits.train.skeleton)} joints")

    def check(
        self, opened: Opened[KeypointScores], reading: Reading, root: Path | None, test: bool
    ) -> Findings:
        assert isinstance(opened.splits, KeypointSplits)
        return check_keypoints(opened.splits, root, test=test)

    def halves(self, train: KeypointDataset, seed: int) -> tuple[Any, Any]:
        return halves_by_image(train, seed=seed)

    def train_transform(self, crop: int, shorter_side: int) -> PersonTrainTransform:
        """The height of a crop; people fill it, whatever the sides of their images."""
        return PersonTrainTransform(person_size(crop))

    def val_transform(self, crop: int | None) -> PersonValTransform:
        assert crop is not None  # of `fitted`
        return PersonValTransform(person_size(crop))

    def fitted(self, settings: Any) -> Any:
        """Candidates are scored on crops as large as the last ones that they learn from."""
        last = settings.stage1 if settings.stage1.epochs else settings.stage0
        return dataclasses.replace(settings, val_crop=settings.val_crop or last.crop)

    def own_crops(self, settings: Any, train: KeypointDataset) -> tuple[Any, Any, Any]:
        """Crops of the given height, or of `HEIGHT`, less where all people are smaller."""
        height = settings.crop
        if height is None:
            longest = max(max(r - x, b - y) for x, y, r, b in (p.box for p in train.people()))
            height = min(HEIGHT, CELL * math.ceil(PADDING * longest / CELL))
        rows, columns = person_size(height)
        if settings.crop_width is not None:
            columns = person_size(settings.crop_width)[0]
        size = rows, columns
        return (
            dataclasses.replace(settings, crop=rows, crop_width=columns),
            PersonTrainTransform(size, settings.scales, settings.turn, jitter=settings.jitter),
            PersonValTransform(size),
        )

    def as_scored(self, model: Model) -> PersonValTransform:
        height, width = model.description["size"]
        return PersonValTransform((height, width))

    def measured(self, opened: Opened[KeypointScores], scores: KeypointScores) -> dict[str, Any]:
        return _of_joints(opened.splits.val, scores)

    def described(
        self, opened: Opened[KeypointScores], scores: KeypointScores, settings: Any
    ) -> dict[str, Any]:
        return {
            "task": "keypoints",
            "classes": list(opened.splits.train.skeleton.joints),
            "output": "heatmaps of joints, that cover the crop of a person",
            **scores.figures,
        }

    def text(self, opened: Opened[KeypointScores], scores: KeypointScores, split: str) -> str:
        rows = [f"  {LABELS[name]:<18} {value:.4f}" for name, value in scores.figures.items()]
        name, value = next(iter(scores.figures.items()))
        return "\n".join([*rows[1:], f"{LABELS[name]} {value:.4f} on {split}"])

    def of_model(self, model: Model, reading: Reading) -> Reading:
        """Nothing of the training decides how other data is read."""
        return reading

    def require_fit(
        self, model: Model, opened: Opened[KeypointScores], part: KeypointDataset, data: str
    ) -> None:
        """It must have the network's joints."""
        if model.classes != part.skeleton.joints:
            raise UserError(
                f"evaluate: expected data of the network's joints {', '.join(model.classes)}, got "
                f"{', '.join(part.skeleton.joints)} in {data}; give the data it was trained for by "
                "--data"
            )

    def viewed(
        self, model: Callable[[Tensor], Tensor], factors: Sequence[float], flip: bool
    ) -> Callable[[Tensor], Tensor]:
        """With the flip test: joints of left and right are exchanged."""
        assert isinstance(model, Model)
        if tuple(factors) != (1.0,):
            raise UserError(
                "scales: expected 1 for keypoints, whose crops have one size, got "
                f"{', '.join(f'{factor:g}' for factor in factors)}; leave it out"
            )
        return flip_tested(model, model.processor.skeleton.mirrored)  # type: ignore[attr-defined]

    def better(self, scores: KeypointScores) -> dict[str, float]:
        return {LABELS[name]: value for name, value in scores.figures.items()}

    def evaluated(
        self, part: KeypointDataset, scores: KeypointScores, reading: Reading
    ) -> dict[str, Any]:
        return {**scores.as_dict(), **_of_joints(part, scores)}

    def tabulate(self, table: Table, part: KeypointDataset, scores: KeypointScores) -> None:
        for name, value in zip(part.skeleton.joints, scores.joints, strict=True):
            table.add_row(
                escape(f"{scores.by} {name}"), "none" if value is None else f"{value:.3f}"
            )
        table.add_section()
        for name, value in self.better(scores).items():
            table.add_row(name, f"{value:.4f}")


def _of_joints(part: KeypointDataset, scores: KeypointScores) -> dict[str, Any]:
    """What each joint scores, and by what; the sizes of heads that PCKh is relative to."""
    joints = dict(zip(part.skeleton.joints, scores.joints, strict=True))
    heads = {"head_size": part.head_from} if "pckh@0.1" in scores.figures else {}
    return {"joints": joints, "joints_by": scores.by, **heads}
