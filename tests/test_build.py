"""The compiled extension: one OpenMP runtime, no need of torch's libraries or of a CUDA driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nasfast.ops import _native

ROOT = Path(__file__).resolve().parents[1]
native = pytest.mark.skipif(_native.C is None, reason=str(_native.ERROR))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime() -> None:
    """The kernels run on torch's thread pool: a second pool would slow both down about 1000x."""
    done = run_python(
        "import nasfast, torch\n"
        "from nasfast.ops import deform_conv2d\n"
        "deform_conv2d(torch.ones(1, 8, 9, 9), torch.zeros(1, 2, 9, 9), torch.ones(8, 8, 1, 1))\n"
        "torch.mm(torch.ones(300, 300), torch.ones(300, 300))\n"
        "files = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line\n"
        "         or 'libiomp' in line or 'libomp' in line}\n"
        "print(len(files), *files)"
    )
    assert done.stdout.startswith("1 "), done.stdout + done.stderr


@native
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_links_neither_torch_nor_the_cuda_runtime() -> None:
    """One build serves every torch, and imports with and without a CUDA driver."""
    libraries = subprocess.run(
        ["readelf", "-d", _native.C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "libgomp" in libraries
    assert not any(name in libraries for name in ("torch", "c10", "cudart", "libcuda."))


@native
def test_cuda_query_never_raises() -> None:
    if not hasattr(_native.C, "cuda_info"):
        pytest.skip("built without CUDA")
    info = _native.C.cuda_info()
    assert info["runtime"] >= 12000
    assert info["devices"] or info["error"]


def configure(folder: Path, **options: str) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    options |= {
        "NASFAST_OUTPUT": str(folder),
        "CMAKE_BUILD_TYPE": "Debug",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    command = ["cmake", "-S", str(ROOT), "-B", str(folder / "build"), "-G", "Ninja", *defines]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_unknown_cuda_switch(tmp_path: Path) -> None:
    done = configure(tmp_path, NASFAST_CUDA="yes")
    assert done.returncode != 0
    assert "NASFAST_CUDA must be auto, on or off, got 'yes'" in done.stderr


def test_cuda_without_nvcc(tmp_path: Path) -> None:
    done = configure(tmp_path, NASFAST_CUDA="on", CMAKE_CUDA_COMPILER="")
    assert done.returncode != 0
    assert "NASFAST_CUDA must find nvcc when it is 'on'; put nvcc in PATH" in done.stderr


def test_cuda_build_imports_without_a_driver(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    done = configure(tmp_path, NASFAST_CUDA="on")
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmake", "--build", str(tmp_path / "build")], capture_output=True, check=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _C\n"
        "info = _C.cuda_info(); print(info)\n"
        "assert info['runtime'] >= 12000 and (info['devices'] or info['error'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr


@native
def test_unknown_instruction_set() -> None:
    done = run_python("from nasfast.ops import _native; print(_native.ERROR)", NASFAST_ISA="avx2")
    if _native.isa_level() == "portable":
        pytest.skip("not an x86-64 processor")
    assert done.stdout.strip() == (
        "nasfast._C cannot be imported: NASFAST_ISA must be x86-64-v2, x86-64-v3 or x86-64-v4, "
        "got 'avx2'; unset it to use the best that the processor has"
    )
