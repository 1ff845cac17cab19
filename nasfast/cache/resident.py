"""Samples of a cache in the memory of a device, gathered there by a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nasfast.cache.batches import Batch, BatchMemory, HostSamples, checked, fetch_ahead
from nasfast.cache.layout import aligned
from nasfast.ops import Field, gather_fields

_CHUNK = 32 << 20  # bytes that are uploaded at once
_cuda: Any = torch.cuda


class DeviceSamples:
    """The first samples of a cache as blocks on a device; what did not fit there is on the host.

    Batches are on the device. Samples from the host go there as blocks, through pinned memory,
    and are widened there.

    Args:
        host: all samples.
        data: uint8 ``[m, sample_bytes]``, the blocks of the first m. Sent to another process by
            ``torch.multiprocessing``, it is the same memory there (CUDA IPC); who made it must
            outlive the others.

    Attributes:
        count: number of samples.
        device: where ``data`` and the batches are.
    """

    def __init__(self, host: HostSamples, data: Tensor) -> None:
        self.host, self.data = host, data
        self.layout, self.count, self.device = host.layout, host.count, data.device
        # of copies from the host
        self.side = _cuda.Stream(self.device) if self.device.type == "cuda" else None

    @classmethod
    def upload(
        cls, host: HostSamples, device: torch.device, memory: int | None = None
    ) -> DeviceSamples:
        """Copy as many samples as fit into ``memory`` bytes; None is all.

        Raises:
            UserError: a damaged sample.
            RuntimeError: a sample that is not published.
            torch.OutOfMemoryError: the device has not that much.
        """
        size = host.layout.sample_bytes
        rows = host.count if memory is None else min(host.count, memory // size)
        try:
            data = torch.empty(rows, size, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"feature cache: expected {rows * size / 1e9:.1f} GB of {device} for {rows} "
                "samples, got out of memory; bound it, as in --memory "
                f"{rows * size // 2_000_000_000 + 1}GB"
            ) from error
        step = max(1, _CHUNK // size)
        staging = _staging(min(step, rows) * size, device).view(-1, size)
        for indices, there in zip(
            torch.split(torch.arange(rows), step), torch.split(data, step), strict=True
        ):
            blocks = staging[: len(indices)]
            host.gather(indices, [_block(size)], [blocks], torch.get_num_threads())
            there.copy_(blocks)
        return cls(host, data)

    def batch(self, indices: Tensor, dtype: torch.dtype | None = None) -> Batch:
        """A batch in new memory. Indices on the device need no copy.

        Indices on the host are checked; of those on the device, only where some samples are on the
        host, for which the device has to be waited for.

        Raises:
            ValueError: indices or a dtype that there are not.
            UserError: a damaged sample on the host.
            RuntimeError: a sample on the host that is not published.
        """
        memory = BatchMemory(self.layout, dtype, self.device)
        if len(self.data) < self.count:
            return _Transfer(self).fetch(indices).batch(memory)
        if indices.device.type == "cpu":
            indices = checked(indices, self.count)
        return self._gather(indices.to(self.device, non_blocking=True), memory)

    def batches(
        self, order: Iterable[Tensor], dtype: torch.dtype | None = None, ahead: int = 1
    ) -> Iterator[Batch]:
        """Batches in reused memory of the device, valid until the next one is asked for.

        They are queued on the stream that is current when a batch is asked for; use them there.
        Where all samples are on the device, ``order`` is consumed at once and goes up in one copy.
        Else a thread fetches ``ahead`` batches, one at least, of what is on the host.
        """
        memory = BatchMemory(self.layout, dtype, self.device)
        if len(self.data) == self.count:
            return self._resident(order, memory)
        transfers = [_Transfer(self) for _ in range(max(ahead, 1) + 1)]
        return (t.batch(memory) for t in fetch_ahead(order, transfers, _Transfer.fetch))

    def _resident(self, order: Iterable[Tensor], memory: BatchMemory) -> Iterator[Batch]:
        parts = [checked(indices, self.count) for indices in order]
        if not parts:
            return
        flat = torch.cat(parts)
        if self.device.type == "cuda":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
        for indices in torch.split(flat, [len(part) for part in parts]):
            yield self._gather(indices, memory)

    def _gather(self, indices: Tensor, memory: BatchMemory) -> Batch:
        outs = memory.first(len(indices))
        gather_fields(self.data, indices, self.layout.fields, outs)
        return memory.named(outs)


def _block(size: int) -> Field:
    """A whole sample."""
    return Field(0, (size,), torch.uint8)


def _staging(size: int, device: torch.device) -> Tensor:
    """Memory of the host that is copied to the device: uint8 ``[size]``."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


class _Transfer:
    """One batch on its way to a device: where its rows are, and the blocks that are on the host.

    Both go up in one copy on a stream of its own, which waits for the kernels that read the copy
    before; the kernels wait for the copy. On a CPU nothing is copied.
    """

    def __init__(self, samples: DeviceSamples) -> None:
        self._samples, self._side = samples, samples.side
        self._staging = _staging(0, samples.device)
        self._sent = self._staging if self._side is None else self._staging.to(samples.device)
        self._rows = self._away = 0
        if self._side is not None:
            self._copied, self._used = _cuda.Event(), _cuda.Event()

    def fetch(self, indices: Tensor) -> _Transfer:
        """Read the samples and start their copy, in any thread."""
        samples = self._samples
        indices = checked(indices, samples.count)
        away = indices >= len(samples.data)
        missing = indices[away]
        self._rows, self._away = len(indices), len(missing)
        if self._side is not None:
            self._copied.synchronize()  # the copy before has read the host's memory
        if len(self._staging) < self._nbytes:
            self._staging = _staging(self._nbytes, samples.device)
        (here, there), blocks = self._parts(self._staging)
        # a row's place among the samples of the device, and among the blocks; -1 is in neither
        here.copy_(indices.where(~away, -1))
        there.fill_(-1)
        there[away] = torch.arange(len(missing))
        samples.host.gather(missing, [_block(samples.layout.sample_bytes)], [blocks])
        if self._side is None:
            self._sent = self._staging
            return self
        with _cuda.stream(self._side):
            self._side.wait_event(self._used)
            if len(self._sent) < self._nbytes:
                self._sent = torch.empty_like(self._staging, device=samples.device)
            sent = self._sent[: self._nbytes]
            sent.copy_(self._staging[: self._nbytes], non_blocking=True)
            self._copied.record()
        return self

    def batch(self, memory: BatchMemory) -> Batch:
        """The batch, written on the current stream."""
        outs = memory.first(self._rows)
        (here, there), blocks = self._parts(self._sent)
        stream = None if self._side is None else _cuda.current_stream(self._side.device)
        if stream is not None:
            stream.wait_event(self._copied)
            self._sent.record_stream(stream)  # it was allocated on the other one
        gather_fields(self._samples.data, here, self._samples.layout.fields, outs)
        gather_fields(blocks, there, self._samples.layout.fields, outs)
        if stream is not None:
            self._used.record(stream)
        return memory.named(outs)

    @property
    def _nbytes(self) -> int:
        return aligned(2 * 8 * self._rows) + self._away * self._samples.layout.sample_bytes

    def _parts(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Places int64 ``[2, rows]`` and blocks uint8 ``[away, sample_bytes]`` in the memory."""
        places = memory[: 2 * 8 * self._rows].view(torch.int64).view(2, self._rows)
        blocks = memory[aligned(places.nbytes) : self._nbytes]
        return places, blocks.view(self._away, self._samples.layout.sample_bytes)
