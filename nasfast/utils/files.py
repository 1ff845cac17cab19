"""Files: writes are atomic and durable, and errors name the file."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import secrets
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nasfast.utils.errors import UserError, cause

__all__ = [
    "atomic_directory",
    "atomic_file",
    "atomic_write",
    "data_path",
    "expanded",
    "naming",
    "parse_json",
    "read_json",
    "read_object",
    "read_text",
    "read_toml",
    "remove_unfinished",
    "require_place",
    "require_shallow",
    "sync_directory",
    "unfinished",
]


DEPTH = 64
"""Lists and objects within each other, at most, in a JSON or TOML file."""


_LEFT = ".{}.*.tmp"
"""Pattern of the names that `_temporary` gives for a file."""


def _temporary(path: Path) -> Path:
    """A name beside the path that no other process or thread takes, or can foresee."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the name `path` in one step when the block ends without an error.

    A reader, or a crash, sees the old file or the whole new one.
    """
    temporary = _temporary(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with (
            naming(path, instead_of=temporary),
            open(temporary, "wb", opener=lambda name, _: os.open(name, flags, 0o666)) as file,
        ):
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def atomic_write(path: Path, data: bytes | memoryview | str) -> None:
    """Replace `path` by `data` in one step."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def data_path(data: str) -> str:
    """The absolute path of a data set's folder; "synthetic" is none.

    Raises:
        UserError: its name is not UTF-8, which the files of a run are.
    """
    path = data if data == "synthetic" else str(expanded(data).resolve())
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"data: expected a folder whose path is UTF-8, got {path!r}; rename it"
        ) from error
    return path


def require_place(path: Path, remedy: str) -> None:
    """Find out whether a directory can be made; nothing is left behind.

    Args:
        path: that it would have; folders above it may be missing too.
        remedy: what to do where it cannot.

    Raises:
        UserError: a file is in the way, the name is too long, or nothing can be written there.
    """
    try:
        above = next(parent for parent in (path, *path.parents) if parent.exists())
        with tempfile.TemporaryDirectory(prefix=".nasfast-", dir=above) as folder:
            (Path(folder) / path.name).mkdir()
    except OSError as error:
        raise UserError(
            f"{path}: expected a directory that can be made and written to, got "
            f"{(error.strerror or cause(error)).lower()}; {remedy}"
        ) from error


def atomic_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Make a directory of these files appear in one step; one that is there is replaced."""
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        for name, data in files.items():
            atomic_write(temporary / name, data)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_directory(path.parent)


def unfinished(name: str) -> bool:
    """Whether a file of this name is the temporary one of another."""
    return fnmatch.fnmatchcase(name, _LEFT.format("*"))


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files and directories that killed processes left in a folder, of a name,
    or any, that no other process writes to."""
    begin = "*" if name is None else glob.escape(name)
    for left in folder.glob(_LEFT.format(begin)):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in a directory (created, renamed, removed files) survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Give an error of the system in the block the file's name where it has none, or that of a
    temporary file: what fails on an open file, such as a full disk, does not know it."""
    try:
        yield
    except OSError as error:
        known = error.filename is not None and error.filename != str(instead_of)
        if error.errno is not None and not known:
            error.filename = str(path)
        raise


def expanded(path: Path | str) -> Path:
    """A path with the home directory for its ``~``, unless a file has that name, such as
    ``~$photo.jpg``.

    Raises:
        UserError: there is none, as in a container without HOME.
    """
    if os.path.lexists(path):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: expected a home directory for ~, got none; set HOME, or give the whole path"
        ) from error


def read_text(path: Path) -> str:
    """Text of a file, without the byte order mark that Windows puts first; UserError where it is
    not UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected text in UTF-8, got other bytes at {error.start}; save it as UTF-8, "
            "or restore it from a copy"
        ) from error


def read_json(path: Path) -> Any:
    """Content of a JSON file; UserError where it is not JSON."""
    text = read_text(path)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected JSON, got {text[:40]!r} ({cause(error)}); restore it from a copy"
        ) from error


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply for whatever reads it, which calls itself.
    """
    content = json.loads(text)
    require_shallow(content)
    return content


def require_shallow(content: object) -> None:
    """Raise RecursionError where lists and objects are nested more deeply than any file needs."""
    level = [content] if isinstance(content, list | dict) else []
    for _ in range(DEPTH):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for each in parts for part in each if isinstance(part, list | dict)]
        if not level:
            return
    raise RecursionError(f"nested more than {DEPTH} deep")


def read_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected a JSON object, got {str(content)[:40]!r}; restore it from a copy"
        )
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """Content of a TOML file; UserError where it is not TOML."""
    text = read_text(path)
    try:
        content = tomllib.loads(text)
        require_shallow(content)
        return content
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected TOML, got {text[:40]!r} ({cause(error)}); restore it from a copy"
        ) from error
