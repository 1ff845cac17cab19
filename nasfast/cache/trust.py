"""What may be used of what lies in a directory: only this user and root may be able to change it.

A directory is opened once and judged while it is open; all that is in it is reached from there, and
no symbolic link in it is followed. So nobody can exchange what was judged for something else.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nasfast.utils.errors import UserError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# a named pipe does not make who opens it wait
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def user_name(uid: int) -> str:
    """The name of a user, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def private_directory(directory: Path) -> Path:
    """The directory that is used where one is asked for.

    That is itself, where nobody but this user and root may write to it, or where it is missing and
    will be made; else this user's folder ``nasfast-<uid>`` in it. A symbolic link of this user or
    of root stands for its target.

    Raises:
        UserError: a directory of another user, in which this one may not make a folder; a link of
            another user.
    """
    directory = _target(directory)
    try:
        status = os.lstat(directory)
    except OSError:
        return directory  # missing, or its use says what is wrong
    if not stat.S_ISDIR(status.st_mode) or _is_trusted(status):
        return directory
    inside = directory / f"nasfast-{os.getuid()}"
    if not os.path.lexists(inside) and not os.access(directory, os.W_OK | os.X_OK):
        raise _not_trusted(directory, status, "give another --cache-dir")
    return inside


def make_directory(directory: Path) -> None:
    """Make a directory for this user alone, in one that is made if need be; one that is there
    stays."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)


@contextmanager
def open_directory(directory: Path, remedy: str) -> Iterator[int]:
    """The descriptor of a directory that nobody but this user and root may write to.

    Raises:
        UserError: others may, or it is a link of another user; the remedy says what to do.
        OSError: there is none, or it may not be read.
    """
    target = _target(directory, remedy)
    try:
        file = os.open(target, _DIRECTORY)
    except NotADirectoryError as error:
        with suppress(OSError):  # else something above it is no directory
            raise UserError(
                f"feature cache: expected {directory} to be a directory, got a file of "
                f"{user_name(os.lstat(target).st_uid)}; {remedy}"
            ) from error
        raise
    try:
        status = os.fstat(file)
        if not _is_trusted(status):
            raise _not_trusted(directory, status, remedy)
        yield file
    finally:
        os.close(file)


def open_plain(directory: int, path: Path, flags: int) -> int:
    """Open a file of an open directory, or make it for this user alone.

    Raises:
        UserError: a symbolic link, or anything else but a plain file.
        OSError: there is none, or it may not be opened so.
    """
    try:
        file = os.open(path.name, flags | _FILE, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket, a directory
            raise _not_plain(path, os.lstat(path.name, dir_fd=directory)) from error
        error.filename = str(path)
        raise
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise _not_plain(path, status)
    return file


def open_trusted(directory: int, path: Path, flags: int) -> int:
    """The same for a file whose content is used.

    Raises:
        UserError: also where another user than this one and root owns it, or may write to it.
    """
    file = open_plain(directory, path, flags)
    status = os.fstat(file)
    if not _is_trusted(status):
        os.close(file)
        raise UserError(
            f"feature cache {path}: expected a file that only you or root may write to, got "
            f"{_owner_and_mode(status)}; delete it, or `chmod go-w` your own if you trust what "
            "it holds"
        )
    return file


def _is_trusted(status: os.stat_result) -> bool:
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & _OTHERS


def _target(directory: Path, remedy: str = "give another --cache-dir") -> Path:
    """Where a link of this user or of root leads; any other path itself."""
    try:
        status = os.lstat(directory)
    except OSError:
        return directory
    if not stat.S_ISLNK(status.st_mode):
        return directory
    if status.st_uid not in (os.getuid(), 0):
        raise UserError(
            f"feature cache: expected {directory} to be a directory, got a symbolic link of "
            f"{user_name(status.st_uid)}; {remedy}"
        )
    return Path(os.path.realpath(directory))


def _owner_and_mode(status: os.stat_result) -> str:
    return f"owner {user_name(status.st_uid)} and mode {stat.S_IMODE(status.st_mode):04o}"


def _not_trusted(directory: Path, status: os.stat_result, remedy: str) -> UserError:
    return UserError(
        f"feature cache: expected {directory} to be a directory that only you or root may write "
        f"to, got {_owner_and_mode(status)}; {remedy}"
    )


def _not_plain(path: Path, status: os.stat_result) -> UserError:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a directory"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device, pipe or socket")
    return UserError(
        f"feature cache {path}: expected a plain file, got {kind} of {user_name(status.st_uid)}; "
        "remove it"
    )
