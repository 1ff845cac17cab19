"""Loader of the compiled extension; the only place that imports ``nasfast._C``.

``C`` is the module, or None where it cannot be imported; ``ERROR`` then says why, and every op runs
its reference. ``python -m nasfast.info`` shows both.
"""

from __future__ import annotations

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
    """Instruction set of the CPU kernels: "x86-64-v2", "-v3", "-v4", "portable", or "none"."""
    return str(C.isa_level()) if C is not None else "none"


# Codes of nasfast::DType in csrc/common/dtype.hpp.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# entry -> dtypes that its CPU kernel stores; the half types are computed in float32 elsewhere.
CPU_DTYPES = {
    "deform_conv2d_forward": (torch.float32, torch.float64, torch.bfloat16),
    "deform_conv2d_backward": (torch.float32, torch.float64),
}


def missing(op: str, device: str) -> str | None:
    """Why the extension has no kernel of the op for a device type, or None where it has."""
    if ERROR is not None:
        return ERROR
    if device == "cuda" and not hasattr(C, f"{op}_forward_cuda"):
        return "built without CUDA (NASFAST_CUDA=off, no nvcc or CMake < 3.25)"
    return None


def storage(entry: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors in a dtype that the kernel stores: their own, or float32."""
    if tensors[0].device.type == "cuda" or tensors[0].dtype in CPU_DTYPES[entry]:
        return list(tensors)
    return [tensor.float() for tensor in tensors]


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


def call(
    entry: str,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    stepped: tuple[int, ...] = (),
) -> None:
    """Runs a kernel of the extension on the device of the tensors.

    Maps [N, C, H, W] must be dense with channels last (those at the positions ``stepped`` may be
    slices of channels), other tensors contiguous; None becomes a null pointer. ``sizes`` and
    ``tensors`` stand in the order of the kernel's C++ structs. On CUDA it runs on the current
    stream and gets its workspace from PyTorch's allocator.

    Raises:
        ValueError: a tensor is not what the kernel would read.
        RuntimeError: the kernel cannot be launched.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    pointers = tuple(
        0 if tensor is None else _pointer(entry, tensor, dtype, device, position in stepped)
        for position, tensor in enumerate(tensors)
    )
    if device.type == "cpu":
        getattr(C, entry)(DTYPES[dtype], sizes, pointers)
        return
    with torch.cuda.device(device):
        size = getattr(C, f"{entry}_cuda_workspace")(DTYPES[dtype], sizes)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream().cuda_stream
        getattr(C, f"{entry}_cuda")(DTYPES[dtype], sizes, pointers, workspace.data_ptr(), stream)


def _pointer(
    entry: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, stepped: bool
) -> int:
    allowed = {dtype, torch.float32} if dtype in (torch.bfloat16, torch.float16) else {dtype}
    if tensor.device != device or tensor.dtype not in allowed:
        raise ValueError(
            f"{entry}: tensor must be {dtype} on {device}, got {tensor.dtype} on {tensor.device}; "
            "convert it before the call"
        )
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    dense = tensor.is_contiguous(memory_format=layout)
    if not (dense or (stepped and pixel_step(tensor) is not None)):
        raise ValueError(
            f"{entry}: tensor must be dense in {layout}, got shape {tuple(tensor.shape)} with "
            f"strides {tensor.stride()}; call .contiguous(memory_format={layout}) before"
        )
    return tensor.data_ptr()
