"""Tasks: data, loss, metric and reward, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nasfast.tasks.restoration.base import RestorationTask
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.deraining import Deraining
from nasfast.tasks.restoration.inpainting import Inpainting
from nasfast.tasks.restoration.super_resolution import SuperResolution
from nasfast.utils.config import from_mapping

TASKS: dict[str, type[RestorationTask]] = {
    task.name: task for task in (Denoising, Deraining, SuperResolution, Inpainting)
}
"""Restoration tasks by name. To add one: a file beside this one and its class in this line."""


def task_from_json(description: Mapping[str, Any]) -> RestorationTask:
    """The restoration task that ``RestorationTask.describe`` described.

    Raises:
        ValueError: no such task, or a setting that it does not have or take.
    """
    name = description.get("task")
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    settings = {key: value for key, value in description.items() if key != "task"}
    return from_mapping(TASKS[name], settings, name)


__all__ = ["TASKS", "RestorationTask", "task_from_json"]
