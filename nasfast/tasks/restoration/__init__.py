"""Image restoration: what is degraded and how, patches to train on, loss and scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from nasfast.tasks.restoration.base import RestorationTask
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.deraining import Deraining
from nasfast.tasks.restoration.inpainting import Inpainting
from nasfast.tasks.restoration.super_resolution import SuperResolution
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError

Task = Denoising | Deraining | SuperResolution | Inpainting
"""Every restoration task. To add one: a file beside this one and its class in this line."""
TASKS: dict[str, type[Task]] = {cls.task: cls for cls in get_args(Task)}
"""The tasks by name."""


def task_from_json(description: Mapping[str, Any]) -> Task:
    """The restoration task that ``RestorationTask.describe`` described.

    Raises:
        UserError: no such task, or a setting that it does not have or take.
    """
    name = description.get("task")
    if name not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    settings = {key: value for key, value in description.items() if key != "task"}
    return from_mapping(TASKS[name], settings, name)


__all__ = ["TASKS", "RestorationTask", "Task", "task_from_json"]
