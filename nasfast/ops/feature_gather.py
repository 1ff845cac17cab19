"""Gathers the samples of a batch from a feature cache, in the dtypes that training computes in.

A sample is one block of bytes, and its arrays stand at fixed offsets in every block.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nasfast.ops import _checks, _native, _register

# Codes of nasfast::feature_gather::Kind in csrc/feature_gather/feature_gather.h.
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BYTES = 3
_STORED = (*_KINDS, torch.uint8)
_MOST = 16  # fields of a call of the kernel
_ALIGN = 16  # bytes
_CORES = os.cpu_count() or 1
_WAY = 0  # of writing on a CPU; others than 0 are for tests: all write the same


class Field(NamedTuple):
    """An array in the block of a sample."""

    offset: int
    """First byte, a multiple of 16."""
    shape: tuple[int, ...]
    """Of one sample, channels last."""
    dtype: torch.dtype
    """As stored: float32, bfloat16, float16 or uint8."""

    @property
    def nbytes(self) -> int:
        """Of one sample."""
        return math.prod(self.shape) * self.dtype.itemsize


def feature_gather(
    data: Tensor,  # uint8 [S, B], a block of B bytes per sample
    indices: Tensor,  # int64 [N]
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,  # [N, *shape]
    *,
    threads: int = 1,
) -> Tensor:
    """Writes one array of the samples ``indices`` to ``out``, and returns ``out``.

    Args:
        data: the blocks; they begin at multiples of 16 bytes and may lie apart.
        indices: samples, in any order and any number of times.
        offset, shape, dtype: the array, see :class:`Field`.
        out: contiguous; of ``dtype``, or of any of float32, bfloat16 and float16 where ``dtype`` is
            one of these. Rounded to the nearest, ties to even.
        threads: of a CPU, at most.

    On CUDA the indices are read by the device alone: nothing waits, the call can be captured in a
    graph, and a row whose index is none of the samples is left as it is.

    Raises:
        TypeError: what is no tensor, integer or dtype.
        ValueError: tensors that do not fit together, with what was expected and what came; on a CPU
            also an index that is none of the samples.
    """
    field = _field(offset, shape, dtype)
    threads = _checks.integer(_OP, "threads", threads)
    _check_kinds(data, indices, [out])
    torch.ops.nasfast.feature_gather.default(data, indices, *field, out, threads)
    return out


def feature_gather_reference(
    data: Tensor,
    indices: Tensor,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
) -> Tensor:
    """:func:`feature_gather` in plain PyTorch, on any device."""
    field = _field(offset, shape, dtype)
    _check_kinds(data, indices, [out])
    _check(data, indices, [field], [out])
    _check_range(indices, len(data))
    if not out.numel():
        return out
    raw = data[:, offset : offset + field.nbytes][indices]
    return out.copy_(raw.view(dtype).view(out.shape))


def gather_fields(
    data: Tensor,  # uint8 [S, B]
    indices: Tensor,  # int64 [N]
    fields: Sequence[Field],
    outs: Sequence[Tensor],  # [N, *shape] of each field
    *,
    threads: int = 1,
) -> None:
    """:func:`feature_gather` of several arrays in one call, and of some of the samples.

    A row whose index is none of the samples is left as it is, on every device: a batch is put
    together from several ``data`` by a call for each.

    Raises:
        TypeError: what is no tensor, integer or field.
        ValueError: tensors that do not fit together, with what was expected and what came.
    """
    threads = _threads(threads)
    _check_all(data, indices, fields, outs)
    for first in range(0, len(fields), _MOST):
        part = slice(first, first + _MOST)
        _run(data, indices, fields[part], outs[part], threads)


class PreparedGather:
    """:func:`gather_fields` into the same memory, again and again: that is checked once.

    On a CPU, where nobody can move the memory (Python's or a file's); else at every call.

    Raises:
        TypeError, ValueError: as :func:`gather_fields`.
    """

    def __init__(
        self,
        data: Tensor,  # uint8 [S, B]
        fields: Sequence[Field],
        outs: Sequence[Tensor],  # [N, *shape] of each field
        rows: int,  # N
        *,
        threads: int = 1,
    ) -> None:
        self._given, self._threads = (data, fields, outs), _threads(threads)
        memory = bytearray(8 * max(rows, 1))  # which nobody can move
        self._indices = torch.frombuffer(memory, dtype=torch.int64)[:rows]
        self._calls: list[Callable[[], None]] | None = None
        if not _has_kernel(data) or not all(map(_native.is_fixed, (data, *outs))):
            return
        _check_all(data, self._indices, fields, outs)
        self._calls = []
        for first in range(0, len(fields), _MOST):
            part = slice(first, first + _MOST)
            call = _kernel_call(data, self._indices, fields[part], outs[part], self._threads)
            self._calls.append(_native.prepare(*call))

    def __call__(self, indices: Tensor) -> None:
        """Write the samples of ``indices`` (int64 ``[N]``)."""
        data, fields, outs = self._given
        expected = indices.is_cpu and indices.dtype == torch.int64
        if self._calls is None or not expected or indices.shape != self._indices.shape:
            gather_fields(data, indices, fields, outs, threads=self._threads)
            return
        self._indices.copy_(indices)
        for call in self._calls:
            call()
        _note_written(outs)


_OP = "feature_gather"
_wrong = functools.partial(_checks.wrong, _OP)


def _check_all(
    data: Tensor, indices: Tensor, fields: Sequence[Field], outs: Sequence[Tensor]
) -> None:
    _check_fields(fields, outs)
    _check_kinds(data, indices, outs)
    _check(data, indices, fields, outs)


def _field(offset: Any, shape: Any, dtype: Any) -> Field:
    """A field of these, which are of the right kinds."""
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise _checks.wrong_kind(_OP, "shape", "a sequence of integers", shape, "pass a tuple")
    if not isinstance(dtype, torch.dtype):
        raise _checks.wrong_kind(_OP, "dtype", "a torch.dtype", dtype, "pass torch.float16")
    sizes = tuple([s if type(s) is int else _checks.integer(_OP, "shape", s) for s in shape])
    return Field(_checks.integer(_OP, "offset", offset), sizes, dtype)


def _threads(threads: Any) -> int:
    """As many as asked for, of those that the processor has."""
    count = _checks.integer(_OP, "threads", threads)
    if count < 1:
        raise _wrong("threads", "of at least 1", count, "change it")
    return min(count, _CORES)


def _check_kinds(data: Any, indices: Any, outs: Sequence[Any]) -> None:
    for tensor in (data, indices, *outs):
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            _checks.check_tensors(_OP, data=data, indices=indices)
            _checks.check_tensors(_OP, out=tensor)
        elif not torch.compiler.is_compiling() and (
            tensor.is_neg() or tensor._is_zerotensor() or tensor.is_nested
        ):
            name = "data" if tensor is data else "indices" if tensor is indices else "out"
            raise _wrong(name, "as plain memory", "a lazy or nested tensor", f"copy {name}")


def _check_fields(fields: Any, outs: Any) -> None:
    for name, value in (("fields", fields), ("outs", outs)):
        if not isinstance(value, list | tuple):
            raise _checks.wrong_kind(_OP, name, "a list", value, "pass a list")
    if len(fields) != len(outs):
        raise _wrong("outs", f"for {len(fields)} fields", len(outs), "pass one for each field")
    for field in fields:
        if type(field) is not Field or type(field.shape) is not tuple:
            raise _checks.wrong_kind(_OP, "fields", "a list of Field", field, "pass ops.Field(..)")


def _check(data: Tensor, indices: Tensor, fields: Sequence[Field], outs: Sequence[Tensor]) -> None:
    """All but what only memory shows: addresses, and the values of the indices."""
    if data.dtype != torch.uint8 or data.dim() != 2 or data.stride(1) != 1:
        raise _wrong(
            "data",
            "as uint8 [samples, bytes] with contiguous rows",
            f"{data.dtype} {list(data.shape)} with strides {data.stride()}",
            "view the blocks as bytes",
        )
    if len(data) > 1 and data.stride(0) % _ALIGN and data.shape[1]:
        raise _wrong(
            "data",
            f"with rows a multiple of {_ALIGN} bytes apart",
            f"a stride of {data.stride(0)}",
            "pad the blocks",
        )
    if indices.dtype != torch.int64 or indices.dim() != 1 or not indices.is_contiguous():
        raise _wrong(
            "indices",
            "as contiguous int64 [N]",
            f"{indices.dtype} {list(indices.shape)} with strides {indices.stride()}",
            "convert them",
        )
    device = data.device
    for tensor in (indices, *outs):
        if tensor.device != device:
            name = "indices" if tensor is indices else "out"
            raise _wrong(name, f"on {device}, as data", tensor.device, "move it")
    size = data.shape[1]
    plan = _plan if isinstance(size, int) else _plan.__wrapped__  # a symbol has no hash
    try:
        plan(tuple(fields), tuple(out.dtype for out in outs), size)
    except TypeError:  # of what has no hash
        for field in fields:
            _field(*field)
        raise
    for field, out in zip(fields, outs, strict=True):
        shape = (len(indices), *field.shape)
        if out.shape != shape or not out.is_contiguous():
            raise _wrong(
                "out",
                f"as contiguous {list(shape)}",
                f"{list(out.shape)} with strides {out.stride()}",
                "allocate it so, channels last",
            )
        if out.requires_grad:
            raise _wrong("out", "without gradient", "requires_grad", "pass out.detach()")


@functools.lru_cache(256)
def _plan(fields: tuple[Field, ...], dtypes: tuple[torch.dtype, ...], size: int) -> tuple[int, ...]:
    """The fields of a call as the kernel takes them, checked against blocks of ``size`` bytes."""
    plan = [len(fields)]
    for field, dtype in zip(fields, dtypes, strict=True):
        _check_field(field, size)
        if dtype != field.dtype and not (dtype in _KINDS and field.dtype in _KINDS):
            kinds = f"{field.dtype}" + " or a float of at most 32 bits" * (field.dtype in _KINDS)
            raise _wrong("out", f"of {kinds}", dtype, "allocate it so")
        same = field.dtype == dtype
        plan += (_BYTES, _BYTES) if same else (_KINDS[field.dtype], _KINDS[dtype])
        plan += field.offset, field.nbytes if same else math.prod(field.shape)
    return (*plan, *[0] * (4 * (_MOST - len(fields))))


def _check_field(field: Field, size: int) -> None:
    _field(*field)  # of the right kinds
    if min(field.shape, default=0) < 0:
        raise _wrong("shape", "of sizes of at least 0", field.shape, "read it from the layout")
    if field.dtype not in _STORED:
        kinds = ", ".join(map(str, _STORED))
        raise _wrong("dtype", f"to be one of {kinds}", field.dtype, "store it as one of these")
    if field.offset % _ALIGN or not 0 <= field.offset <= size - field.nbytes:
        raise _wrong(
            "offset",
            f"to be a multiple of {_ALIGN} from 0 to {size - field.nbytes}, to leave "
            f"{field.nbytes} bytes in a block of {size}",
            field.offset,
            "read it from the layout of the blocks",
        )


def _check_range(indices: Tensor, samples: int) -> None:
    if indices.device.type != "cpu" or not len(indices):
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= samples:
        raise _wrong(
            "indices",
            f"of samples from 0 to {samples - 1}",
            low if low < 0 else high,
            "draw them from what data holds",
        )


@functools.lru_cache(256)
def _forward_pointers(
    rows: int, samples: int, stride: int, plan: tuple[int, ...]
) -> tuple[_native.Pointer, ...]:
    count = len(plan) // 4
    fields = [plan[4 * i : 4 * i + 4] for i in range(count)]
    itemsize = {code: dtype.itemsize for dtype, code in _KINDS.items()} | {_BYTES: 1}
    end = max(offset + size * itemsize[kind] for kind, _, offset, size in fields)

    def blocks(tensor: Tensor) -> bool:
        inside = tensor.dim() == 2 and tensor.shape[0] == samples and tensor.shape[1] >= end
        return inside and tensor.stride() == (stride, 1)

    sizes = [rows * size * itemsize[kind] for _, kind, _, size in fields]
    return (
        _native.Pointer("data", torch.uint8, None, None, blocks),
        _native.Pointer.of("indices", torch.int64, rows),
        *[_native.Pointer("out", None, size) for size in sizes],
        *[_native.Pointer("out", None, 0, needed=False)] * (_MOST - count),
    )


def _pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    rows, samples, stride, _, _, count = sizes[:6]
    return _forward_pointers(rows, samples, stride, sizes[6 : 6 + 4 * count])


_native.POINTERS["feature_gather_forward"] = _pointers


def _run(
    data: Tensor, indices: Tensor, fields: Sequence[Field], outs: Sequence[Tensor], threads: int
) -> None:
    """What :func:`_check` has seen, into at most 16 outs."""
    if not _has_kernel(data):
        inside = (indices >= 0) & (indices < len(data))
        rows = indices[inside]
        for field, out in zip(fields, outs, strict=True):
            new = out.new_empty(len(rows), *field.shape)
            out[inside] = feature_gather_reference(data, rows, *field, new)
        return
    _native.call(*_kernel_call(data, indices, fields, outs, threads))
    _note_written(outs)


def _has_kernel(data: Tensor) -> bool:
    return data.device.type in _native.KERNELS.get(_OP, ())


def _kernel_call(
    data: Tensor, indices: Tensor, fields: Sequence[Field], outs: Sequence[Tensor], threads: int
) -> tuple[str, torch.dtype, tuple[int, ...], tuple[Tensor | None, ...]]:
    """The arguments of :func:`_native.call`."""
    if data.data_ptr() % _ALIGN:
        address = f"an address {data.data_ptr() % _ALIGN} beyond one"
        raise _wrong("data", f"at a multiple of {_ALIGN} bytes", address, "copy it")
    plan = _plan(tuple(fields), tuple(out.dtype for out in outs), data.shape[1])
    sizes = (len(indices), len(data), data.stride(0), threads, _WAY, *plan)
    tensors = (data, indices, *outs, *[None] * (_MOST - len(outs)))
    # the kinds are among the sizes, so the dtype of the call decides nothing
    return "feature_gather_forward", torch.float32, sizes, tensors


def _note_written(outs: Sequence[Tensor]) -> None:
    """A network that still needs for its gradient what was overwritten is to hear of it."""
    torch.autograd.graph.increment_version([out for out in outs if not out.is_inference()])


def _gather(
    data: Tensor,
    indices: Tensor,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
    threads: int,
) -> None:
    if data is None or indices is None or out is None:
        _check_kinds(data, indices, [out])
    field = Field(offset, tuple(shape), dtype)
    _check(data, indices, [field], [out])
    _check_range(indices, len(data))
    _run(data, indices, [field], [out], _threads(threads))


def _fake(
    data: Tensor,
    indices: Tensor,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor,
    threads: int,
) -> None:
    _check(data, indices, [Field(offset, tuple(shape), dtype)], [out])


_register.define(
    "feature_gather(Tensor data, Tensor indices, int offset, int[] shape, ScalarType dtype, "
    "Tensor(a!) out, int threads) -> ()",
    _fake,
)
for _device in ("CPU", "CUDA"):
    _register.LIBRARY.impl("feature_gather", _gather, _device)
    _native.has_kernel("feature_gather", _device.lower())
