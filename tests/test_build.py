"""The compiled extension: how it is built, what it links, and why it may be missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from builds import ROOT, configure

from nasfast.ops import _native

HEADER = "csrc/common/cuda_nvrtc.cuh"  # of those that NVRTC reads

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
        "from nasfast.ops import _native, deform_conv2d\n"
        "assert _native.C is not None, _native.ERROR\n"
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
@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": ""}], ids=["any", "none"])
def test_cuda_query_never_raises(environment: dict[str, str]) -> None:
    """The module imports and answers without a driver and without a device."""
    if not hasattr(_native.C, "cuda_info"):
        pytest.skip("built without CUDA")
    done = run_python(
        "from nasfast import _C; info = _C.cuda_info(); print(info)\n"
        "assert info['runtime'] >= 12000 or hasattr(_C, 'cuda_kernels')\n"
        "assert info['devices'] or info['error']",
        **environment,
    )
    assert done.returncode == 0, done.stderr


def pretend(folder: Path, setting: str) -> dict[str, str]:
    """Option that makes CMake believe another version of a program."""
    file = folder / "pretend.cmake"
    file.write_text(f"set({setting})\n")
    return {"CMAKE_PROJECT_nasfast_INCLUDE": str(file)}


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())  # CMake wraps lines


def test_unknown_cuda_switch(tmp_path: Path) -> None:
    done = configure(tmp_path, NASFAST_CUDA="yes")
    assert_refused(done, "NASFAST_CUDA must be auto, on, nvrtc or off, got 'yes'")


def test_old_compiler(tmp_path: Path) -> None:
    version = "CMAKE_CXX_COMPILER_ID GNU)\nset(CMAKE_CXX_COMPILER_VERSION 11.4.0"
    done = configure(tmp_path, NASFAST_CUDA="off", **pretend(tmp_path, version))
    assert_refused(
        done,
        "the C++ compiler must be GCC 12 or Clang 18, or newer, got GNU 11.4.0; set CXX to another",
    )


@pytest.mark.parametrize("old_cmake", [False, True])
def test_without_cuda(tmp_path: Path, old_cmake: bool) -> None:
    """'auto' says why it leaves the CUDA kernels to NVRTC; 'on' is an error."""
    if old_cmake:
        options = pretend(tmp_path, "CMAKE_VERSION 3.22.1")
        reason = "CMake must be 3.25 or newer, got 3.22.1; pip install cmake"
    else:
        options = {"CMAKE_CUDA_COMPILER": ""}
        reason = "no working nvcc was found; put nvcc in PATH or set CUDACXX"
    done = configure(tmp_path, NASFAST_CUDA="auto", **options)
    assert done.returncode == 0, done.stderr
    assert f"CUDA kernels are compiled when they are used: {reason}\n" in done.stdout
    done = configure(tmp_path, NASFAST_CUDA="on", **options)
    assert_refused(done, f"NASFAST_CUDA is 'on', but {reason}")


@pytest.mark.parametrize("newest", [70, 90])
def test_old_nvcc(tmp_path: Path, newest: int) -> None:
    """It gets the architectures that it knows, unless the caller names them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    old = tmp_path / "nvcc"
    old.write_text(
        f'#!/bin/bash\n[[ "$*" =~ sm_([0-9]+) && ${{BASH_REMATCH[1]}} -gt {newest} ]] && exit 1\n'
        f'exec {nvcc} "$@"\n'
    )
    old.chmod(0o755)
    done = configure(tmp_path, NASFAST_CUDA="auto", CMAKE_CUDA_COMPILER=str(old))
    assert done.returncode == 0, done.stderr
    if newest < 80:
        reason = f"nvcc must know sm_80, but {old} does not; install CUDA 12 or newer"
        assert f"CUDA kernels are compiled when they are used: {reason}\n" in done.stdout
        return
    ninja = (tmp_path / "build" / "build.ninja").read_text()
    assert set(re.findall(r"code=\[([^]]*)\]", ninja)) == {"compute_80,sm_80", "sm_90a"}
    assert configure(tmp_path, NASFAST_CUDA_ARCHS="120").returncode == 0
    assert "code=[compute_120,sm_120]" in (tmp_path / "build" / "build.ninja").read_text()


def test_setup(tmp_path: Path) -> None:
    """A build serves package and checkout, and forgets the programs of an earlier one."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    module = "nasfast/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    checkout, programs = tmp_path / "checkout", tmp_path / "programs"
    (checkout / "nasfast").mkdir(parents=True)
    programs.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "nasfast/__init__.py", HEADER):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for name in ("cmake", "ninja"):  # stand-ins: this one notes its arguments, for both calls
        (programs / name).write_text(f'#!/bin/sh\necho "$@" >> log; echo built > {module}\n')
        (programs / name).chmod(0o755)
    subprocess.run(
        [sys.executable, "setup.py", "build", "--build-lib", "lib"],
        cwd=checkout,
        env=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        check=True,
    )
    assert (checkout / "lib" / module).read_text() == "built\n"
    assert (checkout / "lib" / "nasfast" / HEADER).read_text() == (ROOT / HEADER).read_text()
    assert (checkout / module).is_file()
    arguments = (checkout / "log").read_text().splitlines()[0].split()
    assert "-UCMAKE_CUDA_COMPILER" in arguments
    assert f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}" in arguments
    assert f"-DNASFAST_OUTPUT={checkout / 'nasfast'}" in arguments


@native
def test_unknown_instruction_set() -> None:
    done = run_python("from nasfast.ops import _native; print(_native.ERROR)", NASFAST_ISA="avx2")
    if _native.isa_level() == "portable":
        pytest.skip("not an x86-64 processor")
    message = (
        "nasfast._C cannot be imported: NASFAST_ISA must be x86-64-v2, x86-64-v3, x86-64-v4, "
        "x86-64-v4-bf16 or x86-64-v4-amx, got 'avx2'; unset it to use the best that the processor "
        "has (`pip install .` in the checkout builds it anew)"
    )
    assert done.stdout.strip() == message
    assert done.stderr.count(f"RuntimeWarning: {message}") == 1


def test_missing_extension() -> None:
    """Not built: no warning, the reason where one looks for it."""
    done = run_python(
        "import sys; sys.modules['nasfast._C'] = None\n"
        "from nasfast.ops import _native; print(_native.ERROR)"
    )
    assert done.stdout.strip() == (
        "nasfast._C cannot be imported: import of nasfast._C halted; None in sys.modules "
        "(`pip install .` in the checkout builds it anew)"
    )
    assert "Warning" not in done.stderr
