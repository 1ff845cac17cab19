"""What nvcc makes of the CUDA kernels, for every architecture of CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90a", "100", "120")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")


class Kernel(NamedTuple):
    """One line of the resource report."""

    arch: str
    name: str  # mangled
    registers: int
    spilled: int  # bytes
    shared: int  # bytes of static shared memory; the emulation knows dynamic only


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Object file and compiler's messages of each op."""
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    built = {}
    for source in sorted(ROOT.glob("csrc/*/*_cuda.cu")):
        target = folder / f"{source.stem}.o"
        flags = ["-std=c++17", "-I", ROOT / "csrc", "-Xptxas", "-v", "--threads", "2"]
        done = subprocess.run(
            [NVCC, *flags, *targets, "-c", source, "-o", target],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        built[source.stem] = target, done.stdout + done.stderr
    return built


@pytest.fixture(scope="module")
def kernels(objects: dict[str, tuple[Path, str]]) -> list[Kernel]:
    entry = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\w+)'.*?"
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = []
    for _, messages in objects.values():
        for match in entry.finditer(messages):
            shared = re.search(r"(\d+) bytes smem", match["rest"])
            found.append(
                Kernel(
                    match["arch"],
                    match["name"],
                    int(match["registers"]),
                    int(match["stores"]) + int(match["loads"]),
                    int(shared[1]) if shared else 0,
                )
            )
    assert {kernel.arch for kernel in found} == set(ARCHS)
    return found


def test_no_warnings(objects: dict[str, tuple[Path, str]]) -> None:
    for _, messages in objects.values():
        assert "warning" not in messages.lower()


def test_no_spills(kernels: list[Kernel]) -> None:
    """Registers stay registers: the report of each kernel, where it fails."""
    assert [kernel for kernel in kernels if kernel.spilled or kernel.shared] == []


def test_tensor_cores(objects: dict[str, tuple[Path, str]]) -> None:
    """Machine code of every kernel that multiplies half types holds matrix instructions."""
    triton = importlib.util.find_spec("triton")  # its wheel has the disassembler, CUDA's need not
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, of CUDA or of the triton wheel")
    hot = re.compile(
        r"\S*(forward_kernel\S*TensorTile|backward_(data|weight)\S*float16"
        r"|(product|deform)_kernel\S*TensorTile|weight_kernel\S*TensorGradient)"
    )
    for op in ("deform_conv2d", "mixed_op"):
        path, _ = objects[f"{op}_cuda"]
        code = subprocess.run(
            [cuobjdump, "-sass", path], capture_output=True, text=True, check=True
        )
        functions = re.split(r"\n\s*Function : ", code.stdout)[1:]
        products = [function for function in functions if hot.match(function)]
        assert len(products) >= 4 * len(ARCHS)
        for function in products:
            name, _, body = function.partition("\n")
            assert "HMMA" in body, name
