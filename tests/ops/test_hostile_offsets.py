"""10,000 random calls with hostile offsets under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nasfast.ops import _native

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CALLS_PER_DTYPE = 3400
SANITIZE = "-fsanitize=address,undefined,float-cast-overflow"


def test_hostile_offsets(tmp_path: Path) -> None:
    """NaN, infinite, huge and denormal offsets, and positions exactly on the borders."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if not (CSRC / "deform_conv2d").is_dir():
        pytest.skip("needs the sources of the kernels")
    level = _native.isa_level()
    if level == "none":
        pytest.skip(f"the instruction set is unknown: {_native.ERROR}")
    isa = level.removeprefix("x86-64-")
    # as CMakeLists.txt compiles a kernel, but for the sanitizers and the lower optimisation
    command = ["g++", "-std=c++17", "-O1", "-g", "-fopenmp", "-ffp-contract=fast"]
    command += ["-fno-math-errno", f"-DNASFAST_ISA={isa}", f"-I{CSRC}"]
    command += [SANITIZE, "-fno-sanitize-recover=all"]
    if isa != level:
        command.append(f"-march={level}")
    sources = [HERE / "hostile_offsets.cpp", CSRC / "common" / "isa.cpp"]
    sources += sorted((CSRC / "deform_conv2d").glob("*_cpu.cpp"))
    program = tmp_path / "hostile_offsets"
    done = subprocess.run(
        [*command, *map(str, sources), "-o", str(program)], capture_output=True, text=True
    )
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip(f"the sanitizers are not installed: {done.stderr}")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [str(program), str(CALLS_PER_DTYPE)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        f"{CALLS_PER_DTYPE} calls of {dtype}" for dtype in ("float32", "float64", "bfloat16")
    ]
