"""Settings: frozen dataclasses, the ranges of their numbers, and their form in files."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from nasfast.utils.errors import UserError, about, shown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Bound:
    """Values that a number may have, written at its field: ``lr: Annotated[float, Bound(0, 1)]``.

    NaN is none of them, and infinity only where it is said so.
    """

    low: float
    high: float = math.inf
    open: Literal["", "low", "high"] = ""
    """Which of the two is no value itself."""
    infinite: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is one of them."""
        above = value > self.low if self.open == "low" else value >= self.low
        below = value < self.high if self.open == "high" else value <= self.high
        return above and below and (self.infinite or math.isfinite(value))

    def __str__(self) -> str:
        low, high = (f"{side:,}" for side in (self.low, self.high))
        if self.high == math.inf:
            return f"above {low}" if self.open == "low" else f"of at least {low}"
        if self.open == "low":
            return f"above {low} and at most {high}"
        return f"from {low} to {'below ' if self.open == 'high' else ''}{high}"


Count = Annotated[int, Bound(1, 10**9)]
"""Epochs, steps, samples."""
BatchSize = Annotated[int, Bound(1, 2**16)]
"""Samples that are in memory at once."""
Pixels = Annotated[int, Bound(2, 2**16)]
"""A side of an image."""
Channels = Annotated[int, Bound(1, 2**14)]
"""Width of a layer."""
Seed = Annotated[int, Bound(0, 2**63 - 1)]
Positive = Annotated[float, Bound(0, open="low")]
"""A learning rate."""
Weight = Annotated[float, Bound(0)]
"""Factor of a term of a loss; 0 leaves it out."""
Decay = Annotated[float, Bound(0, 1, open="high")]
"""Of a running mean; 1 would never move it."""
MaxNorm = Annotated[float, Bound(0, open="low", infinite=True)]
"""Of gradients; infinity clips none."""


_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?) *([kKMGT]?)")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def count_of(value: str | int, where: str) -> int:
    """The number of a count such as "0.3M", "300k", "1.5G" or 300000, rounded down.

    Raises:
        UserError: another form, or a number that is not from 1 to 10^18.
    """
    match = _COUNT.fullmatch(str(value).strip())
    count = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if not 1 <= count <= 10**18:
        raise UserError(
            f"{where}: expected a count such as 300000, 300k, 0.3M or 1.5G, got {value!r}; "
            "correct the value"
        )
    return count


class Bounded:
    """Base of a dataclass whose numbers are checked when it is made."""

    def __post_init__(self) -> None:
        """Raise UserError where a number is out of the `Bound` of its field."""
        for name, bound in _bounds(type(self)).items():  # type: ignore[arg-type]
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value is not None and not bound.holds(value):
                    where = f"{type(self).__name__}.{name}"
                    raise UserError(f"{where}: expected a value {bound}, got {value}")


@functools.cache
def _bounds(cls: type) -> dict[str, Bound]:
    """The bounds of a class, by the field that has one or whose parts have."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: bound for name, hint in hints.items() for bound in _bounds_in(hint)}


def _bounds_in(hint: Any) -> list[Bound]:
    if get_origin(hint) is Annotated:
        return [part for part in hint.__metadata__ if isinstance(part, Bound)]
    return [bound for part in get_args(hint) for bound in _bounds_in(part)]


def choices(cls: type, name: str) -> tuple[Any, ...]:
    """The values of the Literal in the type of a dataclass's field; none where there is no such
    field."""
    hint = get_type_hints(cls).get(name)
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(
        value for option in options if get_origin(option) is Literal for value in get_args(option)
    )


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Rebuild a (nested) dataclass; fields that the mapping lacks keep their defaults.

    A field that is not an argument of the dataclass is its tag: of a union of dataclasses, the
    mapping becomes the one with its tag.

    Args:
        cls: the dataclass.
        mapping: its fields; tuples may be lists, paths strings, numbers integers.
        where: the file, or what else the mapping comes from.

    Raises:
        UserError: a field is unknown, missing or of another type.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(mapping) - set(fields))
    if unknown:
        raise UserError(
            f"{where}: unknown setting {unknown[0]!r}; expected some of "
            f"{', '.join(sorted(fields))}. Was the file written by another version of nasfast?"
        )
    needed = dataclasses.MISSING
    for name, field in fields.items():
        if field.default is needed and field.default_factory is needed and name not in mapping:
            raise UserError(f"{where}: expected the setting {name!r}, got none; add it")
    values = {
        name: _typed(value, hints[name], f"{where}, {name}")
        for name, value in mapping.items()
        if fields[name].init
    }
    with about(where):
        return cls(**values)


def override(config: T, settings: Mapping[str, Any], where: str) -> T:
    """A dataclass with other values of some fields.

    Args:
        config: the dataclass.
        settings: by name; fields of a nested dataclass as a mapping, or each as "outer.inner".
        where: what the settings come from.

    Raises:
        UserError: a field is unknown or of another type.
    """
    mapping = _merged(dataclasses.asdict(config), settings)  # type: ignore[call-overload]
    return from_mapping(type(config), mapping, where)


def _merged(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in settings.items():
        outer, _, inner = name.partition(".")
        if inner:
            value = {inner: value}
        if isinstance(value, Mapping) and isinstance(merged.get(outer, {}), Mapping):
            value = _merged(merged.get(outer, {}), value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        merged[outer] = value
    return merged


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A value as the type of its field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        options = [option for option in arguments if option is not NoneType]
        if isinstance(value, Mapping):
            options = _tagged(options, value, where)
        for option in options[:-1]:
            with suppress(UserError):
                return _typed(value, option, where)
        return _typed(value, options[-1], where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_mapping(hint, _checked(value, Mapping, where, "a table"), where)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _refuse(value, where, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        values = _checked(value, (list, tuple), where, "a list")
        kinds = arguments[:1] * len(values) if arguments[-1] is ... else arguments
        if len(values) != len(kinds):
            raise _refuse(value, where, f"a list of {len(kinds)}")
        parts = enumerate(zip(values, kinds, strict=True))
        return tuple(_typed(part, kind, f"{where}[{i}]") for i, (part, kind) in parts)
    if hint is Path:
        return Path(_checked(value, (str, Path), where, "a path"))
    if hint is bool:
        return _checked(value, bool, where, "true or false")
    if hint is str:
        return _checked(value, str, where, "a string")
    if hint is int or hint is float:
        kind, expected = (int, "an integer") if hint is int else ((int, float), "a number")
        if isinstance(value, bool):
            raise _refuse(value, where, expected)
        with suppress(OverflowError):  # an integer of hundreds of digits
            return hint(_checked(value, kind, where, expected))
        raise _refuse(value, where, expected)
    if origin is not None and issubclass(origin, Mapping):
        return _checked(value, Mapping, where, "a table")
    return value


def _tagged(options: list[Any], mapping: Mapping[str, Any], where: str) -> list[Any]:
    """The dataclasses of a union that have the mapping's tag; all where they have no tags."""
    tags = {
        option: (field.name, field.default)
        for option in options
        if dataclasses.is_dataclass(option)
        for field in dataclasses.fields(option)
        if not field.init
    }
    found = [option for option, (name, tag) in tags.items() if mapping.get(name) == tag]
    if tags and not found:
        (name, _), *_ = tags.values()
        expected = f"one of {', '.join(repr(tag) for _, tag in tags.values())}"
        raise _refuse(mapping.get(name), f"{where}, {name}", expected)
    return found or options


def _checked(value: Any, kind: type | tuple[type, ...], where: str, expected: str) -> Any:
    if not isinstance(value, kind):
        raise _refuse(value, where, expected)
    return value


def _refuse(value: Any, where: str, expected: str) -> UserError:
    return UserError(f"{where}: expected {expected}, got {shown(value)}; correct the value")
