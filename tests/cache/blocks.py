"""Samples in memory that stand for the segments of a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nasfast.cache.batches import HostSamples
from nasfast.cache.layout import Layout, stored

COUNT = 11


class Part:
    """Some samples; notes which were checked."""

    def __init__(self, first: int, data: Tensor, broken: Sequence[int] = ()) -> None:
        self.first, self.count, self.data = first, len(data), data
        self.checked: list[int] = []
        self._broken = broken

    def check(self, rows: Tensor) -> None:
        self.checked += (rows + self.first).tolist()
        for row in rows.tolist():
            if row + self.first in self._broken:
                raise RuntimeError(f"sample {row + self.first} is damaged")


def content(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """Encoded arrays of all samples."""
    return {
        "tap0": torch.randn(COUNT, 24, 7, 4).to(dtype),
        "tap1": torch.randn(COUNT, 3, 2, 5).to(dtype),
        "labels": torch.randint(0, 256, (COUNT, 9, 11), dtype=torch.uint8),
    }


def host(
    encoded: dict[str, Tensor],
    parts: Sequence[int] = (COUNT,),
    storage: str = "auto",
    broken: Sequence[int] = (),
) -> HostSamples:
    rows = stored(encoded, COUNT, storage)
    layout = Layout.of(rows)
    sources, first = [], 0
    for data in layout.pack(rows).split(list(parts)):
        sources.append(Part(first, data.clone(), broken))
        first += len(data)
    return HostSamples(layout, sources)


def orders(epochs: int = 1) -> list[Tensor]:
    """Batches of 4 in random order; the last of each epoch is smaller."""
    return [part for _ in range(epochs) for part in torch.randperm(COUNT).split(4)]


def assert_equal(batch: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(batch) == list(wanted)
    for name, array in batch.items():
        assert array.dtype == wanted[name].dtype
        assert torch.equal(array.cpu(), wanted[name])
        last = torch.channels_last if array.dim() == 4 else torch.contiguous_format
        assert array.is_contiguous(memory_format=last)
