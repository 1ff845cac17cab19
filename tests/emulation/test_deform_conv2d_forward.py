"""Forward of deform_conv2d's CUDA kernels, emulated, against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated import (
    CASES,
    DTYPES,
    IDS,
    TF32_TOLERANCE,
    TOLERANCE,
    Case,
    Kernels,
    assert_near,
    cases,
    replay,
)
from hypothesis import given, settings
from hypothesis import strategies as st

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


def check(kernels: Kernels, case: Case, dtype: torch.dtype, tf32: bool = False) -> None:
    tensors = case.tensors(dtype)
    (output,) = kernels.run(case, dtype, tensors, tf32=tf32)
    assert_near(output, case.reference(tensors), TF32_TOLERANCE if tf32 else TOLERANCE[dtype])


@every_case
@every_dtype
def test_equals_reference(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    check(kernels, case, dtype)


@every_case
def test_tf32(kernels: Kernels, case: Case) -> None:
    check(kernels, case, torch.float32, tf32=True)


@settings(max_examples=60)
@given(case=cases(), dtype=st.sampled_from(DTYPES), tf32=st.booleans())
def test_any_sizes(kernels: Kernels, case: Case, dtype: torch.dtype, tf32: bool) -> None:
    check(kernels, case, dtype, tf32 and dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "tf32"])
@pytest.mark.parametrize("out_channels", [72, 264])
def test_wide_tiles(kernels: Kernels, dtype: torch.dtype, out_channels: int) -> None:
    """Pixels enough for tiles of 128 by 128 and by 256; taps in blocks."""
    case = Case("", size=(16, 17), kernel=(5, 5), padding=(2, 2), out_channels=out_channels)
    check(kernels, case, dtype, tf32=dtype == torch.float32)


@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_offset_without_position(kernels: Kernels, dtype: torch.dtype, value: float) -> None:
    """Such a sample is zero, and those outside of the image do not read it."""
    case = Case("", size=(4, 5), offset_groups=2)
    input, offset, weight, bias, mask = case.tensors(dtype)
    assert input is not None
    assert offset is not None
    assert mask is not None
    masked = mask.clone()
    masked[:, 4] = masked[:, 7, 1] = 0
    expected = case.reference([input, offset, weight, bias, masked])
    offset[:, 8] = offset[:, 15, 1] = value  # y of tap 4, x of tap 7 in one row
    (output,) = kernels.run(case, dtype, [input, offset, weight, bias, mask])
    assert_near(output, expected, TOLERANCE[dtype])


@every_dtype
def test_samples_outside_do_not_read(kernels: Kernels, dtype: torch.dtype) -> None:
    case = Case("", size=(4, 5), mask=False)
    input, offset, weight, bias, _ = case.tensors(dtype)
    assert input is not None
    assert offset is not None
    assert bias is not None
    for far in (-2.0 - 5, 5.0 + 2):
        (output,) = kernels.run(
            case,
            dtype,
            [
                torch.full_like(input, float("inf")),
                torch.full_like(offset, far),
                weight,
                bias,
                None,
            ],
        )
        expected = bias.double().view(1, -1, 1, 1).expand(2, -1, 4, 5)
        assert_near(output, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_same_bits_in_any_order(kernels: Kernels, dtype: torch.dtype) -> None:
    """A race would show in another order of blocks, warps and lanes."""
    case = Case("", channels=40, out_channels=72, kernel=(5, 5), padding=(2, 2), offset_groups=5)
    tensors = case.tensors(dtype)
    outputs = []
    for seed in range(4):
        kernels.set_order(seed)
        outputs += kernels.run(case, dtype, tensors)
    kernels.set_order(0)
    first, *others = outputs
    assert first is not None
    assert all(torch.equal(first, other) for other in others if other is not None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (1, 2**31, "at most 2^30 channels of input, got 2147483648; split the call"),
        (0, 2**40, "at most 2^31 - 1 tiles of output pixels, got 927712935936; split the batch"),
    ],
)
def test_sizes_out_of_range(kernels: Kernels, field: int, value: int, message: str) -> None:
    sizes = list(Case("").sizes())
    sizes[field] = value
    with pytest.raises(ValueError) as caught:
        kernels.module.deform_conv2d_forward_cuda(0, sizes, [0] * 6, 0, 0, 0)
    assert str(caught.value) == f"deform_conv2d: CUDA wants {message}"


def test_unknown_dtype(kernels: Kernels) -> None:
    with pytest.raises(ValueError) as caught:
        kernels.module.deform_conv2d_forward_cuda(4, Case("").sizes(), [0] * 6, 0, 0, 0)
    assert str(caught.value) == "dtype must be a code from 0 to 3, got 4"


@pytest.mark.parametrize("program", ["replay_address", "replay_thread"])
@pytest.mark.parametrize(
    ("case", "dtype", "tf32"),
    [
        (Case("", channels=40, out_channels=72), torch.bfloat16, False),
        (Case("", channels=12, out_channels=5, offset_groups=3), torch.float16, False),
        (Case("", channels=8, groups=2), torch.float32, True),
        (Case("", channels=24, offset_groups=3), torch.float32, False),
        (Case("", channels=3, out_channels=2), torch.float64, False),
        (Case("", channels=8, out_channels=136, size=(16, 17)), torch.bfloat16, False),
        (Case("", batch=1, size=(16, 17), kernel=(3, 1), padding=(1, 0)), torch.float16, False),
    ],
    ids=["rows", "scalars", "tf32", "segments", "float64", "wide", "tall"],
)
def test_sanitizers(
    emulation: Path, tmp_path: Path, program: str, case: Case, dtype: torch.dtype, tf32: bool
) -> None:
    """Nothing is read or written out of bounds, also by hostile offsets; no two threads race."""
    tensors = case.tensors(dtype)
    offset = tensors[1]
    assert offset is not None
    flat = offset.view(-1)
    for i, value in enumerate((float("nan"), float("inf"), -1e30, 1e9, -1.0, -0.999, 6.0, 5.999)):
        flat[i::37] = value
    done, (output,) = replay(
        emulation / program, tmp_path, case, dtype, tensors, tf32=tf32, order=1
    )
    assert done.returncode == 0, done.stderr
    assert_near(output, case.reference(tensors), TF32_TOLERANCE if tf32 else TOLERANCE[dtype])


@pytest.mark.parametrize("skip", [(n, -1) for n in range(7)] + [(-1, n) for n in range(3)])
def test_race_check_finds(emulation: Path, tmp_path: Path, skip: tuple[int, int]) -> None:
    """Without any one barrier, or wait of the three steps."""
    case = Case("", batch=1, channels=32, size=(4, 5), kernel=(1, 3), padding=(0, 1))
    tensors = case.tensors(torch.bfloat16)
    program = emulation / "replay_thread"
    done, (output,) = replay(program, tmp_path, case, torch.bfloat16, tensors, order=1, skip=skip)
    late = output is not None and bool(output.isnan().any())  # of the last wait: nobody races
    assert "WARNING: ThreadSanitizer: data race" in done.stderr or late
