"""Image restoration: what is degraded and how, patches to train on, loss and scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from nasfast.tasks.restoration.base import RestorationTask
from nasfast.tasks.restoration.dehazing import Dehazing
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.deraining import Deraining
from nasfast.tasks.restoration.inpainting import Inpainting
from nasfast.tasks.restoration.super_resolution import SuperResolution
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError

Task = Denoising | Deraining | SuperResolution | Inpainting | Dehazing
"""Every restoration task. To add one: a file beside this one, its class in this line and its
name in `TaskName`."""
TASKS: dict[str, type[Task]] = {cls.task: cls for cls in get_args(Task)}
"""The tasks by name."""
TaskName = Literal["denoising", "deraining", "super-resolution", "inpainting", "dehazing"]


def task_from_json(description: object) -> Task:
    """The restoration task that ``RestorationTask.describe`` described.

    Raises:
        UserError: no such task, or a setting that it does not have or take.
    """
    settings = dict(description) if isinstance(description, Mapping) else {"task": description}
    name = settings.pop("task", None)
    if not isinstance(name, str) or name not in TASKS:
        raise UserError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return from_mapping(TASKS[name], settings, name)


__all__ = ["TASKS", "RestorationTask", "Task", "TaskName", "task_from_json"]
