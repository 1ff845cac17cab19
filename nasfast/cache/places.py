"""The places where caches' files are kept: free room, locks, and what is left to remove.

Locks are those of ``flock``, which end with their process. Whoever has a file open holds it shared.
Held alone it is created (under a temporary name), removed, repaired, or taken over from fillers of
another boot or container, whose pids mean nothing here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nasfast.cache.header import extension

SUFFIX = ".features"
TURN = 0.02  # seconds between looks at what others do
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


def sweep(directory: Path, keep: Path | None = None) -> int:
    """Remove what killed processes left: unfinished files, and RAM segments but for ``keep``.

    Returns:
        The bytes freed.
    """
    patterns = [f".*{SUFFIX}.tmp"]
    if directory == ram_directory():
        patterns.append(f"*{SUFFIX}")
    freed = 0
    for path in [path for pattern in patterns for path in directory.glob(pattern)]:
        if path != keep:
            try:
                freed += remove(path) or 0
            except OSError as error:  # another user's, in a directory that is shared, or read-only
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
    return freed


def remove(path: Path, *, force: bool = False) -> int | None:
    """Remove a file that nobody uses, or anyhow; returns the bytes freed, None if it stays."""
    with suppress(FileNotFoundError), settled(path.parent):
        file = os.open(path, os.O_RDWR)
        try:
            if force or (alone(file) and names(path, file)):
                path.unlink()
                return os.fstat(file).st_blocks * 512
        finally:
            os.close(file)
    return None


def creation_lock(temporary: Path, heartbeat: Callable[[], None]) -> int:
    """The temporary file of a new one, open and held alone.

    Raises:
        OSError: the directory cannot be made or written.
    """
    directory = temporary.parent
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700 if is_ram(temporary) else 0o777)
            if is_ram(temporary) and directory.stat().st_uid != os.getuid():
                raise PermissionError(errno.EACCES, "another user's")
            file = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise not_writable(directory, error.errno or errno.EIO) from error
        try:
            while names(temporary, file):
                if alone(file) and names(temporary, file):
                    return file
                heartbeat()
                time.sleep(TURN)
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # renamed or removed meanwhile


def alone(file: int) -> bool:
    """Hold the lock of an open file alone, if nobody else has it; otherwise hold none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def names(path: Path, file: int) -> bool:
    """Whether the path is still that of the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


_holding = threading.local()


@contextmanager
def settled(directory: Path) -> Iterator[None]:
    """Nobody else attaches, leaves or removes RAM segments inside the block.

    Between two kinds of lock a file has none for a moment, in which it would be swept. A garbage
    collection inside may close segments: it holds the lock already.
    """
    if directory != ram_directory() or getattr(_holding, "it", False):
        yield
        return
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        _holding.it = True
        yield
    finally:
        _holding.it = False
        os.close(file)


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
            "with `nasfast cache rm`, or give "
            + ("--placement file" if is_ram(path) else "another --cache-dir"),
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
        f"feature cache: cannot write to {directory}: {os.strerror(code)}; give another "
        "--cache-dir",
    )
