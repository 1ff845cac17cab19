"""Kernels in a process that was forked from one in which several threads have computed."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch
from op_harness import native
from test_all_ops import DIFFERENTIABLE, of_name
from torch import Tensor

from nasfast.ops import _native
from nasfast.ops.feature_gather import Field, gather_fields

SECONDS = 60
"""After which a child that hangs is killed, and its status is no 0."""


def child(run: Callable[[], None]) -> int:
    """The status of a forked process that runs a function."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        status = 1
        try:
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def equal(before: list[Tensor], after: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@native
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=of_name)
def test_a_child_computes_as_its_parent(op) -> None:
    samples = op.find(*op.parallel[:2])
    drawn = [sample.tensors(torch.float32) for sample in samples]

    def run() -> list[Tensor]:
        pairs = zip(samples, drawn, strict=True)
        return [result for sample, tensors in pairs for result in sample.forward_backward(tensors)]

    expected = run()

    def again() -> None:
        assert torch.get_num_threads() == 2
        equal(run(), expected)
        assert child(lambda: equal(run(), expected)) == 0  # a child of the child

    assert child(again) == 0
    equal(run(), expected)  # the parent goes on


@native
@pytest.mark.usefixtures("two_threads")
def test_a_child_gathers_and_convolves() -> None:
    """PyTorch's own kernels share OpenMP's threads."""
    data, indices = torch.arange(4 << 20, dtype=torch.uint8).view(64, -1), torch.arange(64)
    convolution = torch.nn.Conv2d(16, 16, 3)
    image = torch.randn(8, 16, 64, 64)
    field = Field(0, (data.shape[1],), torch.uint8)

    def run() -> list[Tensor]:
        out = torch.empty_like(data)
        gather_fields(data, indices, [field], [out], threads=2)
        convolution.zero_grad()
        convolution(image).sum().backward()
        return [out, convolution.bias.grad]

    expected = run()
    assert child(lambda: equal(run()[:1], expected[:1])) == 0


@native
@pytest.mark.usefixtures("two_threads")
def test_one_thread_where_threads_cannot_be_ended(monkeypatch) -> None:
    """As with libgomp of GCC 8."""
    monkeypatch.setattr(_native.C, "end_threads", lambda: False)
    (sample,) = DIFFERENTIABLE[0].find(DIFFERENTIABLE[0].parallel[0])
    tensors = sample.tensors(torch.float32)
    expected = sample.forward_backward(tensors)

    def run() -> None:
        assert torch.get_num_threads() == 1
        equal(sample.forward_backward(tensors), expected)

    assert child(run) == 0
    assert torch.get_num_threads() == 2
