"""Random calls with hostile offsets under AddressSanitizer and UBSan: with --nightly 10,000 of them
and some for every instruction set, else 1,800 for the best one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from builds import ROOT, configure, run
from op_harness import LEVELS

from nasfast.ops import _native

# folders of the kernels that each may call
KERNELS = {
    "portable": ["portable"],
    "x86-64-v2": ["v2"],
    "x86-64-v3": ["v3"],
    "x86-64-v4": ["v4"],
    "x86-64-v4-bf16": ["v4", "bf16"],
    "x86-64-v4-amx": ["v4", "bf16", "amx"],
}
SANITIZE = "-O1 -g1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, nightly: bool) -> Path:
    """The driver with the op's kernels, compiled as for the extension, but with sanitizers.

    Without --nightly those of the best instruction set alone; the others are never called.
    """
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("sanitized")
    probe = ["g++", *SANITIZE.split(), "-x", "c++", "-", "-o", str(folder / "probe")]
    done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the sanitizers are not installed: {done.stderr}")
    done = configure(
        folder,
        CMAKE_CXX_COMPILER="g++",
        CMAKE_BUILD_TYPE="None",
        CMAKE_CXX_FLAGS=SANITIZE,
        NASFAST_CUDA="off",
    )
    assert done.returncode == 0, done.stderr
    build = folder / "build"
    targets = run("ninja", "-C", build, "-t", "targets", "all")
    sets = "|".join([r"\w+"] if nightly else KERNELS.get(_native.isa_level(), [r"\w+"]))
    kernels = rf"^(\S+/cpu_(?:{sets})\.dir/csrc/deform_conv2d/\S+\.o):"
    objects = re.findall(kernels, targets, re.M)
    run("ninja", "-C", build, *objects)
    program = folder / "hostile_offsets"
    sources = [
        Path(__file__).with_name("hostile_offsets.cpp"),
        ROOT / "csrc" / "common" / "isa.cpp",
    ]
    flags = [*SANITIZE.split(), "-std=c++17", "-fopenmp", f"-I{ROOT / 'csrc'}"]
    if not nightly:
        flags += ["-no-pie", "-Wl,--unresolved-symbols=ignore-in-object-files"]
    run("g++", *flags, *sources, *(build / name for name in objects), "-o", program)
    return program


@pytest.mark.parametrize("isa", ["best", *LEVELS])
def test_hostile_offsets(driver: Path, isa: str, nightly: bool) -> None:
    """NaN, infinite, huge and denormal offsets, and positions exactly on the borders.

    Most calls go to the best instruction set of the processor, some to each of the others.
    """
    best = _native.isa_level()
    # do not spin on a busy machine
    threads = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    if isa == "best":
        output = run(driver, 3400 if nightly else 600, **threads)
    elif best not in LEVELS or LEVELS.index(isa) >= LEVELS.index(best):
        pytest.skip(f"not below the best instruction set, {best}")
    elif not nightly:
        pytest.skip("the best instruction set is enough: --nightly")
    else:
        output = run(driver, 200, NASFAST_ISA=isa, **threads)
        assert output.startswith(f"{isa}\n")
    dtypes = [line.rpartition(" ")[2] for line in output.splitlines()[1:]]
    assert dtypes == ["float32", "float64", "bfloat16"]
