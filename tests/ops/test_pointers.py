"""Every pointer that reaches a kernel is checked just before it, at every entry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from op_harness import native
from test_all_ops import OPS
from torch import Tensor

from nasfast.ops import Field, _native, gather_fields

# Entries of nasfast._C that run no kernel of an op. The cache maps what it gives to its own.
NO_KERNELS = re.compile(
    r"isa_level|cuda_info|cuda_kernels|set_cuda_compiler|end_threads|FileMap|feature_cache_\w+"
    r"|\w+_cuda_workspace|__\w+__"
)
COLUMNS = ("deform_conv2d_columns_forward", "deform_conv2d_columns_backward")  # of CUDA alone


class Call(NamedTuple):
    entry: str
    dtype: torch.dtype
    sizes: tuple[int, ...]
    tensors: list[Tensor | None]


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Call]:
    """The call of each entry that gives it the most pointers, among those of the ops' samples."""
    calls: dict[str, Call] = {}
    run = _native.call

    def record(entry: str, dtype: torch.dtype, sizes: Any, tensors: Any) -> None:
        call, known = Call(entry, dtype, sizes, [*tensors]), calls.get(entry)
        full = sum(tensor is not None and tensor.numel() > 4 for tensor in tensors)
        if known is None or full > sum(t is not None and t.numel() > 4 for t in known.tensors):
            calls[entry] = call
        run(entry, dtype, sizes, tensors)

    monkeypatch.setattr(_native, "call", record)
    for op in OPS.values():
        for sample in op.samples[:12]:
            sample.check(sample.dtypes[0])
    monkeypatch.setattr(_native, "call", run)
    return calls


@pytest.fixture(scope="module")
def calls() -> Iterator[dict[str, Call]]:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield recorded(monkeypatch)


def entries() -> set[str]:
    """Those that run kernels, without what says that they are for CUDA."""
    return {name.removesuffix("_cuda") for name in dir(_native.C) if not NO_KERNELS.fullmatch(name)}


@native
def test_all_entries_are_described() -> None:
    """An entry without a description could not be called."""
    assert entries() <= {*_native.POINTERS}
    assert {*_native.POINTERS} == entries() | {*COLUMNS}


@native
def test_a_new_entry_cannot_be_called_without_a_description() -> None:
    with pytest.raises(KeyError, match="novel_forward"):
        _native.call("novel_forward", torch.float32, (1,), (torch.zeros(1),))


@native
def test_every_pointer_of_every_entry(
    calls: dict[str, Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing, too little, too much, another dtype, device or layout, or freed memory."""
    assert {*calls} == entries() - {*COLUMNS}
    run: list[str] = []

    class Kernels:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: run.append(name)

    monkeypatch.setattr(_native, "C", Kernels())
    for entry, dtype, sizes, tensors in calls.values():
        _native.call(entry, dtype, sizes, tensors)
        assert run.pop() == entry
        for at, tensor in enumerate(tensors):
            if tensor is None:
                continue
            pointer = _native.POINTERS[entry](dtype, sizes)[at]
            for change, message in changes(tensor, pointer):
                if at == 0 and (change is None or change.is_meta):
                    continue  # the first tensor is never None, and says the device of all
                changed = [*tensors[:at], change, *tensors[at + 1 :]]
                with pytest.raises(ValueError, match=f"^{entry}: expected {message}"):
                    _native.call(entry, dtype, sizes, changed)
    assert run == []


def changes(tensor: Tensor, pointer: _native.Pointer) -> Iterator[tuple[Tensor | None, str]]:
    """Tensors that the pointer must not take, and what is said about them."""
    name = pointer.name
    if pointer.needed is not False:
        yield None, f"{name} as a tensor, got None; pass it"
    yield tensor.to("meta"), rf"{name} of .* on .*, got .* on \w+; convert it before the call"
    if pointer.dtype is not None:
        other = torch.int32 if pointer.dtype != torch.int32 else torch.int64
        yield tensor.to(other), rf"{name} of {pointer.dtype} on cpu, got {other} on cpu; convert"
    if pointer.nbytes is None:  # rows of blocks
        yield tensor[:-1], f"{name} as a matching tensor, got shape"
        yield tensor[:, :16], f"{name} as a matching tensor, got shape"
        return
    if not tensor.numel():
        return
    count = rf"{name} of {pointer.nbytes} bytes, got shape \("
    yield tensor.new_empty(0), count
    yield tensor.flatten()[1:], count
    yield torch.cat([tensor.flatten(), tensor.flatten()[:1]]), count
    freed = tensor.clone(memory_format=torch.preserve_format)
    freed.untyped_storage().resize_(0)
    yield freed, rf"{name} with memory, got shape .* without it; allocate it before the call"
    strided = torch.stack([tensor, tensor], -1)[..., 0]
    if tensor.numel() > 1:
        yield strided, rf"{name} as a [\w-]+ tensor, got shape .* with strides .*; make it contig"


@native
def test_memory_that_was_freed_is_not_read() -> None:
    """gather_fields calls its kernel without PyTorch's dispatcher."""
    data = torch.zeros(3, 64, dtype=torch.uint8)
    indices, out = torch.tensor([2, 0]), torch.zeros(2, 4)
    out.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="feature_gather_forward: expected out with memory"):
        gather_fields(data, indices, [Field(0, (4,), torch.float32)], [out])
