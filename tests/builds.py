"""Builds of csrc/ for tests: each configuration once in a session, for all its processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nasfast.ops import _nvrtc

ROOT = Path(__file__).resolve().parents[1]
CUDA_OP_OBJECTS = "CMakeFiles/cuda.dir/csrc/*/*_cuda.cu.o"
# that a spilled register or a warning ends the build; .ci/run installs the package with them
STRICT_CUDA = "-Werror all-warnings -Xptxas=-warn-spills"


def needs_nvrtc() -> None:
    """Skips a test where cupy or NVRTC is missing; fails it in .ci/run, which has installed both.

    Raises:
        RuntimeError: either is missing, and NASFAST_CI is set.
    """
    try:
        _nvrtc.nvrtc()
    except RuntimeError as error:
        if "NASFAST_CI" in os.environ:
            raise
        pytest.skip(f"{error}, or '.[test]'")


def configure(output: Path, **options: str) -> subprocess.CompletedProcess[str]:
    """Configures CMakeLists.txt in ``output / "build"``, for modules and programs in ``output``."""
    pybind11 = pytest.importorskip("pybind11")
    for program in ("cmake", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("needs the sources of the kernels")
    options |= {
        "NASFAST_OUTPUT": str(output),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    command = ["cmake", "-S", str(ROOT), "-B", str(output / "build"), "-G", "Ninja", *defines]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(*command: object, **environment: str) -> str:
    """Output of a command, which must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


class Builds:
    """What has been built in this session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def once(self, name: str) -> Iterator[Path | None]:
        """The folder of a build in which to make it, or None where that has been done."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = folder / "done"
            yield None if done.exists() else folder
            done.touch()

    def emulation(self) -> Path:
        """Folder of the CUDA kernels for the CPU: module, and a program for each sanitizer."""
        with self.once("emulation") as folder:
            if folder:
                done = configure(folder, NASFAST_CUDA="off", NASFAST_EMULATION="ON")
                assert done.returncode == 0, done.stderr
                targets = ["_C_emulated", "replay_address", "replay_thread"]
                said = run("cmake", "--build", folder / "build", "--target", *targets)
                assert "warning" not in said
        return self.folder / "emulation"

    def nvrtc(self) -> Path:
        """Folder of the module whose CUDA kernels are compiled when they are used."""
        with self.once("nvrtc") as folder:
            if folder:
                done = configure(
                    folder,
                    NASFAST_CUDA="off",
                    NASFAST_EMULATION="ON",
                    CMAKE_BUILD_TYPE="None",
                    CMAKE_CXX_FLAGS="-O1",  # nothing here is timed
                )
                assert done.returncode == 0, done.stderr
                said = run("cmake", "--build", folder / "build", "--target", "_C_nvrtc")
                assert "warning" not in said
        return self.folder / "nvrtc"

    def cuda_objects(self) -> dict[str, Path]:
        """Object files of the ops' CUDA kernels by op, for all architectures, without warnings.

        Those of the installed package serve where they are of the present sources.
        """
        package = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        if not strict(package):
            with self.once("cuda") as folder:
                if folder:
                    done = configure(folder, NASFAST_CUDA="on", CMAKE_CUDA_FLAGS=STRICT_CUDA)
                    assert done.returncode == 0, done.stderr
                    run("cmake", "--build", folder / "build", "--target", "cuda")
            package = self.folder / "cuda" / "build"
        return {path.parent.name: path for path in package.glob(CUDA_OP_OBJECTS)}


def strict(build: Path) -> bool:
    """Whether a build holds up-to-date CUDA objects, made like those for tests."""
    cache, objects = build / "CMakeCache.txt", list(build.glob(CUDA_OP_OBJECTS))
    if not cache.exists() or len(objects) < len(list(ROOT.glob("csrc/*/*_cuda.cu"))):
        return False
    sources = [ROOT / "CMakeLists.txt", *(p for p in ROOT.glob("csrc/**/*.*") if p.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    settings = cache.read_text().splitlines()
    return min(path.stat().st_mtime for path in objects) > newest and {
        f"CMAKE_CUDA_FLAGS:STRING={STRICT_CUDA}",
        "CMAKE_BUILD_TYPE:STRING=Release",
        "NASFAST_CUDA_ARCHS:STRING=",
    } <= set(settings)
