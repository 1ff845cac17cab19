"""Samples in memory that stand for the file of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from nasfast.cache.batches import HostSamples
from nasfast.cache.layout import BlockLayout, stored

COUNT = 11


class Blocks:
    """As a segment of samples; notes which were checked."""

    def __init__(self, layout: BlockLayout, data: Tensor, broken: Sequence[int]) -> None:
        self.header, self.data = SimpleNamespace(layout=layout, count=len(data)), data
        self.checked: list[int] = []
        self._broken = broken

    def check(self, rows: Tensor) -> None:
        self.checked += rows.tolist()
        for row in rows.tolist():
            if row in self._broken:
                raise RuntimeError(f"sample {row} is damaged")


def content(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Encoded arrays of all samples."""
    return {
        "tap0": torch.randn(COUNT, 24, 7, 4).to(dtype),
        "tap1": torch.randn(COUNT, 3, 2, 5).to(dtype),
        "labels": torch.randint(0, 256, (COUNT, 9, 11), dtype=torch.uint8),
    }


def host(encoded: dict[str, Tensor], broken: Sequence[int] = ()) -> HostSamples:
    rows = stored(encoded, COUNT, "auto")
    layout = BlockLayout.of(rows)
    blocks: Any = Blocks(layout, layout.pack(rows), broken)
    return HostSamples(blocks)


def orders(epochs: int = 1) -> list[Tensor]:
    """Batches of 4 in random order; the last of each epoch is smaller."""
    return [part for _ in range(epochs) for part in torch.randperm(COUNT).split(4)]


def assert_equal(batch: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(batch) == list(expected)
    for name, array in batch.items():
        assert array.dtype == expected[name].dtype
        assert torch.equal(array.cpu(), expected[name])
        last = torch.channels_last if array.dim() == 4 else torch.contiguous_format
        assert array.is_contiguous(memory_format=last)
