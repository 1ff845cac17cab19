"""What nvcc makes of the CUDA kernels, for every architecture of CMakeLists.txt."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest
from builds import ROOT, Builds, run

ARCHS = {"sm_80", "sm_90a", "sm_100", "sm_120"}


@pytest.fixture(scope="module")
def objects(builds: Builds) -> dict[str, Path]:
    """Object file of each op."""
    if not os.environ.get("CUDACXX") and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return builds.cuda_objects()


def test_no_warning_no_spill(objects: dict[str, Path]) -> None:
    """Either would have ended the build."""
    assert set(objects) == {path.parent.name for path in ROOT.glob("csrc/*/*_cuda.cu")}


def test_shared_memory_is_dynamic() -> None:
    """The emulation knows no other."""
    declared = [
        line.strip()
        for path in ROOT.glob("csrc/**/*.cu*")
        for line in path.read_text().splitlines()
        if "__shared__" in line
    ]
    assert declared == ["extern __shared__ __align__(16) unsigned char nasfast_shared[];"]


def test_tensor_cores(objects: dict[str, Path], nightly: bool) -> None:
    """Machine code of every kernel that multiplies half types holds matrix instructions.

    Without --nightly that of sm_80 alone: the disassembly of all takes a quarter of a minute.
    """
    triton = importlib.util.find_spec("triton")  # its wheel has the disassembler, CUDA's need not
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, of CUDA or of the triton wheel")
    hot = re.compile(
        r"\S*(forward_kernel\S*TensorSamples|backward_(data|weight)\S*float16"
        r"|(product|deform)_kernel\S*TensorConvolution|weight_kernel\S*TensorGradient)"
    )
    for op in ("deform_conv2d", "mixed_op"):
        listed = run(cuobjdump, "-lelf", objects[op])
        assert set(re.findall(r"\.(sm_\w+)\.cubin", listed)) == ARCHS
        for arch in sorted(ARCHS) if nightly else ["sm_80"]:
            code = run(cuobjdump, "-sass", "-arch", arch, objects[op])
            assert set(re.findall(r"^arch = (\S+)", code, re.MULTILINE)) == {arch}
            functions = re.split(r"\n\s*Function : ", code)[1:]
            products = [function for function in functions if hot.match(function)]
            assert len(products) >= 4
            for function in products:
                name, _, body = function.partition("\n")
                assert "HMMA" in body, f"{arch}: {name}"
