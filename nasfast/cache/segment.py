"""The file of a cache, attached: reading it through a map, filling it with others, creating it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasfast.cache import owners, places, trust, waiting
from nasfast.cache.header import HOST, STATE, Header, checksum, extension
from nasfast.utils.errors import UserError
from nasfast.utils.files import naming

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


def _mapped(path: Path, file: int, size: int, access: str) -> Any:
    """The first bytes of a file in memory, as a buffer.

    A file that is cut short after it was looked at ends the process as the page is read: with a
    line that says so, as nothing can be raised from there.
    """
    line = (
        f"error: feature cache {path}: expected {size} bytes, got fewer: it was cut short, or its "
        "disk failed, while it was read; delete it, and start again: --resume continues a search\n"
    )
    kinds = extension().FileMap.Access
    return extension().FileMap(file, size, getattr(kinds, access), os.fsencode(line))


class _Table:
    """The states of a segment's samples, in shared memory."""

    def __init__(self, path: Path, file: int, start: int, count: int, access: str) -> None:
        # all from the start of the file, so that any size of pages will do
        mapped = _mapped(path, file, start + STATE.size * count, access)
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
        self._table = _Table(path, file, table, self.count, "READ")
        size = self.count * self.header.layout.sample_bytes
        self._end = self._blocks + size
        # private: torch wants memory that may be written, and the file is never touched
        whole = _mapped(path, file, self._end, "PRIVATE")
        raw = torch.frombuffer(whole, dtype=torch.uint8, offset=self._blocks, count=size)
        self.data = raw.view(self.count, self.header.layout.sample_bytes)
        self._seen = np.zeros(self.count, np.uint8)
        self._pid = os.getpid()
        self._detach = weakref.finalize(self, _detach, path, file, self._pid)

    @property
    def count(self) -> int:
        return self.header.count

    @classmethod
    def open(cls, path: Path, heartbeat: Callable[[], None] = waiting.idle) -> Segment:
        """Attach a file, with a heartbeat each turn of waiting for who holds it locked.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is no cache, or damaged; others may write to it, or hold it locked.
        """
        with places.settled(path.parent, heartbeat=heartbeat) as directory:
            try:
                file, writable = trust.open_trusted(directory, path, os.O_RDWR), True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                    raise
                file, writable = trust.open_trusted(directory, path, os.O_RDONLY), False
            try:
                places.share(file, path, heartbeat)
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
            UserError: a sample whose bytes are not those that were published, or a file that was
                cut short.
            RuntimeError: a sample that is not published.
        """
        if self._detach.alive and extension().feature_cache_is_shorter(self._file, self._end):
            raise UserError(
                f"feature cache {self.path}: expected {self._end} bytes, got "
                f"{os.fstat(self._file).st_size}: it was cut short while it was read; delete it, "
                "and start again: --resume continues a search"
            )
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
        with self._own() as segment:
            alone = places.alone(segment._file)
            places.share(segment._file, self.path)
        return not alone

    def repair(self, rows: list[int]) -> None:
        """Free damaged rows, so that the next search fills them again.

        Raises:
            OSError: the file cannot be written.
            UserError: others use it, and may have read those rows before.
        """
        with self._own() as segment:
            table = segment._writable_table()
            alone = places.alone(segment._file)
            for row in rows if alone else ():
                table.free(owners.PUBLISHED, row, row + 1)
            places.share(segment._file, self.path)
        if not alone:
            raise UserError(
                f"feature cache {self.path}: in use, its damaged samples stay; end the processes "
                "that use it first"
            )

    @contextmanager
    def _own(self) -> Iterator[Segment]:
        """A segment whose lock is this process's: in a forked child it is its parent's too, and the
        file is attached anew."""
        if self._pid == os.getpid():
            yield self
            return
        segment = Segment.open(self.path)
        try:
            yield segment
        finally:
            segment.close()

    def touch(self) -> None:
        """Note that the file is used; its time of access is when it was last attached."""
        with suppress(OSError):
            os.utime(self._file, ns=(time.time_ns(), os.fstat(self._file).st_mtime_ns))

    def _writable_table(self) -> _Table:
        if not self._writable:
            raise places.not_writable(self.path, errno.EACCES)
        return _Table(self.path, self._file, self._table_at, self.count, "WRITE")

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

    def wait(self) -> waiting.Wait:
        """For those who have claimed what is left. They get on as long as they publish, or compute:
        to encode may take long."""

        def sign() -> object:
            claims = sorted(self._claims().items())
            return [(word, n, waiting.effort(owners.pid_of(word))) for word, n in claims]

        path = self._segment.path
        return waiting.Wait(
            path,
            lambda: {owners.pid_of(word) for word in self._claims()},
            "has claimed samples",
            "to publish the samples that it has claimed",
            f"continue or end that process, or {places.remedy(path.parent)}",
            sign,
        )

    def reap(self) -> int:
        """Free the claims of processes that have died; returns how many there were."""
        return sum(self._table.free(w) for w in self._claims() if not owners.is_alive(w))

    def _claims(self) -> dict[int, int]:
        """How many samples each owner has claimed."""
        words = self._table.words()
        return {word: n for word, n in words.items() if word not in (owners.FREE, owners.PUBLISHED)}

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
                time.sleep(waiting.TURN)
        places.share(self._file, self._segment.path)


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
    try:
        trust.make_directory(path.parent)
    except OSError as error:
        raise places.not_writable(path.parent, error.errno or errno.EIO) from error
    with places.opened(path.parent) as directory:
        segment = _create(directory, path, begin, heartbeat)
        with naming(path.parent):
            os.fsync(directory)  # the name
    return segment


def _create(
    directory: int,
    path: Path,
    begin: Callable[[], tuple[Header, Tensor]],
    heartbeat: Callable[[], None],
) -> Segment | None:
    temporary = path.with_name(f".{path.name}.tmp")
    file = places.creation_lock(directory, temporary, heartbeat)
    segment = None
    try:
        if os.access(path.name, os.F_OK, dir_fd=directory, follow_symlinks=False):
            os.unlink(temporary.name, dir_fd=directory)
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
        with places.settled(path.parent, heartbeat=heartbeat):
            os.rename(temporary.name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            places.share(file, path, heartbeat)
            segment = Segment(path, file, writable=True)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary.name, dir_fd=directory)
        if segment is None:
            os.close(file)
        else:
            segment.close()  # the file is its own
        raise
    return segment


def _detach(path: Path, file: int, pid: int) -> None:
    # a forked child shares the lock, which stays its parent's
    if pid == os.getpid():
        if places.is_ram(path):
            with (
                suppress(OSError, UserError),
                places.settled(path.parent, places.PATIENCE) as there,
            ):
                if places.alone(file) and places.names(there, path.name, file):
                    os.unlink(path.name, dir_fd=there)
        fcntl.flock(file, fcntl.LOCK_UN)  # a forked child would hold on to it
    os.close(file)
