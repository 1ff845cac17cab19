"""What the tests of the ops with kernels have in common."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nasfast.ops import _native

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx")
native = pytest.mark.skipif(_native.C is None, reason=f"runs the reference: {_native.ERROR}")
every_level = pytest.mark.parametrize("level", LEVELS)


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in a layout; channels last is one of maps alone."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor


def run_tests_of(op: str, code: str, before: str = "", **environment: str) -> str:
    """Output of code in a fresh interpreter that has imported the tests of the op as ``t``.

    It runs ``before`` ahead of all imports but that of sys.
    """
    imports = f"sys.path.insert(0, 'tests/ops'); import test_{op} as t, torch\n"
    imports += "from nasfast.ops import _native\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{before}{imports}torch.manual_seed(0)\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_level(level: str, op: str, code: str) -> None:
    """Runs code as above, with the kernels of an instruction set that the processor must have."""
    best = _native.isa_level()
    if best not in LEVELS or LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"the best of this processor is {best}")
    run_tests_of(op, f"assert _native.isa_level() == '{level}'\n{code}", NASFAST_ISA=level)


def check_without_extension(op: str, code: str) -> None:
    """Runs code as above, where ``nasfast._C`` cannot be imported, which the op must say."""
    missing = "sys.modules['nasfast._C'] = None\n"
    says = f"assert _native.isa_level() == 'none'\nprint(_native.LEGS['{op}']['cpu'])\n"
    leg = run_tests_of(op, code + says, missing)
    assert leg.startswith("reference: nasfast._C cannot be imported: ")


def check_same_bits_for_any_thread_count(run: Callable[[], Iterable[Tensor]]) -> None:
    """Calls ``run`` with 1, 2 and 5 threads; the next test starts with one again."""
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append([tensor.flatten().view(torch.uint8) for tensor in run()])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
