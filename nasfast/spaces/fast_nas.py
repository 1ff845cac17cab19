"""Decoders with one contextual cell: Nekrasov et al., Fast NAS of compact semantic segmentation
models via auxiliary cells, CVPR 2019 (arXiv 1810.10804)."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nasfast.spaces.base import (
    Decision,
    Space,
    check_choices,
    graph_features,
    mutate_choices,
    sample_choices,
)
from nasfast.utils.errors import UserError, shown

PRIMITIVES = (
    "conv1x1",
    "conv3x3",
    "sep3x3",
    "sep5x5",
    "gap",
    "conv3x3_d3",
    "conv3x3_d12",
    "sep3x3_d3",
    "sep5x5_d6",
    "skip",
    "none",
)
NONE = PRIMITIVES.index("none")
REACH = {
    "conv3x3": 1,
    "sep3x3": 1,
    "sep5x5": 2,
    "conv3x3_d3": 3,
    "conv3x3_d12": 12,
    "sep3x3_d3": 3,
    "sep5x5_d6": 12,
}
"""Pixels to each side that an operation sees, without its repeats."""


@dataclass(frozen=True)
class Cell:
    """The operations applied to one feature map.

    Node 0 is the input, node 1 is op0(input). Layer k = 1, 2, .. appends three nodes:
    3k - 1 = o1(node p1), 3k = o2(node p2), and 3k + 1 = their sum.
    """

    op0: int
    """Index into PRIMITIVES."""
    layers: tuple[tuple[int, int, int, int], ...]
    """(p1, p2, o1, o2): two earlier nodes, two indices into PRIMITIVES."""

    @property
    def loose_ends(self) -> tuple[int, ...]:
        """Nodes summed to the output: those of node 1 and the layers' sums that no branch reads."""
        read = {p for layer in self.layers for p in layer[:2]}
        return tuple(i for i in range(1, 3 * len(self.layers) + 2, 3) if i not in read)

    def canonical(self) -> "Cell":
        """The lexicographically smallest cell that computes the same up to renaming.

        Free are the order of the two branches of a layer, the order of layers that do not read
        each other, and what a `none` reads as long as the loose ends stay: its output is zero
        anyway, but the node it reads is not a loose end. Time grows as n! 2^n, 48 for n = 3.
        """
        return Cell(self.op0, min(self._renumberings()))

    def _renumberings(self) -> Iterator[tuple[tuple[int, int, int, int], ...]]:
        """For each order of layers and branches, the smallest choice of the nodes `none` reads."""
        count = len(self.layers)
        read = {p for p1, p2, o1, o2 in self.layers for p, o in ((p1, o1), (p2, o2)) if o != NONE}
        hidden = set(range(1, 3 * count + 2, 3)) - set(self.loose_ends) - read
        for order in itertools.permutations(range(count)):
            for swaps in itertools.product((False, True), repeat=count):
                new = {0: 0, 1: 1}
                for k, (old, swap) in enumerate(zip(order, swaps, strict=True)):
                    new[3 * old + 2] = 3 * k + 2 + swap
                    new[3 * old + 3] = 3 * k + 3 - swap
                    new[3 * old + 4] = 3 * k + 4
                hide = sorted(new[p] for p in hidden)
                options: list[list[int]] = []  # nodes that each branch, in the new order, may read
                ops: list[int] = []
                for k, (old, swap) in enumerate(zip(order, swaps, strict=True)):
                    p1, p2, o1, o2 = self.layers[old]
                    branches = [(p1, o1), (p2, o2)]
                    for p, o in reversed(branches) if swap else branches:
                        readable = [0, *hide] if o == NONE else [new[p]]
                        options.append([node for node in readable if node < 3 * k + 2])
                        ops.append(o)
                for nodes in itertools.product(*options):
                    if set(hide) <= set(nodes):
                        yield tuple(zip(nodes[::2], nodes[1::2], ops[::2], ops[1::2], strict=True))
                        break


@dataclass(frozen=True)
class FastNASGenotype:
    """A decoder: blocks that apply the cell to pairs of encoder taps and earlier blocks."""

    cell: Cell
    connections: tuple[tuple[int, int], ...]
    """Inputs of each block: i < num_taps is encoder tap i, num_taps + b is block b."""
    num_taps: int = 4

    @property
    def collected_blocks(self) -> tuple[int, ...]:
        """Blocks that no later block reads: concatenated for the classifier."""
        read = {i for pair in self.connections for i in pair}
        return tuple(b for b in range(len(self.connections)) if b + self.num_taps not in read)

    def canonical(self) -> "FastNASGenotype":
        """The same network with its cell canonical and its blocks in the lexicographically
        smallest order, the two inputs of each block sorted."""
        return replace(self, cell=self.cell.canonical(), connections=min(self._connection_orders()))

    def _connection_orders(self) -> Iterator[tuple[tuple[int, int], ...]]:
        taps, count = self.num_taps, len(self.connections)
        for order in itertools.permutations(range(count)):
            new = {i: i for i in range(taps)} | {
                taps + old: taps + k for k, old in enumerate(order)
            }
            pairs = []
            for old in order:
                low, high = sorted(new[i] for i in self.connections[old])
                pairs.append((low, high))
            if all(high < taps + k for k, (_, high) in enumerate(pairs)):
                yield tuple(pairs)

    def to_json(self) -> dict[str, object]:
        """{"space": .., "cell": [op0, [p1, p2, o1, o2], ..], "connections": [[i, j], ..]}"""
        return {
            "space": "fast_nas",
            "cell": [self.cell.op0, *map(list, self.cell.layers)],
            "connections": [list(pair) for pair in self.connections],
        }


@dataclass(frozen=True)
class FastNASSpace(Space[FastNASGenotype]):
    """Cells of op0 and `num_layers` layers; decoders of `num_blocks` blocks over `num_taps` taps.

    The 2, 5, 8, .. nodes that layers 1, 2, 3, .. may read follow the publication's first code.
    """

    num_layers: int = 3
    num_blocks: int = 3
    num_taps: int = 4

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_blocks", "num_taps"):
            if getattr(self, field) < 1:
                raise UserError(
                    f"FastNASSpace.{field}: expected at least 1, got {getattr(self, field)}"
                )

    @property
    def name(self) -> str:
        return "fast_nas"

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """Connections first, then the cell; all operations share the head "cell.op"."""
        decisions = [
            Decision(f"connection{b}.{side}", f"connection{b}.{side}", self.num_taps + b)
            for b in range(self.num_blocks)
            for side in ("left", "right")
        ]
        decisions.append(Decision("cell.op0", "cell.op", len(PRIMITIVES)))
        for layer in range(1, self.num_layers + 1):
            name = f"cell.layer{layer}"
            decisions += [
                *(Decision(f"{name}.input{i}", f"{name}.input{i}", 3 * layer - 1) for i in (1, 2)),
                *(Decision(f"{name}.op{i}", "cell.op", len(PRIMITIVES)) for i in (1, 2)),
            ]
        return tuple(decisions)

    def size(self) -> int:
        """Exact number of ordered genotypes."""
        return math.prod(decision.size for decision in self.decisions)

    def decode(self, choices: Sequence[int]) -> FastNASGenotype:
        """The genotype of one choice per decision; UserError names a decision out of range."""
        check_choices(self.decisions, choices)
        split = 2 * self.num_blocks
        left, right, cell = choices[0:split:2], choices[1:split:2], choices[split:]
        layers = zip(cell[1::4], cell[2::4], cell[3::4], cell[4::4], strict=True)
        connections = zip(left, right, strict=True)
        return FastNASGenotype(Cell(cell[0], tuple(layers)), tuple(connections), self.num_taps)

    def encode(self, genotype: FastNASGenotype) -> tuple[int, ...]:
        """The choices that decode to `genotype`; UserError if it is not of this space."""
        lengths = (len(genotype.connections), len(genotype.cell.layers), genotype.num_taps)
        if lengths != (self.num_blocks, self.num_layers, self.num_taps):
            raise UserError(
                f"genotype: expected {self.num_blocks} connections, {self.num_layers} cell layers "
                f"and {self.num_taps} taps, got {lengths[0]}, {lengths[1]} and {lengths[2]}; "
                "make a FastNASSpace of that size"
            )
        choices = (
            *itertools.chain(*genotype.connections),
            genotype.cell.op0,
            *itertools.chain(*genotype.cell.layers),
        )
        check_choices(self.decisions, choices)
        return choices

    def sample(self, rng: random.Random) -> FastNASGenotype:
        """Uniform over ordered genotypes."""
        return self.decode(sample_choices(self.decisions, rng))

    def mutate(self, genotype: FastNASGenotype, rng: random.Random) -> FastNASGenotype:
        """Exactly one decision changes, to one of its other choices, uniformly."""
        return self.decode(mutate_choices(self.decisions, self.encode(genotype), rng))

    def features(self, genotype: FastNASGenotype) -> Mapping[str, float]:
        """Of the cell, and of the connections."""
        cell, taps = genotype.cell, genotype.num_taps
        labels = ["input", PRIMITIVES[cell.op0]]
        sources: list[tuple[int, ...]] = [(), (0,)]
        for k, (p1, p2, o1, o2) in enumerate(cell.layers):
            labels += [PRIMITIVES[o1], PRIMITIVES[o2], "sum"]
            sources += [(p1,) if o1 != NONE else (), (p2,) if o2 != NONE else ()]
            sources.append((3 * k + 2, 3 * k + 3))
        features = graph_features(
            [*labels, "cell"], [*sources, cell.loose_ends], REACH, ("gap", "none")
        )
        labels = [*(f"tap{i}" for i in range(taps)), *["block"] * len(genotype.connections)]
        sources = [*[()] * taps, *genotype.connections]
        collected = tuple(taps + b for b in genotype.collected_blocks)
        decoder = graph_features([*labels, "decoder"], [*sources, collected], {}, pairs=True)
        return features | {f"decoder: {name}": value for name, value in decoder.items()}

    def from_json(self, obj: object) -> FastNASGenotype:
        """Read `FastNASGenotype.to_json` or the published list form, [cell, connections]."""
        if isinstance(obj, dict):
            if set(obj) != {"space", "cell", "connections"}:
                raise UserError(
                    'genotype: expected the keys "space", "cell" and "connections", '
                    f"got {sorted(map(str, obj))}"
                )
            if obj["space"] != self.name:
                raise UserError(
                    f'space: expected "{self.name}", got {shown(obj["space"])}; '
                    "read the genotype with the space that wrote it"
                )
            cell, connections = obj["cell"], obj["connections"]
        else:
            cell, connections = _list(obj, "genotype", 2, "[cell, connections] or an object")
        layers = _list(cell, "cell", 1 + self.num_layers, "[op0, layer, ..]")
        pairs = _list(connections, "connections", self.num_blocks, "[[i, j], ..]")
        choices = []
        for block, pair in enumerate(pairs):
            choices += _list(pair, f"connection{block}", 2, "[i, j]")
        choices.append(layers[0])
        for k, layer in enumerate(layers[1:], 1):
            choices += _list(layer, f"cell.layer{k}", 4, "[p1, p2, o1, o2]")
        for decision, choice in zip(self.decisions, choices, strict=True):
            if decision.head == "cell.op" and choice not in range(len(PRIMITIVES)):
                known = ", ".join(f"{i} {name}" for i, name in enumerate(PRIMITIVES))
                raise UserError(
                    f"{decision.name}: expected the index of a primitive, {known}; got "
                    f"{shown(choice)}"
                )
        return self.decode(choices)


def _list(obj: object, where: str, length: int, form: str) -> list[int]:
    """`obj` if it is a list of that length, else UserError; `decode` checks the items."""
    if not isinstance(obj, list | tuple) or len(obj) != length:
        raise UserError(f"{where}: expected a list of {length}, {form}, got {shown(obj)}")
    return list(obj)
