"""Loader of the compiled extension; the only place that imports ``nasfast._C``.

``C`` is the module, or None where it cannot be imported; ``ERROR`` then says why, and every op runs
its reference. ``python -m nasfast.info`` shows both.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

C: Any
ERROR: str | None
try:
    import nasfast._C as _C

    C, ERROR = _C, None
except ImportError as error:
    remedy = "`pip install .` in the checkout builds it anew"
    C, ERROR = None, f"nasfast._C cannot be imported: {error} ({remedy})"
    if not isinstance(error, ModuleNotFoundError):  # it is there, but fails
        warnings.warn(ERROR, RuntimeWarning, stacklevel=2)

# op -> device type -> what runs there; each op enters itself.
LEGS: dict[str, dict[str, str]] = {}


def isa_level() -> str:
    """Instruction set of the CPU kernels: "x86-64-v2", "-v3", "-v4", "-v4-bf16" or "-v4-amx".

    "portable" on other processors, "none" without the extension.
    """
    return str(C.isa_level()) if C is not None else "none"


_c: Any = torch._C  # what PyTorch's own Python modules use of it
_forward_ad: Any = torch.autograd.forward_ad

# op -> device types on which it runs a kernel.
_KERNELS: dict[str, set[str]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)

# Codes of nasfast::DType in csrc/common/dtype.hpp.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# What the CPU kernels store; float16 they compute in float32 memory.
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def has_kernel(op: str, device: str) -> bool:
    """Whether the extension has a kernel of the op for a device type; enters the answer in LEGS."""
    reason = ERROR
    if reason is None and device == "cuda" and not hasattr(C, f"{op}_forward_cuda"):
        reason = "built without CUDA (NASFAST_CUDA=off, no nvcc or CMake < 3.25)"
    if reason is None:
        _KERNELS.setdefault(op, set()).add(device)
    kernel = "C++ kernel" if device == "cpu" else "CUDA kernel"
    LEGS.setdefault(op, {})[device] = f"reference: {reason}" if reason else kernel
    return reason is None


def is_eager(op: str, first: Tensor, *others: Tensor | None) -> bool:
    """Whether calling the kernel is all that PyTorch's dispatcher would do, which costs as much.

    It is not where a mode, a transform, a compiler or autocast wants to see the call, nor where a
    tensor is of a subclass or has no kernel on its device.
    """
    if torch.compiler.is_compiling():
        return False
    device = first.device.type
    if (
        _c._len_torch_dispatch_stack()
        or _c._len_torch_function_stack()
        or _c._functorch.peek_interpreter_stack() is not None
        or _c._get_tracing_state() is not None
        or _forward_ad._current_level >= 0
        or device not in _KERNELS.get(op, ())
        or torch.is_autocast_enabled(device)
    ):
        return False
    plain = _plain_keys(device)
    for tensor in (first, *others):
        if tensor is not None and (
            type(tensor) not in _PLAIN or _c._dispatch_keys(tensor).raw_repr() not in plain
        ):
            return False
    return True


def is_differentiated_forward() -> bool:
    """Whether derivatives are taken in a way that registered ops do not know.

    These are forward mode and the derivatives of ``torch.func``, where PyTorch would take an op's
    for zero, or refuse it.
    """
    if torch.compiler.is_compiling():
        return False
    if _forward_ad._current_level >= 0:
        return True
    stack = _c._functorch.get_interpreter_stack() or ()
    kinds = _c._functorch.TransformType
    return any(interpreter.key() in (kinds.Grad, kinds.Jvp) for interpreter in stack)


@functools.cache
def _plain_keys(device: str) -> set[int]:
    """What the dispatcher knows of a tensor that is nothing but memory of a device."""
    keys = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            tensor = torch.empty(0, device=device)
            keys.add(_c._dispatch_keys(tensor).raw_repr())
    return keys


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
    """Channels last for maps [N, C, H, W] that are so and not contiguous as well."""
    last = torch.channels_last
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def as_map(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The map that a kernel reads, copied where it is of another dtype or layout."""
    return tensor.to(dtype).contiguous(memory_format=torch.channels_last)


def as_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A kernel's map in dtype and layout of ``other``."""
    return tensor.to(other.dtype).contiguous(memory_format=memory_format(other))


def check(entry: str, like: Tensor, dtype: torch.dtype, layout: str, tensor: Tensor | None) -> None:
    """The last door before a kernel, which believes what it is given.

    ``layout`` is "map" (channels last), "slice" (of the channels of such a map) or "dense"
    (contiguous, or channels last).

    Raises:
        ValueError: another dtype, another device than that of ``like``, another layout.
    """
    if tensor is None:
        return
    if tensor.device != like.device or tensor.dtype != dtype:
        raise ValueError(
            f"{entry}: tensor must be {dtype} on {like.device}, got {tensor.dtype} on "
            f"{tensor.device}; convert it before the call"
        )
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if not (
        last
        or (layout == "slice" and pixel_step(tensor) is not None)
        or (layout == "dense" and tensor.is_contiguous())
    ):
        wanted = "contiguous" if layout == "dense" else "channels last"
        raise ValueError(
            f"{entry}: tensor must be {wanted}, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; make it contiguous before the call"
        )


def call(
    entry: str, dtype: torch.dtype, sizes: tuple[int, ...], tensors: Sequence[Tensor | None]
) -> None:
    """Runs a kernel of the extension on the device of the tensors, which :func:`check` has seen.

    ``sizes`` and ``tensors`` stand in the order of the kernel's C++ structs; None becomes a null
    pointer. On CUDA it runs on the current stream, with workspace from PyTorch's allocator.

    Raises:
        RuntimeError: the kernel cannot be launched.
    """
    pointers = tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
    first = tensors[0]
    assert first is not None
    device = first.device
    if device.type == "cpu":
        getattr(C, entry)(DTYPES[dtype], sizes, pointers)
        return
    with torch.cuda.device(device):
        size = getattr(C, f"{entry}_cuda_workspace")(DTYPES[dtype], sizes)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream().cuda_stream
        getattr(C, f"{entry}_cuda")(DTYPES[dtype], sizes, pointers, workspace.data_ptr(), stream)
