"""The Python side of the ops with the CUDA kernels as their backend, on the CPU.

Pointers, sizes and strides arrive where the kernels expect them.
"""

from __future__ import annotations

import pytest
import torch
from emulated_mixed_op import NAMES, Case, Expected, assert_near, inputs, reference
from torch import Tensor

from nasfast.ops import _native, deform_conv2d, deform_conv2d_reference, mixed_op

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"runs the reference: {_native.ERROR}")
every_dtype = pytest.mark.parametrize("dtype", _native.DTYPES, ids=str)


@every_dtype
def test_deform_conv2d(calls: list[str], dtype: torch.dtype) -> None:
    last = torch.channels_last
    predicted = torch.randn(2, 27, 5, 7).contiguous(memory_format=last)
    offset, mask = predicted.split((18, 9), 1)
    tensors: list[Tensor] = [
        torch.randn(2, 16, 5, 7).to(dtype),
        offset if dtype.itemsize == 2 else offset.to(dtype),
        torch.randn(8, 16, 3, 3).to(dtype).contiguous(memory_format=last),
        torch.randn(8).to(dtype),
        mask.sigmoid().to(dtype),
    ]
    doubles = [tensor.double().requires_grad_() for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_()
    input, offset, weight, bias, mask = tensors
    output = deform_conv2d(input, offset, weight, bias, padding=1, mask=mask)
    expected = deform_conv2d_reference(*doubles[:4], padding=1, mask=doubles[4])
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, tensors, cotangent)
    references = torch.autograd.grad(expected, doubles, cotangent.double())
    assert calls == ["deform_conv2d_forward", "deform_conv2d_backward"]
    tolerance = {8: 1e-10, 4: 1e-4, 2: 2e-2}[dtype.itemsize]
    for tensor, got, wanted in zip(
        (input, *tensors), (output, *gradients), (expected, *references)
    ):
        assert got.dtype == tensor.dtype
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < tolerance


@every_dtype
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_mixed_op(calls: list[str], dtype: torch.dtype, recompute: bool, fixed: bool) -> None:
    case = Case("", add=False, fixed=fixed)
    i = inputs(case, dtype)
    expected: Expected = reference(case, i)
    leaves = [t for t in i.all if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    output, statistics = mixed_op(
        i.input,
        i.factors,
        i.branches,
        i.scale,
        i.shift,
        batch_norm=not fixed,
        eps=1e-3,
        recompute=recompute,
    )
    found = torch.autograd.grad(output, leaves, i.grad)
    again = [] if fixed or not recompute else ["mixed_op_forward"]
    assert calls == ["mixed_op_forward", *again, "mixed_op_backward"]
    pairs = [("output", output.detach(), expected.output), *zip(NAMES, found, expected.gradients)]
    if not fixed:
        pairs.append(("statistics", statistics, expected.statistics))
    tolerance = {8: 1e-10, 4: 1e-4, 2: 4e-2}[dtype.itemsize]
    for name, got, wanted in pairs:
        assert wanted is not None
        assert_near(name, got, wanted, tolerance)
