"""Heads of anchor-free detectors: what each point of P3 to P7 shows, and how far its box reaches.

FCOS: Tian et al., ICCV 2019 (arXiv 1904.01355), section 3; NAS-FCOS: section 3.2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nasfast.models.layers import Conv2d, runs_own_ops
from nasfast.models.points import STRIDES
from nasfast.models.pyramids import ModulatedDeformConv
from nasfast.spaces.nas_fcos import HEAD_OPS, HeadGenotype
from nasfast.utils.errors import UserError

GROUPS = 32
"""Of every GroupNorm in a head."""
FARTHEST = 2.0**14
"""Pixels that a distance is at most: exponents are clamped to it."""
PRIOR = 0.01
"""Probability that an untrained network gives every class at every point."""

Tower = Literal["cls", "reg"]


class GroupNorm(nn.GroupNorm):
    """With 32 groups; one value a group, as of a map of one pixel, becomes the shift, where torch's
    refuses it.

    On a CPU the gradients of channels-last maps in bfloat16 take torch 2.13 two to five times as
    long as those of copies whose channels are apart.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        layout = torch.channels_last
        copied = x.dtype == torch.bfloat16 and x.requires_grad and runs_own_ops(x)
        copied = copied and x.is_contiguous(memory_format=layout)
        maps = x.contiguous() if copied else x
        y = torch.group_norm(maps, self.num_groups, self.weight, self.bias, self.eps)
        return y.contiguous(memory_format=layout) if copied else y


def build_head_op(op: int, channels: int) -> nn.Module:
    """An operation of `HEAD_OPS`, ``[N, C, H, W]`` to the same."""
    conv: nn.Module
    match HEAD_OPS[op]:
        case "skip_connect":
            return nn.Identity()
        case "conv_1x1":
            conv = Conv2d(channels, channels, 1)
        case "conv_3x3":
            conv = Conv2d(channels, channels, 3)
        case "sep_conv_3x3" | "sep_conv_3x3_dil3" as name:
            dilation = 3 if name.endswith("dil3") else 1
            conv = nn.Sequential(
                Conv2d(channels, channels, 3, dilation, groups=channels),
                Conv2d(channels, channels, 1),
            )
        case _:
            conv = ModulatedDeformConv(channels, channels)
    return nn.Sequential(conv, GroupNorm(channels), nn.ReLU(inplace=True))


class StockTower(nn.Sequential):
    """Four times 3x3 convolution, GroupNorm, ReLU; the same for every level."""

    def __init__(self, channels: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(4):
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            _initialise(conv)
            layers += [conv, GroupNorm(channels), nn.ReLU(inplace=True)]
        super().__init__(*layers)

    def of_levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self(x) for x in maps]


class SearchedTower(nn.Module):
    """The layers of a genotype: before its share index each level has weights of its own, which
    begin equal."""

    def __init__(self, genotype: HeadGenotype, channels: int) -> None:
        super().__init__()
        layers = [build_head_op(op, channels) for op in genotype.ops]
        own = nn.Sequential(*layers[: genotype.share])
        levels = len(STRIDES) if genotype.share else 0
        self.own = nn.ModuleList(copy.deepcopy(own) for _ in range(levels))
        self.shared = nn.Sequential(*layers[genotype.share :])

    def of_levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        if self.own:
            maps = [layers(x) for layers, x in zip(self.own, maps, strict=True)]
        return [self.shared(x) for x in maps]


class FCOSHead(nn.Module):
    """Towers of classification and of regression, and the convolutions that predict.

    Args:
        genotype: layers of the towers; None are those of FCOS.
        channels: of P3 to P7.
        classes: K.
        centerness: the tower that centre-ness is read from.
        normalized: distances are predicted in strides, not in pixels.

    Shapes: P3 to P7 to float32 ``[N, K + 5, P]``: logits of the classes, distances from the point
    to the left, top, right and bottom of its box in pixels, from 0 to FARTHEST, and the logit of
    centre-ness; the points as `nasfast.models.points.points` lists them.
    """

    def __init__(
        self,
        genotype: HeadGenotype | None,
        channels: int,
        classes: int,
        centerness: Tower = "cls",
        normalized: bool = False,
    ) -> None:
        super().__init__()
        if channels % GROUPS:
            raise UserError(
                f"head: expected a width that is a multiple of {GROUPS}, the groups of its "
                f"GroupNorm, got {channels}; change it"
            )
        self.centerness, self.normalized = centerness, normalized
        self.towers = nn.ModuleDict(
            {
                name: StockTower(channels)
                if genotype is None
                else SearchedTower(genotype, channels)
                for name in ("cls", "reg")
            }
        )
        self.classify = nn.Conv2d(channels, classes, 3, padding=1)
        self.reach = nn.Conv2d(channels, 4, 3, padding=1)
        self.center = nn.Conv2d(channels, 1, 3, padding=1)
        for conv in (self.classify, self.reach, self.center):
            _initialise(conv)
        assert self.classify.bias is not None
        nn.init.constant_(self.classify.bias, -math.log((1 - PRIOR) / PRIOR))
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        cls, reg = (self.towers[name].of_levels(pyramid) for name in ("cls", "reg"))  # type: ignore[operator]
        parts = []
        for level, (x, y, stride) in enumerate(zip(cls, reg, STRIDES, strict=True)):
            unit = stride if self.normalized else 1
            exponent = self.scales[level] * self.reach(y).float()
            distances = unit * exponent.clamp(max=math.log(FARTHEST / unit)).exp()
            center = self.center(x if self.centerness == "cls" else y).float()
            parts.append(torch.cat([self.classify(x).float(), distances, center], 1).flatten(2))
        return torch.cat(parts, 2)


def _initialise(conv: nn.Conv2d) -> None:
    if not conv.weight.is_meta:  # where that would load torch's compiler
        nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
