"""Training steps as CUDA graphs: one launch per step instead of thousands."""

from __future__ import annotations

import functools
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
T = TypeVar("T")

WARMUP = 3
"""Eager steps before it is recorded: they make optimizer states, and cuDNN chooses algorithms."""


class Recorder(Protocol):
    """What records and repeats work of a device."""

    def stream(self) -> AbstractContextManager[object]:
        """Everything inside runs in order with what is recorded and repeated."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Record ``work`` without running it; the result is what each repetition writes."""

    def repeat(self) -> None:
        """Run what was recorded, on the memory that it was recorded with."""

    def close(self) -> None:
        """Give back the recording and its memory."""


class GraphedStep:
    """A training step, eager at first and then repeated from a recording.

    All steps train: the first :data:`WARMUP` of a kind of batch and those on batches of another
    shape are eager, the others copy the batch into the recording's own and repeat it. Results are
    the eager ones up to floating point. A step that cannot be recorded stays eager, and a warning
    says why.

    What a step reads from Python is fixed when it is recorded: a learning rate must not change, and
    Adam has to be ``capturable``.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._eager_steps: Counter[object] = Counter()  # by the batch's kind
        self._batch: Batch | None = None
        self._loss: Tensor | None = None
        self._refused = False

    def __call__(self, step: Callable[[Any], Tensor], batch: Batch) -> Tensor:
        """The loss of one ``step`` on ``batch``: tensors of the device.

        The recording repeats the ``step`` that it was made of, so let it be the same in all calls.
        The loss is valid until the next call.
        """
        tensors, kind = _tensors(batch), _kind(batch)
        with self._recorder.stream():
            if self._batch is None and not self._refused and self._eager_steps[kind] >= WARMUP:
                self._record(step, batch)
            if self._loss is None or self._batch is None or kind != _kind(self._batch):
                self._eager_steps[kind] += 1
                return step(batch)
            for own, new in zip(_tensors(self._batch), tensors, strict=True):
                own.copy_(new, non_blocking=True)
            self._recorder.repeat()
            return self._loss

    def _record(self, step: Callable[[Any], Tensor], batch: Batch) -> None:
        own: Batch
        if isinstance(batch, Tensor):
            own = batch.clone()
        elif isinstance(batch, dict):
            own = {name: tensor.clone() for name, tensor in batch.items()}
        else:
            own = tuple(tensor.clone() for tensor in batch)
        try:
            self._loss = self._recorder.record(lambda: step(own))
            self._batch = own
        except RuntimeError as error:
            self._refused = True
            cause = error.__context__ or error  # ending a failed capture fails as well
            warnings.warn(
                f"the training step stays eager, as it cannot be recorded as a CUDA graph: {cause}",
                RuntimeWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        """Give back the recording and its memory; gradients that lie there must be gone."""
        self._batch = self._loss = None
        self._recorder.close()


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    if isinstance(batch, dict):
        return tuple(batch.values())
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def _kind(batch: Batch) -> tuple[object, ...]:
    """What has to agree with the recording."""
    names = tuple(batch) if isinstance(batch, dict) else ()
    return names, *((tensor.shape, tensor.dtype) for tensor in _tensors(batch))


class CudaGraph:
    """:class:`Recorder` of a CUDA device. Each has memory of its own, which returns to PyTorch's
    allocator when it is closed."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _side_stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def stream(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        self._graph, result = capture(work, self._stream)
        return result

    def repeat(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def close(self) -> None:
        if self._graph is not None:
            self._stream.synchronize()
            self._graph.reset()
            self._graph = None


def capture(work: Callable[[], T], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record ``work`` without running it: the graph, and the result that a replay writes anew.

    If ``work`` cannot be recorded, its error is raised, and PyTorch is left as it was before.
    """
    device = stream.device
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # the graph has a pool of its own
    with torch.cuda.device(device), torch.cuda.stream(stream):
        try:
            # other threads, which gather features ahead, may allocate meanwhile
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors of the pool
            if error.__context__ is not None:
                traceback.clear_frames(error.__context__.__traceback__)
            graph.reset()
            _release(pool, device)
            raise
    return graph, result


def _release(pool: tuple[int, int], device: torch.device) -> None:
    """Undo what a failed capture leaves behind, on the stream of the capture.

    PyTorch 2.11 goes on allocating from the capture's pool and refuses later captures (its pull
    request 180395); up to 2.13 at least, the pool keeps its memory (190308).
    """
    index = device.index
    with suppress(RuntimeError):  # PyTorch 2.12 has done it
        torch._C._cuda_endAllocateToPool(index, pool)
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    mine = [s for s in segments if s["device"] == index and tuple(s["segment_pool_id"]) == pool]
    if any(s["allocated_size"] == 0 for s in mine):  # empty, and yet not freed: still in use
        torch._C._cuda_releasePool(index, pool)
    # a capture that succeeds ends the recording state of 2.11's random generator
    after = torch.cuda.CUDAGraph()
    after.capture_begin(capture_error_mode="thread_local")
    torch.zeros(1, device=device)
    after.capture_end()
    after.reset()
    torch.cuda.empty_cache()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def graphed_step(device: torch.device) -> Iterator[GraphedStep | None]:
    """What :func:`nasfast.training.loop.train_epoch` repeats steps with; None where there are no
    graphs."""
    if device.type != "cuda":
        yield None
        return
    step = GraphedStep(CudaGraph(device))
    try:
        yield step
    finally:
        step.close()
