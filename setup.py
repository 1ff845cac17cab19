"""Builds ``nasfast._C`` with CMake; everything else stands in pyproject.toml.

Environment:
    NASFAST_CUDA        on (CUDA kernels by nvcc), nvrtc (compiled when they are first used), auto
                        (by nvcc where it is found), off
    NASFAST_CUDA_ARCHS  CUDA architectures as CMake names them (those of "80;90a-real;100-real;120"
                        that nvcc knows)
    MAX_JOBS            compiler processes at a time (one for each core)
    DEBUG               1: unoptimised, with debug information

To develop, ``pip install --no-build-isolation -e .`` (needs pybind11 in the environment) and, after
a change in csrc/, ``cmake --build build/cmake-*``. With build isolation pip removes the build's
pybind11 when it is done: rebuild with a second ``pip install -e .``, which compiles what changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt in place of compiling sources."""

    def run(self) -> None:
        import pybind11

        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if os.environ.get("DEBUG") == "1" else "Release",
            # of this build: an earlier one's may have gone with pip's build environment
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "NASFAST_OUTPUT": ROOT / "nasfast",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        for name in ("NASFAST_CUDA", "NASFAST_CUDA_ARCHS"):
            if name in os.environ:
                options[name] = os.environ[name]
        # forget what an earlier build was told and found, then set
        forget = ("-UNASFAST_CUDA*", "-UCMAKE_CUDA_COMPILER")
        defines = [*forget, *(f"-D{name}={value}" for name, value in options.items())]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines])
        subprocess.check_call(["cmake", "--build", str(build), "--parallel", jobs])
        if not (self.inplace or self.editable_mode):
            # The module stays in the checkout as well: Python run there imports ./nasfast, not
            # the installed package.
            module = self.get_ext_filename("nasfast._C")
            target = Path(self.build_lib, module)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / module, target)
            # what kernels are compiled from when they are first used, where there was no nvcc
            for pattern in ("*.h", "*.hpp", "*.cuh", "*.cu"):
                for source in ROOT.glob(f"csrc/*/{pattern}"):
                    copy = target.parent / source.relative_to(ROOT)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, copy)


setup(
    ext_modules=[Extension("nasfast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # programs, fetched for the build only where the machine has none
    setup_requires=[name for name in ("cmake", "ninja") if shutil.which(name) is None],
)
