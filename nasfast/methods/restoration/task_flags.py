"""The task on the command line: ``--task NAME``, and its own settings as ``--task.FIELD``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from nasfast.tasks.restoration import task_from_json

C = TypeVar("C")


def parse_with_task(default: C, argv: Sequence[str], prog: str, description: str | None) -> C:
    """Settings from a command line; tyro shows the settings of the task that is the default.

    Args:
        default: a dataclass with a field ``task``, which may be None; flags override it.
        argv: the command line.
        prog: name of the command.
        description: its help.

    Raises:
        UserError: ``--task`` names no task.
    """
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    known, rest = parser.parse_known_args(argv)
    settings: Any = default
    if known.task is not None and known.task != getattr(settings.task, "task", None):
        settings = dataclasses.replace(settings, task=task_from_json({"task": known.task}))
    parsed: C = tyro.cli(
        type(default),
        args=rest,
        default=settings,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),  # None is no subcommand
    )
    return parsed
