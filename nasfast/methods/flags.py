"""Settings from a command line: ``--help`` shows the flags needed most, ``--help-all`` all."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

C = TypeVar("C")
HELP = frozenset({"--help", "-h"})


def preset_of(presets: Mapping[str, C], name: str | None, data: str | None) -> C:
    """The preset of a search that is named; without a name, or with a wrong one, which is refused
    later, that of the data: "demo" for generated images, else "quick"."""
    return presets.get(name or "") or presets["demo" if data in (None, "synthetic") else "quick"]


def parse(
    default: C, argv: Sequence[str], prog: str, description: str | None, first: Sequence[str] = ()
) -> C:
    """Settings from a command line; help, or what is wrong, is printed and ends the process.

    Args:
        default: a dataclass, whose values flags override; a ``tyro.MISSING`` has to be given.
        argv: the command line.
        prog: name of the command.
        description: its help.
        first: fields that ``--help`` describes, positional ones too; of the others it gives the
            flags alone. Without any it describes all.
    """
    if not first or HELP.isdisjoint(argv):
        words = ["--help" if word == "--help-all" else word for word in argv]
        return _parse(default, words, prog, description)
    try:
        _parse(_shortened(default, first), ["--help"], prog, description)
    finally:  # tyro has raised SystemExit
        words = [word for word in argv if word not in HELP]
        print(f"more flags; {' '.join([prog, *words])} --help-all describes them")
        for group, flags in _flags(default, first):
            print(textwrap.fill(flags, 100, **_columns(f"  {group:<12} "), break_on_hyphens=False))
    raise AssertionError("expected tyro to end the process")


def _parse(default: C, argv: Sequence[str], prog: str, description: str | None) -> C:
    parsed: C = tyro.cli(
        type(default),
        args=argv,
        default=default,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),  # a field that may be None is no subcommand
    )
    return parsed


def _shortened(default: Any, first: Sequence[str]) -> Any:
    """The same values in a dataclass that has the flags of other fields hidden."""
    cls = type(default)
    hints = get_type_hints(cls, include_extras=True)
    hidden = {
        field.name: Annotated[hints[field.name], tyro.conf.Suppress]
        for field in dataclasses.fields(cls)
        if field.name not in first
    }
    # a factory is no attribute of the class, and would not be inherited
    factories = {
        field.name: dataclasses.field(default_factory=field.default_factory)
        for field in dataclasses.fields(cls)
        if field.name in hidden and field.default_factory is not dataclasses.MISSING
    }
    body = {"__annotations__": hidden, "__doc__": cls.__doc__, **factories}
    short = type(cls.__name__, (cls,), body)
    values = {field.name: getattr(default, field.name) for field in dataclasses.fields(cls)}
    shortened: Any = dataclasses.dataclass(frozen=True, kw_only=True)(short)
    return shortened(**values)


def _flags(settings: Any, first: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(group, flags) of the other fields; a nested dataclass is a group."""
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in first
    }
    groups = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    yield "", " ".join(_flag(name) for name in values if name not in groups)
    for name, value in groups.items():
        yield name, " ".join(_nested(value, name))


def _nested(settings: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _nested(value, name)
        elif field.init:
            yield _flag(name)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _columns(label: str) -> Any:
    return {"initial_indent": label, "subsequent_indent": " " * len(label)}
