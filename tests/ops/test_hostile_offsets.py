"""10,000 random calls with hostile offsets under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from op_harness import LEVELS, ROOT

from nasfast.ops import _native

SANITIZE = "-O1 -g1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver with the op's kernels, compiled as for the extension, but with sanitizers."""
    pybind11 = pytest.importorskip("pybind11")
    for program in ("g++", "cmake", "ninja"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("needs the sources of the kernels")
    folder = tmp_path_factory.mktemp("sanitized")
    probe = ["g++", *SANITIZE.split(), "-x", "c++", "-", "-o", str(folder / "probe")]
    done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the sanitizers are not installed: {done.stderr}")
    options = {
        "CMAKE_CXX_COMPILER": "g++",
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": SANITIZE,
        "NASFAST_CUDA": "off",
        "NASFAST_OUTPUT": str(folder),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    build = folder / "build"
    run(
        "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())
    )
    targets = run("ninja", "-C", build, "-t", "targets", "all")
    objects = re.findall(r"^(\S+/cpu_\w+\.dir/csrc/deform_conv2d/\S+\.o):", targets, re.M)
    run("ninja", "-C", build, *objects)
    program = folder / "hostile_offsets"
    sources = [
        Path(__file__).with_name("hostile_offsets.cpp"),
        ROOT / "csrc" / "common" / "isa.cpp",
    ]
    flags = [*SANITIZE.split(), "-std=c++17", "-fopenmp", f"-I{ROOT / 'csrc'}"]
    run("g++", *flags, *sources, *(build / name for name in objects), "-o", program)
    return program


def run(*command: object, **environment: str) -> str:
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


@pytest.mark.parametrize("isa", ["best", *LEVELS])
def test_hostile_offsets(driver: Path, isa: str) -> None:
    """NaN, infinite, huge and denormal offsets, and positions exactly on the borders.

    Most calls go to the best instruction set of the processor, some to each of the others.
    """
    best = _native.isa_level()
    threads = {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }  # do not spin on a busy machine
    if isa == "best":
        output = run(driver, 3400, **threads)
    elif best not in LEVELS or LEVELS.index(isa) >= LEVELS.index(best):
        pytest.skip(f"not below the best instruction set, {best}")
    else:
        output = run(driver, 200, NASFAST_ISA=isa, **threads)
        assert output.startswith(f"{isa}\n")
    dtypes = [line.rpartition(" ")[2] for line in output.splitlines()[1:]]
    assert dtypes == ["float32", "float64", "bfloat16"]
