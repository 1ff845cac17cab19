"""The CUDA kernel of feature_gather, emulated, against the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import replay_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nasfast.ops import Field, _native, feature_gather, feature_gather_reference, gather_fields

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"runs the reference: {_native.ERROR}")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FEATURE_GATHER = 4  # its number in replay.cpp
SAMPLES = 4


def layout(shapes: list[tuple[int, ...]], stored: list[torch.dtype]) -> list[Field]:
    """Fields one after another."""
    fields, end = [], 0
    for shape, dtype in zip(shapes, stored, strict=True):
        fields.append(Field(end, shape, dtype))
        end += -(-fields[-1].nbytes // 16) * 16
    return fields


def content(fields: list[Field]) -> Tensor:
    size = -(-(fields[-1].offset + fields[-1].nbytes) // 16) * 16
    data = torch.randint(0, 256, (SAMPLES, size), dtype=torch.uint8)
    for field in fields:
        values = (torch.randn(SAMPLES, *field.shape) * 40).clamp(0, 255)
        raw = values.to(field.dtype).reshape(SAMPLES, -1).view(torch.uint8)
        data[:, field.offset : field.offset + raw.shape[1]] = raw
    return data


def target(field: Field, to: torch.dtype) -> torch.dtype:
    return field.dtype if field.dtype == torch.uint8 else to


def poisoned(rows: int, field: Field, to: torch.dtype) -> Tensor:
    dtype = target(field, to)
    return torch.full((rows, *field.shape), torch.nan if dtype in FLOATS else 99, dtype=dtype)


def expected(data: Tensor, indices: Tensor, field: Field, to: torch.dtype) -> Tensor:
    out = poisoned(len(indices), field, to)
    return feature_gather_reference(data, indices, *field, out)


SHAPES: list[tuple[int, ...]] = [(5, 7, 24), (3, 2, 19), (9, 33), (17, 9, 64)]
KINDS = [torch.float16, torch.uint8, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("indices", [(2, 0, 2), ()], ids=["batch-3", "batch-0"])
def test_equals_reference(
    calls: list[str], to: torch.dtype, shift: int, indices: tuple[int, ...]
) -> None:
    """Every kind in every shape: runs of 16 bytes and single elements, several blocks a field."""
    fields = layout(SHAPES, KINDS[shift:] + KINDS[:shift])
    data, chosen = content(fields), torch.tensor(indices, dtype=torch.int64)
    outs = [poisoned(len(indices), field, to) for field in fields]
    gather_fields(data, chosen, fields, outs)
    for field, out in zip(fields, outs, strict=True):
        assert torch.equal(out, expected(data, chosen, field, to))
    assert calls == ["feature_gather_forward"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    stored=st.sampled_from(KINDS),
    to=st.sampled_from(FLOATS),
    indices=st.lists(st.integers(0, SAMPLES - 1), max_size=4),
)
def test_any_shape(
    calls: list[str],
    shape: list[int],
    stored: torch.dtype,
    to: torch.dtype,
    indices: list[int],
) -> None:
    (field,) = layout([tuple(shape)], [stored])
    data, chosen = content([field]), torch.tensor(indices, dtype=torch.int64)
    out = poisoned(len(indices), field, to)
    feature_gather(data, chosen, *field, out)
    assert torch.equal(out, expected(data, chosen, field, to))


def test_rows_of_other_samples_are_left_alone(calls: list[str]) -> None:
    fields = layout(SHAPES, KINDS)
    data, indices = content(fields), torch.tensor([-1, 1, SAMPLES, 2**62])
    outs = [poisoned(4, field, torch.float32) for field in fields]
    gather_fields(data, indices, fields, outs)
    for field, out in zip(fields, outs, strict=True):
        untouched = poisoned(3, field, torch.float32)
        assert torch.equal(out[[0, 2, 3]].view(torch.uint8), untouched.view(torch.uint8))
        assert torch.equal(out[1:2], expected(data, indices[1:2], field, torch.float32))


def test_an_out_at_any_address(calls: list[str]) -> None:
    """Rows that are whole runs of 16 bytes, but begin beside one."""
    (field,) = layout([(4, 8)], [torch.float16])
    data, indices = content([field]), torch.tensor([3, 1])
    memory = torch.full((1 + 2 * 32,), torch.nan)
    out = memory[1:].view(2, 4, 8)
    feature_gather(data, indices, *field, out)
    assert torch.equal(out, expected(data, indices, field, torch.float32))


def test_more_rows_than_a_grid_has(calls: list[str]) -> None:
    (field,) = layout([(16,)], [torch.uint8])
    data, indices = content([field]), torch.arange(65538) % SAMPLES
    out = torch.zeros(len(indices), 16, dtype=torch.uint8)
    feature_gather(data, indices, *field, out)
    assert torch.equal(out, data[:, :16][indices])


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizer(
    emulation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sanitizer: str
) -> None:
    """No byte beside the buffers is touched, and none is written twice."""
    fields = layout(SHAPES, KINDS)
    data, indices = content(fields), torch.tensor([3, 0])
    outs = [poisoned(2, field, torch.float16) for field in fields]
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(_native, "call", lambda *arguments: calls.append(arguments))
    gather_fields(data, indices, fields, outs)
    ((_, _, sizes, tensors),) = calls
    program = emulation / f"replay_{sanitizer}"
    done, results = replay_call(
        program, tmp_path, FEATURE_GATHER, 0, sizes, tensors[:2], tensors[2:], order=1
    )
    assert done.returncode == 0, done.stderr
    for field, result in zip(fields, results):
        assert torch.equal(result, expected(data, indices, field, torch.float16))
