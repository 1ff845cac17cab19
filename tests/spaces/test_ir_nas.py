import collections
import itertools
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasfast.spaces import IRNASGenotype, IRNASSpace
from nasfast.spaces.ir_nas import (
    OPS,
    PRIMITIVES,
    derive_nodes,
    moves,
    num_edges,
    num_levels,
    targets,
    viterbi,
)

SPACE = IRNASSpace(layers=4, nodes=5)


@st.composite
def genotypes(draw, ops=(0, 1, 2, 3, 4)):
    """Any genotype of SPACE with operations among `ops`."""
    choices = [
        draw(st.sampled_from(ops) if d.head == "cell.op" else st.integers(0, d.size - 1))
        for d in SPACE.decisions
    ]
    return SPACE.decode(choices)


def paths(layers):
    """All valid sequences of levels, by trying every sequence."""
    return [
        levels
        for levels in itertools.product(range(3), repeat=layers)
        if all(abs(a - b) <= 1 for a, b in itertools.pairwise((0, *levels)))
    ]


def test_sizes_of_the_supernet():
    assert [num_edges(nodes) for nodes in (1, 2, 3, 4, 5)] == [2, 5, 9, 14, 20]
    assert [num_levels(layer) for layer in (0, 1, 2, 3, 12)] == [1, 2, 3, 3, 3]
    assert moves(3) == ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
    assert [len(moves(layers)) for layers in (1, 2, 3, 4)] == [1, 3, 6, 9]
    assert [list(targets(level)) for level in range(3)] == [[0, 1], [0, 1, 2], [1, 2]]
    assert (*OPS, "none") == PRIMITIVES


# The space


@pytest.mark.parametrize(("layers", "count"), [(1, 2), (2, 5), (3, 12), (4, 29)])
def test_paths(layers, count):
    space = IRNASSpace(layers, 1)
    assert space.size() == count * 5**2
    decoded = [space.decode([0, 0, 0, path]).levels for path in range(count)]
    assert decoded == paths(layers)
    assert [space.encode(space.decode([0, 0, 0, path]))[-1] for path in range(count)] == [
        *range(count)
    ]


def test_size_is_exact():
    assert SPACE.size() == 29 * math.prod(math.comb(2 + i, 2) * 5**2 for i in range(5))


def test_decisions_in_sampling_order():
    names = [decision.name for decision in SPACE.decisions]
    assert names[:3] == ["cell.node0.inputs", "cell.node0.op0", "cell.node0.op1"]
    assert names[-1] == "path"
    assert [decision.size for decision in SPACE.decisions[::3]] == [1, 3, 6, 10, 15, 29]
    assert collections.Counter(d.head for d in SPACE.decisions)["cell.op"] == 10


@given(genotypes())
def test_edges_may_be_written_in_either_order(genotype):
    obj = genotype.to_json()
    for node in obj["nodes"]:
        node.reverse()
    assert SPACE.from_json(obj) == genotype


# Canonical form


def swap_nodes(nodes, k):
    """Nodes k and k + 1 change places, unless the second reads the first."""
    if any(state == 2 + k for _, state in nodes[k + 1]):
        return nodes
    rename = {2 + k: 3 + k, 3 + k: 2 + k}
    swapped = [*nodes[:k], nodes[k + 1], nodes[k], *nodes[k + 2 :]]
    return tuple(
        tuple(sorted(((op, rename.get(s, s)) for op, s in node), key=lambda edge: edge[1]))
        for node in swapped
    )


@given(genotypes(ops=(0, 4)) | genotypes(), st.lists(st.integers(0, 3), max_size=8))
def test_canonical_is_invariant_and_idempotent(genotype, swaps):
    nodes = genotype.nodes
    for k in swaps:
        nodes = swap_nodes(nodes, k)
    other = replace(genotype, nodes=nodes)
    SPACE.encode(other)
    canonical = genotype.canonical()
    assert other.canonical() == canonical == canonical.canonical()
    assert canonical.levels == genotype.levels
    assert canonical.nodes <= genotype.nodes
    SPACE.encode(canonical)


def cell_graph(nodes):
    """The computation of a cell of three nodes, smallest over all names of its nodes."""
    forms = []
    for names in itertools.permutations("abc"):
        name = ["x", "y", *names]
        forms.append(
            sorted(
                (name[2 + i], sorted((name[s], op) for op, s in node))
                for i, node in enumerate(nodes)
            )
        )
    return str(min(forms))


def test_canonical_cells_are_equal_exactly_when_their_graphs_are():
    space = IRNASSpace(1, 3)
    pairs_and_ops = ((range(math.comb(2 + i, 2)), range(2), range(2)) for i in range(3))
    every = itertools.product(*itertools.chain(*pairs_and_ops))
    genotypes = [space.decode([*choices, 0]) for choices in every]
    pairs = {(genotype.canonical(), cell_graph(genotype.nodes)) for genotype in genotypes}
    assert len(pairs) < len(set(genotypes)) == 4 * 12 * 24
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


# Derivation


def table(rows, columns):
    value = st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5])  # the latter make ties
    return st.lists(
        st.lists(value, min_size=columns, max_size=columns), min_size=rows, max_size=rows
    )


def test_derived_edges_and_operations():
    #                conv  sep  dil  def skip none
    probabilities = [
        [0.10, 0.20, 0.10, 0.10, 0.10, 0.40],
        [0.10, 0.10, 0.30, 0.10, 0.30, 0.10],
        [0.10, 0.10, 0.10, 0.10, 0.25, 0.35],  # node 1
        [0.00, 0.00, 0.00, 0.05, 0.00, 0.95],
        [0.20, 0.20, 0.20, 0.20, 0.20, 0.00],
    ]
    assert derive_nodes(probabilities, 2) == (
        (("sep3x3", 0), ("dil3x3", 1)),
        (("skip", 0), ("conv3x3", 2)),
    )


def test_equal_probabilities_keep_the_first_states_and_operation():
    cell = derive_nodes([[1 / 6] * 6] * 9, 3)
    assert cell == ((("conv3x3", 0), ("conv3x3", 1)),) * 3


@given(table(9, 6))
def test_derived_cell_by_definition(probabilities):
    first = 0
    for i, node in enumerate(derive_nodes(probabilities, 3)):
        worth = {s: max(probabilities[first + s][:5]) for s in range(2 + i)}
        kept = [state for _, state in node]
        for op, state in node:
            assert probabilities[first + state][PRIMITIVES.index(op)] == worth[state]
        for dropped in set(worth) - set(kept):
            assert all((worth[state], -state) > (worth[dropped], -dropped) for state in kept)
        first += 2 + i


def product(levels, probabilities):
    rows = dict(zip(moves(len(levels)), probabilities, strict=True))
    result, before = 1.0, 0
    for layer, level in enumerate(levels, 1):
        result *= rows[layer, before][level - before + 1]
        before = level
    return result


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@given(data=st.data())
def test_viterbi_finds_the_best_path(layers, data):
    probabilities = data.draw(table(len(moves(layers)), 3))
    levels = viterbi(probabilities, layers)
    assert levels in paths(layers)
    assert product(levels, probabilities) == max(product(p, probabilities) for p in paths(layers))


def test_viterbi_does_not_leave_the_levels():
    assert viterbi([[1.0, 0.2, 0.01]] * 9, 4) == (0, 0, 0, 0)
    assert viterbi([[0.01, 0.2, 1.0]] * 9, 4) == (0, 0, 1, 2), "at level 2 it could only stay"


def test_viterbi_ties():
    half = [0.5, 0.5, 0.5]
    assert viterbi([half] * 9, 4) == (0, 0, 0, 0), "the lowest level at the end, and on the way"
    # level 1 at the end is best; from 0 and from 1 it is equally probable
    assert viterbi([half, [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], 2) == (0, 1)


# Errors


def test_genotype_of_another_space():
    message = (
        "genotype: expected 4 levels and 5 nodes, got 3 and 4; make an IRNASSpace of that size"
    )
    other = IRNASSpace(3, 4).decode([0] * 13)
    with pytest.raises(ValueError, match=re.escape(message)):
        SPACE.encode(other)
    with pytest.raises(ValueError, match=re.escape(message)):
        SPACE.from_json(other.to_json())


@pytest.mark.parametrize("field", ["layers", "nodes"])
def test_empty_space(field):
    with pytest.raises(ValueError, match=f"IRNASSpace.{field}: expected at least 1, got 0"):
        IRNASSpace(**{field: 0})


GOOD = IRNASSpace(2, 2).decode([0] * 7).to_json()


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([1], 'genotype: expected an object of "space", "nodes" and "levels", got [1]'),
        ({"nodes": 1}, 'an object of "space", "nodes" and "levels", got [\'nodes\']'),
        (GOOD | {"space": "x"}, "space: expected \"ir_nas\", got 'x'; read the genotype with"),
        (GOOD | {"nodes": []}, "nodes: expected a list, [node, ..], got []"),
        (GOOD | {"nodes": None}, "nodes: expected a list, [node, ..], got None"),
        (
            GOOD | {"nodes": [[["skip", 0]]]},
            "node0: expected a list of 2, [[op, state], [op, state]], got [['skip', 0]]",
        ),
        (
            GOOD | {"nodes": [[["skip", 0], "skip"]]},
            "node0.edge1: expected a list of 2, [op, state], got 'skip'",
        ),
        (
            GOOD | {"nodes": [[["skip", 0], ["skip", "1"]]]},
            "node0.edge1: expected the number of a state, got '1'",
        ),
        (
            GOOD | {"nodes": [[["skip", 0], ["none", 1]]]},
            "node0.edge1: expected one of conv3x3, sep3x3, dil3x3, def3x3, skip, got 'none'",
        ),
        (
            GOOD | {"nodes": [[["skip", 0], ["skip", 2]]]},
            "node0: expected two different states of 0..1, the lower first, got 0 and 2",
        ),
        (
            GOOD | {"nodes": [[["skip", 1], ["skip", 1]]]},
            "node0: expected two different states of 0..1, the lower first, got 1 and 1",
        ),
        (GOOD | {"levels": 3}, "levels: expected a list, [level, ..], got 3"),
        (
            GOOD | {"levels": [0, 2]},
            "levels: expected layer 2 at one of [0, 1], which level 0 before it reaches, got 2",
        ),
        (
            GOOD | {"levels": [2]},
            "levels: expected layer 1 at one of [0, 1], which level 0 before it reaches, got 2",
        ),
        (GOOD | {"levels": [0, True]}, "levels: expected layer 2 at one of [0, 1], which level 0"),
    ],
)
def test_malformed_json(obj, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        IRNASGenotype.from_json(obj)


def test_tables_of_another_size():
    with pytest.raises(ValueError, match=r"probabilities: expected 5 rows of 6, got 4 of 6"):
        derive_nodes([[0.1] * 6] * 4, 2)
    with pytest.raises(ValueError, match=r"probabilities: expected 3 rows of 3, got 3 of 3, 6"):
        viterbi([[0.1] * 6, [0.1] * 3, [0.1] * 3], 2)
