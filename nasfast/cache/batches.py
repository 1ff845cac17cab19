"""Samples of a cache gathered into batches, on the host, ahead of the trainer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from nasfast.cache.layout import Layout, dtype_name
from nasfast.ops import Field, gather_fields

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Source(Protocol):
    """Samples ``first .. first + count - 1`` of a cache in mapped memory."""

    data: Tensor  # uint8 [count, sample_bytes]

    @property
    def first(self) -> int: ...
    @property
    def count(self) -> int: ...
    def check(self, rows: Tensor) -> None:
        """Raises where rows of ``data`` are not published, or damaged."""


class Plan:
    """What a batch holds: the encoded arrays, maps in one dtype.

    Args:
        layout: of the blocks.
        dtype: of the maps; None leaves them as they are stored, and makes int8 maps float32.

    Raises:
        ValueError: another dtype than float32, bfloat16 and float16.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype | None) -> None:
        if dtype is not None and dtype not in _FLOATS:
            names = ", ".join(map(dtype_name, _FLOATS))
            raise ValueError(f"feature cache: expected maps as one of {names}, got {dtype}")
        self.dtype = dtype
        offsets = {spec.name: spec.offset for spec in layout.arrays}
        self._names = [spec.name for spec in layout.visible]
        self.fields, self._dtypes = list[Field](), list[torch.dtype]()
        for spec in layout.visible:
            scale = offsets.get(f"{spec.name}.scale")
            self.fields.append(Field(spec.offset, spec.shape, spec.dtype, scale))
            to = spec.dtype if scale is None else torch.float32
            self._dtypes.append((dtype or to) if spec.is_map and to.is_floating_point else to)

    def allocate(self, rows: int, device: torch.device) -> list[Tensor]:
        """Memory for a batch: maps ``[rows, H, W, C]``, labels ``[rows, H, W]``."""
        return [
            torch.empty(rows, *field.shape, dtype=dtype, device=device)
            for field, dtype in zip(self.fields, self._dtypes, strict=True)
        ]

    def named(self, outs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The same memory as a batch: maps ``[rows, C, H, W]`` in channels last."""
        maps = (out.permute(0, 3, 1, 2) if out.dim() == 4 else out for out in outs)
        return dict(zip(self._names, maps, strict=True))


class Buffers:
    """Memory of batches, used again and again; it grows to the largest."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._outs: list[Tensor] = []

    def first(self, rows: int) -> list[Tensor]:
        """Memory for ``rows`` samples."""
        if not self._outs or len(self._outs[0]) < rows:
            with torch.inference_mode(False):  # what comes after may train on the same memory
                self._outs = self._plan.allocate(rows, self._device)
        return [out[:rows] for out in self._outs]


class HostSamples:
    """The samples of a cache where they are: in the memory maps of its segments.

    Args:
        layout: of the blocks.
        sources: the segments, in order; together they hold all samples.

    Attributes:
        count: number of samples.
        device: the CPU.
    """

    device = torch.device("cpu")

    def __init__(self, layout: Layout, sources: Sequence[Source]) -> None:
        self.layout = layout
        self.count = sources[-1].first + sources[-1].count
        self._sources = sources
        self._plans: dict[torch.dtype | None, Plan] = {}
        self._spare: dict[torch.dtype | None, list[Buffers]] = {}

    def plan(self, dtype: torch.dtype | None) -> Plan:
        """What a batch holds; see :class:`Plan`."""
        if dtype not in self._plans:
            self._plans[dtype] = Plan(self.layout, dtype)
        return self._plans[dtype]

    def batch(self, indices: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """A batch in new memory; see :class:`Plan`.

        Raises:
            ValueError: indices or a dtype that there are not.
            RuntimeError: a sample that is not published, or damaged.
        """
        plan = self.plan(dtype)
        outs = plan.allocate(len(indices), self.device)
        self.gather(indices, plan.fields, outs, torch.get_num_threads())
        return plan.named(outs)

    def batches(
        self, order: Iterable[Tensor], dtype: torch.dtype | None = None, ahead: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """Batches in reused memory: gathered ahead by a thread, see :class:`Batches`, or with
        ``ahead`` = 0 when they are asked for, in one piece of memory."""
        plan = self.plan(dtype)
        spare = self._spare.setdefault(dtype, [])
        stages = []
        for _ in range(ahead + 1):
            buffers = spare.pop() if spare else Buffers(plan, self.device)
            stages.append(_HostStage(self, plan, buffers))
        if ahead == 0:
            return self._when_asked(order, stages[0], spare)
        return Batches(order, stages, lambda stage: spare.append(stage.buffers))

    @staticmethod
    def _when_asked(
        order: Iterable[Tensor], stage: _HostStage, spare: list[Buffers]
    ) -> Iterator[dict[str, Tensor]]:
        for indices in order:
            stage.fill(indices, torch.get_num_threads())
            yield stage.batch()
        spare.append(stage.buffers)

    def gather(
        self, indices: Tensor, fields: Sequence[Field], outs: Sequence[Tensor], threads: int = 1
    ) -> None:
        """Write fields of samples to ``outs``; at its first read a sample is verified."""
        indices = checked(indices, self.count)
        for source in self._sources:
            rows = indices - source.first if source.first else indices
            mine = rows
            if source.count < self.count:
                mine = rows[(rows >= 0) & (rows < source.count)]
            if len(mine):
                source.check(mine)
                gather_fields(source.data, rows, fields, outs, threads=threads)


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
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= count:
            wrong = low if low < 0 else high
            raise ValueError(
                f"feature cache: expected indices from 0 to {count - 1}, got {wrong}; the cache "
                f"has {count} samples"
            )
    return indices


class Stage(Protocol):
    """A place for one batch."""

    @property
    def buffers(self) -> Buffers: ...
    def fill(self, indices: Tensor) -> None:
        """Fetch the samples; called by the thread that works ahead."""

    def batch(self) -> dict[str, Tensor]:
        """What was fetched; called by the thread that wants the batch."""


class _HostStage:
    def __init__(self, samples: HostSamples, plan: Plan, buffers: Buffers) -> None:
        self._samples, self._plan, self.buffers = samples, plan, buffers
        self._batch: dict[str, Tensor] = {}

    def fill(self, indices: Tensor, threads: int = 1) -> None:
        outs = self.buffers.first(len(indices))
        self._samples.gather(indices, self._plan.fields, outs, threads)
        self._batch = self._plan.named(outs)

    def batch(self) -> dict[str, Tensor]:
        return self._batch


class Batches(Iterator[dict[str, Tensor]]):
    """Iterates over batches that a thread of its own gathers ahead.

    A batch is valid until the next one is asked for: its memory is used again. The last batch of an
    iteration that is closed early keeps its memory.

    Args:
        order: the samples of each batch, int64 ``[n]``. It is consumed in order and ahead, by the
            thread: a generator that it draws from should draw for nothing else meanwhile.
        stages: memory for as many batches as may exist at once, two at least.
        reuse: called with each stage afterwards, but for one whose batch is still out.

    What goes wrong in the thread is raised by the ``next`` that would have given the batch.

    Raises:
        ValueError: fewer than two stages.
    """

    def __init__(
        self,
        order: Iterable[Tensor],
        stages: Sequence[Stage],
        reuse: Callable[[Stage], object] = lambda stage: None,
    ) -> None:
        if len(stages) < 2:
            raise ValueError(
                f"feature cache: expected 0 batches ahead or more, got {len(stages) - 1}"
            )
        self._free: SimpleQueue[Stage | None] = SimpleQueue()
        self._ready: SimpleQueue[Stage | BaseException | None] = SimpleQueue()
        self._given: list[Stage] = []  # the one whose batch is out
        for stage in stages:
            self._free.put(stage)
        stop = threading.Event()
        thread = threading.Thread(
            target=_produce,
            args=(order, self._free, self._ready, stop),
            name="nasfast-batches",
            daemon=True,
        )
        thread.start()
        # also at the end of the process: a thread must not wake up in an interpreter that is gone
        self._close = weakref.finalize(
            self, _finish, thread, stop, self._free, self._given, stages, reuse
        )

    def __next__(self) -> dict[str, Tensor]:
        if not self._close.alive:
            raise StopIteration
        if self._given:
            self._free.put(self._given.pop())
        stage = self._ready.get()
        if stage is None or isinstance(stage, BaseException):
            self.close()
            raise StopIteration if stage is None else stage
        self._given.append(stage)
        return stage.batch()

    def close(self) -> None:
        """Stop the thread; there are no more batches."""
        self._close()


def _produce(
    order: Iterable[Tensor],
    free: SimpleQueue[Stage | None],
    ready: SimpleQueue[Stage | BaseException | None],
    stop: threading.Event,
) -> None:
    end: BaseException | None = None
    try:
        for indices in order:
            stage = free.get()
            if stop.is_set() or stage is None:
                return
            stage.fill(indices)
            ready.put(stage)
    except BaseException as error:
        end = error
    ready.put(end)


def _finish(
    thread: threading.Thread,
    stop: threading.Event,
    free: SimpleQueue[Stage | None],
    given: list[Stage],
    stages: Sequence[Stage],
    reuse: Callable[[Stage], object],
) -> None:
    stop.set()
    free.put(None)
    if threading.current_thread() is not thread:  # a garbage collection may run in it
        thread.join()
    for stage in stages:
        if stage not in given:
            reuse(stage)
