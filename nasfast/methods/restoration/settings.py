"""The task on the command line: ``--task NAME``, and its own settings as ``--task.FIELD``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import tyro

from nasfast.tasks.restoration import task_from_json
from nasfast.utils.cli import flag_value

C = TypeVar("C")


def parse(
    config: type[C], argv: Sequence[str], *, prog: str, description: str | None, default: C | None
) -> C:
    """Settings from a command line.

    Args:
        config: a dataclass whose field ``task`` holds what ``RestorationTask.describe`` gives, or
            None.
        argv: the command line.
        prog: name of the command.
        description: its help.
        default: what flags override; None where the dataclass has defaults enough.

    Raises:
        ValueError: ``--task`` names no task.
    """
    before: Mapping[str, Any] = (getattr(default, "task", None) if default else None) or {}
    name = flag_value(argv, "--task") or before.get("task")
    if name is None:
        return _cli(config, argv, prog, description, default)
    task = task_from_json(before if name == before.get("task") else {"task": name})
    # the same settings with the task's fields as flags
    typed: Any = dataclasses.make_dataclass(
        config.__name__,
        [("task", type(task), dataclasses.field(default=task))],
        bases=(config,),
        frozen=True,
    )
    values = {} if default is None else _fields(default) | {"task": task}
    defaults = typed(**values) if values else None
    parsed = _cli(typed, _without(argv, "--task"), prog, description, defaults)
    return config(**_fields(parsed) | {"task": parsed.task.describe()})


def _cli(
    config: type[C], argv: Sequence[str], prog: str, description: str | None, default: C | None
) -> C:
    if default is None:
        return tyro.cli(config, args=argv, prog=prog, description=description)
    return tyro.cli(config, args=argv, prog=prog, description=description, default=default)


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _without(argv: Sequence[str], flag: str) -> list[str]:
    """The command line without a flag and its value."""
    kept, words = [], iter(argv)
    for word in words:
        if word == flag:
            next(words, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept
