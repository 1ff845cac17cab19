"""PyTorch's convolutions where they are gone round."""

import pytest
import torch
from torch.nn import functional as F

from nasfast.encoders import MobileNetV2
from nasfast.models.layers import Conv2d
from nasfast.ops.convolution import StridedDepthwiseConv2d, convolution_dtype

C = 24


def layers():
    return {
        "encoder": StridedDepthwiseConv2d(C, C, 3, 2, 1, groups=C, bias=False),
        "with a bias": StridedDepthwiseConv2d(C, C, 3, 2, 1, groups=C),
        "decoder": Conv2d(C, C, 5, groups=C, stride=2),
    }


def gradients(layer, x, dtype):
    """Of a sum of squares, with its output."""
    tensors = [x.detach().to(dtype).requires_grad_(), *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float64):
        y = layer(tensors[0])
    return y, *torch.autograd.grad(y.double().square().sum(), tensors)


@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_depthwise_convolutions_learn_in_float32(name, dtype, monkeypatch):
    torch.manual_seed(0)
    layer, x = layers()[name], torch.randn(2, C, 9, 8)
    x = x.to(dtype).to(memory_format=torch.channels_last)
    seen, conv2d = [], F.conv2d

    def spied(*tensors_and_sizes):
        seen.append((tensors_and_sizes[0].dtype, convolution_dtype(tensors_and_sizes[0])))
        return conv2d(*tensors_and_sizes)

    monkeypatch.setattr(F, "conv2d", spied)
    y, grad, *rest = gradients(layer, x, dtype)
    assert seen == [(torch.float32, torch.float32)]  # autocast is off
    assert (y.dtype, grad.dtype) == (torch.bfloat16, dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert convolution_dtype(x) == dtype
    assert seen[1:] == [(dtype, torch.bfloat16)]  # as PyTorch does
    exact = gradients(layer.double(), x, torch.float64)
    for found, right in zip((y, grad, *rest), exact, strict=True):
        torch.testing.assert_close(
            found.double(), right, rtol=0.02, atol=0.02 * right.abs().max().item()
        )


def test_other_precisions_are_as_they_were():
    layer = layers()["encoder"].double()
    y, *_ = gradients(layer, torch.randn(1, C, 6, 6), torch.float64)
    assert y.dtype == torch.float64


def test_the_encoder_has_them():
    strided = [m for m in MobileNetV2(0.35).modules() if isinstance(m, StridedDepthwiseConv2d)]
    assert [(m.stride, m.groups) for m in strided] == [((2, 2), c) for c in (48, 48, 96, 192)]
