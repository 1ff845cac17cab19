"""Networks of templates: section 3 of Nekrasov et al., Template-based automatic search of compact
semantic segmentation architectures, WACV 2020."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.encoders import FeatureInfo
from nasfast.models.decoders import DenseDecoder, EncoderDecoder
from nasfast.models.layers import (
    Conv2d,
    ConvBNReLU,
    SepConv,
    concatenate,
    global_mean,
    norm_relu,
    normalized,
    pad,
    resize,
    size_of,
)
from nasfast.spaces.template_nas import AGGREGATIONS, OPERATIONS, Template, TemplateNASGenotype
from nasfast.utils.config import Bound, Bounded, Channels

IMAGE_STRIDE = 32
"""Sides of images for dense tasks are multiples of it."""


@dataclass(frozen=True)
class TemplateConfig(Bounded):
    """Size of the network around a genotype."""

    agg_size: Channels = 48
    """Channels before the classifier; the published search uses 48 and its final networks 64."""
    sep_repeats: Annotated[int, Bound(1, 16)] = 1
    """Repeats inside separable convolutions; the published search uses 1, final networks 2."""
    faithful: bool = False
    """Repeat the stride in every convolution and every application of a template, as the published
    code does. Its paper, and the default, has it in the first of them only."""
    aux_heads: bool = False
    """Have a classifier on every layer that reaches the last one, for training; none is published.
    """


FULL_TEMPLATES = TemplateConfig(agg_size=64, sep_repeats=2)
"""Of the published final networks."""


class MaxPool(nn.Module):
    """1x1 convolution, BatchNorm, maximum over 3x3 pixels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 1)
        self.bn = nn.BatchNorm2d(out_channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(normalized(self.conv(x), self.bn), 3, self.stride, 1)


class GlobalAverage(nn.Module):
    """Global mean, 1x1 convolution, BatchNorm, ReLU: what is everywhere, ``[N, C, 1, 1]``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBNReLU(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(global_mean(x))
        return y


class Tile(nn.Module):
    """All channels ``times`` times, side by side."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return x if self.times == 1 else concatenate(*[x] * self.times)


def build_operation(
    index: int, in_channels: int, out_channels: int, strides: Sequence[int]
) -> tuple[nn.Module, int]:
    """Operation ``index`` of ``OPERATIONS``, and the stride that it has.

    Args:
        index: of the operation.
        in_channels: of its input.
        out_channels: of its output, a multiple.
        strides: of the repeats of a separable convolution; pooling has the first, others none.
    """
    name = OPERATIONS[index]
    if name == "skip":
        return Tile(out_channels // in_channels), 1
    if name == "gap":
        return GlobalAverage(in_channels, out_channels), 1
    if name == "maxpool3x3":
        return MaxPool(in_channels, out_channels, strides[0]), strides[0]
    kernel, dilation = {"sep3x3": (3, 1), "sep5x5": (5, 1), "sep5x5_d6": (5, 6)}[name]
    return SepConv(in_channels, kernel, dilation, strides, out_channels), math.prod(strides)


class Map(NamedTuple):
    """What is known of a feature map before there is one."""

    channels: int
    stride: int
    """Pixels of the image per cell, along each axis."""


class Application(nn.Module):
    """A template on two maps, with weights of its own.

    Attributes:
        out: channels and stride of the result.
    """

    def __init__(
        self,
        template: Template,
        inputs: Sequence[Map],
        widen: int,
        strides: Sequence[int],
        downsampling: bool,
    ) -> None:
        super().__init__()
        branches = []
        for op, (channels, stride) in zip(template[:2], inputs, strict=True):
            module, own = build_operation(op, channels, channels * widen, strides)
            branches.append((module, Map(channels * widen, stride * own)))
        self.ops = nn.ModuleList(module for module, _ in branches)
        maps = [map for _, map in branches]
        channels = max(map.channels for map in maps)
        self.adapt = nn.ModuleList(
            nn.Identity() if map.channels == channels else ConvBNReLU(map.channels, channels)
            for map in maps
        )
        strides = [map.stride for map in maps]
        wanted = (max if downsampling else min)(strides)
        self.sized = strides.index(wanted)
        """Branch whose size the result has."""
        self.resized = [stride != wanted for stride in strides]
        self.everywhere = [isinstance(op, GlobalAverage) for op in self.ops]
        name = AGGREGATIONS[template.aggregation]
        self.join = {"psum": WeightedSum, "cat": Fuse}[name](channels)
        self.spreads = name == "cat" and not all(self.everywhere)
        self.out = Map(channels, wanted)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        inputs = x, y
        maps = [adapt(op(map)) for op, adapt, map in zip(self.ops, self.adapt, inputs, strict=True)]
        size = size_of(inputs[self.sized] if self.everywhere[self.sized] else maps[self.sized])
        for i in (0, 1):
            if self.everywhere[i]:
                maps[i] = _spread(maps[i], size) if self.spreads else maps[i]
            elif self.resized[i]:
                maps[i] = resize(maps[i], size)
        result: Tensor = self.join(*maps)
        return _spread(result, size) if all(self.everywhere) else result


def _spread(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``[N, C, 1, 1]`` everywhere on a map."""
    return x.expand(-1, -1, *size).contiguous(memory_format=torch.channels_last)


class WeightedSum(nn.Module):
    """Sum of two maps, each channel with a learned weight ("psum"), at first 1. One may be what is
    everywhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, channels, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total: Tensor = self.weight[0] * x + self.weight[1] * y
        return total


class Fuse(nn.Module):
    """Two maps side by side, BatchNorm, ReLU, 1x1 convolution to the channels of one ("cat")."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2 * channels)
        self.conv = Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.conv(norm_relu(concatenate(x, y), self.bn))
        return result


class TemplateDecoder(DenseDecoder):
    """A genotype as a network on the encoder's taps.

    Args:
        genotype: templates and layers.
        feature_info: the encoder's taps.
        outputs: channels of the output map.
        config: widths, the convention of strides, and whether there are auxiliary heads.

    Attributes:
        with_aux: whether training mode runs the auxiliary heads.

    Shapes: taps ``[N, C_i, H_i, W_i]`` to ``[N, outputs, H, W]`` at the resolution of the largest
    collected layer, and in training mode one auxiliary map per collected layer, if there are heads.

    Sides of images are multiples of 32, and a map may have stride 64. For such a network the taps
    are padded: its last cells would else reach beyond the finer maps that it is resized to, and all
    its cells be shifted. Outputs then have stride 32 at most, and end where the image does.
    """

    def __init__(
        self,
        genotype: TemplateNASGenotype,
        feature_info: Sequence[FeatureInfo],
        outputs: int,
        config: TemplateConfig,
    ) -> None:
        super().__init__()
        self.genotype, self.config = genotype, config
        self.with_aux = True
        maps = [Map(tap.channels, tap.stride) for tap in feature_info]
        self.inputs = [layer[:2] for layer in genotype.layers]
        self.layers = nn.ModuleList()
        for k, layer in enumerate(genotype.layers):
            inputs = [maps[i] for i in layer[:2]]
            applications = nn.ModuleList()
            for repeat in range(layer.repeats + 1):
                stride = 2**layer.stride
                strides = [stride] * config.sep_repeats
                if not config.faithful:
                    strides = [stride if i == repeat == 0 else 1 for i in range(config.sep_repeats)]
                template = genotype.templates[layer.template]
                application = Application(
                    template,
                    inputs,
                    stride if repeat == 0 else 1,
                    strides,
                    k < genotype.downsampling,
                )
                inputs = [inputs[1], application.out]
                applications.append(application)
            self.layers.append(applications)
            maps.append(inputs[1])
        self.collected = [k + genotype.num_taps for k in genotype.collected_layers]
        collected = [maps[i] for i in self.collected]
        self.tap_strides = [tap.stride for tap in feature_info]
        self.strides = [map.stride for map in collected]
        coarsest = max(map.stride for map in maps)
        self.padded = coarsest if coarsest > IMAGE_STRIDE and not config.faithful else None
        """Stride that the sides of the taps are padded for."""
        self.pre_clf = ConvBNReLU(sum(map.channels for map in collected), config.agg_size)
        self.conv_clf = nn.Conv2d(config.agg_size, outputs, 3, padding=1)
        self.aux_heads = nn.ModuleList(
            nn.Conv2d(map.channels, outputs, 3, padding=1) for map in collected if config.aux_heads
        )

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output and, in training mode, the auxiliary outputs (an empty list otherwise)."""
        pool = list(taps)
        if self.padded:
            pool = [
                pad(tap, self.padded // stride)
                for tap, stride in zip(taps, self.tap_strides, strict=True)
            ]
        for applications, (i, j) in zip(self.layers, self.inputs, strict=True):
            x, y = pool[i], pool[j]
            for application in cast(nn.ModuleList, applications):
                x, y = y, application(x, y)
            pool.append(y)
        collected = [pool[i] for i in self.collected]
        finest = collected[self.strides.index(min(self.strides))]
        fused = concatenate(*(resize(x, size_of(finest)) for x in collected))
        output = self.conv_clf(self.pre_clf(F.relu(fused, inplace=True)))
        output = self._on_image(output, min(self.strides), taps[0])
        if not (self.training and self.with_aux):
            return output, []
        heads = zip(self.aux_heads, collected, self.strides, strict=False)  # all or none
        return output, [self._on_image(head(x), stride, taps[0]) for head, x, stride in heads]

    def _on_image(self, output: Tensor, stride: int, tap: Tensor) -> Tensor:
        """An output of padded taps as it would be without: of the first tap as it came."""
        if not self.padded:
            return output
        height, width = size_of(output)
        if stride > IMAGE_STRIDE:  # whose cells need not end with the image
            times, stride = stride // IMAGE_STRIDE, IMAGE_STRIDE
            output = resize(output, (height * times, width * times))
        rows, columns = (-(-side * self.tap_strides[0] // stride) for side in size_of(tap))
        if torch.compiler.is_compiling():  # the strides of a slice become conditions of an export
            return output[..., torch.arange(rows), :][..., torch.arange(columns)]
        return output[..., :rows, :columns]


class TemplateNetwork(EncoderDecoder):
    """An encoder's first rows with a `TemplateDecoder`."""
