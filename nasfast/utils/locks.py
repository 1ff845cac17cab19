"""Folders and files that one process at a time writes to.

The kernel frees a lock when the process that holds it ends, however it ends. A forked child gives
up what its parent holds: it may outlive a parent that is killed.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nasfast.utils.errors import UserError
from nasfast.utils.files import naming, remove_unfinished, unfinished

__all__ = ["LOCK", "acquire", "claimed", "is_free", "locked", "release", "writing", "writing_to"]

LOCK = "lock"
"""File in a folder that is written to; it holds the number of the process that last did."""

_TURN = 0.05
"""Seconds between two attempts."""

_ATTEMPTS = 1000
"""To make a folder that others remove at the same time."""

_held: set[int] = set()


def acquire(path: Path, subject: Path, patience: float = 0.0) -> int:
    """Open a lock file, made where there is none, and hold it alone; `release` gives it back.

    Args:
        path: the lock file.
        subject: what is written while it is held.
        patience: seconds to wait for another process.

    Raises:
        UserError: another process holds it.
        OSError: it cannot be made, or is a symbolic link.
    """
    deadline = time.monotonic() + patience
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
        try:
            with naming(path):  # of a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace") or "that has just started"
            os.close(descriptor)
            if time.monotonic() < deadline:
                time.sleep(_TURN)
                continue
            raise UserError(
                f"{subject} is being written by process {holder}; wait for it or stop it first"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # who held it has removed it
    try:
        with naming(path):  # of a full disk
            os.truncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def release(descriptor: int) -> None:
    """Give up a lock; that of a parent process is given up already."""
    if descriptor in _held:
        _held.remove(descriptor)
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process writes to the folder.

    Raises:
        UserError: another one does.
    """
    descriptor = acquire(folder / LOCK, folder)
    try:
        yield
    finally:
        release(descriptor)


def is_free(folder: Path, early: Collection[str] = ()) -> bool:
    """Whether a folder may be claimed: there is nothing of that name, or nothing in it but the lock
    of a process that was killed as it began, with what it had written by then.

    Args:
        folder: that is to be made.
        early: names of the files that are written before there is anything to keep.
    """
    try:
        names = {entry.name for entry in os.scandir(folder)}
        begun = {name for name in names - {LOCK, *early} if not unfinished(name)}
        return not names or (LOCK in names and not begun)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return not os.path.lexists(folder)  # a file is where a folder above should be
    except PermissionError:  # another user's
        return False


@contextmanager
def claimed(folder: Path, early: Collection[str] = ()) -> Iterator[bool]:
    """Make a folder, and keep other processes from writing to it: True inside, or False where it
    holds something already. Left without anything in it, it is removed. `early`: as of `is_free`.

    Raises:
        UserError: another process is about to write there.
        OSError: it cannot be made.
    """
    for attempt in itertools.count(1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = acquire(folder / LOCK, folder)
            break
        except (FileNotFoundError, FileExistsError):
            # who had it has removed it just now, unless something else is in the way
            if attempt == _ATTEMPTS or _is_in_the_way(folder):
                raise
    try:
        free = is_free(folder, early)
        if free:
            remove_unfinished(folder)
            for name in early:
                (folder / name).unlink(missing_ok=True)
        yield free
    finally:
        if is_free(folder, early):
            with suppress(OSError):
                for name in (*early, LOCK):
                    (folder / name).unlink(missing_ok=True)
                folder.rmdir()
        release(descriptor)


@contextmanager
def writing(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Inside, no other process that asks writes the file or folder of this name.

    Args:
        path: of the file or folder.
        patience: seconds to wait for another process.

    Raises:
        UserError: another one does.
    """
    lock = path.with_name(f".{path.name}.lock")
    descriptor = acquire(lock, path, patience)
    try:
        remove_unfinished(path.parent, path.name)
        yield
    finally:
        lock.unlink(missing_ok=True)
        release(descriptor)


@contextmanager
def writing_to(folder: Path, name: str) -> Iterator[None]:
    """`writing` for a file in a folder; one that was made here goes again where nothing came into
    it."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with writing(folder / name):
            yield
    finally:
        if new:
            with suppress(OSError):
                folder.rmdir()


def _is_in_the_way(path: Path) -> bool:
    """Whether a file, or a link that leads nowhere, has the path, which may go at any time."""
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return path.is_symlink()


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release_in_child() -> None:
    for descriptor in list(_held):
        release(descriptor)


os.register_at_fork(after_in_child=_release_in_child)
