import collections
import itertools
import math
import random
import re

import pytest
from drawn import genotypes
from hypothesis import given

from nasfast.spaces import PRIMITIVES, Cell, FastNASGenotype, FastNASSpace

SPACE = FastNASSpace()
NONE, SKIP = PRIMITIVES.index("none"), PRIMITIVES.index("skip")
ARCHITECTURES = [  # as published, with the blocks that reach the classifier
    ([[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]], (0, 1, 2)),
    ([[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]], (1, 2)),
    ([[5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], [[1, 3], [4, 3], [2, 2]]], (1, 2)),
]


def test_decisions_in_sampling_order():
    names = [decision.name for decision in SPACE.decisions]
    assert names[:3] == ["connection0.left", "connection0.right", "connection1.left"]
    assert names[6:9] == ["cell.op0", "cell.layer1.input1", "cell.layer1.input2"]
    assert names[-1] == "cell.layer3.op2"
    sizes = [decision.size for decision in SPACE.decisions]
    assert sizes == [4, 4, 5, 5, 6, 6, 11, 2, 2, 11, 11, 5, 5, 11, 11, 8, 8, 11, 11]
    assert SPACE.size() == math.prod(sizes) == 1_795_937_679_360_000
    heads = collections.Counter(decision.head for decision in SPACE.decisions)
    assert (len(heads), heads["cell.op"]) == (13, 7)


@pytest.mark.parametrize(("published", "collected"), ARCHITECTURES)
def test_published_architectures(published, collected):
    genotype = SPACE.from_json(published)
    assert genotype.collected_blocks == collected
    assert SPACE.decode(SPACE.encode(genotype)) == genotype
    cell, connections = published
    assert genotype.to_json() == {"space": "fast_nas", "cell": cell, "connections": connections}


def test_loose_ends():
    assert SPACE.from_json(ARCHITECTURES[1][0]).cell.loose_ends == (4, 7, 10)
    assert Cell(0, ((1, 0, 0, 0), (4, 2, 0, 0), (7, 6, 0, 0))).loose_ends == (10,)
    assert Cell(0, ((1, 0, NONE, 0),)).loose_ends == (4,), "what `none` reads is read"


# Canonical form


@given(genotypes(SPACE, ops=(0, SKIP, NONE)) | genotypes(SPACE))
def test_canonical_is_in_the_space(genotype):
    canonical = genotype.canonical()
    assert type(canonical) is FastNASGenotype
    assert SPACE.encode(canonical) <= SPACE.encode(genotype)
    assert len(canonical.cell.loose_ends) == len(genotype.cell.loose_ends)
    assert len(canonical.collected_blocks) == len(genotype.collected_blocks)


def cell_graph(cell):
    """The computation of a cell as a graph, smallest over all names of its nodes."""
    forms, count = [], len(cell.layers)
    for order in itertools.permutations(range(count)):
        for swaps in itertools.product((0, 1), repeat=count):
            name = {0: "x", 1: "op0"}
            for k, (layer, swap) in enumerate(zip(order, swaps)):
                name[3 * k + 2], name[3 * k + 3] = f"{layer}.{swap}", f"{layer}.{1 - swap}"
                name[3 * k + 4] = f"{layer}.sum"
            edges = {("output", "+", name[i]) for i in cell.loose_ends}  # node, operation, input
            for k, (p1, p2, o1, o2) in enumerate(cell.layers):
                for b, (p, o) in enumerate(((p1, o1), (p2, o2))):
                    branch = name[3 * k + 2 + b]
                    edges.add((branch, str(o), "nothing" if o == NONE else name[p]))
                    edges.add((name[3 * k + 4], "+", branch))
            forms.append(sorted(edges))
    return cell.op0, str(min(forms))


def is_one_to_one(pairs):
    pairs = set(pairs)
    return len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def test_canonical_cells_are_equal_exactly_when_their_graphs_are():
    every = itertools.product(
        itertools.product(range(2), range(2), (0, NONE), (0, NONE)),
        itertools.product(range(5), range(5), (0, NONE), (0, NONE)),
    )
    cells = [Cell(0, layers) for layers in every]
    rng = random.Random(0)
    for ops in [(0, NONE)] * 2000 + [(0, SKIP, NONE)] * 1000:
        layers = [[*rng.choices(range(3 * k + 2), k=2), *rng.choices(ops, k=2)] for k in range(3)]
        cells.append(Cell(3, tuple(map(tuple, layers))))
    pairs = [(cell.canonical(), cell_graph(cell)) for cell in cells]
    assert is_one_to_one(pairs)
    assert len({canonical for canonical, _ in pairs[:1600]}) < 800
    assert len(set(cells[1600:])) - len({canonical for canonical, _ in pairs[1600:]}) > 300


def test_canonical_connections_are_equal_exactly_when_their_graphs_are():
    pairs = []
    nodes = [itertools.product(range(2 + b), repeat=2) for b in range(3)]
    for connections in itertools.product(*nodes):
        forms = []
        for names in itertools.permutations("abc"):
            new = [0, 1, *names]
            blocks = zip(names, connections, strict=True)
            forms.append(sorted((n, sorted(str(new[i]) for i in pair)) for n, pair in blocks))
        genotype = FastNASGenotype(Cell(0, ()), connections, num_taps=2)
        pairs.append((genotype.canonical().connections, str(min(forms))))
    assert len(pairs) == 576
    assert is_one_to_one(pairs)


# Errors


def test_genotype_of_another_space():
    message = (
        "expected 3 connections, 3 cell layers and 4 taps, got 1, 1 and 2; make a FastNASSpace"
    )
    with pytest.raises(ValueError, match=message):
        SPACE.encode(FastNASSpace(1, 1, 2).decode([0] * 7))


GOOD = SPACE.from_json(ARCHITECTURES[0][0]).to_json()
CELL = GOOD["cell"][1:]


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ("[]", "genotype: expected a list of 2, [cell, connections] or an object, got '[]'"),
        ([1, 2, 3], "genotype: expected a list of 2, [cell, connections] or an object, got [1, 2"),
        ({"cell": []}, 'expected the keys "space", "cell" and "connections", got [\'cell\']'),
        (GOOD | {"space": "x"}, "space: expected \"fast_nas\", got 'x'; read the genotype with"),
        (GOOD | {"cell": [0, []]}, "cell: expected a list of 4, [op0, layer, ..], got [0, []]"),
        (
            GOOD | {"cell": [0, [], [], []]},
            "cell.layer1: expected a list of 4, [p1, p2, o1, o2], g",
        ),
        (GOOD | {"connections": None}, "connections: expected a list of 3, [[i, j], ..], got None"),
        (GOOD | {"connections": [[0, 0]] * 2 + [[0]]}, "connection2: expected a list of 2, [i, j]"),
        (GOOD | {"connections": [[0, 4]] * 3}, "connection0.right: expected an integer in 0..3, g"),
        (GOOD | {"cell": [11, *CELL]}, "cell.op0: expected the index of a primitive, 0 conv1x1, 1"),
        (GOOD | {"cell": ["conv7x7", *CELL]}, "8 sep5x5_d6, 9 skip, 10 none; got 'conv7x7'"),
    ],
)
def test_malformed_json(obj, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SPACE.from_json(obj)
