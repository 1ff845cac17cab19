"""Decoders of the Fast-NAS space (Nekrasov et al., CVPR 2019), and networks that end in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor, nn

from nasfast.encoders import Encoder, FeatureInfo
from nasfast.models.layers import ConvBNReLU, build_op, concatenate, largest, resize
from nasfast.spaces.base import Genotype
from nasfast.spaces.fast_nas import Cell, FastNASGenotype
from nasfast.utils.config import Bound, Bounded, Channels


@dataclass(frozen=True)
class DecoderConfig(Bounded):
    """Size of the decoder around a genotype."""

    agg_size: Channels = 48
    """Channels of every cell; the published search uses 48 and its final networks 64."""
    sep_repeats: Annotated[int, Bound(1, 16)] = 1
    """Repeats inside separable convolutions; the published search uses 1, final networks 2."""
    aux_cell: bool = True
    """Auxiliary heads hold a whole cell (the over-parameterised search form) or one convolution."""


FULL_DECODER = DecoderConfig(agg_size=64, sep_repeats=2, aux_cell=False)
"""Of the published final networks."""


class ContextualCell(nn.Module):
    """The cell of section 3.2: a small graph of operations on one map, loose ends summed."""

    def __init__(self, cell: Cell, channels: int, sep_repeats: int) -> None:
        super().__init__()
        self.inputs = [position for layer in cell.layers for position in layer[:2]]
        self.loose_ends = cell.loose_ends
        ops = [cell.op0] + [op for layer in cell.layers for op in layer[2:]]
        self.ops = nn.ModuleList(build_op(op, channels, sep_repeats) for op in ops)

    def forward(self, x: Tensor) -> Tensor:
        features: list[Tensor] = [x, self.ops[0](x)]
        for left in range(0, len(self.inputs), 2):
            a = self.ops[left + 1](features[self.inputs[left]])
            b = self.ops[left + 2](features[self.inputs[left + 1]])
            features += [a, b, a + b]
        out = features[self.loose_ends[0]]
        for position in self.loose_ends[1:]:
            out = out + features[position]
        return out


class FusionBlock(nn.Module):
    """Two maps, each through its own copy of the cell and a 1x1 convolution, summed."""

    def __init__(self, cell: Cell, channels: int, sep_repeats: int) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(
                ContextualCell(cell, channels, sep_repeats), ConvBNReLU(channels, channels)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        maps = [self.left(x), self.right(y)]
        size = largest(maps)
        return resize(maps[0], size) + resize(maps[1], size)


class DenseDecoder(nn.Module):
    """What turns the taps of an encoder into an output, and in training into auxiliary ones.

    Attributes:
        genotype: what it was built from.
        config: a dataclass, what else it was built from.
        with_aux: whether training mode runs the auxiliary heads.
        conv_clf: gives the output.
        aux_heads: give the auxiliary outputs; no part of the network's size.
    """

    genotype: Genotype
    config: Any
    with_aux: bool
    conv_clf: nn.Conv2d
    aux_heads: nn.ModuleList


class Decoder(DenseDecoder):
    """A genotype as a network on the encoder's taps.

    Args:
        genotype: cell and connections.
        feature_info: the encoder's taps.
        outputs: channels of the output map.
        config: widths and the form of the auxiliary heads.

    Attributes:
        with_aux: whether training mode runs the auxiliary heads.

    Shapes: taps ``[N, C_i, H_i, W_i]`` to ``[N, outputs, H, W]`` at the resolution of the
    largest collected block, and in training mode one auxiliary map per block.
    """

    def __init__(
        self,
        genotype: FastNASGenotype,
        feature_info: Sequence[FeatureInfo],
        outputs: int,
        config: DecoderConfig,
    ) -> None:
        super().__init__()
        c, cell = config.agg_size, genotype.cell
        self.genotype, self.config = genotype, config
        self.with_aux = True
        self.connections = genotype.connections
        self.collected = genotype.collected_blocks
        self.adapt = nn.ModuleList(ConvBNReLU(tap.channels, c) for tap in feature_info)
        self.blocks = nn.ModuleList(
            FusionBlock(cell, c, config.sep_repeats) for _ in self.connections
        )
        self.pre_clf = ConvBNReLU(c * len(self.collected), c)
        self.conv_clf = nn.Conv2d(c, outputs, 3, padding=1)
        self.aux_heads = nn.ModuleList(
            nn.Sequential(
                *([ContextualCell(cell, c, config.sep_repeats)] if config.aux_cell else []),
                nn.Conv2d(c, outputs, 3, padding=1),
            )
            for _ in self.connections
        )

    def forward(self, taps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output and, in training mode, the auxiliary outputs (an empty list otherwise)."""
        pool = [adapt(tap) for adapt, tap in zip(self.adapt, taps, strict=True)]
        num_taps = len(pool)
        for block, (i, j) in zip(self.blocks, self.connections, strict=True):
            pool.append(block(pool[i], pool[j]))
        blocks = pool[num_taps:]
        collected = [blocks[i] for i in self.collected]
        size = largest(collected)
        # blocks are sums of (resized) ReLUs: the published ReLU behind the concatenation is implied
        fused = concatenate(*(resize(x, size) for x in collected))
        output = self.conv_clf(self.pre_clf(fused))
        if not (self.training and self.with_aux):
            return output, []
        return output, [head(x) for head, x in zip(self.aux_heads, blocks, strict=True)]


def output_layers(decoder: DenseDecoder) -> Iterator[nn.Conv2d]:
    """The last convolution of the output and of each auxiliary one."""
    for head in (decoder.conv_clf, *decoder.aux_heads):
        yield [module for module in head.modules() if isinstance(module, nn.Conv2d)][-1]


class DenseNetwork(nn.Module):
    """An encoder and what makes an output of its taps; ``forward`` gives what the latter gives: the
    output and, in training, auxiliary ones."""

    def __init__(self, encoder: Encoder, decoder: DenseDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        output, aux = self.decoder(self.encoder(images))
        return output, aux


class EncoderDecoder(DenseNetwork):
    """A network whose outputs are maps."""
