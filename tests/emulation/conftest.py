"""Builds the emulation once per session."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import Kernels

from nasfast.ops import _native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the module and of the programs."""
    pybind11 = pytest.importorskip("pybind11")
    if platform.machine() != "x86_64":
        pytest.skip("the emulation changes stacks in x86-64 assembly")
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja")
    folder = tmp_path_factory.mktemp("emulation")
    options = {
        "NASFAST_CUDA": "off",
        "NASFAST_EMULATION": "ON",
        "NASFAST_OUTPUT": folder,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = ["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    targets = ["_C_emulated", "replay_address", "replay_thread"]
    for command in (configure, ["cmake", "--build", folder / "build", "--target", *targets]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout + done.stderr
    return folder


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
def legs(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels in the place of those for the CPU; the list grows by the name of each called."""
    called: list[str] = []

    def entry(name: str) -> Any:
        def run(dtype: int, sizes: tuple[int, ...], pointers: tuple[int, ...]) -> None:
            called.append(name)
            size = getattr(kernels.module, f"{name}_cuda_workspace")(dtype, sizes)
            workspace = torch.empty(size + 256, dtype=torch.uint8)
            aligned = workspace.data_ptr() + -workspace.data_ptr() % 256
            getattr(kernels.module, f"{name}_cuda")(dtype, sizes, pointers, aligned, 0)

        return run

    ops = ("deform_conv2d", "mixed_op")
    names = [f"{op}_{way}" for op in ops for way in ("forward", "backward")]
    names.append("feature_gather_forward")
    monkeypatch.setattr(_native, "C", SimpleNamespace(**{name: entry(name) for name in names}))
    monkeypatch.setattr(_native, "CPU_DTYPES", tuple(_native.DTYPES))
    return called
