"""Pyramids on the taps C2 to C5 of an encoder: maps P3 to P7 of strides 8 to 128."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.encoders import FeatureInfo
from nasfast.models.layers import (
    Conv2d,
    ConvBNReLU,
    SepConv,
    concatenate,
    norm_relu,
    resize,
    size_of,
)
from nasfast.ops import DeformConv2d
from nasfast.spaces.nas_fcos import AGGREGATORS, FPN_OPS, OUTPUTS, TAPS, Block, NASFCOSGenotype
from nasfast.utils.errors import UserError

Cat = Literal["grouped", "full"]
OFFSET_GROUPS = 2


class ModulatedDeformConv(nn.Module):
    """Deformable convolution v2, 3x3: two groups of channels have own offsets and masks, which one
    convolution predicts; at first all offsets are 0 and all masks 0.5.

    Section 3.1 of Zhu et al., Deformable ConvNets v2, CVPR 2019.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(in_channels, 27 * OFFSET_GROUPS, 3, padding=1)
        self.deform = DeformConv2d(in_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        for bias in (self.offset.bias, self.deform.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        taps = 9 * OFFSET_GROUPS
        offset, mask = self.offset(x).split((2 * taps, taps), 1)
        y: Tensor = self.deform(x, offset, mask.sigmoid())
        return y


class DeformBNReLU(nn.Sequential):
    """Deformable convolution, BatchNorm, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            ModulatedDeformConv(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, _ = self
        return norm_relu(conv(x), cast(nn.BatchNorm2d, norm))


def build_fpn_op(op: int, channels: int) -> nn.Module:
    """An operation of `FPN_OPS`, ``[N, C, H, W]`` to the same."""
    match FPN_OPS[op]:
        case "sep_conv_3x3":
            return SepConv(channels, 3)
        case "sep_conv_3x3_dil3":
            return SepConv(channels, 3, 3)
        case "sep_conv_5x5_dil6":
            return SepConv(channels, 5, 6)
        case "skip_connect":
            return nn.Identity()
    return DeformBNReLU(channels)


class WeightedSum(nn.Module):
    """``a * x + b * y`` with a learned factor a channel for each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(channels, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a.to(x.dtype) * x + self.b.to(y.dtype) * y


class Concatenation(nn.Module):
    """Channels side by side, BatchNorm, ReLU, 1x1 convolution back to the width.

    That convolution has, as published, a group a channel: channels 2g and 2g + 1 of the
    concatenation make channel g, so that x alone makes the first half of the channels and y the
    second. With ``cat="full"`` it mixes all.
    """

    def __init__(self, channels: int, cat: Cat) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2 * channels)
        self.conv = Conv2d(2 * channels, channels, 1, groups=channels if cat == "grouped" else 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.conv(norm_relu(concatenate(x, y), self.norm))
        return z


class FusedBlock(nn.Module):
    """A block of the searched pyramid."""

    def __init__(self, block: Block, channels: int, cat: Cat) -> None:
        super().__init__()
        self.sources = block[:2]
        self.ops = nn.ModuleList(build_fpn_op(op, channels) for op in block[2:4])
        summed = AGGREGATORS[block.aggregator] == "psum"
        self.aggregate = WeightedSum(channels) if summed else Concatenation(channels, cat)

    def forward(self, pool: Sequence[Tensor | None]) -> Tensor:
        x, y = (op(pool[source]) for op, source in zip(self.ops, self.sources, strict=True))
        size = max(size_of(x), size_of(y))
        z: Tensor = self.aggregate(resize(x, size), resize(y, size))
        return z


class _Halving(nn.Conv2d):
    """3x3 convolution with stride 2.

    A map that is one wide gets a column of the padding first: there the bfloat16 gradient of the
    weights is what nothing wrote, up to NaN, on a CPU in torch 2.13.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1)) if self.training and x.shape[-1] == 1 else x)


class _Top(nn.Module):
    """P6 and P7, by convolutions with stride 2: of P5, and of the ReLU of P6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6, self.p7 = (_Halving(channels) for _ in range(2))
        _initialise(self)

    def forward(self, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(p5)
        return [p6, self.p7(F.relu(p6))]


class Pyramid(nn.Module):
    """What gives P3 to P7.

    Attributes:
        channels: of each of them.
    """

    channels: int

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """C2 to C5 to P3 to P7."""
        raise NotImplementedError


class FPN(Pyramid):
    """The stock pyramid of FCOS (Lin et al., Feature Pyramid Networks, CVPR 2017) on C3 to C5."""

    def __init__(self, feature_info: Sequence[FeatureInfo], channels: int) -> None:
        super().__init__()
        self.channels = channels
        taps = feature_info[1:]
        self.lateral = nn.ModuleList(nn.Conv2d(tap.channels, channels, 1) for tap in taps)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in taps)
        _initialise(self)
        self.top = _Top(channels)

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        maps = [lateral(tap) for lateral, tap in zip(self.lateral, taps[1:], strict=True)]
        for finer, coarser in itertools.pairwise(reversed(range(len(maps)))):
            coarse = F.interpolate(maps[finer], size_of(maps[coarser]), mode="nearest")
            maps[coarser] = maps[coarser] + coarse
        levels = [output(x) for output, x in zip(self.output, maps, strict=True)]
        return [*levels, *self.top(levels[-1])]


class SearchedFPN(Pyramid):
    """A pyramid of blocks (section 3.2 of NAS-FCOS).

    Args:
        genotype: with blocks, of which three are loose.
        feature_info: taps C2 to C5.
        width: channels of the blocks.
        cat: form of the concatenations.
        widen: the levels have twice the width, without weights: what is loose beside the last three
            blocks is put beside each level, where it is added otherwise. A genotype without any
            gives each level twice. This alone explains the published counts of the detectors
            with widths 128 and 256.
        faithful: inputs that no block reads are adapted all the same, as in the published counts.
    """

    def __init__(
        self,
        genotype: NASFCOSGenotype,
        feature_info: Sequence[FeatureInfo],
        width: int,
        cat: Cat = "grouped",
        *,
        widen: bool = False,
        faithful: bool = False,
    ) -> None:
        super().__init__()
        assert genotype.fpn is not None
        if len(feature_info) != TAPS or not genotype.valid:
            raise UserError(
                f"pyramid: expected an encoder with {TAPS} taps and {OUTPUTS} blocks that none "
                f"reads, got {len(feature_info)} and {len(genotype.loose)}"
            )
        self.channels, self.widen = 2 * width if widen else width, widen
        self.read = genotype.taps
        kept = range(TAPS) if faithful else self.read
        self.adapt = nn.ModuleDict(
            {str(i): ConvBNReLU(feature_info[i].channels, width) for i in kept}
        )
        self.blocks = nn.ModuleList(FusedBlock(block, width, cat) for block in genotype.fpn)
        self.extra, self.last = genotype.loose[:-OUTPUTS], genotype.loose[-OUTPUTS:]
        self.top = _Top(self.channels)

    def forward(self, taps: Sequence[Tensor]) -> list[Tensor]:
        pool: list[Tensor | None] = [
            self.adapt[str(i)](tap) if str(i) in self.adapt else None for i, tap in enumerate(taps)
        ]
        blocks = []
        for block in self.blocks:
            blocks.append(block(pool))
            pool.append(blocks[-1])
        levels = []
        for index, tap in zip(reversed(self.last), taps[1:], strict=True):
            x = blocks[index]
            others = [resize(blocks[extra], size_of(x)) for extra in self.extra]
            if self.widen:
                x = concatenate(x, sum(others[1:], others[0]) if others else x)
            else:
                x = sum(others, x)
            levels.append(resize(x, size_of(tap)))
        return [*levels, *self.top(levels[-1])]


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
