"""Look at data before a search: ``nasfast check --data DIR``.

Prints what is read and what is not, sizes, the share of each class and of void, and warns of what
would mislead a search: classes that never occur, images that are both in train and in val. Draws a
dozen images, under their masks where they have some. Exit status: 0, or 1 with warnings, or 2 with
an error. ``nasfast check restoration`` reads the folder as that method would, and
``nasfast check --task depth``, ``keypoints`` or ``dehazing`` as data for that task.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nasfast.data import UnknownLayout, folder_of
from nasfast.data.checks import Findings, Row
from nasfast.data.images import FaultyFiles
from nasfast.data.sheet import draw_sheet
from nasfast.methods.base import CheckConfig, Method
from nasfast.methods.registry import METHODS
from nasfast.utils.cli import flag_value, printable, reports_errors, say
from nasfast.utils.config import choices
from nasfast.utils.errors import UserError
from nasfast.utils.files import atomic_file, require_place


def findings_of(argv: Sequence[str]) -> tuple[CheckConfig, Findings]:
    """Settings and findings of the method that the command line names, or else of the first that
    knows the folder's layout.

    Raises:
        UserError: the data cannot be opened.
    """
    unknown: dict[str, list[str]] = {}
    for method in _methods(argv):
        config = tyro.cli(
            method.check_settings, args=argv, description=__doc__, prog="nasfast check"
        )
        config = dataclasses.replace(config, data=str(folder_of(config.data) or config.data))
        _check_out(config)
        try:
            return config, method.check(config)
        except UnknownLayout as error:
            unknown.setdefault(str(error), []).append(method.name)
        except FaultyFiles as error:
            return config, Findings(errors=error.faults)
    raise UserError("; ".join(f"{', '.join(names)}: {text}" for text, names in unknown.items()))


def _methods(argv: Sequence[str]) -> list[Method]:
    """The method that a command line names, or all that have its flags."""
    given = (re.split("[=.]", word[2:])[0] for word in argv if word[:2] == "--")
    flags = {name.replace("-", "_") for name in given}
    task = flag_value(argv, "--task")
    fitting = [
        method
        for method in METHODS.values()
        if flags <= {field.name for field in dataclasses.fields(method.check_settings)}
        and (task is None or task in choices(method.check_settings, "task"))
    ]
    named = [METHODS[word] for word in argv if word in METHODS]
    known = {name for each in METHODS.values() for name in choices(each.check_settings, "task")}
    if not named and task is not None and task not in known:
        raise UserError(
            f"task: expected one of {', '.join(sorted(known))}, got {task!r}; correct the name"
        )
    return named or fitting or list(METHODS.values())


def _sheet(config: CheckConfig) -> Path:
    name = re.sub(r"[^\w.+-]+|^[.+-]+", "_", Path(config.data).name)
    return config.out or Path(f"{name}-check.png")


def _check_out(config: CheckConfig) -> None:
    """Raise UserError where the sheet would lie in the data."""
    root, out = folder_of(config.data), _sheet(config).resolve()
    if root is not None and out.is_relative_to(root):
        raise UserError(
            f"out: expected a place outside the data, got {out}; give --out, or run the command "
            "in another directory"
        )
    if out.is_dir():
        raise UserError(f"out: expected a PNG to write, got the directory {out}; name a file in it")
    require_place(out.parent, "give another --out")


def _table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=escape(title))
    for column, first in rows[0].items():
        table.add_column(column, justify="left" if isinstance(first, str) else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2%}" if value else "none"
    return escape(printable(str(value)))


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    console = Console()
    config, findings = findings_of(sys.argv[1:] if argv is None else argv)
    for title, rows in findings.facts.items():
        console.print(_table(title, rows))
    for warning in findings.warnings:
        say(console, f"warning: {warning}")
    for error in findings.errors:
        print(f"error: {error}", file=sys.stderr)
    if findings.tiles:
        out = _sheet(config)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as file:
            draw_sheet(findings.tiles, findings.legend).save(file, "png")
        say(console, f"{len(findings.tiles)} images: {out}")
    if findings.errors:
        return 2
    return 1 if findings.warnings else 0
