"""Durable files: what was written is whole and on the disk, or was never there."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nasfast.utils.errors import UserError

__all__ = ["atomic_file", "atomic_write", "read_json", "read_toml", "sync_directory"]


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` in one step when the block ends without an error.

    A reader, or a crash, sees the old file or the whole new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_directory(path: Path) -> None:
    """Make the names in a directory (created, renamed, removed files) survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> object:
    """Content of a JSON file."""
    try:
        content: object = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}; restore the file") from error
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """Content of a TOML file."""
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: expected TOML, got {error}; restore the file") from error
