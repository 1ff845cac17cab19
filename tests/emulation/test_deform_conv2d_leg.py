"""The Python leg of deform_conv2d with the CUDA kernels behind it, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nasfast.ops import _native, deform_conv2d, deform_conv2d_reference


@pytest.mark.skipif(_native.C is None, reason=f"runs the reference: {_native.ERROR}")
@pytest.mark.parametrize("dtype", _native.DTYPES, ids=str)
def test_leg(legs: list[str], dtype: torch.dtype) -> None:
    """Pointers, sizes and strides arrive where the kernels expect them."""
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
    assert legs == ["deform_conv2d_forward", "deform_conv2d_backward"]
    tolerance = {8: 1e-10, 4: 1e-4, 2: 2e-2}[dtype.itemsize]
    for tensor, got, wanted in zip(
        (input, *tensors), (output, *gradients), (expected, *references)
    ):
        assert got.dtype == tensor.dtype
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < tolerance
