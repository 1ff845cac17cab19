"""Restoration networks derived by IR-NAS (Zhang et al., CVPR 2020, arXiv 1909.08228)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from nasfast.models.layers import (
    ConvBN,
    ConvBNReLU,
    DepthwiseSeparable,
    change_slowly,
    check_images,
    concatenate,
    to_blocks,
)
from nasfast.models.mixed_op import build_branch
from nasfast.spaces.ir_nas import REACH, IRNASGenotype, Node
from nasfast.utils.config import Bound, Bounded, Channels

ATROUS_RATES = (2, 4, 6)
"""Dilations in the head, in pixels."""
MAX_REDUCTION = 64


@dataclass(frozen=True)
class RestorerConfig(Bounded):
    """Size of the network around a genotype; the defaults are the published denoiser."""

    width: Channels = 20
    """Channels F of a state at level 0; others have 2 F and 4 F, or 1.5 F where widths are free,
    the nearest even number, the larger one of two."""
    stem: Channels = 64
    """Channels of the stem."""
    head: Channels = 128
    """Channels of the head, each of its branches and the convolutions behind it."""
    low_level: Channels = 48
    """Channels of the feature of level 0 that the head is joined with."""
    residual: bool = False
    """Predict the degradation, which is subtracted from the image (in super-resolution from its
    bicubic enlargement), instead of the restored image. The first publication does not."""
    atrous: bool = True
    """Whether the head has atrous branches (ASPP), as published first, or is one pointwise
    convolution, as the authors' later denoisers have it: half the time of a small network."""
    reduction: Annotated[int, Bound(1, MAX_REDUCTION)] = 1
    """Above 1, the network reads blocks of so many pixels to a side as one (a pixel unshuffle and a
    pointwise convolution), and predicts a gain and an offset of each value, which change slowly:
    enlarged bilinearly, they give gain * image + offset. It sees so many times as far. Not as
    published; for haze."""
    dead_reduce: bool = False
    """Also build the convolution that stands in for a missing level 0 where no layer misses it. The
    published parameter counts include it; nothing reads it."""


def reach(genotype: IRNASGenotype, reduction: int = 1) -> int:
    """Pixels that an output of a `Restorer` depends on, to each side; with deformable convolutions,
    those that weigh."""
    if reduction > 1:  # less a block, as blocks are read by a pointwise convolution, and two more:
        return reduction * (reach(genotype) + 1)  # its own, and what it is enlarged from
    before_last, last = 1, 2  # the stem
    for _ in genotype.levels:
        states = [before_last, last]
        for node in genotype.nodes:
            states.append(max(states[state] + REACH[op] for op, state in node))
        before_last, last = last, max(states[2:])
    return last + max(ATROUS_RATES) + 2  # the head, and two separable convolutions behind it


class DerivedCell(nn.Module):
    """A layer: two inputs brought to its width, and nodes that sum two operations each."""

    def __init__(self, nodes: tuple[Node, ...], inputs: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.nodes = nodes
        self.before_last, self.last = (ConvBN(size, channels) for size in inputs)
        self.ops = nn.ModuleDict(
            {
                f"node{i}_edge{j}": build_branch(op, channels)
                for i, node in enumerate(nodes)
                for j, (op, _) in enumerate(node)
                if op != "skip"
            }
        )

    def forward(self, before_last: Tensor, last: Tensor) -> Tensor:
        """Concatenated nodes ``[N, nodes * C, H, W]``."""
        states: list[Tensor] = [self.before_last(F.relu(before_last)), self.last(F.relu(last))]
        activated: dict[int, Tensor] = {}

        def run(edge: str, op: str, state: int) -> Tensor:
            if op == "skip":
                return states[state]
            if state not in activated:
                activated[state] = F.relu(states[state])
            out: Tensor = self.ops[edge](activated[state])
            return out

        for i, (first, second) in enumerate(self.nodes):
            states.append(run(f"node{i}_edge0", *first) + run(f"node{i}_edge1", *second))
        return concatenate(*states[2:])


class ASPP(nn.Module):
    """Pointwise and atrous separable branches, concatenated and fused; no pooling."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvBNReLU(in_channels, channels),
                *(DepthwiseSeparable(in_channels, channels, rate) for rate in ATROUS_RATES),
            ]
        )
        self.fuse = ConvBNReLU((1 + len(ATROUS_RATES)) * channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W]
        out: Tensor = self.fuse(concatenate(*(branch(x) for branch in self.branches)))
        return out


def build_head(in_channels: int, config: RestorerConfig) -> nn.Module:
    """What reads the last cell."""
    return (ASPP if config.atrous else ConvBNReLU)(in_channels, config.head)


class Restorer(nn.Module):
    """A genotype as a network.

    Args:
        genotype: cell and levels.
        config: widths around it.
        channels: c of the images.
        scale: enlargement of height and width, by a pixel shuffle at the end.
    """

    def __init__(
        self, genotype: IRNASGenotype, config: RestorerConfig, channels: int, scale: int = 1
    ) -> None:
        super().__init__()
        self.genotype, self.config = genotype, config
        self.channels, self.scale = channels, scale
        if config.reduction > 1 and scale > 1:
            raise ValueError(
                f"Restorer: expected a reduction of 1 where images are enlarged, got "
                f"{config.reduction} for a scale of {scale}"
            )
        stem, head, low = config.stem, config.head, config.low_level
        out = len(genotype.nodes) * config.width  # channels of a cell at level 0
        side = 3 if config.reduction == 1 else 1  # a block is a window already
        self.stem1 = ConvBNReLU(channels * config.reduction**2, stem, side)
        self.stem2 = ConvBN(stem, stem, 3)
        states = genotype.channels(config.width)
        widths = [stem, stem, *(len(genotype.nodes) * size for size in states)]
        self.cells = nn.ModuleList(
            DerivedCell(genotype.nodes, (widths[i], widths[i + 1]), size)
            for i, size in enumerate(states)
        )
        has_low = 0 in genotype.levels
        self.reduce = None
        if config.dead_reduce or not has_low:
            self.reduce = ConvBN(stem, out, 3, affine=False)
        self.aspp = build_head(widths[-1], config)
        self.low_level = ConvBNReLU(out, low)
        self.refine = nn.Sequential(
            DepthwiseSeparable(head + low, head), DepthwiseSeparable(head, head)
        )
        per_value = 1 if config.reduction == 1 else 2
        self.last = nn.Conv2d(head, per_value * channels * scale**2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Restored images, not clamped, ``[N, c, scale H, scale W]``.

        Args:
            images: ``[N, c, H, W]``, in units of 0..1; noise may leave them.

        Raises:
            ValueError: images of another number of channels.
        """
        check_images("Restorer", images, self.channels)
        side = self.config.reduction
        if side == 1:
            restored = F.pixel_shuffle(self._last(images), self.scale)
        else:
            restored = change_slowly(images, self._last(to_blocks(images, side)), side)
        if not self.config.residual:
            return restored
        if self.scale > 1:
            images = F.interpolate(images, scale_factor=self.scale, mode="bicubic")
        return images - restored

    def _last(self, images: Tensor) -> Tensor:
        """What the last convolution gives."""
        before_last = self.stem1(images)
        last = self.stem2(before_last)
        low = None if 0 in self.genotype.levels or self.reduce is None else self.reduce(last)
        for cell, level in zip(self.cells, self.genotype.levels, strict=True):
            before_last, last = last, cell(before_last, last)
            if level == 0:
                low = last
        x = self.refine(concatenate(self.aspp(F.relu(last)), self.low_level(low)))
        out: Tensor = self.last(x)
        return out
