"""The file of a cache, attached: reading it through a map, filling it with others, creating it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nasfast.cache import owners, places
from nasfast.cache.header import HOST, STATE, Header, checksum, extension
from nasfast.utils.errors import UserError
from nasfast.utils.files import naming, sync_directory

_NORESERVE = 0x4000  # MAP_NORESERVE: a private map of a large file is no claim on memory
_PATIENCE = 2.0  # seconds to wait for processes that only inspect a file


@dataclass(frozen=True)
class Census:
    """States of a segment's samples."""

    published: int
    claimed: int
    count: int

    @property
    def complete(self) -> bool:
        return self.published == self.count


class _Table:
    """The states of a segment's samples, in shared memory."""

    def __init__(self, file: int, start: int, count: int, access: int) -> None:
        # all from the start of the file, so that any size of pages will do
        mapped = mmap.mmap(file, start + STATE.size * count, mmap.MAP_SHARED, access)
        self._bytes = np.frombuffer(mapped, np.uint8)[start:]
        self.address: int = self._bytes.ctypes.data
        self._count = count

    def __getitem__(self, row: int) -> tuple[int, int]:
        """Word and checksum of a row."""
        word, published = STATE.unpack_from(self._bytes.data, STATE.size * row)
        return word, published

    def words(self) -> dict[int, int]:
        """How many rows have each word."""
        return dict(extension().feature_cache_census(self.address, self._count))

    def free(self, word: int, begin: int = 0, end: int | None = None) -> int:
        """Free the rows of a word; returns how many there were."""
        rows = begin, self._count if end is None else end
        return int(extension().feature_cache_release(self.address, *rows, word))


class Segment:
    """An attached file with the samples of a cache, memory-mapped.

    Attributes:
        path: the file.
        header: what it holds.
        data: uint8 ``[count, sample_bytes]``, zero-copy. Pages that nobody writes to in this
            process show what is on the disk. It is valid as long as it lives, whatever happens to
            the segment and to the file's name.
    """

    def __init__(self, path: Path, file: int, *, writable: bool) -> None:
        """Takes over an open file that is locked shared; :meth:`open` is the way to one."""
        self.path, self._file, self._writable = path, file, writable
        self.header, table, self._blocks = Header.read(path, file)
        self._table_at = table
        self._table = _Table(file, table, self.count, mmap.PROT_READ)
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
    def count(self) -> int:
        return self.header.count

    @classmethod
    def open(cls, path: Path) -> Segment:
        """Attach a file.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is no cache, or damaged.
        """
        with places.settled(path.parent):
            try:
                file, writable = os.open(path, os.O_RDWR), True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                    raise
                file, writable = os.open(path, os.O_RDONLY), False
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
        words = self._table.words()
        published, free = (words.pop(word, 0) for word in (owners.PUBLISHED, owners.FREE))
        return Census(published, self.count - published - free, self.count)

    def check(self, rows: Tensor) -> None:
        """Verify the checksums of rows of ``data`` (int64 ``[n]``) that were not verified before.

        Raises:
            ValueError: no row of the segment.
            UserError: a sample whose bytes are not those that were published.
            RuntimeError: a sample that is not published.
        """
        rows = rows.to("cpu", torch.int64).contiguous()
        while (position := self._find_broken(rows)) >= 0:
            fault = self._fault(int(rows[position]))
            if fault is not None:
                raise fault

    def _find_broken(self, rows: Tensor) -> int:
        position = extension().feature_cache_find_broken(
            self._table.address,
            self.data.data_ptr(),
            self.header.layout.sample_bytes,
            self.count,
            rows.data_ptr(),
            len(rows),
            self._seen.ctypes.data,
        )
        return int(position)

    def verify(self) -> list[int]:
        """Read everything: the rows whose checksum does not match, of those that are published."""
        self._seen[:] = 0
        return [row for row in self.published() if len(set(self._sums(row))) == 2]

    def published(self) -> list[int]:
        """The rows that are published."""
        return [row for row in range(self.count) if self._table[row][0] == owners.PUBLISHED]

    def in_use(self) -> bool:
        """Whether others have the file open."""
        alone = places.alone(self._file)
        fcntl.flock(self._file, fcntl.LOCK_SH)
        return not alone

    def repair(self, rows: list[int]) -> None:
        """Free damaged rows, so that the next search fills them again.

        Raises:
            OSError: the file cannot be written.
            UserError: others use it, and may have read those rows before.
        """
        table = self._writable_table()
        alone = places.alone(self._file)
        for row in rows if alone else ():
            table.free(owners.PUBLISHED, row, row + 1)
        fcntl.flock(self._file, fcntl.LOCK_SH)
        if not alone:
            raise UserError(
                f"feature cache {self.path}: in use, its damaged samples stay; end the processes "
                "that use it first"
            )

    def touch(self) -> None:
        """Note that the file is used; its time of access is when it was last attached."""
        with suppress(OSError):
            os.utime(self._file, ns=(time.time_ns(), os.fstat(self._file).st_mtime_ns))

    def _writable_table(self) -> _Table:
        if not self._writable:
            raise places.not_writable(self.path, errno.EACCES)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        return _Table(self._file, self._table_at, self.count, access)

    def _sums(self, row: int) -> tuple[int, int]:
        """The checksum of a row's bytes, and the one that was published."""
        return checksum(self.data[row], row), self._table[row][1]

    def _fault(self, row: int) -> Exception | None:
        """What is wrong with a row; None if it was published just now."""
        if not 0 <= row < self.count:
            return ValueError(
                f"feature cache {self.path}: expected a sample of 0 to {self.count - 1}, got {row}"
            )
        about = f"feature cache {self.path}: sample {row}"
        if self._table[row][0] != owners.PUBLISHED:
            return RuntimeError(
                f"{about} is not there yet; FeatureCache.load_or_build returns when all are"
            )
        got, expected = self._sums(row)
        if got == expected:
            return None
        return UserError(
            f"{about} is damaged: expected the checksum {expected:016x}, got {got:016x}; free it "
            f"with `nasfast cache verify --repair {self.path}`, and the next search "
            "encodes it again"
        )


class Filler:
    """This process's part in filling a segment: claims free samples, writes and publishes them.

    Raises:
        OSError: the file cannot be written, or its disk is full.
        UserError: processes of another machine or container use it.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment, self._table = segment, segment._writable_table()
        self._file, self._blocks = segment._file, segment._blocks
        self._owner = owners.this_process()
        self._take_over()
        status = os.fstat(self._file)
        if status.st_blocks * 512 < status.st_size:  # a sparse copy
            places.allocate(self._file, status.st_size, segment.path)

    def claim(self, chunk: int, start: int) -> Tensor:
        """Free rows of one aligned chunk, now this process's: int64, empty if none is free."""
        at, count = self._table.address, self._segment.count
        rows = extension().feature_cache_claim(at, count, chunk, start, self._owner)
        return torch.tensor(rows, dtype=torch.int64)

    def write(self, rows: Tensor, blocks: Tensor) -> None:
        """Write claimed rows, uint8 ``[n, sample_bytes]``, and publish them.

        The blocks go through the file, where a full disk is an error and not a signal; nothing is
        synchronised, as the checksums tell what a power failure has torn.
        """
        sums = []
        for row, block in zip(rows.tolist(), blocks):
            sums.append((row, checksum(block, row)))
            begin = self._blocks + row * blocks.shape[1]
            with naming(self._segment.path):
                places.write_at(self._file, block.numpy().data, begin)
        publish = extension().feature_cache_publish
        for row, value in sums:
            if not publish(self._table.address, row, self._owner, value):
                raise UserError(
                    f"feature cache {self._segment.path}: sample {row} was taken from this "
                    "process while it encoded; start it again"
                )

    def release(self) -> None:
        """Free what this process has claimed and not published."""
        self._table.free(self._owner)

    def reap(self) -> int:
        """Free the claims of processes that have died; returns how many there were."""
        return sum(self._table.free(w) for w in self._claims() if not owners.is_alive(w))

    def _claims(self) -> set[int]:
        """The owners of what is claimed."""
        return set(self._table.words()) - {owners.FREE, owners.PUBLISHED}

    def _take_over(self) -> None:
        """Make this host the one whose pids the table holds."""
        host, deadline = owners.host(), time.monotonic() + _PATIENCE

        def is_ours() -> bool:
            return os.pread(self._file, len(host), HOST) == host

        if is_ours():
            return
        while not is_ours():
            if places.alone(self._file):
                if not is_ours():
                    for word in self._claims():
                        self._table.free(word)
                    places.write_at(self._file, host, HOST)
            elif time.monotonic() > deadline:
                raise UserError(
                    f"feature cache {self._segment.path}: in use by another machine or "
                    "container; wait until it has ended, or give another --cache-dir"
                )
            else:
                time.sleep(places.TURN)
        fcntl.flock(self._file, fcntl.LOCK_SH)


def create(
    path: Path, begin: Callable[[], tuple[Header, Tensor]], heartbeat: Callable[[], None]
) -> Segment | None:
    """Make the file of a segment and attach it; None if another process has made it meanwhile.

    One process at a time calls ``begin``, which returns the header and the blocks of the first
    samples (uint8 ``[n, sample_bytes]``). The others wait, with a ``heartbeat`` a
    turn.

    Raises:
        OSError: the directory cannot be written or has no room for the whole file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    file = places.creation_lock(temporary, heartbeat)
    segment = None
    try:
        if path.exists():
            temporary.unlink()
            os.close(file)
            return None
        header, blocks = begin()
        prefix, table, offset = header.encode()
        size = header.layout.sample_bytes
        os.ftruncate(file, 0)  # what a killed process left
        places.allocate(file, offset + header.count * size, path)
        with naming(path):
            places.write_at(file, prefix, 0)
            places.write_at(file, owners.host(), HOST)
            states = b""
            for i, block in enumerate(blocks):
                places.write_at(file, block.numpy().data, offset + i * size)
                states += STATE.pack(owners.PUBLISHED, checksum(block, i))
            # whole: it is written through maps later, where a full disk is a signal, and not all
            # file systems can reserve room
            places.write_at(file, states.ljust(header.count * STATE.size, b"\0"), table)
            os.fsync(file)
        with places.settled(path.parent):
            os.rename(temporary, path)
            fcntl.flock(file, fcntl.LOCK_SH)
            segment = Segment(path, file, writable=True)
    except BaseException:
        temporary.unlink(missing_ok=True)
        if segment is None:
            os.close(file)
        else:
            segment.close()  # the file is its own
        raise
    sync_directory(path.parent)
    return segment


def _detach(path: Path, file: int, pid: int, ram: bool) -> None:
    # a forked child shares the lock, which stays its parent's
    if pid == os.getpid():
        if ram:
            with suppress(FileNotFoundError), places.settled(path.parent):
                if places.alone(file) and places.names(path, file):
                    path.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)  # its maps would hold on to it
    os.close(file)
