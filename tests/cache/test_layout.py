"""Blocks of samples, and how maps are stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import raises

from nasfast.cache.layout import BlockLayout, stored

F32, F16 = torch.float32, torch.float16


@st.composite
def encoded(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Arrays of 1 to 4 samples: maps, labels, vectors, scalars."""
    n = draw(st.integers(1, 4))
    out = {}
    for i in range(draw(st.integers(1, 4))):
        shape = (n, *draw(st.lists(st.integers(1, 5), max_size=3)))
        dtype = draw(st.sampled_from([torch.uint8, F16, torch.bfloat16, F32]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        out[f"a{i}"] = torch.randint(-99, 99, shape, generator=generator).to(dtype)
    return out


@given(encoded())
@settings(max_examples=40)
def test_pack_and_view(arrays):
    n = len(next(iter(arrays.values())))
    rows = stored(arrays, n, "auto")
    layout = BlockLayout.of(rows)
    blocks = layout.pack(rows)
    assert blocks.shape == (n, layout.sample_bytes)
    assert BlockLayout.from_json(layout.to_json(), layout.sample_bytes, "auto") == layout
    for spec, (name, array) in zip(layout.arrays, arrays.items(), strict=True):
        read = layout.view(blocks, spec)
        assert spec.name == name
        assert read.data_ptr() == blocks.data_ptr() + spec.offset
        assert read.dtype == array.dtype
        assert torch.equal(read, array.permute(0, 2, 3, 1) if array.dim() == 4 else array)


@given(encoded())
@settings(max_examples=40)
def test_blocks_are_aligned_and_zero_elsewhere(arrays):
    n = len(next(iter(arrays.values())))
    rows = stored(arrays, n, "auto")
    layout = BlockLayout.of(rows)
    offsets = [spec.offset for spec in layout.arrays]
    assert all(offset % 64 == 0 for offset in [*offsets, layout.sample_bytes])
    rest = layout.pack(rows)
    for spec, end in zip(layout.arrays, [*offsets[1:], layout.sample_bytes]):
        assert spec.offset + spec.nbytes <= end < spec.offset + spec.nbytes + 64
        rest[:, spec.offset : spec.offset + spec.nbytes] = 0
    assert not rest.any()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "feature cache: expected named arrays of the samples, got none"),
        (
            {"tap": torch.zeros(2, 1, 1, 1, 1)},
            "feature cache: expected tap as maps [n, C, H, W] or labels [n, H, W], got "
            "[2, 1, 1, 1, 1]",
        ),
        ({"tap": torch.zeros(3, 2, 2)}, "feature cache: expected 2 samples of tap, got 3"),
        (
            {"labels": torch.zeros(2, 2, 2, dtype=torch.float64)},
            "feature cache: expected labels as one of uint8, float16, bfloat16, float32, "
            "int16, int32, int64, got float64; convert it",
        ),
    ],
)
def test_what_cannot_be_stored(arrays, message):
    with raises(ValueError, message):
        stored(arrays, 2, "auto")
