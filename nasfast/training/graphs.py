"""Training steps as CUDA graphs: one launch a step instead of thousands."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Batch = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

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
        self._batch: tuple[Tensor, ...] | None = None
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
            for own, new in zip(self._batch, tensors, strict=True):
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
            self._batch = _tensors(own)
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
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # other threads, which gather features ahead, may allocate meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode):
            result = work()
        self._graph = graph
        return result

    def repeat(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def close(self) -> None:
        if self._graph is not None:
            self._stream.synchronize()
            self._graph.reset()
            self._graph = None


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
