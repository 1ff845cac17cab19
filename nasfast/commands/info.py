"""``nasfast info``: what is built, what runs where, and why anything is missing; or, of the zoo,
``--models`` or an architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Column, Table

import nasfast
import nasfast.ops  # every op registers its backends
from nasfast.device import autocast_dtype, machine_info, resolve_device
from nasfast.models.zoo import ZOO, list_models
from nasfast.ops import _native, _nvrtc
from nasfast.utils.cli import reports_errors, say


def extension() -> dict[str, str]:
    """State of the compiled extension and of the CUDA that it finds."""
    if _native.C is None:
        return {"extension": f"missing: {_native.ERROR}", "CUDA kernels": "missing: no extension"}
    rows = {"extension": str(_native.C.__file__)}
    if not hasattr(_native.C, "cuda_info"):
        return rows | {"CUDA kernels": f"none: {_native.NOT_BUILT}"}
    cuda = _native.C.cuda_info()
    rows["CUDA kernels"] = f"compiled by nvcc, of CUDA {_version(cuda['runtime'])}"
    if hasattr(_native.C, "set_cuda_compiler"):
        try:
            rows["CUDA kernels"] = f"compiled when first used, by {_nvrtc.version()}"
        except RuntimeError as error:
            rows["CUDA kernels"] = f"none: {error}"
    rows["CUDA driver"] = _version(cuda["driver"]) if cuda["driver"] else "none"
    devices = [f"{name} (sm_{major}{minor})" for name, (major, minor) in cuda["devices"]]
    rows["CUDA devices"] = ", ".join(devices) or f"none: {cuda['error'] or 'no device found'}"
    return rows


def tables() -> list[Table]:
    """The report, ready to print."""
    machine = Table("machine", Column("", overflow="fold"), title="nasfast")
    for name, value in machine_info().items():
        machine.add_row(name, str(value))
    device = resolve_device("auto")
    machine.add_row("device 'auto'", str(device))
    machine.add_row("autocast", str(autocast_dtype(device)))
    for name, value in extension().items():
        machine.add_row(name, value)
    backends = Table("op", "device", "runs")
    for op, by_device in _native.BACKENDS.items():
        for device_type, backend in by_device.items():
            backends.add_row(op, device_type, backend)
    return [machine, backends]


def _version(code: int) -> str:
    return f"{code // 1000}.{code % 1000 // 10}"


def show(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    models: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Print what is built, what runs where, and why anything is missing.

    Args:
        name: an architecture of the zoo to describe instead.
        models: list the zoo instead.
    """
    console = Console()
    if name is not None:
        say(console, str(nasfast.model_info(name)))
    elif models:
        for model in list_models():
            say(console, f"{model:<18} {ZOO[model].method:<14} {ZOO[model].source}")
    else:
        for table in tables():
            console.print(table)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    tyro.cli(show, args=argv, prog="nasfast info")
    return 0
