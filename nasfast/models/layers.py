"""The operations that cells are made of. All keep shape: ``[N, C, H, W]`` to ``[N, C, H, W]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.spaces.fast_nas import PRIMITIVES


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to ``size`` = (H, W) with half-pixel centres; no work when it fits."""
    if (x.shape[-2], x.shape[-1]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def largest(maps: list[Tensor]) -> tuple[int, int]:
    """Spatial size (H, W) of the map with the largest area, the first among equals."""
    winner = max(maps, key=lambda x: x.shape[-2] * x.shape[-1])
    return winner.shape[-2], winner.shape[-1]


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; output size equals input size."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1
    ) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class SepConv(nn.Sequential):
    """``repeats`` times depthwise, pointwise, BatchNorm, ReLU (nothing between the first two)."""

    def __init__(self, channels: int, kernel: int, dilation: int = 1, repeats: int = 1) -> None:
        padding = dilation * (kernel // 2)
        layers: list[nn.Module] = []
        for _ in range(repeats):
            layers += [
                nn.Conv2d(
                    channels,
                    channels,
                    kernel,
                    padding=padding,
                    dilation=dilation,
                    groups=channels,
                    bias=False,
                ),
                ConvBNReLU(channels, channels),
            ]
        super().__init__(*layers)


class GlobalAveragePool(nn.Module):
    """Global mean, 1x1 convolution, BatchNorm, ReLU, back to the input's size.

    A batch of one has no variance over a 1x1 map: such a batch is normalised with the running
    statistics, in training as well.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3), keepdim=True))
        if self.training and len(x) == 1:
            bn = self.bn
            y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        else:
            y = self.bn(y)
        return F.relu(y).expand(-1, -1, x.shape[-2], x.shape[-1])


class Zero(nn.Module):
    """No connection. Unlike ``0 * x`` it does not carry NaN on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


OPS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv1x1": lambda c, repeats: ConvBNReLU(c, c, 1),
    "conv3x3": lambda c, repeats: ConvBNReLU(c, c, 3),
    "sep3x3": lambda c, repeats: SepConv(c, 3, repeats=repeats),
    "sep5x5": lambda c, repeats: SepConv(c, 5, repeats=repeats),
    "gap": lambda c, repeats: GlobalAveragePool(c),
    "conv3x3_d3": lambda c, repeats: ConvBNReLU(c, c, 3, dilation=3),
    "conv3x3_d12": lambda c, repeats: ConvBNReLU(c, c, 3, dilation=12),
    "sep3x3_d3": lambda c, repeats: SepConv(c, 3, dilation=3, repeats=repeats),
    "sep5x5_d6": lambda c, repeats: SepConv(c, 5, dilation=6, repeats=repeats),
    "skip": lambda c, repeats: nn.Identity(),
    "none": lambda c, repeats: Zero(),
}
"""Primitive name to builder ``(channels, repeats of separable convolutions) -> module``."""


def build_op(index: int, channels: int, sep_repeats: int) -> nn.Module:
    """Build primitive ``index`` of ``PRIMITIVES`` at a channel count."""
    return OPS[PRIMITIVES[index]](channels, sep_repeats)
