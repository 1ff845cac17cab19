"""Samples of a cache gathered into batches, on the host, ahead of the trainer."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nasfast.cache.layout import ALIGN, BlockLayout, aligned, dtype_name
from nasfast.cache.segment import Segment
from nasfast.ops import Field, PreparedGather, gather_fields

Batch = dict[str, Tensor]
Slot = TypeVar("Slot")
Fetched = TypeVar("Fetched")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class BatchMemory:
    """Memory of a batch, used again and again; it grows to the largest.

    Args:
        layout: of the blocks.
        dtype: of the maps; None leaves them as they are stored.
        device: where the memory is.

    Raises:
        ValueError: another dtype than float32, bfloat16 and float16.
    """

    def __init__(
        self, layout: BlockLayout, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        if dtype is not None and dtype not in _FLOATS:
            names = ", ".join(map(dtype_name, _FLOATS))
            raise ValueError(f"feature cache: expected maps as one of {names}, got {dtype}")
        self._layout, self._device = layout, device
        self._dtypes = [
            (dtype or spec.dtype) if spec.is_map and spec.dtype.is_floating_point else field.dtype
            for spec, field in zip(layout.arrays, layout.fields, strict=True)
        ]
        self._counts = [math.prod(field.shape) for field in layout.fields]
        self._arrays: list[Tensor] = []
        self._prepared: tuple[int, int, PreparedGather, Batch] | None = None

    def first(self, rows: int) -> list[Tensor]:
        """Memory for ``rows`` samples: maps ``[rows, H, W, C]``, labels ``[rows, H, W]``, and
        integers of several bytes as uint8 ``[rows, nbytes]``."""
        if not self._arrays or len(self._arrays[0]) < rows:
            with torch.inference_mode(False):  # what comes after may train on the same memory
                self._arrays = self._allocated(rows)
        if len(self._arrays[0]) == rows:
            return self._arrays
        return [array[:rows] for array in self._arrays]

    def _allocated(self, rows: int) -> list[Tensor]:
        if self._device.type != "cpu":
            return [
                torch.empty(rows, *field.shape, dtype=dtype, device=self._device)
                for field, dtype in zip(self._layout.fields, self._dtypes, strict=True)
            ]
        ends = [0]
        for count, dtype in zip(self._counts, self._dtypes, strict=True):
            ends.append(aligned(ends[-1] + rows * count * dtype.itemsize))
        # in one piece, for which NumPy asks for huge pages from 4 MiB on: in small ones a batch is
        # written at three quarters of the speed
        piece = np.empty(ends[-1] + ALIGN, np.uint8)
        first, arrays = -piece.ctypes.data % ALIGN, []
        for field, dtype, count, begin in zip(
            self._layout.fields, self._dtypes, self._counts, ends, strict=False
        ):
            array = (
                torch.frombuffer(piece, dtype=dtype, count=rows * count, offset=first + begin)
                if rows * count
                else torch.empty(0, dtype=dtype)
            )
            arrays.append(array.view(rows, *field.shape))
        return arrays

    def prepared(self, data: Tensor, rows: int, threads: int) -> tuple[PreparedGather, Batch]:
        """What gathers ``rows`` samples of ``data``, always the same, into this memory, and the
        batch."""
        if self._prepared is None or self._prepared[:2] != (rows, threads):
            with torch.inference_mode(False):
                arrays = self.first(rows)
                gather = PreparedGather(data, self._layout.fields, arrays, rows, threads=threads)
                self._prepared = rows, threads, gather, self.named(arrays)
        return self._prepared[2:]

    def named(self, arrays: Sequence[Tensor]) -> Batch:
        """The same memory as a batch: maps ``[rows, C, H, W]`` in channels last."""
        batch = {}
        for spec, array in zip(self._layout.arrays, arrays, strict=True):
            if spec.raw:
                array = array.view(spec.dtype).view(len(array), *spec.shape)
            batch[spec.name] = array.permute(0, 3, 1, 2) if spec.is_map else array
        return batch


class HostSamples:
    """The samples of a cache where they are: in the memory map of its file.

    Attributes:
        layout: of the blocks.
        count: number of samples.
        device: the CPU.
    """

    device = torch.device("cpu")

    def __init__(self, segment: Segment) -> None:
        self.layout, self.count = segment.header.layout, segment.header.count
        self._segment = segment
        self._spare: dict[torch.dtype | None, list[BatchMemory]] = {}

    def batch(self, indices: Tensor, dtype: torch.dtype | None = None) -> Batch:
        """A batch in new memory.

        Raises:
            ValueError: indices or a dtype that there are not.
            UserError: a damaged sample.
            RuntimeError: a sample that is not published.
        """
        memory = BatchMemory(self.layout, dtype, self.device)
        return self._read(memory, indices, torch.get_num_threads())

    def batches(
        self, order: Iterable[Tensor], dtype: torch.dtype | None = None, ahead: int = 1
    ) -> Iterator[Batch]:
        """Batches in reused memory, each valid until the next is asked for: gathered ahead by a
        thread, or with ``ahead`` = 0 when they are asked for, in one piece of memory.

        Raises:
            ValueError: a dtype that there is not, or a negative ``ahead``.
        """
        if ahead < 0:
            raise ValueError(f"feature cache: expected 0 batches ahead or more, got {ahead}")
        spare = self._spare.setdefault(dtype, [])
        memories = [
            spare.pop() if spare else BatchMemory(self.layout, dtype, self.device)
            for _ in range(ahead + 1)
        ]
        if ahead == 0:
            return self._when_asked(order, memories[0], spare)
        return fetch_ahead(order, memories, self._read, spare)

    def _when_asked(
        self, order: Iterable[Tensor], memory: BatchMemory, spare: list[BatchMemory]
    ) -> Iterator[Batch]:
        for indices in order:
            yield self._read(memory, indices, torch.get_num_threads())
        spare.append(memory)

    def _read(self, memory: BatchMemory, indices: Tensor, threads: int = 1) -> Batch:
        indices = self._checked(indices)
        gather, batch = memory.prepared(self._segment.data, len(indices), threads)
        gather(indices)
        return {name: array.detach() for name, array in batch.items()}

    def gather(
        self, indices: Tensor, fields: Sequence[Field], outs: Sequence[Tensor], threads: int = 1
    ) -> None:
        """Write fields of samples to ``outs``; at its first read a sample is verified."""
        indices = self._checked(indices)
        gather_fields(self._segment.data, indices, fields, outs, threads=threads)

    def _checked(self, indices: Tensor) -> Tensor:
        indices = checked(indices, self.count)
        self._segment.check(indices)
        return indices


def checked(indices: Tensor, count: int) -> Tensor:
    """The indices on the host, contiguous.

    Raises:
        ValueError: they are not int64 ``[n]`` from 0 to count - 1.
    """
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise ValueError(
            f"feature cache: expected indices as int64 [n], got {dtype_name(indices.dtype)} "
            f"{list(indices.shape)}"
        )
    indices = indices.cpu().contiguous()
    if len(indices):
        rows = indices.tolist()  # quicker than a reduction, for as few as these
        low, high = min(rows), max(rows)
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(
                f"feature cache: expected indices from 0 to {count - 1}, got {wrong}; the cache "
                f"has {count} samples"
            )
    return indices


def fetch_ahead(
    order: Iterable[Tensor],
    slots: Iterable[Slot],
    fetch: Callable[[Slot, Tensor], Fetched],
    spare: list[Slot] | None = None,
) -> Iterator[Fetched]:
    """What ``fetch`` returns for each batch of indices, in order, called ahead by a thread.

    Args:
        order: the samples of each batch. The thread draws from it: a generator of random numbers
            that it uses should draw for nothing else meanwhile.
        slots: places for as many batches as may exist at once: a slot is used again when the next
            batch is asked for.
        fetch: called with a free slot. What it or ``order`` raises is raised where the batch would
            have come.
        spare: takes the slots in the end, without the one whose batch is out.
    """
    free, running = list(slots), deque[tuple[Slot, Future[Fetched | None]]]()
    remaining = iter(order)

    def draw(slot: Slot) -> Fetched | None:
        indices = next(remaining, None)
        return None if indices is None else fetch(slot, indices)

    thread, pid = ThreadPoolExecutor(1, "nasfast-batches"), os.getpid()
    try:
        while True:
            if os.getpid() != pid:
                raise RuntimeError(
                    "feature cache: expected the process that began these batches, got a forked "
                    "child, which has no thread that fetches them; begin new ones there"
                )
            running.extend((slot, thread.submit(draw, slot)) for slot in free)
            free.clear()
            slot, future = running[0]
            fetched = future.result()
            if fetched is None:
                wait([future for _, future in running])
                return
            running.popleft()
            yield fetched
            free.append(slot)
    finally:
        # not waited for: a garbage collection in the thread itself may close this generator
        thread.shutdown(wait=False, cancel_futures=True)
        free += [slot for slot, future in running if future.done()]
        if spare is not None:
            spare += free
