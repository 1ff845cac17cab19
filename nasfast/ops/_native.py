"""Loader of the compiled extension; the only place that imports ``nasfast._C``.

``C`` is the module, or None where it cannot be imported; ``ERROR`` then says why, and every op runs
its reference. ``nasfast info`` shows both.
"""

from __future__ import annotations

import functools
import importlib
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from nasfast.ops import _nvrtc

C: Any
ERROR: str | None
try:
    C, ERROR = importlib.import_module("nasfast._C"), None
except ImportError as error:
    remedy = "`pip install .` in the checkout builds it anew"
    C, ERROR = None, f"nasfast._C cannot be imported: {error} ({remedy})"
    if not isinstance(error, ModuleNotFoundError):  # it is there, but fails
        warnings.warn(ERROR, RuntimeWarning, stacklevel=2)

_threads_ended = True


def _before_fork() -> None:
    """OpenMP's threads do not come along, and its next parallel loop in the child would wait for
    them for ever, that of torch as well: they end before, and both processes begin new ones."""
    global _threads_ended
    _threads_ended = C.end_threads()


def _after_fork() -> None:
    if not _threads_ended:  # the library is too old to end them: without others none is waited for
        torch.set_num_threads(1)


if C is not None:
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
if hasattr(C, "set_cuda_compiler"):
    C.set_cuda_compiler(_nvrtc.kernel_code)

BACKENDS: dict[str, dict[str, str]] = {}
"""Op, device type: what runs there. Every op registers its own."""
KERNELS: dict[str, set[str]] = {}
"""Op: device types on which it runs a kernel."""

NOT_BUILT = "built without CUDA (NASFAST_CUDA=off)"

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""Codes of nasfast::DType in csrc/common/dtype.hpp."""
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""What the CPU kernels store; they compute float16 in float32 memory."""


def isa_level() -> str:
    """Instruction set of the CPU kernels: "x86-64-v2", "-v3", "-v4", "-v4-bf16" or "-v4-amx".

    "portable" on other processors, "none" without the extension.
    """
    return str(C.isa_level()) if C is not None else "none"


def has_kernel(op: str, device: str) -> bool:
    """Whether the extension has a kernel of the op for a device type; registers the answer."""
    reason = ERROR
    if reason is None and device == "cuda":
        reason = _without_cuda(f"{op}_forward_cuda")
    if reason is None:
        KERNELS.setdefault(op, set()).add(device)
    kernel = "C++ kernel" if device == "cpu" else "CUDA kernel"
    BACKENDS.setdefault(op, {})[device] = f"reference: {reason}" if reason else kernel
    return reason is None


def _without_cuda(entry: str) -> str | None:
    """Why an entry of the extension has no CUDA kernel, or None."""
    if not hasattr(C, entry):
        return NOT_BUILT
    return _nvrtc.missing() if hasattr(C, "set_cuda_compiler") else None


def storage(tensor: Tensor) -> torch.dtype:
    """The dtype that the kernels read it in: its own, or float32."""
    own = tensor.device.type == "cuda" or tensor.dtype in CPU_DTYPES
    return tensor.dtype if own else torch.float32


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a kernel's sums (nasfast::Accumulate)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(tensor: Tensor | None) -> tuple[object, ...] | None:
    """All that decides how the kernels read a tensor, apart from its address."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def pixel_step(tensor: Tensor) -> int | None:
    """Elements between neighbouring pixels of a map [N, C, H, W] whose channels lie together.

    C for a channels-last map, more for a slice of its channels, None for any other layout.
    """
    _, channels, height, width = tensor.shape
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return channels
    step = tensor.stride(3)
    expected = (step * width * height, 1, step * width, step)
    return step if tensor.stride() == expected and step >= channels else None


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Channels last for maps [N, C, H, W] that are so, or slices of the channels of such a map.

    Contiguous for all others, and for what is both.
    """
    if tensor.is_contiguous() or tensor.dim() != 4 or pixel_step(tensor) is None:
        return torch.contiguous_format
    return torch.channels_last


def as_map(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The map that a kernel reads, copied where it is of another dtype or layout."""
    return tensor.to(dtype).contiguous(memory_format=torch.channels_last)


def empty_map(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a map [N, C, H, W] in channels last, on the device of ``like``."""
    last = torch.channels_last
    dtype = dtype or like.dtype
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=last)


def as_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A kernel's result in dtype and layout of ``other``."""
    layout = memory_format(other) if tensor.dim() == 4 else torch.contiguous_format
    if tensor.dtype == other.dtype and tensor.is_contiguous(memory_format=layout):
        return tensor
    result = torch.empty(tensor.shape, dtype=other.dtype, device=other.device, memory_format=layout)
    return result.copy_(tensor)


def convert(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in a dtype; on CUDA all together, not by a launch for each."""
    others = [tensor for tensor in tensors if tensor.dtype != dtype]
    if len(others) < 2 or not all(tensor.is_cuda for tensor in others):
        return [tensor.to(dtype) for tensor in tensors]
    made = [torch.empty_like(tensor, dtype=dtype) for tensor in others]
    torch._foreach_copy_(made, others)
    rest = iter(made)
    return [tensor if tensor.dtype == dtype else next(rest) for tensor in tensors]


def convolution_settings(tensor: Tensor) -> tuple[bool, bool]:
    """deterministic, tf32: CUDA kernels follow PyTorch's global settings of its convolutions."""
    if not tensor.is_cuda:
        return False, False
    cudnn: Any = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.conv.fp32_precision == "tf32"


def double_bits(value: float) -> int:
    """The bits of a double, as the integer that ``Params`` carries it in."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


class Pointer(NamedTuple):
    """What a kernel reads or writes behind one of its pointers."""

    name: str
    dtype: torch.dtype | None  # None: any
    nbytes: int | None  # None: what ``holds`` knows
    layout: torch.memory_format | None = torch.contiguous_format
    holds: Callable[[Tensor], bool] | None = None
    """Of a tensor in another layout."""
    needed: bool | int = True
    """False where it may be null; the index of another pointer where it may be if that one is."""

    @classmethod
    def of(
        cls,
        name: str,
        dtype: torch.dtype,
        elements: int,
        layout: torch.memory_format = torch.contiguous_format,
        needed: bool | int = True,
    ) -> Pointer:
        """To so many elements in a layout."""
        return cls(name, dtype, elements * dtype.itemsize, layout, None, needed)


POINTERS: dict[str, Callable[[torch.dtype, tuple[int, ...]], tuple[Pointer, ...]]] = {}
"""Entry of the extension, without "_cuda": its pointers, by the dtype and the sizes of a call."""


def pointers(
    *entries: str,
) -> Callable[[Callable[..., tuple[Pointer, ...]]], Callable[..., tuple[Pointer, ...]]]:
    """Registers the function that describes the pointers of entries."""

    def register(
        function: Callable[..., tuple[Pointer, ...]],
    ) -> Callable[..., tuple[Pointer, ...]]:
        for entry in entries:
            POINTERS[entry] = functools.lru_cache(1024)(function)
        return function

    return register


def _refuse(entry: str, pointer: Pointer, tensor: Tensor | None, device: torch.device) -> NoReturn:
    """Raises the error that says what is wrong with a tensor for a pointer."""
    name = f"{entry}: expected {pointer.name}"
    if tensor is None:
        raise ValueError(f"{name} as a tensor, got None; pass it")
    if tensor.device != device or tensor.dtype != (pointer.dtype or tensor.dtype):
        raise ValueError(
            f"{name} of {pointer.dtype or tensor.dtype} on {device}, got {tensor.dtype} on "
            f"{tensor.device}; convert it before the call"
        )
    got = f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"
    if tensor.nbytes != pointer.nbytes and pointer.nbytes is not None:
        raise ValueError(f"{name} of {pointer.nbytes} bytes, got {got}; pass all of them")
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(f"{name} with memory, got {got} without it; allocate it before the call")
    layout = {torch.channels_last: "channels-last", torch.contiguous_format: "contiguous"}
    kind = "matching" if pointer.layout is None else layout[pointer.layout]
    raise ValueError(f"{name} as a {kind} tensor, got {got}; make it contiguous before the call")


def _addresses(
    entry: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    first: Tensor,
) -> list[int]:
    """Of tensors that are what :data:`POINTERS` says; all are on the device of the first."""
    device, on_cpu = first.device, first.is_cpu
    addresses = []
    for pointer, tensor in zip(POINTERS[entry](dtype, sizes), tensors, strict=True):
        _, kind, nbytes, layout, holds, needed = pointer
        if tensor is None:
            if needed is not False and (needed is True or tensors[needed] is not None):
                _refuse(entry, pointer, None, device)
            addresses.append(0)
            continue
        address = tensor.data_ptr()
        if (
            (tensor.dtype is not kind and kind is not None)
            or (tensor.nbytes != nbytes and nbytes is not None)
            or not (tensor.is_cpu if on_cpu else tensor.device == device)
            or not (address or not tensor.numel())
            or (layout is not None and not tensor.is_contiguous(memory_format=layout))
            or (holds is not None and not holds(tensor))
        ):
            _refuse(entry, pointer, tensor, device)
        addresses.append(address)
    return addresses


def call(
    entry: str, dtype: torch.dtype, sizes: tuple[int, ...], tensors: Sequence[Tensor | None]
) -> None:
    """Runs a kernel of the extension on the device of the tensors.

    ``sizes`` and ``tensors`` stand in the order of the kernel's C++ structs; None becomes a null
    pointer. This is the final validation, of every pointer: kernels do not check again. On CUDA it
    runs on the current stream of that device, whichever is the current one, with workspace from
    PyTorch's allocator.

    Raises:
        ValueError: a tensor that is not what :data:`POINTERS` says of the entry.
        RuntimeError: the kernel cannot be launched.
    """
    first = tensors[0]
    assert first is not None
    addresses = _addresses(entry, dtype, sizes, tensors, first)
    if first.is_cpu:
        getattr(C, entry)(DTYPES[dtype], sizes, addresses)
        return
    device = first.device
    index = device.index
    size = getattr(C, f"{entry}_cuda_workspace")(DTYPES[dtype], sizes, index)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    run = getattr(C, f"{entry}_cuda")
    run(DTYPES[dtype], sizes, addresses, workspace.data_ptr(), stream, index)


def prepare(
    entry: str, dtype: torch.dtype, sizes: tuple[int, ...], tensors: Sequence[Tensor | None]
) -> Callable[[], None]:
    """:func:`call` of a CPU kernel, to be repeated: the pointers are validated now.

    Keep the tensors. Nobody may be able to free or move their memory, see :func:`is_fixed`.

    Raises:
        ValueError: as :func:`call`.
    """
    first = tensors[0]
    assert first is not None
    addresses = _addresses(entry, dtype, sizes, tensors, first)
    return functools.partial(getattr(C, entry), DTYPES[dtype], sizes, addresses)


def is_fixed(tensor: Tensor) -> bool:
    """Whether its memory stays in place as long as the tensor lives: another owns it, as NumPy."""
    return tensor.is_cpu and not tensor.untyped_storage().resizable()
