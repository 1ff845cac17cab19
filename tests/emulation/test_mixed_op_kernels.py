"""mixed_op's CUDA kernels, emulated, against the reference and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import emulated
import pytest
import torch
from emulated import DTYPES, IDS, replay_call
from emulated_mixed_op import (
    CASES,
    TF32_TOLERANCE,
    TOLERANCE,
    Case,
    Inputs,
    Kept,
    Kernels,
    assert_equal_reference,
    backward_buffers,
    cases,
    forward_buffers,
    inputs,
    reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

Buffers = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]  # that a call reads and writes

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=IDS)


@pytest.fixture(scope="session")
def mixed(kernels: emulated.Kernels) -> Kernels:
    return Kernels(kernels.module)


def check(
    mixed: Kernels, case: Case, dtype: torch.dtype, i: Inputs | None = None, **options: bool
) -> None:
    i = inputs(case, dtype) if i is None else i
    output, kept = mixed.forward(case, dtype, i, **options)
    found = mixed.backward(case, dtype, i, kept, **options)
    tolerance = TF32_TOLERANCE if options.get("tf32") else TOLERANCE[dtype]
    assert_equal_reference(case, reference(case, i), output, kept, found, tolerance)


@every_case
@every_dtype
def test_equals_reference(mixed: Kernels, case: Case, dtype: torch.dtype) -> None:
    check(mixed, case, dtype)


@every_case
def test_tf32(mixed: Kernels, case: Case) -> None:
    """With inputs that tf32 holds: offsets come out as they are, and no sample changes its cell."""
    check(mixed, case, torch.float32, inputs(case, torch.bfloat16).to(torch.float32), tf32=True)


@every_dtype
def test_bias_of_def_costs_no_precision(mixed: Kernels, dtype: torch.dtype) -> None:
    """Normalisation by the batch removes it; here it is 100 standard deviations."""
    case = Case("", batch=20, channels=6, size=(1, 1), branches=("def",))
    i = inputs(case, dtype)
    assert i.branches.deform_bias is not None
    i.branches.deform_bias.mul_(100)
    check(mixed, case, dtype, i)


@pytest.mark.parametrize(
    ("dtype", "fixed"),
    [(torch.float64, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["float64", "float32", "bfloat16"],
)
def test_many_tiles(mixed: Kernels, dtype: torch.dtype, fixed: bool) -> None:
    """Several to a part of the kernels' gradients, and to a lane that merges moments."""
    check(mixed, Case("", batch=130, channels=2, size=(1, 1), fixed=fixed), dtype)


def test_many_pixels(mixed: Kernels) -> None:
    """A thread that sums has several; the channels take two blocks."""
    case = Case("", batch=1, channels=300, size=(15, 20), branches=("skip",), offset_groups=1)
    check(mixed, case, torch.float32)


@every_dtype
@pytest.mark.parametrize("fixed", [False, True])
def test_deterministic(mixed: Kernels, dtype: torch.dtype, fixed: bool) -> None:
    check(mixed, Case("", fixed=fixed), dtype, deterministic=True)


@settings(max_examples=60)
@given(
    case=cases(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    deterministic=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_sizes(
    mixed: Kernels, case: Case, dtype: torch.dtype, deterministic: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    if dtype == torch.bfloat16:  # statistics of few values would magnify what it rounds
        case = replace(case, fixed=True)
    check(mixed, case, dtype, deterministic=deterministic)


@every_dtype
def test_given_statistics(mixed: Kernels, dtype: torch.dtype) -> None:
    """Raw maps and offsets come out again, to the bit."""
    case = Case("")
    i = inputs(case, dtype)
    _, kept = mixed.forward(case, dtype, i)
    output, again = mixed.forward(case, dtype, i, given=kept)
    assert output is None
    for one, other in ((kept.raw, again.raw), (kept.offset, again.offset)):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("wanted", range(14))
def test_single_gradient(mixed: Kernels, fixed: bool, wanted: int) -> None:
    """Each gradient alone is the one computed with the others."""
    case, dtype = Case("", channels=6, size=(3, 4), fixed=fixed), torch.float64
    i = inputs(case, dtype)
    _, kept = mixed.forward(case, dtype, i)
    together = mixed.backward(case, dtype, i, kept, deterministic=True)
    only = [index == wanted for index in range(14)]
    alone = mixed.backward(case, dtype, i, kept, only, deterministic=True)
    for index, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert other is not None
        assert (one is None) if index != wanted else (one is not None and torch.equal(one, other))


def test_skip_of_no_factor_is_not_there(mixed: Kernels) -> None:
    """What is infinite in the input stays in the branches that read it."""
    for fixed in (False, True):
        case = Case("", branches=("conv",), channels=2, fixed=True, affine=False)
        case, dtype = replace(case, fixed=fixed), torch.float64
        i = inputs(case, dtype)
        i.input[0, 0, 0, 0] = -float("inf")
        output, kept = mixed.forward(case, dtype, i)
        assert output is not None
        assert output.isfinite().all()
        gradient = mixed.backward(case, dtype, i, kept)[0]
        assert gradient is not None
        assert gradient.isfinite().all()


def test_empty_batch(mixed: Kernels) -> None:
    """Gradients of weights are zero."""
    for fixed in (False, True):
        case, dtype = Case("", batch=0, channels=2, fixed=fixed), torch.float32
        i = inputs(case, dtype)
        _, kept = mixed.forward(case, dtype, i)
        found = mixed.backward(case, dtype, i, kept)
        assert all(t is not None and t.eq(0).all() for t in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("fixed", [False, True])
def test_same_bits_in_any_order(mixed: Kernels, dtype: torch.dtype, fixed: bool) -> None:
    """Of blocks, warps and lanes."""
    case = Case("", size=(9, 17), channels=6, fixed=fixed)
    i, runs = inputs(case, dtype), []
    for seed in range(3):
        mixed.set_order(seed)
        output, kept = mixed.forward(case, dtype, i)
        found = mixed.backward(case, dtype, i, kept, deterministic=True)
        offset = None if fixed else kept.offset  # not written then
        runs.append([output, kept.raw, offset, kept.statistics, *found])
    mixed.set_order(0)
    for one, *others in zip(*runs, strict=True):
        assert all((one is None) or torch.equal(one, other) for other in others)


@every_dtype
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_offset_without_position(mixed: Kernels, dtype: torch.dtype, value: float) -> None:
    """Such samples are zero and have no gradients."""
    case = Case("", channels=4, branches=("def",), fixed=True)
    i = inputs(case, dtype)
    assert i.branches.offset_bias is not None
    i.branches.offset_bias[8] = i.branches.offset_bias[27] = value  # y of tap 4; x of tap 13
    output, kept = mixed.forward(case, dtype, i)
    found = mixed.backward(case, dtype, i, kept)
    assert output is not None
    assert output.isfinite().all()
    assert all(t is None or t.isfinite().all() for t in found)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (1, 2**20, "2^15 channels, got 1048576; split the call"),
        (3, 2**25, "2^24 columns, got 33554432; split the call"),
        (0, 2**40, "2^31 - 1 tiles of pixels, got 1099511627776; split the batch"),
    ],
)
def test_sizes_out_of_range(mixed: Kernels, field: int, value: int, message: str) -> None:
    sizes = list(Case("").sizes())
    sizes[field] = value
    module = mixed.module
    for call in (
        lambda: module.mixed_op_forward_cuda(0, sizes, [0] * 18, 0, 0, 0),
        lambda: module.mixed_op_forward_cuda_workspace(0, sizes, 0),
        lambda: module.mixed_op_backward_cuda(0, sizes, [0] * 32, 0, 0, 0),
        lambda: module.mixed_op_backward_cuda_workspace(0, sizes, 0),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"mixed_op: CUDA wants at most {message}"


def replay(
    program: Path,
    folder: Path,
    call: int,
    case: Case,
    dtype: torch.dtype,
    buffers: Buffers,
    skip: tuple[int, int] = (-1, -1),
    **options: bool,
) -> tuple[str, list[Tensor | None]]:
    """A sanitizer's complaints about a call (2 forward, 3 backward), and what it wrote."""
    sizes = case.sizes(**options)
    done, written = replay_call(
        program, folder, call, DTYPES.index(dtype), sizes, *buffers, order=1, skip=skip
    )
    return done.stderr if done.returncode else "", written


SANITIZED = [
    ("all", Case("", batch=1, size=(5, 17), channels=6), torch.bfloat16, {}),
    ("fixed", Case("", batch=1, size=(9, 7), channels=6, fixed=True), torch.float16, {}),
    ("segments", Case("", batch=1, size=(3, 4), channels=36), torch.float32, {}),
    ("tf32", Case("", batch=1, size=(3, 4), channels=36), torch.float32, {"tf32": True}),
    ("exact", Case("", channels=6), torch.float64, {"deterministic": True}),
]


@pytest.mark.parametrize("program", ["replay_address", "replay_thread"])
@pytest.mark.parametrize(
    ("case", "dtype", "options"),
    [case[1:] for case in SANITIZED],
    ids=[case[0] for case in SANITIZED],
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
    i = inputs(case, dtype)
    assert i.branches.offset_bias is not None
    i.branches.offset_bias[:4] = torch.tensor([float("nan"), 1e9, -1e30, -5.0])
    run = partial(replay, emulation / program, tmp_path)
    complaint, written = run(2, case, dtype, forward_buffers(case, dtype, i), **options)
    assert complaint == ""
    left = Kept(*written[:3])
    complaint, _ = run(3, case, dtype, backward_buffers(case, dtype, i, left), **options)
    assert complaint == ""


SKIPPED = [
    *[(2, (n, -1)) for n in range(1, 8)],  # the first is for a segment after another
    (2, (-1, 0)),
    *[(3, (n, -1)) for n in range(3)],
    *[(3, (-1, n)) for n in range(3)],
]


@pytest.mark.parametrize(("call", "skip"), SKIPPED)
def test_race_check_finds(
    mixed: Kernels, emulation: Path, tmp_path: Path, call: int, skip: tuple[int, int]
) -> None:
    """Without any one barrier, or wait for a copy."""
    case, dtype = Case("", batch=1, channels=4, size=(2, 3)), torch.bfloat16
    i = inputs(case, dtype)
    _, kept = mixed.forward(case, dtype, i)
    forward, backward = forward_buffers(case, dtype, i), backward_buffers(case, dtype, i, kept)
    complaint, written = replay(
        *(emulation / "replay_thread", tmp_path, call, case, dtype),
        forward if call == 2 else backward,
        skip,
    )
    late = any(t is not None and t.isnan().any() for t in written)  # of the last wait: nobody races
    assert "WARNING: ThreadSanitizer: data race" in complaint or late
