"""The dense tasks that the methods for decoders search and train networks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from nasfast.methods.segmentation.tasks.base import Binding, Opened, Reading
from nasfast.methods.segmentation.tasks.depth import DepthBinding
from nasfast.methods.segmentation.tasks.keypoints import KeypointBinding
from nasfast.methods.segmentation.tasks.segmentation import SegmentationBinding

__all__ = ["BINDINGS", "Binding", "Opened", "Reading", "TaskName", "binding_of"]

TaskName = Literal["segmentation", "depth", "keypoints"]
BINDINGS: Mapping[str, Binding[Any]] = {
    "segmentation": SegmentationBinding(),
    "depth": DepthBinding(),
    "keypoints": KeypointBinding(),
}


def binding_of(settings: Any) -> Binding[Any]:
    """That of the settings' task.

    Raises:
        UserError: they hold something for another task.
    """
    name = settings.task or "segmentation"
    binding = BINDINGS[name]
    remedy = "leave it out, or give another --task"
    binding.refuse_foreign(settings, f"--task {name}", remedy)
    return binding
