"""Devices, mixed precision and the description of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import nasfast
from nasfast.ops import _native
from nasfast.utils.errors import UserError

_MODE: Any = torch.utils.deterministic  # its property is unknown to type checkers


def resolve_device(name: str) -> torch.device:
    """Device for "auto" (CUDA if present, else CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: unknown name, or a CUDA device that this machine does not have.
    """
    kind, _, index = name.partition(":")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (name != kind and not index.isdecimal()):
        raise UserError(
            f"resolve_device: expected device 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}; "
            "'auto' takes a GPU where there is one"
        )
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without it"
        raise UserError(
            f"resolve_device: expected a device of this machine, got {name!r}, but torch finds no "
            f"CUDA device (torch {torch.__version__} is {built}); use 'cpu' or 'auto', or run "
            "`nasfast info` to see what is missing"
        )
    if index and int(index) >= torch.cuda.device_count():
        raise UserError(
            f"resolve_device: expected a device index below {torch.cuda.device_count()} (the CUDA "
            f"devices of this machine), got {name!r}; use 'cuda' for the first one"
        )
    return torch.device(name)


def use_deterministic_algorithms() -> None:
    """From now on results on CUDA repeat bit for bit.

    Otherwise sums of gradients by atomic additions, as of bilinear resizing and deformable
    convolutions, and some of cuDNN's algorithms have another order in every run. What has no
    deterministic way still runs, and PyTorch warns of it.
    """
    # cuBLAS reads it with its first product; one of the two settings that PyTorch accepts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    _MODE.fill_uninitialized_memory = False  # nothing here reads such memory


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, :func:`use_deterministic_algorithms` where it is wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _MODE.fill_uninitialized_memory
    if wanted:
        use_deterministic_algorithms()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        _MODE.fill_uninitialized_memory = filled


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Dtype for autocast that the device computes natively, or None to stay in float32.

    bfloat16 on a CPU with AVX512-BF16 or AMX and on CUDA from compute capability 8.0.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = any(_cpu_capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else None


def machine_info() -> dict[str, object]:
    """What a result depends on besides configuration and seed (written to ``env.json``)."""
    return {
        "nasfast": nasfast.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "cpu": device_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa_level": _native.isa_level(),
    }


def _cpu_capabilities() -> dict[str, object]:
    query = getattr(torch.cpu, "get_capabilities", None)  # absent from the oldest torch supported
    return dict(query()) if query else {}


def device_name(device: torch.device) -> str:
    """Of the processor, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the checkout that nasfast runs from; None for an installed package."""
    root = Path(nasfast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
