"""PyTorch's convolution, round what torch 2.13 does badly in bfloat16 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StridedDepthwiseConv2d", "convolution_dtype", "in_float32", "learns_in_bfloat16"]


def convolution_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of ``x`` gives: autocast's dtype where it is on, but float64 stays."""
    device = x.device.type
    if (
        x.dtype == torch.float64
        or not torch.amp.is_autocast_available(device)
        or not torch.is_autocast_enabled(device)
    ):
        return x.dtype
    return torch.get_autocast_dtype(device)


def in_float32(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)`` computed in float32 or wider, in the dtype that it has without that."""
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    with torch.autocast("cpu", enabled=False):
        y: Tensor = conv._conv_forward(x.to(dtype), conv.weight.to(dtype), bias)
    return y.to(convolution_dtype(x))


def learns_in_bfloat16(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether ``conv(x)`` is in bfloat16 on a CPU, by PyTorch, with a backward pass to come."""
    return (
        x.device.type == "cpu"
        and convolution_dtype(x) == torch.bfloat16
        and torch.is_grad_enabled()
        and (x.requires_grad or conv.weight.requires_grad)
        and not torch.compiler.is_compiling()
    )


class StridedDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with a stride, trained in float32 where it would be in bfloat16 on a
    CPU: its backward pass takes oneDNN 2 to 60 times as long there."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[N, C, H, W]`` to ``[N, C, Ho, Wo]``."""
        return in_float32(self, x) if learns_in_bfloat16(self, x) else super().forward(x)
