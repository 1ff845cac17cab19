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


def call(entry: str, sizes: tuple[int, ...], tensors: Sequence[Tensor | None]) -> None:
    """Runs a CPU kernel of the extension on float32 or float64 tensors.

    Images [N, C, H, W] must be dense with channels last, other tensors contiguous; None becomes a
    null pointer. ``sizes`` and ``tensors`` stand in the order of the kernel's C++ structs.

    Raises:
        ValueError: a tensor is not what the kernel would read.
    """
    dtype = next(tensor.dtype for tensor in tensors if tensor is not None)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{entry}: tensors must be torch.float32 or torch.float64, got {dtype}; convert them "
            "before the call"
        )
    pointers = tuple(0 if t is None else _pointer(entry, t, dtype) for t in tensors)
    getattr(C, entry)(dtype == torch.float64, sizes, pointers)


def _pointer(entry: str, tensor: Tensor, dtype: torch.dtype) -> int:
    if tensor.device.type != "cpu" or tensor.dtype != dtype:
        raise ValueError(
            f"{entry}: tensor must be {dtype} on cpu, got {tensor.dtype} on {tensor.device}; "
            "convert it before the call"
        )
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    if not tensor.is_contiguous(memory_format=layout):
        raise ValueError(
            f"{entry}: tensor must be dense in {layout}, got shape {tuple(tensor.shape)} with "
            f"strides {tensor.stride()}; call .contiguous(memory_format={layout}) before"
        )
    return tensor.data_ptr()
