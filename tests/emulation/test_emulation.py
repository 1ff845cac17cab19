"""The emulation itself: right kernels come out right, and what is wrong with others shows."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
LINES = (HERE / "kernels.cu").read_text().splitlines()


def line(text: str, occurrence: int = 0) -> int:
    """Number of the line of kernels.cu."""
    return [i for i, found in enumerate(LINES, 1) if found.strip() == text][occurrence]


@pytest.fixture(scope="module")
def programs(emulation: Path) -> dict[str, Path]:
    """kernels.cu by sanitizer."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DNASFAST_EMULATION", f"-I{HERE.parents[1] / 'csrc'}"]
    built = {}
    for sanitizer in ("", "address", "thread"):
        built[sanitizer] = emulation / f"kernels_{sanitizer}"
        sanitize = [f"-fsanitize={sanitizer}"] if sanitizer else []
        files = ["-x", "c++", HERE / "kernels.cu", "-o", built[sanitizer]]
        subprocess.run([compiler, *flags, *sanitize, *files], check=True)
    return built


def run(program: Path, name: str, order: int = 1) -> tuple[str, str]:
    """What the program says about a kernel, and the sanitizer's summary."""
    done = subprocess.run(
        ["setarch", "-R", program, name, str(order)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=0"},
    )
    summary = [found for found in done.stderr.splitlines() if found.startswith("SUMMARY")]
    return done.stdout.strip(), summary[0] if summary else ""


@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    "name", ["reverse", "reverse in warp", "copy", "all blocks, atomic", "product"]
)
def test_right(programs: dict[str, Path], sanitizer: str, order: int, name: str) -> None:
    assert run(programs[sanitizer], name, order) == ("right", "")


def test_conversions(programs: dict[str, Path]) -> None:
    """To and from the half types, against the compiler's."""
    assert run(programs[""], "halves") == ("right", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "divergent barrier",
            f"thread 0 waits at {HERE}/kernels.cu:"
            f"{line('if (threadIdx.x < 32) __syncthreads();')}, but thread 32 has ended",
        ),
        (
            "two barriers",
            f"thread 0 waits at {HERE}/kernels.cu:{line('__syncthreads();', 0)}, "
            f"but thread 32 waits at {HERE}/kernels.cu:{line('__syncthreads();', 1)}",
        ),
        ("divergent shuffle", "thread 0 has ended, but thread 1 is in a warp-wide function"),
        ("two warp functions", "lanes of a warp call different warp-wide functions"),
        ("misaligned", "ldmatrix: the address must be a multiple of 16"),
        (
            "half a warp",
            "a block must have whole warps, at most 1024 threads and 99 KiB of shared memory, "
            "got 48 threads and 0 bytes",
        ),
    ],
)
@pytest.mark.parametrize("sanitizer", ["", "address"])
def test_raises(programs: dict[str, Path], sanitizer: str, name: str, message: str) -> None:
    said, summary = run(programs[sanitizer], name)
    assert said.partition(" (block 0, thread ")[0] == f"{name}: {message}"
    assert not summary


@pytest.mark.parametrize("name", ["reverse, no barrier", "copy, no wait", "unwritten shared"])
def test_wrong(programs: dict[str, Path], name: str) -> None:
    """What is read too early is not there by chance."""
    assert "wrong" in {run(programs[""], name, order)[0] for order in range(3)}


@pytest.mark.parametrize(
    "name", ["reverse, no barrier", "reverse in warp, no barrier", "all blocks"]
)
def test_race(programs: dict[str, Path], name: str) -> None:
    _, summary = run(programs["thread"], name)
    assert "data race" in summary
    assert "kernels.cu" in summary


def test_out_of_bounds(programs: dict[str, Path]) -> None:
    _, summary = run(programs["address"], "beyond shared")
    assert "heap-buffer-overflow" in summary
    assert f"kernels.cu:{line('out[0] = shared[64 + threadIdx.x];')}" in summary
