"""Cells and widths of restoration networks: Zhang et al., IR-NAS, CVPR 2020 (arXiv 1909.08228).

One cell of N nodes serves every layer. Node i sums two operations on two of its 2 + i states:
state 0 is the input from two layers before, 1 the input from the layer before, 2 + j is node j.
Layer l = 1, 2, .. runs at a level 0, 1 or 2, its width doubling with each. Widths of neighbouring
layers differ by a factor of two at most, and before the first layer stands level 0.

Two options are beside the publication: "free" widths, which have a level of 1.5 times the basic
width too, and a searched depth, networks of 1 to L layers.
"""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, get_args

from nasfast.spaces.base import (
    Decision,
    Space,
    check_choices,
    graph_features,
    mutate_choices,
    sample_choices,
)
from nasfast.utils.errors import UserError, shown

PRIMITIVES = ("conv3x3", "sep3x3", "dil3x3", "def3x3", "skip", "none")
OPS = tuple(name for name in PRIMITIVES if name != "none")
"""What an edge of a derived cell can be."""
REACH = {"conv3x3": 1, "sep3x3": 2, "dil3x3": 2, "def3x3": 3, "skip": 0}
"""Pixels that an operation's output depends on, to each side. That of def3x3 has no bound: here are
the convolution of its offsets, its taps, and offsets of up to a pixel."""
SKIP = PRIMITIVES.index("skip")

Widths = Literal["published", "free"]
FACTORS: dict[Widths, tuple[float, ...]] = {"published": (1, 2, 4), "free": (1, 1.5, 2, 4)}
"""Width of each level, in multiples of the basic width W."""

MAX_LAYERS = 64
"""Layers of a network, at most."""
MAX_NODES = 8
"""Nodes of a cell, at most: the canonical order is found among all N! of them."""

Edge = tuple[str, int]
"""(operation, state it reads)."""
Node = tuple[Edge, Edge]


def num_edges(nodes: int) -> int:
    """Edges of the cell of the supernet: its node i reads all its 2 + i states."""
    return nodes * (nodes + 3) // 2


def channels(width: int, level: int, widths: Widths = "published") -> int:
    """Channels of a state at a level, for the basic width W. 1.5 W is the even number that is
    nearest, the larger one of two: halves of the channels share offsets of a deformable
    convolution."""
    exact = width * FACTORS[widths][level]
    return 2 * math.floor(exact / 2 + 0.5) if FACTORS[widths][level] == 1.5 else int(exact)


@cache
def targets(level: int, widths: Widths = "published") -> range:
    """Levels that the layer after one of `level` can have: at most twice or half as wide."""
    factors = FACTORS[widths]
    within = [i for i, f in enumerate(factors) if factors[level] / 2 <= f <= factors[level] * 2]
    return range(within[0], within[-1] + 1)


@cache
def num_levels(layer: int, widths: Widths = "published") -> int:
    """Levels that layer 1, 2, .. can have; 0 is what stands before the first."""
    return targets(num_levels(layer - 1, widths) - 1, widths).stop if layer else 1


def steps(widths: Widths = "published") -> range:
    """Of a source to its targets, the differences of levels: the columns of beta."""
    levels = range(len(FACTORS[widths]))
    most = max(target - level for level in levels for target in targets(level, widths))
    return range(-most, most + 1)


def moves(layers: int, widths: Widths = "published") -> tuple[tuple[int, int], ...]:
    """(layer, level before it) of each row of beta: a source, and its moves by `steps` levels."""
    return tuple(
        (layer, level)
        for layer in range(1, layers + 1)
        for level in range(num_levels(layer - 1, widths))
    )


@dataclass(frozen=True)
class IRNASGenotype:
    """A cell and the level of each layer."""

    nodes: tuple[Node, ...]
    """The two edges of each node, from different states, the lower state first."""
    levels: tuple[int, ...]
    widths: Widths = "published"
    """What the levels stand for."""

    def channels(self, width: int) -> tuple[int, ...]:
        """Of the states of each layer, for the basic width W."""
        return tuple(channels(width, level, self.widths) for level in self.levels)

    @property
    def skips(self) -> int:
        """Edges of the cell that are identities."""
        return sum(op == "skip" for node in self.nodes for op, _ in node)

    def canonical(self) -> "IRNASGenotype":
        """The same network with its nodes in the lexicographically smallest order.

        The output of a cell is the concatenation of all nodes, which only 1x1 and depthwise
        convolutions read: their order is a matter of names. Time grows as N!, 120 for N = 5.
        """
        orders = []
        for order in itertools.permutations(range(len(self.nodes))):
            new = {0: 0, 1: 1} | {2 + old: 2 + k for k, old in enumerate(order)}
            nodes = [_node((op, new[state]) for op, state in self.nodes[old]) for old in order]
            if all(state < 2 + k for k, node in enumerate(nodes) for _, state in node):
                orders.append(tuple(nodes))
        return replace(self, nodes=min(orders))

    def to_json(self) -> dict[str, object]:
        """{"space": .., "nodes": [[[op, state], [op, state]], ..], "levels": [level, ..]}, and
        "widths" where they are not the published ones."""
        form: dict[str, object] = {
            "space": "ir_nas",
            "nodes": [[list(edge) for edge in node] for node in self.nodes],
            "levels": list(self.levels),
        }
        return form if self.widths == "published" else form | {"widths": self.widths}

    @classmethod
    def from_json(cls, obj: object) -> "IRNASGenotype":
        """Read `to_json`, of any number of nodes and layers; UserError names the field."""
        if not isinstance(obj, dict) or {*obj, "widths"} != {
            "space",
            "nodes",
            "levels",
            "widths",
        }:
            got = sorted(map(str, obj)) if isinstance(obj, dict) else shown(obj)
            raise UserError(
                f'genotype: expected an object of "space", "nodes" and "levels", got {got}'
            )
        if obj["space"] != "ir_nas":
            raise UserError(
                f'space: expected "ir_nas", got {shown(obj["space"])}; '
                "read the genotype with the space that wrote it"
            )
        widths = obj.get("widths", "published")
        if widths not in get_args(Widths):
            raise UserError(f"widths: {_one_of_widths(widths)}; read it with a newer nasfast")
        nodes = [
            _node(
                _edge(edge, f"node{i}.edge{j}")
                for j, edge in enumerate(_list(node, f"node{i}", 2, "[[op, state], [op, state]]"))
            )
            for i, node in enumerate(_list(obj["nodes"], "nodes", None, "[node, ..]"))
        ]
        levels = _list(obj["levels"], "levels", None, "[level, ..]")
        genotype = cls(tuple(nodes), tuple(levels), widths)
        IRNASSpace(len(levels), len(nodes), widths=widths).encode(genotype)
        return genotype


@dataclass(frozen=True)
class IRNASSpace(Space[IRNASGenotype]):
    """Networks of `layers` layers whose cell has `nodes` nodes."""

    layers: int = 4
    nodes: int = 5
    widths: Widths = field(default="published", kw_only=True)
    """What levels a layer can have."""
    searched_depth: bool = field(default=False, kw_only=True)
    """Whether networks of fewer layers are of the space too."""

    def __post_init__(self) -> None:
        if self.widths not in get_args(Widths):
            raise UserError(f"IRNASSpace.widths: {_one_of_widths(self.widths)}; correct the value")
        for name, most in (("layers", MAX_LAYERS), ("nodes", MAX_NODES)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(
                    f"IRNASSpace.{name}: expected 1 to {most}, got {getattr(self, name)}"
                )

    @property
    def name(self) -> str:
        return "ir_nas"

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """Of each node the pair of states and the two operations, which share the head "cell.op";
        then the path, an index into all valid sequences of levels, the shorter ones first, those of
        one length in lexicographic order."""
        decisions = []
        for i in range(self.nodes):
            inputs = f"cell.node{i}.inputs"
            decisions += [
                Decision(inputs, inputs, math.comb(2 + i, 2)),
                *(Decision(f"cell.node{i}.op{j}", "cell.op", len(OPS)) for j in (0, 1)),
            ]
        paths = sum(_num_paths(0, layers, self.widths) for layers in self.depths)
        return (*decisions, Decision("path", "path", paths))

    @property
    def depths(self) -> range:
        """Layers that a network can have."""
        return range(1 if self.searched_depth else self.layers, self.layers + 1)

    def size(self) -> int:
        """Exact number of genotypes, not deduplicated by canonical form."""
        return math.prod(decision.size for decision in self.decisions)

    def decode(self, choices: Sequence[int]) -> IRNASGenotype:
        """The genotype of one choice per decision; UserError names a decision out of range."""
        check_choices(self.decisions, choices)
        nodes = []
        for i in range(self.nodes):
            pair, *ops = choices[3 * i : 3 * i + 3]
            low, high = _pairs(2 + i)[pair]
            nodes.append(((OPS[ops[0]], low), (OPS[ops[1]], high)))
        index = choices[-1]
        for layers in self.depths:
            if index < (paths := _num_paths(0, layers, self.widths)):
                break
            index -= paths
        return IRNASGenotype(tuple(nodes), _path(index, layers, self.widths), self.widths)

    def encode(self, genotype: IRNASGenotype) -> tuple[int, ...]:
        """The choices that decode to `genotype`; UserError if it is not of this space."""
        lengths = (len(genotype.levels), len(genotype.nodes))
        if lengths[0] not in self.depths or lengths[1] != self.nodes:
            layers = f"1 to {self.layers}" if self.searched_depth else f"{self.layers}"
            raise UserError(
                f"genotype: expected {layers} levels and {self.nodes} nodes, got {lengths[0]} "
                f"and {lengths[1]}; make an IRNASSpace of that size"
            )
        if genotype.widths != self.widths:
            raise UserError(
                f'genotype: expected levels of "{self.widths}" widths, got those of '
                f'"{genotype.widths}"; make an IRNASSpace of these'
            )
        choices = []
        for i, ((op0, low), (op1, high)) in enumerate(genotype.nodes):
            for j, op in enumerate((op0, op1)):
                if op not in OPS:
                    raise UserError(
                        f"node{i}.edge{j}: expected one of {', '.join(OPS)}, got {shown(op)}"
                    )
            if (low, high) not in _pairs(2 + i):
                raise UserError(
                    f"node{i}: expected two different states of 0..{1 + i}, the lower first, got "
                    f"{shown(low)} and {shown(high)}"
                )
            choices += [_pairs(2 + i).index((low, high)), OPS.index(op0), OPS.index(op1)]
        shorter = sum(
            _num_paths(0, layers, self.widths) for layers in self.depths if layers < lengths[0]
        )
        return (*choices, shorter + _path_index(genotype.levels, self.widths))

    def sample(self, rng: random.Random) -> IRNASGenotype:
        """Uniform over genotypes."""
        return self.decode(sample_choices(self.decisions, rng))

    def mutate(self, genotype: IRNASGenotype, rng: random.Random) -> IRNASGenotype:
        """Exactly one decision changes, to one of its other choices, uniformly."""
        return self.decode(mutate_choices(self.decisions, self.encode(genotype), rng))

    def features(self, genotype: IRNASGenotype) -> Mapping[str, float]:
        """Of the cell; and the levels, how often they occur and follow each other; the number of
        layers where it is searched."""
        labels, sources = ["before last", "last"], list[tuple[int, ...]]([(), ()])
        states = [0, 1]
        for node in genotype.nodes:
            at = len(labels)
            labels += [*(op for op, _ in node), "node"]
            sources += [*((states[state],) for _, state in node), (at, at + 1)]
            states.append(at + 2)
        features = graph_features(
            [*labels, "cell"], [*sources, tuple(states[2:])], REACH, pairs=True
        )
        levels = genotype.levels
        path = Counter(f"level{level}" for level in levels)
        path.update(f"level{b} after {a}" for a, b in itertools.pairwise(levels))
        if self.searched_depth:
            path["layers"] = len(levels)
        return features | path

    def from_json(self, obj: object) -> IRNASGenotype:
        """Read `IRNASGenotype.to_json`; UserError if it is not of this space."""
        genotype = IRNASGenotype.from_json(obj)
        self.encode(genotype)
        return genotype


def derive_nodes(
    probabilities: Sequence[Sequence[float]], nodes: int, max_skips: int | None = None
) -> tuple[Node, ...]:
    """The cell that the mixing probabilities of a supernet stand for (section 3.1).

    An edge is worth its largest probability of an operation other than `none`. Each node keeps the
    two edges worth most, the earlier one where they are equal, with that operation.

    Args:
        probabilities: one row per edge, in the order of nodes, then of states; columns as
            PRIMITIVES.
        nodes: nodes of the cell.
        max_skips: of the cell. The least probable skip beyond counts as impossible and the cell is
            derived again, until no more are left (Chen et al., P-DARTS, ICCV 2019, section 3.3).

    Raises:
        ValueError: rows or columns of another number.
    """
    _check_table("probabilities", probabilities, num_edges(nodes), len(PRIMITIVES))
    table = [list(row[: len(OPS)]) for row in probabilities]
    while True:
        derived, skips, first = [], [], 0
        for i in range(nodes):
            rows = table[first : first + 2 + i]
            best = sorted(range(2 + i), key=lambda state: -max(rows[state]))[:2]
            ops = {state: rows[state].index(max(rows[state])) for state in best}
            derived.append(_node((OPS[op], state) for state, op in ops.items()))
            skips += [first + state for state, op in ops.items() if op == SKIP]
            first += 2 + i
        if max_skips is None or len(skips) <= max_skips:
            return tuple(derived)
        table[min(skips, key=lambda edge: table[edge][SKIP])][SKIP] = 0.0


def viterbi(
    probabilities: Sequence[Sequence[float]],
    layers: int,
    widths: Widths = "published",
    depths: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """The levels whose product of move probabilities is largest (section 3.2).

    Of equal products the one from the lower level is kept, and at the end the lowest level.

    Where the depth is searched, each number of layers has such a path, and that one is taken whose
    depth's probability times the geometric mean of its moves' is largest, the shorter one of
    equals. The mean, as the product falls with every layer, whatever the supernet learned.

    Args:
        probabilities: one row per source in the order of :func:`moves`, columns as
            :func:`steps`; what leaves the levels is not read.
        layers: layers of the network, at most where the depth is searched.
        widths: what levels there are.
        depths: probability of 1, 2, .. layers; None where the depth is not searched.

    Raises:
        ValueError: rows or columns of another number.
    """
    rows, columns = moves(layers, widths), steps(widths)
    _check_table("probabilities", probabilities, len(rows), len(columns))
    if depths is not None:
        _check_table("depths", [depths], 1, layers)
    table = dict(zip(rows, probabilities))
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (1.0, ())}
    exits: list[tuple[float, tuple[int, ...]]] = []
    for layer in range(1, layers + 1):
        paths: dict[int, tuple[float, tuple[int, ...]]] = {}
        for source, (product, levels) in sorted(best.items()):
            for target in targets(source, widths):
                score = product * table[layer, source][target - source - columns.start]
                if target not in paths or score > paths[target][0]:
                    paths[target] = score, (*levels, target)
        best = paths
        exits.append(max((best[level] for level in sorted(best)), key=lambda path: path[0]))
    if depths is None:
        return exits[-1][1]
    worth = [
        depth * product ** (1 / len(levels))
        for depth, (product, levels) in zip(depths, exits, strict=True)
    ]
    return exits[worth.index(max(worth))][1]


@cache
def _pairs(states: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(states), 2))


@cache
def _num_paths(level: int, layers: int, widths: Widths) -> int:
    """Sequences of `layers` levels after `level`."""
    if not layers:
        return 1
    return sum(_num_paths(target, layers - 1, widths) for target in targets(level, widths))


def _path(index: int, layers: int, widths: Widths) -> tuple[int, ...]:
    """Sequence of levels number `index` in lexicographic order."""
    levels: list[int] = []
    for left in reversed(range(layers)):
        for target in targets(levels[-1] if levels else 0, widths):
            if index < _num_paths(target, left, widths):
                levels.append(target)
                break
            index -= _num_paths(target, left, widths)
    return tuple(levels)


def _path_index(levels: Sequence[int], widths: Widths) -> int:
    """Inverse of `_path`; UserError names a level that the one before does not reach."""
    index, before = 0, 0
    for layer, level in enumerate(levels, 1):
        reached = targets(before, widths)
        if type(level) is not int or level not in reached:
            raise UserError(
                f"levels: expected layer {layer} at one of {sorted(reached)}, which level "
                f"{before} before it reaches, got {shown(level)}"
            )
        left = len(levels) - layer
        index += sum(_num_paths(target, left, widths) for target in reached if target < level)
        before = level
    return index


def _one_of_widths(got: object) -> str:
    choices = " or ".join(f'"{name}"' for name in get_args(Widths))
    return f"expected {choices}, got {shown(got)}"


def _node(edges: Iterable[Edge]) -> Node:
    first, second = sorted(edges, key=lambda edge: edge[1])
    return first, second


def _edge(obj: object, where: str) -> Edge:
    op, state = _list(obj, where, 2, "[op, state]")
    if type(state) is not int:
        raise UserError(f"{where}: expected the number of a state, got {shown(state)}")
    return op, state


def _list(obj: object, where: str, length: int | None, form: str) -> list[Any]:
    """`obj` if it is a list of that length, None for any but 0, else UserError."""
    if not isinstance(obj, list | tuple) or len(obj) != (length or max(len(obj), 1)):
        kind = f"a list of {length}" if length else "a list"
        raise UserError(f"{where}: expected {kind}, {form}, got {shown(obj)}")
    return list(obj)


def _check_table(name: str, table: Sequence[Sequence[float]], rows: int, columns: int) -> None:
    widths = {len(row) for row in table}
    if len(table) != rows or widths != {columns}:
        got = f"{len(table)} of {', '.join(map(str, sorted(widths)))}"
        raise ValueError(f"{name}: expected {rows} rows of {columns}, got {got}")
