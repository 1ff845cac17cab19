"""The emulated kernels, and the Python side of the ops with them behind it."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builds import Builds
from emulated import Kernels

from nasfast.ops import _native


@pytest.fixture(scope="session")
def emulation(builds: Builds) -> Path:
    """Folder of the module and of the programs."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulation changes stacks in x86-64 assembly")
    return builds.emulation()


@pytest.fixture(scope="session")
def kernels(emulation: Path) -> Kernels:
    (path,) = emulation.glob("_C_emulated*.so")
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Kernels(module)


@pytest.fixture
def calls(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels as the backend of the CPU; the list grows by the name of each called."""
    called: list[str] = []

    def entry(name: str) -> Any:
        def run(dtype: int, sizes: tuple[int, ...], pointers: tuple[int, ...]) -> None:
            called.append(name)
            size = getattr(kernels.module, f"{name}_cuda_workspace")(dtype, sizes, 0)
            workspace = torch.empty(size + 256, dtype=torch.uint8)
            aligned = workspace.data_ptr() + -workspace.data_ptr() % 256
            getattr(kernels.module, f"{name}_cuda")(dtype, sizes, pointers, aligned, 0, 0)

        return run

    ops = ("deform_conv2d", "deform_conv2d_columns", "mixed_op")
    names = [f"{op}_{way}" for op in ops for way in ("forward", "backward")]
    names.append("feature_gather_forward")
    monkeypatch.setattr(_native, "C", SimpleNamespace(**{name: entry(name) for name in names}))
    monkeypatch.setattr(_native, "CPU_DTYPES", tuple(_native.DTYPES))
    return called
