"""Fixtures for the tests of ops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nasfast.ops import _native


@pytest.fixture
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by the name of each CUDA kernel that runs; restores PyTorch's settings."""
    called, call = [], _native.call

    def record(entry: str, dtype: Any, sizes: Any, tensors: Any) -> None:
        if tensors[0].is_cuda:
            called.append(entry)
        call(entry, dtype, sizes, tensors)

    monkeypatch.setattr(_native, "call", record)
    precision = torch.backends.cudnn.conv.fp32_precision
    yield called
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.conv.fp32_precision = precision
