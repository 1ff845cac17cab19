"""Processors by the description in a model file. A new task gets a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nasfast.data.base import default_colors
from nasfast.data.keypoints import Skeleton
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.tasks.depth import DepthProcessor
from nasfast.tasks.detection.processor import DetectionProcessor
from nasfast.tasks.keypoints import KeypointProcessor
from nasfast.tasks.processor import Processor
from nasfast.tasks.restoration import task_from_json
from nasfast.tasks.restoration.processor import RestorationProcessor
from nasfast.tasks.segmentation import SegmentationProcessor


def processor_of(description: Mapping[str, Any]) -> Processor:
    """How the network of a description, as `nasfast.models.io.load_model` returns it, is used.

    Raises:
        KeyError: the description lacks what the task needs.
        UserError: the task is unknown, or has another setting.
    """
    if description.get("task") == "depth":
        return DepthProcessor(float(description["per_metre"]), float(description["typical"]))
    if description.get("task") == "keypoints":
        return KeypointProcessor(Skeleton(tuple(description["classes"])))
    detects = "detection" in (description.get("task"), description.get("method"))
    if "task" in description and not detects:
        genotype = IRNASGenotype.from_json(description["genotype"])
        task = task_from_json(description["task"])
        reduction = description.get("restorer", {}).get("reduction", 1)
        return RestorationProcessor.of(task, description["channels"], genotype, reduction)
    classes = tuple(description["classes"])
    colors = description.get("colors") or default_colors(len(classes))
    colors = tuple((r, g, b) for r, g, b in colors)
    if detects:
        ids = description.get("category_ids") or range(1, len(classes) + 1)
        return DetectionProcessor(classes, colors, tuple(int(each) for each in ids))
    return SegmentationProcessor(classes, colors)
