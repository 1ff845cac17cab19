"""What the tests of the feature cache put in, and what they expect of its errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nasfast.cache import CacheConfig, FeatureCache

KEY = {"encoder": "abc", "dtype": "float16"}
COUNT = 5


def arrays(dtype: torch.dtype = torch.float16, count: int = COUNT) -> dict[str, Tensor]:
    return {
        "tap0": torch.randn(count, 3, 7, 4).to(dtype),
        "tap1": torch.randn(count, 8, 2, 1).to(dtype),
        "labels": torch.randint(0, 256, (count, 9, 11), dtype=torch.uint8),
    }


def encoder(
    content: Mapping[str, Tensor], calls: list[list[int]] | None = None
) -> Callable[[Tensor], dict[str, Tensor]]:
    """Encodes samples of ``content``; notes what it was asked for."""

    def encode(indices: Tensor) -> dict[str, Tensor]:
        if calls is not None:
            calls.append(indices.tolist())
        return {name: array[indices] for name, array in content.items()}

    return encode


def must_not_encode(indices: Tensor) -> dict[str, Tensor]:
    raise AssertionError(f"encoded again: {indices.tolist()}")


def build(
    directory: Path,
    content: Mapping[str, Tensor] | None = None,
    key: Mapping[str, str] = KEY,
    chunk: int = 2,
    **config: Any,
) -> FeatureCache:
    content = content or arrays()
    count = len(next(iter(content.values())))
    return FeatureCache.load_or_build(
        key, count, encoder(content), CacheConfig(directory, **config), chunk=chunk
    )


def raises(error: type[Exception], message: str) -> Any:
    """The whole text, with ``...`` for what a test does not know."""
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    return pytest.raises(error, match=f"^{pattern}$")
