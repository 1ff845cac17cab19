"""Gradients of deform_conv2d's CUDA kernels, emulated, against autograd of the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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
from torch import Tensor

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
INPUT, OFFSET, WEIGHT, BIAS, MASK = range(5)


def cotangent(case: Case, dtype: torch.dtype) -> Tensor:
    return torch.randn(case.batch, case.out_channels, *case.out_size).to(dtype)


def gradients(case: Case, tensors: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Of the reference, in float64."""
    leaves = [None if t is None else t.clone().double().requires_grad_() for t in tensors]
    if leaves[BIAS] is None:  # whose gradient does not depend on it
        leaves[BIAS] = torch.zeros(case.out_channels, dtype=torch.float64, requires_grad=True)
    output = case.reference(leaves)
    found = torch.autograd.grad(output, [t for t in leaves if t is not None], grad.double())
    rest = iter(found)
    return [None if t is None else next(rest) for t in leaves]


def assert_equal_reference(
    case: Case,
    dtype: torch.dtype,
    tensors: list[Tensor | None],
    grad: Tensor,
    actual: list[Tensor | None],
    tf32: bool = False,
) -> None:
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[dtype]
    for gradient, expected in zip(actual, gradients(case, tensors, grad)):
        if expected is None:
            assert gradient is None
        else:
            assert_near(gradient, expected, tolerance)


def check(kernels: Kernels, case: Case, dtype: torch.dtype, **options: bool) -> None:
    tensors, grad = case.tensors(dtype), cotangent(case, dtype)
    actual = kernels.run(case, dtype, tensors, grad, **options)
    assert_equal_reference(case, dtype, tensors, grad, actual, options.get("tf32", False))


@every_case
@every_dtype
def test_equals_reference(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    check(kernels, case, dtype)


@every_case
def test_tf32(kernels: Kernels, case: Case) -> None:
    check(kernels, case, torch.float32, tf32=True)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_deterministic(kernels: Kernels, case: Case, dtype: torch.dtype) -> None:
    check(kernels, case, dtype, deterministic=True)


@settings(max_examples=100)
@given(
    case=cases(),
    dtype=st.sampled_from(DTYPES),
    tf32=st.booleans(),
    deterministic=st.booleans(),
)
def test_any_sizes(
    kernels: Kernels, case: Case, dtype: torch.dtype, tf32: bool, deterministic: bool
) -> None:
    tf32 = tf32 and dtype == torch.float32
    check(kernels, case, dtype, tf32=tf32, deterministic=deterministic)


@every_dtype
@pytest.mark.parametrize("out_channels", [200, 264])
def test_many_output_channels(kernels: Kernels, dtype: torch.dtype, out_channels: int) -> None:
    """Several chunks, which fit into shared memory at once or not; the high product for weight."""
    check(kernels, Case("", kernel=(1, 2), channels=72, out_channels=out_channels), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_many_pixels(kernels: Kernels, dtype: torch.dtype) -> None:
    """A block has all taps; pixels in parts for weight and bias."""
    check(kernels, Case("", batch=3, channels=8, size=(24, 31)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_many_steps(kernels: Kernels, dtype: torch.dtype) -> None:
    """More pixels to a part of the weight's gradient than samples are located at once."""
    case = Case("", channels=8, size=(16, 20), kernel=(15, 15), padding=(7, 7))
    tensors, grad = case.tensors(dtype), cotangent(case, dtype)
    actual = kernels.run(case, dtype, tensors, grad, wanted=[i == WEIGHT for i in range(5)])
    expected = gradients(case, tensors, grad)[WEIGHT]
    assert expected is not None
    assert_near(actual[WEIGHT], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shift", [-1.5, -0.5, 0.25, 1.5])
@pytest.mark.parametrize("deterministic", [False, True])
def test_neighbours_share_corners(
    kernels: Kernels, width: int, shift: float, deterministic: bool
) -> None:
    """Smooth offsets, also where a row ends among the pixels that are added together."""
    case = Case("", channels=8, size=(5, width), kernel=(1, 2), padding=(0, 1))
    dtype = torch.float64
    input, offset, weight, bias, mask = case.tensors(dtype)
    assert offset is not None
    tensors = [input, torch.full_like(offset, shift), weight, bias, mask]
    grad = cotangent(case, dtype)
    actual = kernels.run(case, dtype, tensors, grad, deterministic=deterministic)
    assert_equal_reference(case, dtype, tensors, grad, actual)


@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_offset_without_position(kernels: Kernels, dtype: torch.dtype, value: float) -> None:
    """Such a sample has no gradients; the others are what they would be."""
    case = Case("", size=(4, 5), offset_groups=2)
    input, offset, weight, bias, mask = case.tensors(dtype)
    assert offset is not None
    assert mask is not None
    masked = mask.clone()
    masked[:, 4] = masked[:, 7, 1] = 0
    grad = cotangent(case, dtype)
    expected = gradients(case, [input, offset, weight, bias, masked], grad)
    assert expected[MASK] is not None
    expected[MASK][:, 4] = expected[MASK][:, 7, 1] = 0
    offset[:, 8] = offset[:, 15, 1] = value  # y of tap 4, x of tap 7 in one row
    mask[:, 4] = mask[:, 7, 1] = float("nan")  # nor does its factor count
    actual = kernels.run(case, dtype, [input, offset, weight, bias, mask], grad)
    for gradient, reference in zip(actual, expected):
        assert reference is not None
        assert_near(gradient, reference, TOLERANCE[dtype])


@every_dtype
def test_samples_outside_do_not_read(kernels: Kernels, dtype: torch.dtype) -> None:
    case = Case("", size=(4, 5), mask=False)
    input, offset, weight, bias, _ = case.tensors(dtype)
    assert input is not None
    assert offset is not None
    input.fill_(float("inf"))
    for far in (-2.0 - 5, 5.0 + 2):
        tensors = [input, torch.full_like(offset, far), weight, bias, None]
        actual = kernels.run(case, dtype, tensors, cotangent(case, dtype))
        for index in (INPUT, OFFSET, WEIGHT):
            gradient = actual[index]
            assert gradient is not None
            assert gradient.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wanted", range(5))
def test_single_gradient(
    kernels: Kernels, dtype: torch.dtype, deterministic: bool, wanted: int
) -> None:
    """Each gradient alone is the one computed with the others."""
    case = Case("", offset_groups=2)
    tensors, grad = case.tensors(dtype), cotangent(case, dtype)
    options: dict[str, Any] = {"deterministic": deterministic}
    together = kernels.run(case, dtype, tensors, grad, **options)
    options["wanted"] = [i == wanted for i in range(5)]
    alone = kernels.run(case, dtype, tensors, grad, **options)
    for i, (one, other) in enumerate(zip(alone, together)):
        assert other is not None
        assert (one is None) if i != wanted else (one is not None and torch.equal(one, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_same_bits_in_any_order(kernels: Kernels, dtype: torch.dtype) -> None:
    """All but grad_input always, and grad_input where it is asked for."""
    case = Case("", channels=24, out_channels=72, size=(8, 9), kernel=(2, 2), offset_groups=3)
    tensors, grad = case.tensors(dtype), cotangent(case, dtype)
    runs: dict[bool, list[list[Tensor | None]]] = {False: [], True: []}
    for deterministic, found in runs.items():
        for seed in range(1, 4):
            kernels.set_order(seed)
            found.append(kernels.run(case, dtype, tensors, grad, deterministic=deterministic))
    kernels.set_order(0)
    for i in range(5):
        first, *others = [run[i] for run in (*runs[True], *(runs[False] if i != INPUT else []))]
        assert first is not None
        assert all(other is not None and torch.equal(first, other) for other in others)
    if dtype.itemsize >= 4:  # the half types may round the difference off
        first, second, _ = [run[INPUT] for run in runs[False]]
        assert first is not None
        assert second is not None
        assert not torch.equal(first, second), "the order makes no difference to this case"


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
@every_dtype
def test_exact_sums_of_any_size(kernels: Kernels, dtype: torch.dtype, scale: float) -> None:
    """Deterministic sums are scaled to the values that come."""
    if dtype == torch.float16:
        scale = scale**0.1
    case = Case("")
    tensors, grad = case.tensors(dtype), (cotangent(case, torch.float64) * scale).to(dtype)
    actual = kernels.run(case, dtype, tensors, grad, deterministic=True)[INPUT]
    expected = gradients(case, tensors, grad)[INPUT]
    assert actual is not None
    assert expected is not None
    # not numbers so small that the half types and float32 lose bits
    assert_near(actual.double() / scale, expected / scale, 2 * TOLERANCE[dtype])


@every_dtype
def test_exact_sums_of_nothing(kernels: Kernels, dtype: torch.dtype) -> None:
    case = Case("")
    grad = torch.zeros_like(cotangent(case, dtype))
    gradient = kernels.run(case, dtype, case.tensors(dtype), grad, deterministic=True)[INPUT]
    assert gradient is not None
    assert gradient.eq(0).all()


@every_dtype
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradient_not_finite(
    kernels: Kernels, dtype: torch.dtype, deterministic: bool, value: float
) -> None:
    """It stays so, and spoils nothing that does not depend on it."""
    case = Case("", size=(5, 8))
    tensors, grad = case.tensors(dtype), cotangent(case, dtype)
    expected = gradients(case, tensors, grad)
    clean = kernels.run(case, dtype, tensors, grad, deterministic=deterministic)
    grad[0, 0, 2, 3] = value
    spoiled = gradients(case, tensors, grad)
    actual = kernels.run(case, dtype, tensors, grad, deterministic=deterministic)
    for index in (INPUT, OFFSET, MASK):
        gradient, before, reference, dirty = (
            run[index] for run in (actual, clean, expected, spoiled)
        )
        assert gradient is not None
        assert before is not None
        assert reference is not None
        assert dirty is not None
        finite = dirty.isfinite()
        assert not finite.all()
        assert torch.equal(gradient.isfinite(), finite)
        assert_near(gradient.where(finite, before), reference, TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("deterministic", [False, True])
def test_samples_outside_of_an_image_that_is_not_finite(
    kernels: Kernels, dtype: torch.dtype, deterministic: bool
) -> None:
    """They and their gradients are zero, whatever the first pixel and their own masks hold."""
    case = Case("", size=(5, 8))
    tensors, grad = case.tensors(dtype), cotangent(case, dtype)
    input, offset, _, _, mask = tensors
    assert input is not None
    assert offset is not None
    assert mask is not None
    outside = torch.rand(mask.shape) < 0.5
    offset[:, ::2][outside] = 100.0
    mask[outside] = float("nan")
    input[:, :, 0, 0] = float("nan")
    expected = gradients(case, tensors, grad)
    actual = kernels.run(case, dtype, tensors, grad, deterministic=deterministic)
    for index in (INPUT, OFFSET, MASK):
        gradient, reference = actual[index], expected[index]
        assert gradient is not None
        assert reference is not None
        finite = reference.isfinite()
        assert torch.equal(gradient.isfinite(), finite)
        zeros = torch.zeros_like(reference)
        assert_near(
            gradient.double().where(finite, zeros),
            reference.where(finite, zeros),
            TOLERANCE[dtype],
        )
        if index == MASK:
            assert gradient[outside].eq(0).all()


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
    for call in (
        lambda: kernels.module.deform_conv2d_backward_cuda(0, sizes, [0] * 10, 0, 0, 0),
        lambda: kernels.module.deform_conv2d_backward_cuda_workspace(0, sizes, 0),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"deform_conv2d: CUDA wants {message}"


@pytest.mark.parametrize("program", ["replay_address", "replay_thread"])
@pytest.mark.parametrize(
    ("case", "dtype", "options"),
    [
        (Case("", channels=72, out_channels=72), torch.bfloat16, {}),
        (Case("", channels=8, size=(24, 25)), torch.bfloat16, {}),
        (Case("", channels=8, out_channels=264, kernel=(1, 3)), torch.float16, {}),
        (Case("", channels=12, out_channels=5, offset_groups=3), torch.float16, {}),
        (Case("", channels=8, groups=2), torch.float32, {"tf32": True}),
        (Case("", channels=24, out_channels=40, offset_groups=3), torch.float32, {}),
        (Case("", channels=8), torch.float32, {"deterministic": True}),
        (Case("", channels=3, out_channels=2), torch.float64, {"deterministic": True}),
    ],
    ids=["slices", "positions", "high", "scalars", "tf32", "segments", "exact", "exact-float64"],
)
def test_sanitizers(
    emulation: Path,
    tmp_path: Path,
    program: str,
    case: Case,
    dtype: torch.dtype,
    options: dict[str, bool],
) -> None:
    """Nothing is read or written out of bounds, also by hostile offsets; no two threads race."""
    tensors, grad = case.tensors(dtype), cotangent(case, dtype)
    offset = tensors[OFFSET]
    assert offset is not None
    flat = offset.view(-1)
    for i, value in enumerate((float("nan"), float("inf"), -1e30, 1e9, -1.0, -0.99, 6.0, 5.99)):
        flat[i::37] = value
    done, actual = replay(
        emulation / program, tmp_path, case, dtype, tensors, grad, order=1, **options
    )
    assert done.returncode == 0, done.stderr
    # at whole positions, where the derivative by the offset jumps, it is the reference's too
    assert_equal_reference(case, dtype, tensors, grad, actual, options.get("tf32", False))


DATA = [i in (INPUT, OFFSET, MASK) for i in range(5)]
SKIPPED = [
    *[("data", DATA, (n, -1)) for n in range(9)],  # of three positions with two chunks
    *[("data", DATA, (-1, n)) for n in range(6)],
    *[("weight", [i == WEIGHT for i in range(5)], (n, -1)) for n in range(5)],  # of four steps
    *[("weight", [i == WEIGHT for i in range(5)], (-1, n)) for n in range(4)],
    ("bias", [i == BIAS for i in range(5)], (0, -1)),
]


@pytest.mark.parametrize(("kernel", "wanted", "skip"), SKIPPED)
def test_race_check_finds(
    emulation: Path, tmp_path: Path, kernel: str, wanted: list[bool], skip: tuple[int, int]
) -> None:
    """Without any one barrier, or wait for a copy."""
    case = Case("", batch=1, channels=8, out_channels=72, size=(20, 20))
    if kernel == "weight":
        case = replace(case, kernel=(1, 2))
    tensors, grad = case.tensors(torch.bfloat16), cotangent(case, torch.bfloat16)
    program = emulation / "replay_thread"
    done, written = replay(
        program, tmp_path, case, torch.bfloat16, tensors, grad, wanted=wanted, order=1, skip=skip
    )
    late = any(t is not None and t.isnan().any() for t in written)  # of the last wait: nobody races
    assert "WARNING: ThreadSanitizer: data race" in done.stderr or late
