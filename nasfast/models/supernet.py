"""The supernet of restoration networks: Zhang et al., IR-NAS, CVPR 2020 (arXiv 1909.08228).

All layers run at the resolution of the images. A layer has up to three levels, of 1, 2 and 4 times
the basic width in channels; all cells mix operations by the same alphas, and betas mix the outputs
of the previous layer's levels. Routes are summed first and the cell is called once per level ("cell
sharing", section 3.2).

Two options are beside the publication. Widths of 1.5 times the basic one make a fourth level. Where
the depth is searched, each layer has an exit, a decoder of its own, and the output mixes the images
of all exits by the softmax of their logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nasfast.models.layers import (
    ConvBN,
    DepthwiseSeparable,
    change_slowly,
    check_images,
    concatenate,
    to_blocks,
)
from nasfast.models.mixed_op import Memory, MixedOp, PlainMixedOp
from nasfast.spaces.ir_nas import (
    MAX_LAYERS,
    MAX_NODES,
    PRIMITIVES,
    IRNASGenotype,
    IRNASSpace,
    Widths,
    channels,
    derive_nodes,
    moves,
    num_edges,
    num_levels,
    steps,
    targets,
    viterbi,
)
from nasfast.utils.config import Bound, Bounded, Channels
from nasfast.utils.errors import UserError

STEM = 64
"""Channels between the two convolutions of the stem."""
ATROUS_RATE = 16
"""Dilation in the decoder, in pixels."""


@dataclass(frozen=True)
class SupernetConfig(Bounded):
    """Size of a supernet; the defaults are the published search for denoising."""

    layers: Annotated[int, Bound(1, MAX_LAYERS)] = 4
    """Layers of cells."""
    nodes: Annotated[int, Bound(1, MAX_NODES)] = 5
    """Nodes of a cell, N."""
    width: Channels = 10
    """Channels W of a state at level 0."""
    searched_depth: bool = False
    """Whether networks of fewer layers are searched too; beside the publication."""
    widths: Widths = "published"
    """Channels that a layer can have. published: W, 2 W, 4 W. free: 1.5 W too, as the nearest even
    number, the larger one of two; beside the publication."""
    memory: Memory = "recompute"
    """Whether backward reads what forward saved, or computes it again from the states of the
    cells: about 60 times less memory for 1.5 times the work."""
    fused: bool = True
    """Whether the mixed operations run fused, or as the plain formulation that they are tested
    against, which keeps all it computes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 2:
            raise UserError(
                f"SupernetConfig.width: expected an even number, got {self.width}; half the "
                "channels share the offsets of a deformable convolution"
            )
        if self.searched_depth and self.layers == 1:
            raise UserError(
                "SupernetConfig.searched_depth: expected at least 2 layers, got 1; raise layers"
            )
        for name, kind in (("memory", Memory), ("widths", Widths)):
            if getattr(self, name) not in (choices := get_args(kind)):
                wanted = " or ".join(f'"{choice}"' for choice in choices)
                raise UserError(
                    f"SupernetConfig.{name}: expected {wanted}, got {getattr(self, name)!r}"
                )

    def channels(self, level: int) -> int:
        """Of a state at a level."""
        return channels(self.width, level, self.widths)

    @property
    def space(self) -> IRNASSpace:
        """All networks that can be found."""
        return IRNASSpace(
            self.layers, self.nodes, widths=self.widths, searched_depth=self.searched_depth
        )


class Mix(Protocol):
    """How the operations of every edge are mixed in one forward pass."""

    @property
    def weights(self) -> Tensor:  # [edges, K]
        """Factor of each primitive."""

    @property
    def active(self) -> Sequence[Sequence[int]] | None:
        """Primitives to run on each edge; None runs all."""


class MixedCell(nn.Module):
    """Nodes that sum mixed operations over all states before them."""

    def __init__(self, config: SupernetConfig, channels: int) -> None:
        super().__init__()
        self.nodes = config.nodes
        self.edges = nn.ModuleList(
            MixedOp(channels, memory=config.memory) if config.fused else PlainMixedOp(channels)
            for _ in range(num_edges(config.nodes))
        )

    def forward(
        self,
        before_last: Tensor,  # [N, C, H, W]
        last: Tensor,  # [N, C, H, W]
        weights: Sequence[Tensor],  # of each edge [K]
        active: Sequence[Sequence[int] | None],
    ) -> list[Tensor]:
        """The nodes, each ``[N, C, H, W]``; their concatenation is the output of the cell."""
        states = [before_last, last]
        edges = zip(self.edges, weights, active, strict=True)
        for _ in range(self.nodes):
            node = None
            for state, (op, weight, runs) in zip(states, edges):
                node = op(state, weight, runs, into=node)
            assert node is not None
            states.append(node)
        return states[2:]


class Router(nn.Module):
    """What the cells of a layer read: beta-weighted sums of the layer before, at their widths."""

    def __init__(self, config: SupernetConfig, layer: int) -> None:
        super().__init__()
        self.sources = num_levels(layer - 1, config.widths)
        self.targets = [targets(source, config.widths) for source in range(self.sources)]
        self.first = steps(config.widths).start
        self.maps = config.nodes if layer > 1 else 1  # the first layer reads the stem
        self.convs = nn.ModuleDict(
            {
                f"{source}to{level}": ConvBN(
                    config.nodes * config.channels(source), config.channels(level), affine=False
                )
                for source, levels in enumerate(self.targets)
                for level in levels
            }
        )

    def forward(self, moves: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        """One input per level, ``[N, C, H, W]``.

        Args:
            moves: probabilities ``[sources, steps]`` of the moves by -1, 0, +1 levels, or more.
            maps: the nodes of all source levels, each ``[N, C, H, W]``.
        """
        sums: dict[int, Tensor] = {}
        for source in range(self.sources):
            nodes = maps[source * self.maps : (source + 1) * self.maps]
            x = concatenate(*nodes) if len(nodes) > 1 else nodes[0]
            for level in self.targets[source]:
                term = moves[source, level - source - self.first] * self.convs[
                    f"{source}to{level}"
                ](x)
                sums[level] = sums[level] + term if level in sums else term
        return tuple(sums[level] for level in sorted(sums))


class Head(nn.Module):
    """ASPP of one level with one atrous rate and no pooling."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.atrous = DepthwiseSeparable(in_channels, channels, ATROUS_RATE)
        self.pointwise = ConvBN(in_channels, channels, affine=False)
        self.fuse = ConvBN(2 * channels, channels, affine=False)

    def forward(self, *nodes: Tensor) -> Tensor:  # each [N, C, H, W]
        x = concatenate(*nodes)
        return F.relu(self.fuse(concatenate(self.atrous(x), F.relu(self.pointwise(x)))))


class Stem(nn.Module):
    """Images to the inputs of the first layer: one before last, and what its router reads."""

    def __init__(self, config: SupernetConfig, channels: int, reduction: int) -> None:
        super().__init__()
        side = 3 if reduction == 1 else 1
        self.conv1 = ConvBN(channels * reduction**2, STEM, side, affine=False)
        self.conv2 = ConvBN(STEM, config.nodes * config.width, 3, affine=False)
        self.reduce = ConvBN(STEM, config.width, 3, affine=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.conv1(images))
        return self.reduce(x), self.conv2(x)


class Tail(nn.Module):
    """Heads of all levels to images in 0..1, or to what changes slowly, without bounds."""

    def __init__(self, in_channels: int, channels: int, scale: int, slow: bool) -> None:
        super().__init__()
        self.refine = ConvBN(in_channels, in_channels, 3, affine=False)
        out = 2 * channels if slow else channels * scale**2
        self.conv = nn.Conv2d(in_channels, out, 3, padding=1)
        self.scale, self.slow = scale, slow

    def forward(self, *heads: Tensor) -> Tensor:  # each [N, C, H, W]
        x: Tensor = self.conv(F.relu(self.refine(concatenate(*heads))))
        return x if self.slow else F.pixel_shuffle(x, self.scale).sigmoid()


class Supernet(nn.Module):
    """All networks of the space at once.

    Args:
        config: its size.
        channels: c of the images.
        scale: enlargement of height and width, by a pixel shuffle at the end.
        reduction: side of the blocks of pixels that are read as one, as in `RestorerConfig`; above
            1, what the heads predict is subtracted from the images.

    Attributes:
        alphas: logits ``[edges, K]`` of the operations, for all cells; edges in the order of
            nodes, then of states.
        betas: logits ``[rows, 3]`` of the moves of a source by -1, 0, +1 levels, rows in the order
            of :func:`nasfast.spaces.ir_nas.moves`; ``[rows, 5]`` and by -2 to +2 where widths are
            free. Moves that leave the levels, or are too far, have probability 0.
        depths: logits ``[layers]`` of the exits; None where the depth is not searched.
    """

    forbidden: Tensor  # as betas

    def __init__(
        self, config: SupernetConfig, channels: int, scale: int = 1, reduction: int = 1
    ) -> None:
        super().__init__()
        self.config, self.channels, self.scale = config, channels, scale
        self.reduction = reduction
        widths, layers = config.widths, range(1, config.layers + 1)
        rows, columns = moves(config.layers, widths), steps(widths)
        self.alphas = nn.Parameter(torch.ones(num_edges(config.nodes), len(PRIMITIVES)))
        self.betas = nn.Parameter(torch.ones(len(rows), len(columns)))
        self.depths = nn.Parameter(torch.ones(config.layers)) if config.searched_depth else None
        forbidden = [
            [level + step not in targets(level, widths) for step in columns] for _, level in rows
        ]
        self.register_buffer("forbidden", torch.tensor(forbidden), persistent=False)

        levels = range(num_levels(config.layers, widths))
        self.stem = Stem(config, channels, reduction)
        self.routers = nn.ModuleList(Router(config, layer) for layer in layers)
        self.wideners = nn.ModuleList(
            ConvBN(config.channels(level), config.channels(level + 1), affine=False)
            for level in levels[:-1]
        )
        self.cells = nn.ModuleList(
            MixedCell(config, config.channels(level))
            for layer in layers
            for level in range(num_levels(layer, widths))
        )
        self.heads, self.tail = self._exit(config.layers)
        self.exits = nn.ModuleList()  # of the layers before the last
        if config.searched_depth:
            self.exits.extend(nn.ModuleList(self._exit(layer)) for layer in layers[:-1])

    def _exit(self, layer: int) -> tuple[nn.ModuleList, Tail]:
        """Heads of all levels of a layer, and what brings them together."""
        config, levels = self.config, range(num_levels(layer, self.config.widths))
        out = config.nodes * config.width
        heads = nn.ModuleList(Head(config.nodes * config.channels(level), out) for level in levels)
        return heads, Tail(len(levels) * out, self.channels, self.scale, self.reduction > 1)

    def architecture(self) -> list[nn.Parameter]:
        """What the architecture's optimizer trains."""
        return [self.alphas, self.betas, *([] if self.depths is None else [self.depths])]

    def weights(self) -> list[nn.Parameter]:
        """What the weights' optimizer trains: all other parameters."""
        names = ("alphas", "betas", "depths")
        return [p for name, p in self.named_parameters() if name not in names]

    def forward(self, images: Tensor, mix: Mix | None = None) -> Tensor:
        """Restored images, ``[N, c, scale H, scale W]``; in 0..1, but for those of a reduction.

        Args:
            images: ``[N, c, H, W]``.
            mix: how operations are mixed; None is the softmax of the alphas.

        Raises:
            ValueError: images of another number of channels.
        """
        check_images("Supernet", images, self.channels)
        weights = (self.alphas.softmax(1) if mix is None else mix.weights).unbind()
        active: Sequence[Sequence[int] | None] = [None] * len(weights)
        if mix is not None and mix.active is not None:
            active = mix.active
        sources = [num_levels(layer, self.config.widths) for layer in range(self.config.layers)]
        routes = torch.split(self.move_probabilities(), sources)
        cells, exits = iter(self.cells), [*self.exits, (self.heads, self.tail)]
        early, restored = len(routes) - len(exits), []  # layers that have no exit

        read = images if self.reduction == 1 else to_blocks(images, self.reduction)
        reduced, stem = self._run(self.stem, read)
        before, nodes = [reduced], [[stem]]  # by level: inputs, and outputs, of the layer before
        for layer, (router, route) in enumerate(zip(self.routers, routes, strict=True)):
            inputs = self._run(router, route, *itertools.chain(*nodes))
            while len(before) < len(inputs):
                before = [*before, self._run(self.wideners[len(before) - 1], before[-1])]
            nodes = [
                cell(before_last, last, weights, active)
                for before_last, last, cell in zip(before, inputs, cells)
            ]
            before = inputs
            if layer >= early:
                heads, tail = exits[layer - early]
                maps = [self._run(head, *states) for head, states in zip(heads, nodes, strict=True)]
                restored.append(self._run(tail, *maps))
        mixed: Tensor = restored[-1]
        if (depths := self.depth_probabilities()) is not None:
            mixed = sum(share * image for share, image in zip(depths, restored, strict=True))
        if self.reduction == 1:
            return mixed
        return images - change_slowly(images, mixed, self.reduction)

    def derive(
        self, operations: Tensor | None = None, max_skips: int | None = None
    ) -> IRNASGenotype:
        """The network that alphas, betas and depths stand for (section 3.1 and 3.2).

        Args:
            operations: what each is worth, ``[edges, K]``; None is the softmax of the alphas.
            max_skips: of the cell.
        """
        with torch.no_grad():
            alphas = self.alphas.softmax(1) if operations is None else operations
            betas, depths = self.move_probabilities(), self.depth_probabilities()
        nodes = derive_nodes(alphas.tolist(), self.config.nodes, max_skips)
        levels = viterbi(
            betas.tolist(),
            self.config.layers,
            self.config.widths,
            None if depths is None else depths.tolist(),
        )
        return IRNASGenotype(nodes, levels, self.config.widths)

    def entropies(self, operations: Tensor | None = None) -> tuple[float, ...]:
        """Entropy in nats of the operations of an edge and of the moves of a source, on average,
        and where the depth is searched that of the exits.

        Args:
            operations: their probabilities ``[edges, K]``; None is the softmax of the alphas.
        """
        with torch.no_grad():
            alphas = self.alphas.softmax(1) if operations is None else operations
            tables = [alphas, self.move_probabilities()]
            if (depths := self.depth_probabilities()) is not None:
                tables.append(depths[None])
            return tuple(torch.special.entr(table).sum(1).mean().item() for table in tables)

    def move_probabilities(self) -> Tensor:  # as betas
        """Of each source, its moves by -1, 0, +1 levels, or -2 to +2."""
        return self.betas.masked_fill(self.forbidden, -torch.inf).softmax(1)

    def depth_probabilities(self) -> Tensor | None:  # [layers]
        """Of networks of 1, 2, .. layers, where the depth is searched."""
        return None if self.depths is None else self.depths.softmax(0)

    def _run(self, module: nn.Module, *inputs: Tensor) -> Any:
        """``module(*inputs)``, keeping only the inputs for backward if memory is "recompute"."""
        if self.config.memory == "save":
            return module(*inputs)
        return checkpoint(
            module,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _statistics_kept(module)),
        )


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm leaves its running statistics alone: they have seen this batch already."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
