"""The task among the settings: ``--task NAME``, and its own settings as ``--task.FIELD``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from nasfast.methods.flags import parse
from nasfast.tasks.restoration import task_from_json
from nasfast.utils.config import override

C = TypeVar("C")


def parse_with_task(
    default: C, argv: Sequence[str], prog: str, description: str | None, first: Sequence[str] = ()
) -> C:
    """Settings from a command line; help shows the settings of the task that is the default.

    Args:
        default: a dataclass with a field ``task``, which may be None; flags override it.
        argv: the command line.
        prog: name of the command.
        description: its help.
        first: fields that ``--help`` describes.

    Raises:
        UserError: ``--task`` names no task.
    """
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    known, rest = parser.parse_known_args(argv)
    return parse(_with_task(default, known.task), rest, prog, description, first)


def override_with_task(default: C, settings: Mapping[str, Any], where: str) -> C:
    """`override`, where "task" is a name, a task, or its description.

    Raises:
        UserError: there is no such task or setting.
    """
    task = settings.get("task")
    if isinstance(task, str):
        settings = {name: value for name, value in settings.items() if name != "task"}
    name = task.get("task") if isinstance(task, Mapping) else getattr(task, "task", task)
    if isinstance(name, str):
        default = _with_task(default, name)
    return override(default, settings, where)


def _with_task(default: C, name: str | None) -> C:
    """The settings with that task and its defaults, unless they have it already."""
    settings: Any = default
    if name is not None and name != getattr(settings.task, "task", None):
        task = task_from_json({"task": name})
        own: dict[str, Any] = {}
        if task.colour and hasattr(settings, "channels"):
            own["channels"] = 3
        if hasattr(settings, "network"):
            own["network"] = dataclasses.replace(settings.network, reduction=task.reduction)
        settings = dataclasses.replace(settings, task=task, **own)
    changed: C = settings
    return changed
