"""Columns of deform_conv2d and their gradients by emulated CUDA kernels, and the op by them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from emulated import (
    DTYPES,
    IDS,
    TOLERANCE,
    Case,
    Kernels,
    arrange,
    assert_near,
    first,
    poisoned,
    replay_call,
)
from torch import Tensor

from nasfast.ops import deform_conv2d, deform_conv2d_reference
from nasfast.ops._native import accumulate

OP = importlib.import_module("nasfast.ops.deform_conv2d")
FORWARD, BACKWARD = 5, 6  # numbers in replay.cpp
# tiles of 32 pixels and slices of channels that are cut off, and parts that begin inside of a tile
CASES = [
    Case("plain"),
    Case("no-mask", mask=False, channels=8),
    Case("slices", channels=72, kernel=(1, 2), padding=(0, 1)),
    Case("offset-groups", channels=48, offset_groups=2, size=(9, 8), stride=(2, 1)),
    Case("packed", channels=32, offset_groups=4, packed=True),
    Case("taps", channels=8, kernel=(5, 5), padding=(2, 2), size=(16, 17), batch=3),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


class Columns:
    """A case with hostile offsets, its columns in float64, and their gradients."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.tensors = case.tensors(dtype)
        input, offset, _, _, mask = self.tensors
        assert input is not None
        assert offset is not None
        flat, hostile = offset.view(-1), (torch.nan, torch.inf, -1e30, 1e9)
        for i, value in enumerate(hostile):
            flat[i::37] = value
        depth = case.taps * case.channels
        # every sample of every channel as an output channel
        weight = torch.eye(depth, dtype=torch.float64).view(depth, *case.kernel, case.channels)
        leaves = [None if t is None else t.double().requires_grad_() for t in (input, offset, mask)]
        output = deform_conv2d_reference(
            *(leaves[0], leaves[1], weight.permute(0, 3, 1, 2), None),  # type: ignore[arg-type]
            *(case.stride, case.padding, case.dilation, leaves[2]),
        )
        self.expected = output.detach().permute(0, 2, 3, 1).reshape(-1, depth)
        self.cotangent = torch.randn(self.expected.shape).to(dtype)
        of_output = self.cotangent.double().view(output.permute(0, 2, 3, 1).shape)
        found = torch.autograd.grad(
            output, [t for t in leaves if t is not None], of_output.permute(0, 3, 1, 2)
        )
        self.gradients = [*found, *[None] * (3 - len(found))]  # of input, offset, mask
        pixels = len(self.expected)
        self.parts = [(0, pixels // 3), (pixels // 3, pixels - pixels // 3)]

    def sizes(self, part: tuple[int, int]) -> tuple[int, ...]:
        return (*self.case.sizes(), *part)

    def read(self) -> list[Tensor | None]:
        return arrange(self.case, self.tensors)[:3]

    def of_part(self, part: tuple[int, int]) -> Tensor:
        return self.cotangent[part[0] : part[0] + part[1]].clone()

    def written(self) -> list[Tensor | None]:
        """grad_input, which is added to, grad_offset and grad_mask."""
        case, wide = self.case, accumulate(self.dtype)
        pixels, count = (case.batch, *case.out_size), case.taps * case.offset_groups
        mask = poisoned((*pixels, count), wide) if case.mask else None
        shape = (case.batch, *case.size, case.channels)
        return [torch.zeros(shape, dtype=wide), poisoned((*pixels, 2 * count), wide), mask]

    def check_gradients(self, written: list[Tensor | None]) -> None:
        for got, expected in zip(written, self.gradients):
            assert (got is None) == (expected is None)
            if expected is not None and got is not None:
                # exact gradients of the samples make them as near as sums in float32
                assert_near(first(got), expected, TOLERANCE[accumulate(self.dtype)])


@every_case
@every_dtype
def test_columns(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    columns = Columns(case, dtype)
    for part in columns.parts:
        got = poisoned((part[1], columns.expected.shape[1]), dtype)
        name = "deform_conv2d_columns_forward_cuda"
        kernels.call(name, dtype, columns.sizes(part), [*columns.read(), got])
        assert_near(got, columns.expected[part[0] : part[0] + part[1]], TOLERANCE[dtype])


@every_case
@every_dtype
def test_gradients_of_columns(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    """The samples take the place of their gradient."""
    columns, name = Columns(case, dtype), "deform_conv2d_columns_backward_cuda"
    written = columns.written()
    for part in columns.parts:
        both = columns.of_part(part)
        pointers = [both, *columns.read(), both, *written]
        kernels.call(name, dtype, columns.sizes(part), pointers)
        assert_near(both, columns.expected[part[0] : part[0] + part[1]], TOLERANCE[dtype])
    columns.check_gradients(written)


@pytest.mark.parametrize("wanted", range(4))
def test_single_result(kernels: Kernels, wanted: int) -> None:
    """Each alone is what it is with the others."""
    columns, name = Columns(CASES[0], torch.float64), "deform_conv2d_columns_backward_cuda"
    part = (0, len(columns.expected))
    runs = []
    for wants in ([True] * 4, [i == wanted for i in range(4)]):
        results = [poisoned(columns.expected.shape, torch.float64), *columns.written()]
        chosen = [t if want else None for t, want in zip(results, wants)]
        pointers = [columns.of_part(part), *columns.read(), *chosen]
        kernels.call(name, torch.float64, columns.sizes(part), pointers)
        runs.append(results[wanted])
    together, alone = runs
    assert together is not None
    assert alone is not None
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("program", ["replay_address", "replay_thread"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("call", [FORWARD, BACKWARD])
def test_sanitizers(
    emulation: Path, tmp_path: Path, program: str, dtype: torch.dtype, call: int
) -> None:
    """Nothing is read or written out of bounds; no two threads race."""
    columns = Columns(Case("", channels=72, kernel=(2, 2), size=(8, 9)), dtype)
    part = (0, len(columns.expected))
    read, written = columns.read(), [poisoned(columns.expected.shape, dtype)]
    if call == BACKWARD:  # without grad_input, which the program does not set to zero
        written += [None, *columns.written()[1:]]
        read.insert(0, columns.of_part(part))
    done, (got, *gradients) = replay_call(
        *(emulation / program, tmp_path, call, DTYPES.index(dtype), columns.sizes(part)),
        *(read, written, 1),
    )
    assert done.returncode == 0, done.stderr
    assert_near(got, columns.expected, TOLERANCE[dtype])
    if call == BACKWARD:
        columns.gradients[0] = None
        columns.check_gradients(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("wanted", [[0, 1, 2, 3, 4], [2], [0], [1, 3]], ids=str)
def test_op(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, wanted: list[int]
) -> None:
    """In parts, the last of which is smaller; only the gradients that are wanted."""
    monkeypatch.setattr(OP, "_by_columns", lambda *_: True)
    monkeypatch.setattr(OP, "_COLUMNS", 3000 * dtype.itemsize)  # 20 pixels and a half
    last = torch.channels_last
    offset, mask = torch.randn(2, 27, 5, 7).contiguous(memory_format=last).split((18, 9), 1)
    tensors = [
        torch.randn(2, 16, 5, 7).to(dtype),
        offset.to(dtype),
        torch.randn(8, 16, 3, 3).to(dtype).contiguous(memory_format=last),
        torch.randn(8).to(dtype),
        mask.sigmoid().to(dtype),
    ]
    doubles = [tensor.double().requires_grad_() for tensor in tensors]
    leaves = [tensors[i].requires_grad_() for i in wanted]
    output = deform_conv2d(*tensors[:4], padding=1, mask=tensors[4])
    expected = deform_conv2d_reference(*doubles[:4], padding=1, mask=doubles[4])
    assert_near(output.detach(), expected.detach(), TOLERANCE[dtype])
    cotangent = torch.randn_like(output)
    references = torch.autograd.grad(expected, [doubles[i] for i in wanted], cotangent.double())
    for got, reference in zip(torch.autograd.grad(output, leaves, cotangent), references):
        assert_near(got, reference, TOLERANCE[dtype])
    assert {*calls} <= {"deform_conv2d_columns_forward", "deform_conv2d_columns_backward"}
    assert len(calls) == (4 if wanted == [3] else 8)


def test_precision_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are as the convolutions' setting says, and others' products as they were."""
    matmul, seen = torch.backends.cuda.matmul, []
    for before in ("none", "tf32", "ieee"):
        matmul.fp32_precision = before
        for tf32 in (0, 1):
            with OP._precision((0, tf32)):
                seen.append(matmul.fp32_precision == "tf32")
            assert matmul.fp32_precision == before
    matmul.fp32_precision = "none"
    assert seen == [False, True] * 3
