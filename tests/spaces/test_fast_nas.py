import collections
import itertools
import random
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasfast.spaces import PRIMITIVES, Cell, FastNASGenotype, FastNASSpace

SPACE = FastNASSpace()
NONE, SKIP = PRIMITIVES.index("none"), PRIMITIVES.index("skip")
ARCHITECTURES = [  # as published, with the blocks that reach the classifier
    ([[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]], (0, 1, 2)),
    ([[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]], (1, 2)),
    ([[5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], [[1, 3], [4, 3], [2, 2]]], (1, 2)),
]


@st.composite
def genotypes(draw, ops=tuple(range(11))):
    """Any genotype of SPACE with operations among `ops`."""
    choices = [
        draw(st.sampled_from(ops) if d.head == "cell.op" else st.integers(0, d.size - 1))
        for d in SPACE.decisions
    ]
    return SPACE.decode(choices)


def test_size_is_exact():
    assert SPACE.size() == 1_795_937_679_360_000
    assert SPACE.size() == (4 * 4 * 5 * 5 * 6 * 6) * 11 * (4 * 121) * (25 * 121) * (64 * 121)


def test_decisions_in_sampling_order():
    names = [decision.name for decision in SPACE.decisions]
    assert names[:3] == ["connection0.left", "connection0.right", "connection1.left"]
    assert names[6:9] == ["cell.op0", "cell.layer1.input1", "cell.layer1.input2"]
    assert names[-1] == "cell.layer3.op2"
    sizes = [decision.size for decision in SPACE.decisions]
    assert sizes == [4, 4, 5, 5, 6, 6, 11, 2, 2, 11, 11, 5, 5, 11, 11, 8, 8, 11, 11]
    heads = collections.Counter(decision.head for decision in SPACE.decisions)
    assert len(heads) == 13
    assert heads["cell.op"] == 7


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


def swap_branches(cell, k):
    """The two branches of layer k (from 1) change places."""
    rename = {3 * k - 1: 3 * k, 3 * k: 3 * k - 1}
    layers = [
        (rename.get(p1, p1), rename.get(p2, p2), o1, o2) if i > k else (p1, p2, o1, o2)
        for i, (p1, p2, o1, o2) in enumerate(cell.layers, 1)
    ]
    p1, p2, o1, o2 = layers[k - 1]
    layers[k - 1] = (p2, p1, o2, o1)
    return replace(cell, layers=tuple(layers))


def swap_layers(cell, k):
    """Layers k and k + 1 change places, unless the second reads the first."""
    first, second = cell.layers[k - 1 : k + 1]
    if max(second[:2]) >= 3 * k - 1:
        return cell
    rename = {3 * k + i: 3 * k + (i + 3 if i < 2 else i - 3) for i in range(-1, 5)}
    later = [(rename.get(p, p), rename.get(q, q), a, b) for p, q, a, b in cell.layers[k + 1 :]]
    return replace(cell, layers=(*cell.layers[: k - 1], second, first, *later))


def reread_none(cell, k, branch, node):
    """A `none` reads another node, unless the loose ends change."""
    layer = list(cell.layers[k - 1])
    if layer[2 + branch] != NONE:
        return cell
    layer[branch] = node % (3 * k - 1)
    other = replace(cell, layers=(*cell.layers[: k - 1], tuple(layer), *cell.layers[k:]))
    return other if other.loose_ends == cell.loose_ends else cell


def swap_inputs(connections, b):
    return (*connections[:b], connections[b][::-1], *connections[b + 1 :])


def swap_blocks(connections, b, taps=4):
    """Blocks b and b + 1 change places, unless the second reads the first."""
    first, second = connections[b : b + 2]
    if taps + b in second:
        return connections
    rename = {taps + b: taps + b + 1, taps + b + 1: taps + b}
    later = [(rename.get(i, i), rename.get(j, j)) for i, j in connections[b + 2 :]]
    return (*connections[:b], second, first, *later)


@st.composite
def equivalent(draw, genotype):
    cell, connections = genotype.cell, genotype.connections
    for _ in range(draw(st.integers(1, 12))):
        step = draw(st.sampled_from(("branches", "layers", "none", "none", "inputs", "blocks")))
        if step == "branches":
            cell = swap_branches(cell, draw(st.integers(1, 3)))
        elif step == "layers":
            cell = swap_layers(cell, draw(st.integers(1, 2)))
        elif step == "none":
            k, branch = draw(st.integers(1, 3)), draw(st.integers(0, 1))
            cell = reread_none(cell, k, branch, draw(st.integers(0, 7)))
        elif step == "inputs":
            connections = swap_inputs(connections, draw(st.integers(0, 2)))
        else:
            connections = swap_blocks(connections, draw(st.integers(0, 1)))
    return FastNASGenotype(cell, connections)


@given(genotypes(ops=(0, SKIP, NONE)) | genotypes(), st.data())
def test_canonical_is_invariant_and_idempotent(genotype, data):
    canonical = genotype.canonical()
    other = data.draw(equivalent(genotype))
    SPACE.encode(other)
    assert other.canonical() == canonical
    assert type(canonical) is FastNASGenotype
    assert SPACE.encode(canonical) <= SPACE.encode(genotype)
    assert canonical.canonical() == canonical
    assert len(canonical.cell.loose_ends) == len(genotype.cell.loose_ends)
    assert len(canonical.collected_blocks) == len(genotype.collected_blocks)


def cell_graph(cell):
    """The computation of a cell of two layers as a graph, smallest over all names of its nodes."""
    edges = set()  # (node, operation, node it reads)
    name = {0: ("x",), 1: ("op0",)}
    for k, (p1, p2, o1, o2) in enumerate(cell.layers):
        for b, (p, o) in enumerate(((p1, o1), (p2, o2))):
            branch = ("branch", 2 * k + b)
            edges.add((branch, o, ("nothing",) if o == NONE else name[p]))
            edges.add((("sum", k), "+", branch))
            name[3 * k + 2 + b] = branch
        name[3 * k + 4] = ("sum", k)
    edges |= {(("output",), "+", name[i]) for i in cell.loose_ends}
    forms = []
    for branches, sums in itertools.product(
        itertools.permutations(range(4)), itertools.permutations(range(2))
    ):
        new = {("branch", i): ("branch", j) for i, j in enumerate(branches)}
        new |= {("sum", i): ("sum", j) for i, j in enumerate(sums)}
        forms.append(sorted(str((new.get(a, a), o, new.get(b, b))) for a, o, b in edges))
    return cell.op0, tuple(min(forms))


def is_one_to_one(pairs):
    pairs = set(pairs)
    return len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)


def test_canonical_cells_are_equal_exactly_when_their_graphs_are():
    every = itertools.product(
        itertools.product(range(2), range(2), (0, NONE), (0, NONE)),
        itertools.product(range(5), range(5), (0, NONE), (0, NONE)),
    )
    cells = [Cell(0, layers) for layers in every]
    assert len(cells) == 1600
    rng, space = random.Random(0), FastNASSpace(num_layers=2)
    while len(cells) < 3600:
        cell = space.sample(rng).cell
        cells.append(Cell(3, tuple((p, q, o % 3, r % 3 and NONE) for p, q, o, r in cell.layers)))
    pairs = [(cell.canonical(), cell_graph(cell)) for cell in cells]
    assert is_one_to_one(pairs)
    assert len({canonical for canonical, _ in pairs[:1600]}) < 800


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


def test_what_none_reads_matters_for_the_loose_ends():
    reads_x = Cell(0, ((0, 0, 1, NONE),))
    reads_op0 = Cell(0, ((0, 1, 1, NONE),))
    assert reads_x.canonical() != reads_op0.canonical()
    two = Cell(0, ((0, 0, 1, 1), (0, 2, 1, NONE)))
    assert two.canonical() == replace(two, layers=((0, 0, 1, 1), (0, 3, 1, NONE))).canonical()


# Errors


def test_genotype_of_another_space():
    with pytest.raises(
        ValueError,
        match="expected 3 connections, 3 cell layers and 4 taps, got 1, 1 and 2; make a FastNAS",
    ):
        SPACE.encode(FastNASSpace(1, 1, 2).decode([0] * 7))


@pytest.mark.parametrize("field", ["num_layers", "num_blocks", "num_taps"])
def test_empty_space(field):
    with pytest.raises(ValueError, match=f"FastNASSpace.{field}: expected at least 1, got 0"):
        FastNASSpace(**{field: 0})


GOOD = SPACE.from_json(ARCHITECTURES[0][0]).to_json()


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
            ("cell.layer1: expected a list of 4, [p1, p2, o1, o2], g"),
        ),
        (GOOD | {"connections": None}, "connections: expected a list of 3, [[i, j], ..], got None"),
        (
            GOOD | {"connections": [[0, 0], [0, 0], [0]]},
            "connection2: expected a list of 2, [i, j], got [0]",
        ),
        (
            GOOD | {"connections": [[0, 4], [0, 0], [0, 0]]},
            "connection0.right: expected an integer in 0..3, got 4",
        ),
        (
            GOOD | {"cell": [11, *GOOD["cell"][1:]]},
            "cell.op0: expected the index of a primitive, 0 conv1x1, 1 conv3x3, 2 sep3x3, ",
        ),
        (
            GOOD | {"cell": ["conv7x7", *GOOD["cell"][1:]]},
            "8 sep5x5_d6, 9 skip, 10 none; got 'conv7x7'",
        ),
    ],
)
def test_malformed_json(obj, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SPACE.from_json(obj)
