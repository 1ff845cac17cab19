"""``nasfast info`` says what is built, what runs where, and why anything is missing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import nasfast
from nasfast.commands import info
from nasfast.ops import _native


def test_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nasfast.info"], capture_output=True, text=True, check=True
    )
    for word in (nasfast.__version__, "isa_level", "deform_conv2d", "CUDA kernels", "threads"):
        assert word in done.stdout


def native(**members: Any) -> SimpleNamespace:
    return SimpleNamespace(__file__="nasfast/_C.so", **members)


@pytest.mark.parametrize(
    ("module", "rows"),
    [
        (
            None,
            {"extension": "missing: why", "CUDA kernels": "missing: no extension"},
        ),
        (
            native(),
            {
                "extension": "nasfast/_C.so",
                "CUDA kernels": "none: built without CUDA (NASFAST_CUDA=off)",
            },
        ),
        (
            native(cuda_info=lambda: {"runtime": 13000, "driver": 0, "devices": [], "error": "no"}),
            {
                "extension": "nasfast/_C.so",
                "CUDA kernels": "compiled by nvcc, of CUDA 13.0",
                "CUDA driver": "none",
                "CUDA devices": "none: no",
            },
        ),
        (
            native(
                cuda_info=lambda: {
                    "runtime": 13000,
                    "driver": 13010,
                    "devices": [("H200", (9, 0)), ("T4", (7, 5))],
                    "error": "",
                }
            ),
            {
                "extension": "nasfast/_C.so",
                "CUDA kernels": "compiled by nvcc, of CUDA 13.0",
                "CUDA driver": "13.1",
                "CUDA devices": "H200 (sm_90), T4 (sm_75)",
            },
        ),
    ],
    ids=["no extension", "no CUDA", "no driver", "two devices"],
)
def test_extension(
    monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace | None, rows: dict[str, str]
) -> None:
    monkeypatch.setattr(_native, "C", module)
    monkeypatch.setattr(_native, "ERROR", "why")
    assert info.extension() == rows
