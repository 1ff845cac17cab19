"""Frozen dataclasses from the plain mappings that they were saved as."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Rebuild a (nested) dataclass; fields that the mapping lacks keep their defaults.

    Raises:
        ValueError: the mapping has a field that the dataclass does not know.
    """
    hints = get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(mapping) - names)
    if unknown:
        raise ValueError(
            f"{where}: unknown setting {unknown[0]!r}; expected some of "
            f"{', '.join(sorted(names))}. "
            "Was the file written by another version of nasfast?"
        )
    values = {}
    for name, value in mapping.items():
        kind = next((arg for arg in get_args(hints[name]) if arg is Path), hints[name])
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            value = from_mapping(kind, value, f"{where}, {name}")
        elif kind is Path and value is not None:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        values[name] = value
    return cls(**values)


def require_positive(config: object, *names: str) -> None:
    """Raise ValueError unless these fields are above 0."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            where = f"{type(config).__name__}.{name}"
            raise ValueError(f"{where}: expected a value above 0, got {value}")
