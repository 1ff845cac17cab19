"""Depth estimation with decoders."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.table import Table
from torch import Tensor

from nasfast.data.checks import Findings
from nasfast.data.depth import DepthSplits, load_depth_splits
from nasfast.data.depth.checks import check_depths
from nasfast.inference.model import Model
from nasfast.methods.segmentation.tasks.base import Binding, Opened, Reading
from nasfast.tasks.depth import DepthScores, DepthSettings, DepthTask
from nasfast.utils.files import data_path

LABELS = {
    "delta1": "delta < 1.25",
    "delta2": "delta < 1.25^2",
    "delta3": "delta < 1.25^3",
    "rmse": "RMSE, m",
    "rmse_log": "RMSE of logarithms",
    "abs_rel": "absolute relative error",
    "sqr_rel": "squared relative error, m",
}


class DepthBinding(Binding[DepthScores]):
    """Metres for every pixel."""

    metric = ("delta1", LABELS["delta1"])
    terms = MappingProxyType(
        {
            "reward": "Geometric mean of delta1 and of 1 / (1 + RMSE / standard deviation of the "
            "true depths) on training images held out to score candidates, 0 to 1.",
            "delta1": "Share of the pixels whose predicted and true depth differ by a factor below "
            "1.25; delta2 and delta3: below its square and cube.",
            "rmse": "Root of the mean squared error, in metres.",
        }
    )
    views = "logarithms averaged"
    foreign = ("mask_values", "omit", "class_balance", "turn")

    def open(self, reading: Reading) -> Opened[DepthScores]:
        splits = load_depth_splits(
            reading.data,
            reading.depth,
            seed=reading.seed,
            resize_longer=reading.resize_longer,
            cache_in_memory=reading.keep,
        )
        return Opened(splits, DepthTask(splits, reading.depth), "depths in metres")

    def check(
        self, opened: Opened[DepthScores], reading: Reading, root: Path | None, test: bool
    ) -> Findings:
        assert isinstance(opened.splits, DepthSplits)
        return check_depths(opened.splits, root, test=test)

    def measured(self, opened: Opened[DepthScores], scores: DepthScores) -> dict[str, Any]:
        task = _task(opened)
        baseline = task.baseline and {"mean_depth_of_each_pixel": task.baseline.as_dict()}
        return {**_counted(task.settings), **(baseline or {})}

    def described(
        self, opened: Opened[DepthScores], scores: DepthScores, settings: Any
    ) -> dict[str, Any]:
        task = _task(opened)
        return {
            "task": task.name,
            "output": "natural logarithm of the depth in metres",
            "depth": dataclasses.asdict(task.settings),
            "per_metre": task.processor.per_metre,
            "typical": task.typical,
            "resize_longer": settings.resize_longer,
            "delta1": scores.delta1,
        }

    def text(self, opened: Opened[DepthScores], scores: DepthScores, split: str) -> str:
        found = [f"  {LABELS[name]:<26} {value:.4f}" for name, value in scores.as_dict().items()]
        lines = [*found[1:], f"{self.metric[1]} {scores.delta1:.4f} on {split}"]
        if (baseline := _task(opened).baseline) is not None:
            lines.append(
                f"the mean depth of each pixel in train: {self.metric[1]} {baseline.delta1:.4f}, "
                f"RMSE {baseline.rmse:.4f} m"
            )
        return "\n".join(lines)

    def of_model(self, model: Model, reading: Reading) -> Reading:
        """Other data has a scale of its own."""
        before = dict(model.description.get("depth", {}))
        if data_path(reading.data) != model.description.get("data"):
            before.pop("scale", None)
        return dataclasses.replace(
            reading,
            depth=reading.depth.over(before),
            resize_longer=reading.resize_longer or model.description.get("resize_longer"),
        )

    def require_fit(self, model: Model, opened: Opened[DepthScores], part: Any, data: str) -> None:
        """Metres are metres."""

    def view(self, output: Tensor, factor: float, views: int) -> Tensor:
        """What is seen enlarged seems nearer by the same factor."""
        return (output + math.log(factor)) / views

    def better(self, scores: DepthScores) -> dict[str, float]:
        return {LABELS[name]: getattr(scores, name) for name in ("delta1", "delta2", "delta3")}

    def evaluated(self, part: Any, scores: DepthScores, reading: Reading) -> dict[str, Any]:
        return {**scores.as_dict(), **_counted(reading.depth)}

    def tabulate(self, table: Table, part: Any, scores: DepthScores) -> None:
        for name, value in scores.as_dict().items():
            table.add_row(LABELS[name], f"{value:.4f}")


def _task(opened: Opened[DepthScores]) -> DepthTask:
    assert isinstance(opened.task, DepthTask)
    return opened.task


def _counted(settings: DepthSettings) -> dict[str, Any]:
    """Which pixels the scores are of."""
    return {"crop": settings.crop or "none", "cap": settings.cap}
