"""One file of a cache: header, state table, blocks. The format is in docs/feature_cache.md.

Everything that touches the file is here: reading it through a map, filling it together with other
processes, creating it whole, and the locks that tell whether it is in use.

Locks are those of ``flock``, which end with their process. Whoever has a file open holds it shared.
Held alone it is removed, repaired, or taken over from fillers of another boot or container, whose
pids mean nothing here. A file is created under a temporary name, held alone by its creator.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasfast.cache import owners
from nasfast.cache.layout import Layout, aligned
from nasfast.files import sync_directory
from nasfast.ops import _native

MAGIC = b"NASFEATS"
VERSION = 1
SUFFIX = ".features"
_PREFIX = struct.Struct("<8sQQQQ")  # magic, version, bytes of the JSON, table, blocks
_CHECKED = _PREFIX.size + 8  # then the checksum of prefix and JSON, then the filling host
_JSON = 128  # first byte of the JSON
_PAGE = 4096
_STATE = 16  # bytes of a word and a checksum
_NORESERVE = 0x4000  # MAP_NORESERVE: a private map of a large file is no claim on memory
_TURN = 0.02  # seconds between looks at what others do
_PATIENCE = 2.0  # seconds for those who hold a file only to look at it


@dataclass(frozen=True)
class Header:
    """What a segment holds."""

    key: Mapping[str, str]
    """What the samples depend on."""
    storage: str
    """How maps are stored: auto (as encoded), float16, bfloat16, float32 or int8."""
    placement: str
    """file or ram."""
    first: int
    """Index of the first sample."""
    count: int
    """Samples in this segment."""
    total: int
    """Samples in the whole cache."""
    layout: Layout

    def encode(self) -> tuple[bytes, int, int]:
        """The bytes before the state table; offsets of the table and of the blocks."""
        text = json.dumps(
            {
                "key": dict(self.key),
                "storage": self.storage,
                "placement": self.placement,
                "first": self.first,
                "count": self.count,
                "total": self.total,
                "sample_bytes": self.layout.sample_bytes,
                "arrays": self.layout.to_json(),
            }
        ).encode()
        table = aligned(_JSON + len(text), _PAGE)
        blocks = aligned(table + _STATE * self.count, _PAGE)
        prefix = _PREFIX.pack(MAGIC, VERSION, len(text), table, blocks)
        checksum = _checksum_of(prefix + text).to_bytes(8, "little")
        return (prefix + checksum).ljust(_JSON, b"\0") + text, table, blocks

    @classmethod
    def read(cls, path: Path, file: int) -> tuple[Header, int, int]:
        """The header of a file; offsets of the table and of the blocks.

        Raises:
            ValueError: a foreign file, another version, a damaged header or a truncated file.
        """
        size = os.fstat(file).st_size
        prefix = os.pread(file, _JSON, 0)
        if len(prefix) < _JSON or not prefix.startswith(MAGIC):
            raise ValueError(
                f"feature cache {path}: wanted a file that starts with {MAGIC!r}, got "
                f"{prefix[:8]!r}; delete it, or move it away"
            )
        _, version, length, table, blocks = _PREFIX.unpack_from(prefix)
        if version != VERSION:
            raise ValueError(
                f"feature cache {path}: wanted format version {VERSION}, got {version}; delete it, "
                "or use the nasfast that made it"
            )
        text = os.pread(file, min(length, size), _JSON)
        wanted = int.from_bytes(prefix[_PREFIX.size : _CHECKED], "little")
        got = _checksum_of(prefix[: _PREFIX.size] + text)
        if got != wanted:
            raise ValueError(
                f"feature cache {path}: damaged header, wanted the checksum {wanted:016x}, got "
                f"{got:016x}; delete it"
            )
        fields = json.loads(text)
        layout = Layout.from_json(fields.pop("arrays"), fields.pop("sample_bytes"))
        header = cls(layout=layout, **fields)
        end = blocks + header.count * layout.sample_bytes
        if size < end:
            raise ValueError(
                f"feature cache {path}: truncated, wanted {end} bytes, got {size}; delete it"
            )
        return header, table, blocks


@dataclass(frozen=True)
class Census:
    """States of a segment's samples."""

    published: int
    claimed: int
    count: int

    @property
    def complete(self) -> bool:
        return self.published == self.count


class Segment:
    """An attached file: samples ``first .. first + count - 1`` of a cache, memory-mapped.

    Attributes:
        path: the file.
        header: what it holds.
        data: uint8 ``[count, sample_bytes]``, zero-copy; row i is sample ``first + i``. Pages that
            nobody writes to in this process show what is on the disk. It is valid as long as it
            lives, whatever happens to the segment and to the file's name.
    """

    def __init__(self, path: Path, file: int, *, writable: bool) -> None:
        """Takes over an open file that is locked shared; :meth:`open` is the way to one."""
        self.path, self._file, self._writable = path, file, writable
        self.header, table, self._blocks = Header.read(path, file)
        end = table + _STATE * self.count
        # whole from the start, so that any size of pages will do
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._table = np.frombuffer(mmap.mmap(file, end, mmap.MAP_SHARED, access), np.uint8)
        self._states = self._table.ctypes.data + table
        size = self.count * self.header.layout.sample_bytes
        # private: torch wants memory that may be written, and the file is never touched
        flags = mmap.MAP_PRIVATE | _NORESERVE
        whole = mmap.mmap(file, self._blocks + size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        raw = torch.frombuffer(whole, dtype=torch.uint8, offset=self._blocks, count=size)
        self.data = raw.view(self.count, self.header.layout.sample_bytes)
        self._seen = np.zeros(self.count, np.uint8)
        ram = self.header.placement == "ram"
        self._detach = weakref.finalize(self, _detach, path, file, os.getpid(), ram)

    @property
    def first(self) -> int:
        return self.header.first

    @property
    def count(self) -> int:
        return self.header.count

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Attach a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no segment, or damaged.
        """
        with _settled(path.parent):
            try:
                file, writable = os.open(path, os.O_RDWR | os.O_CLOEXEC), True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                    raise
                file, writable = os.open(path, os.O_RDONLY | os.O_CLOEXEC), False
            try:
                fcntl.flock(file, fcntl.LOCK_SH)
                return cls(path, file, writable=writable)
            except BaseException:
                os.close(file)
                raise

    def close(self) -> None:
        """No longer use the file; of a RAM segment the last user removes it."""
        self._detach()

    def census(self) -> Census:
        """How many samples are published and claimed."""
        words = _extension().feature_cache_census(self._states, self.count)
        published, free = (words.pop(word, 0) for word in (owners.PUBLISHED, owners.FREE))
        return Census(published, self.count - published - free, self.count)

    def check(self, rows: Tensor) -> None:
        """Verify the checksums of rows of ``data`` (int64 ``[n]``) that were not verified before.

        Raises:
            ValueError: no row of the segment.
            RuntimeError: a sample that is not published, or whose bytes are not those that were.
        """
        rows = rows.contiguous()
        position = _extension().feature_cache_find_broken(
            self._states,
            self.data.data_ptr(),
            self.header.layout.sample_bytes,
            self.first,
            self.count,
            rows.data_ptr(),
            len(rows),
            self._seen.ctypes.data,
        )
        if position >= 0:
            raise self._fault(int(rows[position]))

    def verify(self) -> list[int]:
        """Read everything: the rows whose checksum does not match, of those that are published."""
        self._seen[:] = 0
        return [row for row in self.published() if self._sums(row)[0] != self._sums(row)[1]]

    def published(self) -> list[int]:
        """The rows that are published."""
        return [row for row in range(self.count) if self._state(row)[0] == owners.PUBLISHED]

    def repair(self, rows: list[int]) -> None:
        """Free damaged rows, so that the next who wants the cache fills them again.

        Raises:
            RuntimeError: others use the segment.
        """
        if not _alone(self._file):
            fcntl.flock(self._file, fcntl.LOCK_SH)
            raise RuntimeError(
                f"feature cache {self.path}: in use, damaged samples stay; repair it later"
            )
        for row in rows:
            _extension().feature_cache_release(self._states, row, row + 1, owners.PUBLISHED)
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def _state(self, row: int) -> tuple[int, int]:
        at = self._table.size - _STATE * (self.count - row)
        word, checksum = struct.unpack_from("<QQ", self._table.data, at)
        return word, checksum

    def _sums(self, row: int) -> tuple[int, int]:
        """The checksum of a row's bytes, and the one that was published."""
        return _checksum(self.data[row], self.first + row), self._state(row)[1]

    def _fault(self, row: int) -> Exception:
        if not 0 <= row < self.count:
            return ValueError(
                f"feature cache {self.path}: wanted a sample of {self.first} to "
                f"{self.first + self.count - 1}, got {self.first + row}"
            )
        about = f"feature cache {self.path}: sample {self.first + row}"
        if self._state(row)[0] != owners.PUBLISHED:
            return RuntimeError(
                f"{about} is not there yet; FeatureCache.load_or_build returns when all are"
            )
        got, wanted = self._sums(row)
        return RuntimeError(
            f"{about} is damaged: wanted the checksum {wanted:016x}, got {got:016x}; free it with "
            f"`python -m nasfast.cache verify --repair {self.path}`, and the next search encodes "
            "it again"
        )


class Filler:
    """This process's part in filling a segment: claims free samples, writes and publishes them.

    Raises:
        OSError: the file cannot be written, or its disk is full.
        RuntimeError: processes of another machine or container fill it.
    """

    def __init__(self, segment: Segment) -> None:
        if not segment._writable:
            raise _not_writable(segment.path.parent, OSError(errno.EACCES, ""))
        self._segment, self._file = segment, segment._file
        self._states, self._blocks = segment._states, segment._blocks
        self._owner = owners.this_process()
        self._take_over()
        status = os.fstat(self._file)
        if status.st_blocks * 512 < status.st_size:  # a sparse copy
            _allocate(self._file, status.st_size, segment.path)

    def claim(self, chunk: int, start: int) -> Tensor:
        """Free rows of one aligned chunk, now this process's: int64, empty if none is free."""
        states, count = self._states, self._segment.count
        rows = _extension().feature_cache_claim(states, count, chunk, start, self._owner)
        return torch.tensor(rows, dtype=torch.int64)

    def write(self, rows: Tensor, blocks: Tensor) -> None:
        """Write claimed rows, uint8 ``[n, sample_bytes]``, and publish them.

        The blocks go through the file, where a full disk is an error and not a signal; nothing is
        synchronised, as the checksums tell what a power failure has torn.
        """
        first, sums = self._segment.first, []
        for row, block in zip(rows.tolist(), blocks):
            sums.append((row, _checksum(block, first + row)))
            _write(self._file, block.numpy().data, self._blocks + row * blocks.shape[1])
        for row, checksum in sums:
            if not _extension().feature_cache_publish(self._states, row, self._owner, checksum):
                raise RuntimeError(
                    f"feature cache {self._segment.path}: sample {first + row} was taken from this "
                    "process while it encoded; start it again"
                )

    def release(self) -> None:
        """Free what this process has claimed and not published."""
        _extension().feature_cache_release(self._states, 0, self._segment.count, self._owner)

    def reap(self) -> int:
        """Free the claims of processes that have died; returns how many there were."""
        words = _extension().feature_cache_census(self._states, self._segment.count)
        claims = (word for word in words if word not in (owners.FREE, owners.PUBLISHED))
        return self._free(word for word in claims if not owners.is_alive(word))

    def _free(self, words: Iterable[int]) -> int:
        release, count = _extension().feature_cache_release, self._segment.count
        return sum(release(self._states, 0, count, word) for word in words)

    def _take_over(self) -> None:
        """Make this host the one whose pids the table holds."""
        host, deadline = owners.host(), time.monotonic() + _PATIENCE
        if os.pread(self._file, len(host), _CHECKED) == host:
            return
        while os.pread(self._file, len(host), _CHECKED) != host:
            if _alone(self._file):
                if os.pread(self._file, len(host), _CHECKED) != host:
                    words = _extension().feature_cache_census(self._states, self._segment.count)
                    self._free(w for w in words if w not in (owners.FREE, owners.PUBLISHED))
                    _write(self._file, host, _CHECKED)
            elif time.monotonic() > deadline:
                raise RuntimeError(
                    f"feature cache {self._segment.path}: being filled by another machine or "
                    "container; wait until it has ended, or give another --cache-dir"
                )
            else:
                time.sleep(_TURN)
        fcntl.flock(self._file, fcntl.LOCK_SH)


def create(
    path: Path, begin: Callable[[], tuple[Header, Tensor]], heartbeat: Callable[[], None]
) -> Segment | None:
    """Make the file of a segment and attach it; None if another process has made it meanwhile.

    One process at a time calls ``begin``, which returns the header and the blocks of the first
    samples (uint8 ``[n, sample_bytes]``, perhaps none). The others wait, with a ``heartbeat`` a
    turn.

    Raises:
        OSError: the directory cannot be written or has no room for the whole file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o777 if _is_disk(path) else 0o700)
        file = _creation_lock(temporary, heartbeat)
    except OSError as error:
        raise _not_writable(path.parent, error) from error
    try:
        if path.exists():
            temporary.unlink()
            os.close(file)
            return None
        header, blocks = begin()
        prefix, table, offset = header.encode()
        size = header.layout.sample_bytes
        os.ftruncate(file, 0)  # what a killed process left
        _allocate(file, offset + header.count * size, path)
        _write(file, prefix, 0)
        _write(file, owners.host(), _CHECKED)
        for i, block in enumerate(blocks):
            _write(file, block.numpy().data, offset + i * size)
            state = struct.pack("<QQ", owners.PUBLISHED, _checksum(block, header.first + i))
            _write(file, state, table + i * _STATE)
        os.fsync(file)
        with _settled(path.parent):
            os.rename(temporary, path)
            fcntl.flock(file, fcntl.LOCK_SH)
            segment = Segment(path, file, writable=True)
    except BaseException:
        temporary.unlink(missing_ok=True)
        os.close(file)
        raise
    sync_directory(path.parent)
    return segment


def sweep(directory: Path, keep: Path) -> None:
    """Remove what killed processes left: unfinished files, and RAM segments but for ``keep``."""
    patterns = [f".*{SUFFIX}.tmp"]
    if directory == ram_directory():
        patterns.append(f"*{SUFFIX}")
    if directory.is_dir():
        for path in [path for pattern in patterns for path in directory.glob(pattern)]:
            if path != keep:
                remove(path)


def remove(path: Path, *, force: bool = False) -> int | None:
    """Remove a file that nobody uses, or anyhow; returns the bytes freed, None if it stays."""
    with suppress(FileNotFoundError), _settled(path.parent):
        try:
            file = os.open(path, os.O_RDWR)
        except PermissionError:
            return None
        try:
            if force or (_alone(file) and _names(path, file)):
                path.unlink()
                return os.fstat(file).st_blocks * 512
        finally:
            os.close(file)
    return None


def ram_directory() -> Path:
    """Where this user's RAM segments live."""
    return Path(f"/dev/shm/nasfast-{os.getuid()}")


def free_bytes(directory: Path) -> int:
    """What a new file in a directory may take; in RAM also no more than the machine has left."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if directory == ram_directory():
        line = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        free = min(free, int(line[1]) * 1024) if line else free
    return free


def _detach(path: Path, file: int, pid: int, ram: bool) -> None:
    # a forked child shares the lock, which stays its parent's
    if pid == os.getpid():
        if ram:
            with suppress(FileNotFoundError), _settled(path.parent):
                if _alone(file) and _names(path, file):
                    path.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)  # its maps would hold on to it
    os.close(file)


def _creation_lock(temporary: Path, heartbeat: Callable[[], None]) -> int:
    """The temporary file, open and held alone."""
    while True:
        file = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            while not _alone(file):
                heartbeat()
                time.sleep(_TURN)
            if _names(temporary, file):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # renamed or removed meanwhile


def _alone(file: int) -> bool:
    """Hold the lock of an open file alone, if nobody else has it; otherwise hold none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(path: Path, file: int) -> bool:
    """Whether the path is still that of the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


_holding = threading.local()


@contextmanager
def _settled(directory: Path) -> Iterator[None]:
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


def _allocate(file: int, size: int, path: Path) -> None:
    """Reserve the whole of a file."""
    missing = size - os.fstat(file).st_blocks * 512
    free = free_bytes(path.parent)
    code = 0
    if _is_disk(path) or missing <= free:
        code = _extension().feature_cache_allocate(file, size)
    if code == errno.ENOSPC or (missing > free and code in (0, errno.EOPNOTSUPP)):
        raise OSError(
            errno.ENOSPC,
            f"feature cache: wanted {missing} bytes in {path.parent}, got {free} free; make room "
            "with `python -m nasfast.cache rm`, bound a RAM segment with --memory, or give another "
            "--cache-dir",
        )
    if code == errno.EOPNOTSUPP:
        os.ftruncate(file, size)
    elif code:
        raise OSError(code, f"feature cache: {size} bytes in {path.parent}: {os.strerror(code)}")


def _write(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def _not_writable(directory: Path, error: OSError) -> OSError:
    code = error.errno or errno.EIO
    return OSError(
        code,
        f"feature cache: cannot write to {directory}: {os.strerror(code)}; give another "
        "--cache-dir",
    )


def _is_disk(path: Path) -> bool:
    return path.parent != ram_directory()


def _checksum(block: Tensor, index: int) -> int:
    """Of a sample's block, uint8 ``[sample_bytes]``."""
    checksum = _extension().feature_cache_checksum(block.data_ptr(), block.numel(), index)
    return int(checksum)


def _checksum_of(data: bytes) -> int:
    array = np.frombuffer(data, np.uint8)
    return int(_extension().feature_cache_checksum(array.ctypes.data, len(data), 0))


def _extension() -> Any:
    if _native.C is None:
        raise RuntimeError(f"the feature cache needs the compiled extension: {_native.ERROR}")
    return _native.C
