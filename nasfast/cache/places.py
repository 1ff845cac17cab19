"""The places where caches' files are kept: free room, locks, and what is left to remove.

Locks are those of ``flock``, which end with their process. Whoever has a file open holds it shared.
Held alone it is created (under a temporary name), removed, repaired, or taken over from fillers of
another boot or container, whose pids mean nothing here. Directories and files are opened as
``trust`` says, and nobody is waited for longer than ``waiting`` says.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nasfast.cache import trust, waiting
from nasfast.cache.header import extension
from nasfast.utils.errors import UserError

SUFFIX = ".features"
ANY = f"[!.]*{SUFFIX}"
PATIENCE = 1.0  # seconds that a lock of the RAM segments is worth to who only cleans up
_MEMBERSHIP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def ram_directory() -> Path:
    """Where this user's RAM segments live."""
    return Path(f"/dev/shm/nasfast-{os.getuid()}")


def free_bytes(directory: Path) -> int:
    """What a new file in a directory may take; in RAM also no more than the memory that is left, to
    the machine and to this process's control groups."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if directory == ram_directory():
        line = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        free = min(free, int(line[1]) * 1024) if line else free
        free = max(0, min([free, *_left_to_groups()]))
    return free


def _left_to_groups() -> Iterator[int]:
    """What each limit on the memory of this process has left, in bytes.

    A limit holds for all groups below. Cached files count as used until their room is needed, so
    those that were not read lately are no obstacle.
    """
    memberships = _MEMBERSHIP.read_text().splitlines() if _MEMBERSHIP.exists() else []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if not controllers:  # version 2
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _GROUPS / "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(root):
                with suppress(OSError):  # a container sees its own group as the root
                    limit, used = ((directory / name).read_text().strip() for name in names[:2])
                    stat = (directory / "memory.stat").read_text()
                    cached = re.search(rf"^{names[2]} (\d+)$", stat, re.M)
                    if limit != "max":
                        yield int(limit) - int(used) + (int(cached[1]) if cached else 0)


def is_ram(path: Path) -> bool:
    """Whether a file is a RAM segment."""
    return path.parent == ram_directory()


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """The descriptor of a directory of caches.

    Raises:
        UserError: others than this user and root may write to it.
        OSError: there is none, or it may not be read.
    """
    with trust.open_directory(directory, remedy(directory)) as file:
        yield file


def remedy(directory: Path) -> str:
    """What to do where a directory cannot be used."""
    return f"give {'--placement file' if directory == ram_directory() else 'another --cache-dir'}"


def caches(directory: Path) -> list[Path]:
    """The caches in a directory: none where it is missing, or the one in RAM is another user's.

    Raises:
        UserError: others may write to it.
    """
    try:
        with opened(directory) as file:
            found = sorted(name for name in os.listdir(file) if fnmatch.fnmatchcase(name, ANY))
    except FileNotFoundError:
        return []
    except (OSError, UserError):
        if directory != ram_directory():
            raise
        return []
    return [directory / name for name in found]


def sweep(directory: Path, keep: Path | None = None) -> int:
    """Remove what killed processes left: unfinished files, and RAM segments but for ``keep``.

    What this user may not remove stays, as does what is in the way of RAM segments; their use says
    what is wrong.

    Returns:
        The bytes freed.
    """
    patterns = [f".*{SUFFIX}.tmp"]
    if directory == ram_directory():
        patterns.append(ANY)
    freed = 0
    try:
        with settled(directory, PATIENCE) as file:
            for name in sorted(os.listdir(file)):
                path = directory / name
                if path != keep and any(fnmatch.fnmatchcase(name, p) for p in patterns):
                    freed += _swept(path)
    except FileNotFoundError:
        pass
    except (OSError, UserError):
        if directory != ram_directory():
            raise
    return freed


def _swept(path: Path) -> int:
    try:
        return remove(path) or 0
    except UserError:  # no plain file
        return 0
    except OSError as error:  # another user's, or read-only
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return 0


def remove(path: Path, *, force: bool = False) -> int | None:
    """Remove a file that nobody uses, or anyhow; returns the bytes freed, None if it stays.

    Raises:
        UserError: a symbolic link, or anything else but a plain file.
    """
    with suppress(FileNotFoundError), settled(path.parent, PATIENCE) as directory:
        file = trust.open_plain(directory, path, os.O_RDWR)
        try:
            if force or (alone(file) and names(directory, path.name, file)):
                os.unlink(path.name, dir_fd=directory)
                return os.fstat(file).st_blocks * 512
        finally:
            os.close(file)
    return None


def creation_lock(directory: int, temporary: Path, heartbeat: Callable[[], None]) -> int:
    """The temporary file of a new one in an open directory, open and held alone.

    Raises:
        OSError: the directory cannot be written.
        UserError: its creator has stopped.
    """
    wait = None
    while True:
        try:
            file = trust.open_trusted(directory, temporary, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise not_writable(temporary.parent, error.errno or errno.EIO) from error
        try:
            while names(directory, temporary.name, file):
                if alone(file) and names(directory, temporary.name, file):
                    return file
                heartbeat()
                wait = wait or _wait_for_creator(directory, temporary)
                wait.turn()
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # renamed or removed meanwhile


def _wait_for_creator(directory: int, temporary: Path) -> waiting.Wait:
    """It encodes the first samples and writes them, both of which take their time."""

    def creators() -> set[int]:
        try:
            file = trust.open_plain(directory, temporary, os.O_RDONLY)
        except FileNotFoundError:
            return set()
        try:
            return waiting.lock_holders(file)
        finally:
            os.close(file)

    def sign() -> object:
        with suppress(FileNotFoundError):
            status = os.stat(temporary.name, dir_fd=directory, follow_symlinks=False)
            written = status.st_ino, status.st_mtime_ns, status.st_blocks
            return written, [(pid, waiting.effort(pid)) for pid in sorted(creators())]
        return None

    return waiting.Wait(
        temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp")),
        creators,
        "makes it",
        "to make it",
        f"continue or end that process, or {remedy(temporary.parent)}",
        sign,
    )


def alone(file: int) -> bool:
    """Hold the lock of an open file alone, if nobody else has it; otherwise hold none."""
    return waiting.try_lock(file, fcntl.LOCK_EX)


def share(file: int, path: Path, heartbeat: Callable[[], None] = waiting.idle) -> None:
    """Hold the lock of an open file as all who use it do.

    Raises:
        UserError: somebody holds it alone for too long.
    """
    waiting.lock(file, fcntl.LOCK_SH, path, remedy(path.parent), heartbeat=heartbeat)


def names(directory: int, name: str, file: int) -> bool:
    """Whether a name in an open directory is still that of the open file."""
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(status, os.fstat(file))


_holding = threading.local()


@contextmanager
def settled(
    directory: Path, bound: float | None = None, heartbeat: Callable[[], None] = waiting.idle
) -> Iterator[int]:
    """An open directory, in which nobody else attaches, leaves or removes RAM segments.

    Between two kinds of lock a file has none for a moment, in which it would be swept. A garbage
    collection inside may close segments: it holds the lock already.

    Raises:
        UserError: others may write to it, or hold its lock for too long; after ``bound`` seconds.
        OSError: there is none, or it may not be read.
    """
    with opened(directory) as file:
        if directory != ram_directory() or getattr(_holding, "it", False):
            yield file
            return
        waiting.lock(file, fcntl.LOCK_EX, directory, remedy(directory), bound, heartbeat)
        try:
            _holding.it = True
            yield file
        finally:
            _holding.it = False


def allocate(file: int, size: int, path: Path) -> None:
    """Reserve the whole of a file, so that a full disk is an error before anything is written.

    Raises:
        OSError: there is no room, in RAM also where the machine has no memory left.
    """
    missing = size - os.fstat(file).st_blocks * 512
    free = free_bytes(path.parent)
    code = errno.ENOSPC
    if not is_ram(path) or missing <= free:
        code = extension().feature_cache_allocate(file, size)
    if code in (errno.ENOSPC, errno.EDQUOT) or (code == errno.EOPNOTSUPP and missing > free):
        raise OSError(
            errno.ENOSPC,
            f"feature cache: expected {missing} bytes in {path.parent}, got {free} free; make room "
            f"with `nasfast cache rm`, or {remedy(path.parent)}",
        )
    if code == errno.EOPNOTSUPP:
        os.ftruncate(file, size)
    elif code:
        raise OSError(code, f"feature cache: {size} bytes in {path.parent}: {os.strerror(code)}")


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def not_writable(directory: Path, code: int) -> OSError:
    """The error of a directory or file that cannot be written, for a reason of ``errno``."""
    return OSError(
        code,
        f"feature cache: cannot write to {directory}: {os.strerror(code)}; {remedy(directory)}",
    )
