"""Samples of a cache in the memory of a device, gathered there by a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nasfast.cache.batches import Batches, Buffers, HostSamples, Plan, checked
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
            RuntimeError: a sample that is not published, or damaged.
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
        staging = _host((min(step, rows), size), torch.uint8, device)
        for indices, there in zip(
            torch.split(torch.arange(rows), step), torch.split(data, step), strict=True
        ):
            blocks = staging[: len(indices)]
            host.gather(indices, [_block(size)], [blocks], torch.get_num_threads())
            there.copy_(blocks)
        return cls(host, data)

    def batch(self, indices: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """A batch in new memory; see :class:`Plan`. Indices on the device need no copy.

        Indices on the host are checked; of those on the device, only where some samples are on the
        host, for which the device has to be waited for.

        Raises:
            ValueError: indices or a dtype that there are not.
            RuntimeError: a sample on the host that is not published, or damaged.
        """
        plan = self.host.plan(dtype)
        outs = plan.allocate(len(indices), self.device)
        if len(self.data) < self.count:
            transfer = _Transfer(self)
            transfer.fill(indices)
            transfer.gather(plan.fields, outs)
        else:
            if indices.device.type == "cpu":
                indices = checked(indices, self.count)
            indices = indices.to(self.device, non_blocking=True)
            gather_fields(self.data, indices, plan.fields, outs)
        return plan.named(outs)

    def batches(
        self, order: Iterable[Tensor], dtype: torch.dtype | None = None, ahead: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """Batches in reused memory of the device, valid until the next one is asked for.

        They are queued on the stream that is current when a batch is asked for; use them there.
        Where all samples are on the device, ``order`` is consumed at once and goes up in one copy.
        Else a thread fetches ``ahead`` batches, one at least, of what is on the host, see
        :class:`Batches`.
        """
        plan = self.host.plan(dtype)
        buffers = Buffers(plan, self.device)
        if len(self.data) == self.count:
            return self._resident(order, plan, buffers)
        return Batches(order, [_DeviceStage(self, plan, buffers) for _ in range(max(ahead, 1) + 1)])

    def _resident(
        self, order: Iterable[Tensor], plan: Plan, buffers: Buffers
    ) -> Iterator[dict[str, Tensor]]:
        parts = [checked(indices, self.count) for indices in order]
        if not parts:
            return
        flat = torch.cat(parts)
        if self.device.type == "cuda":
            flat = flat.pin_memory().to(self.device, non_blocking=True)
        for indices in torch.split(flat, [len(part) for part in parts]):
            outs = buffers.first(len(indices))
            gather_fields(self.data, indices, plan.fields, outs)
            yield plan.named(outs)


def _block(size: int) -> Field:
    """A whole sample."""
    return Field(0, (size,), torch.uint8)


def _host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host that is copied to the device."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


class _Memory:
    """Rows on the host that are copied to the device; on both sides it grows to the largest."""

    def __init__(self, row: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._row, self._dtype, self._device = row, dtype, device
        self._host = _host((0, *row), dtype, device)
        self._there = torch.empty(0, *row, dtype=dtype, device=device)

    def host(self, rows: int) -> Tensor:
        if len(self._host) < rows:
            self._host = _host((rows, *self._row), self._dtype, self._device)
        return self._host[:rows]

    def send(self, rows: int) -> Tensor:
        """The first rows of the host, on the device as soon as the current stream is there."""
        if self._device.type == "cpu":
            return self._host[:rows]
        if len(self._there) < rows:
            self._there = torch.empty_like(self._host, device=self._device)
        return self._there[:rows].copy_(self._host[:rows], non_blocking=True)


class _Order:
    """What keeps copies, on a stream of their own, and the stream that wants them in order.

    Nothing on a CPU, where a copy is done when it returns.
    """

    def __init__(self, side: Any) -> None:
        self._side = side
        if side is not None:
            self._copied, self._used = _cuda.Event(), _cuda.Event()

    def await_host(self) -> None:
        """Returns when the host's memory has been read by the copies before."""
        if self._side is not None:
            self._copied.synchronize()

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Copies go to the side stream, behind what still reads their targets."""
        if self._side is None:
            yield
            return
        with _cuda.stream(self._side):
            self._side.wait_event(self._used)
            yield
            self._copied.record()

    @contextmanager
    def use(self, *copied: Tensor) -> Iterator[None]:
        """The current stream reads what was copied."""
        if self._side is None:
            yield
            return
        stream = _cuda.current_stream(self._side.device)
        stream.wait_event(self._copied)
        for tensor in copied:
            tensor.record_stream(stream)  # it was allocated on the other one
        yield
        self._used.record(stream)


class _Transfer:
    """The samples of one batch that are on the host, as blocks on their way to the device."""

    def __init__(self, samples: DeviceSamples) -> None:
        self._samples = samples
        self._order = _Order(samples.side)
        self._blocks = _Memory((samples.layout.sample_bytes,), torch.uint8, samples.device)
        self._places = _Memory((), torch.int64, samples.device)
        self._copied: tuple[Tensor, Tensor]

    def fill(self, indices: Tensor) -> None:
        """Read the samples, in any thread."""
        samples = self._samples
        indices = checked(indices, samples.count)
        away = indices >= len(samples.data)
        missing = indices[away]
        self._order.await_host()
        # a row's place among the samples of the device, and among the blocks; -1 is in neither
        places = self._places.host(2 * len(indices)).view(2, len(indices))
        places[0] = indices.where(~away, -1)
        places[1] = -1
        places[1, away] = torch.arange(len(missing))
        blocks = self._blocks.host(len(missing))
        samples.host.gather(missing, [_block(samples.layout.sample_bytes)], [blocks])
        with self._order.copies():
            self._copied = self._places.send(places.numel()), self._blocks.send(len(missing))

    def gather(self, fields: Sequence[Field], outs: Sequence[Tensor]) -> None:
        """Write the batch, on the current stream."""
        places, blocks = self._copied
        here, there = places.view(2, len(places) // 2)
        with self._order.use(places, blocks):
            gather_fields(self._samples.data, here, fields, outs)
            gather_fields(blocks, there, fields, outs)


class _DeviceStage:
    def __init__(self, samples: DeviceSamples, plan: Plan, buffers: Buffers) -> None:
        self._plan, self.buffers = plan, buffers
        self._transfer = _Transfer(samples)
        self._rows = 0

    def fill(self, indices: Tensor) -> None:
        self._rows = len(indices)
        self._transfer.fill(indices)

    def batch(self) -> dict[str, Tensor]:
        outs = self.buffers.first(self._rows)
        self._transfer.gather(self._plan.fields, outs)
        return self._plan.named(outs)
