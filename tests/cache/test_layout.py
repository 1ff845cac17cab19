"""Blocks of samples, and how maps are stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import raises

from nasfast.cache.layout import Layout, stored

F32, F16 = torch.float32, torch.float16


@st.composite
def encoded(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Arrays of 1 to 4 samples: maps, labels, vectors, scalars."""
    n = draw(st.integers(1, 4))
    out = {}
    for i in range(draw(st.integers(1, 4))):
        shape = (n, *draw(st.lists(st.integers(1, 5), max_size=3)))
        dtype = draw(st.sampled_from([torch.uint8, torch.int8, F16, torch.bfloat16, F32]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        out[f"a{i}"] = torch.randint(-99, 99, shape, generator=generator).to(dtype)
    return out


@given(encoded())
@settings(max_examples=40, deadline=None)
def test_pack_and_view(arrays):
    n = len(next(iter(arrays.values())))
    rows = stored(arrays, n, "auto")
    layout = Layout.of(rows)
    blocks = layout.pack(rows)
    assert blocks.shape == (n, layout.sample_bytes)
    assert Layout.from_json(layout.to_json(), layout.sample_bytes) == layout
    for name, array in arrays.items():
        read = layout.view(blocks, name)
        assert read.data_ptr() == blocks.data_ptr() + layout[name].offset
        assert read.dtype == array.dtype
        assert torch.equal(read, array.permute(0, 2, 3, 1) if array.dim() == 4 else array)


@given(encoded())
@settings(max_examples=40, deadline=None)
def test_blocks_are_aligned_and_zero_elsewhere(arrays):
    n = len(next(iter(arrays.values())))
    rows = stored(arrays, n, "auto")
    layout = Layout.of(rows)
    offsets = [spec.offset for spec in layout.arrays]
    assert all(offset % 64 == 0 for offset in [*offsets, layout.sample_bytes])
    rest = layout.pack(rows)
    for spec, end in zip(layout.arrays, [*offsets[1:], layout.sample_bytes]):
        assert spec.offset + spec.nbytes <= end < spec.offset + spec.nbytes + 64
        rest[:, spec.offset : spec.offset + spec.nbytes] = 0
    assert not rest.any()


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_floating_maps_take_the_storage_type(storage):
    arrays = {"tap": torch.randn(2, 3, 4, 5), "labels": torch.zeros(2, 4, 5, dtype=torch.uint8)}
    rows = stored(arrays, 2, storage)
    assert rows["tap"].dtype == getattr(torch, storage)
    assert torch.equal(rows["tap"], arrays["tap"].permute(0, 2, 3, 1).to(rows["tap"].dtype))
    assert rows["labels"].dtype == torch.uint8


def test_int8_is_scaled_by_channel_and_sample():
    x = torch.randn(3, 5, 6, 7) * torch.logspace(-3, 3, 5)[:, None, None]
    x[1, 2] = 0
    rows = stored({"tap": x}, 3, "int8")
    assert list(rows) == ["tap", "tap.scale", "tap.error"]
    assert torch.equal(rows["tap.scale"], x.abs().amax((2, 3)) / 127)
    assert rows["tap"].abs().amax((1, 2)).tolist() == [
        [127] * 5,
        [127, 127, 0, 127, 127],
        [127] * 5,
    ]
    read = (rows["tap"] * rows["tap.scale"][:, None, None]).permute(0, 3, 1, 2)
    assert ((read - x).abs() <= rows["tap.scale"][:, :, None, None] * 0.5001).all()
    expected = torch.stack([(read - x).square().sum((1, 2, 3)), x.square().sum((1, 2, 3))], 1)
    torch.testing.assert_close(rows["tap.error"], expected, rtol=1e-4, atol=0)
    layout = Layout.of(rows)
    assert [spec.name for spec in layout.visible] == ["tap"]
    assert layout.scale_of(layout["tap"]) == layout["tap.scale"]
    assert layout.scale_of(layout["tap.error"]) is None


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_int8_needs_finite_values(value):
    x = torch.zeros(1, 2, 2, 2)
    x[0, 1, 1, 0] = value
    text = "feature cache: expected finite values of tap to store them as int8, got inf or NaN; "
    with raises(ValueError, text + "store float32"):
        stored({"tap": x}, 1, "int8")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "feature cache: expected named arrays of the samples, got none"),
        (
            {"a.b": torch.zeros(2)},
            "feature cache: expected a name without a dot, got 'a.b'; rename it",
        ),
        (
            {"tap": torch.zeros(2, 1, 1, 1, 1)},
            "feature cache: expected tap as maps [n, C, H, W] or labels [n, H, W], got "
            "[2, 1, 1, 1, 1]",
        ),
        ({"tap": torch.zeros(3, 2, 2)}, "feature cache: expected 2 samples of tap, got 3"),
        (
            {"labels": torch.zeros(2, 2, 2, dtype=torch.int64)},
            "feature cache: expected labels as one of uint8, int8, float16, bfloat16, float32, got "
            "int64; convert it",
        ),
    ],
)
def test_what_cannot_be_stored(arrays, message):
    with raises(ValueError, message):
        stored(arrays, 2, "auto")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"labels": torch.zeros(2, 11, 9)},
            "feature cache: expected samples of labels as float32 [9, 11], got float32 [11, 9]; "
            "crop all images to one size",
        ),
        (
            {"labels": torch.zeros(2, 9, 11, dtype=F16)},
            "feature cache: expected samples of labels as float32 [9, 11], got float16 [9, 11]; "
            "crop all images to one size",
        ),
        (
            {"tap": torch.zeros(2, 9, 11)},
            "feature cache: expected the arrays labels of each sample, got tap; encode the same "
            "for all",
        ),
    ],
)
def test_samples_that_differ(other, message):
    layout = Layout.of({"labels": torch.zeros(2, 9, 11)})
    with raises(ValueError, message):
        layout.pack(other)
