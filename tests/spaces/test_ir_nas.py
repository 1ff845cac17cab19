import collections
import itertools
import math
import re

import pytest
from drawn import genotypes
from hypothesis import given, settings
from hypothesis import strategies as st

from nasfast.spaces import IRNASGenotype, IRNASSpace
from nasfast.spaces.ir_nas import (
    OPS,
    PRIMITIVES,
    channels,
    derive_nodes,
    moves,
    num_edges,
    num_levels,
    steps,
    targets,
    viterbi,
)

SPACE = IRNASSpace(layers=4, nodes=5)


FREE = IRNASSpace(layers=4, nodes=1, widths="free", searched_depth=True)


def paths(layers, factors=(1, 2, 4)):
    """All valid sequences of levels, by trying every sequence."""
    return [
        levels
        for levels in itertools.product(range(len(factors)), repeat=layers)
        if all(
            max(factors[a], factors[b]) <= 2 * min(factors[a], factors[b])
            for a, b in itertools.pairwise((0, *levels))
        )
    ]


def free_paths(layers):
    return paths(layers, (1, 1.5, 2, 4))


def test_sizes_of_the_supernet():
    assert [num_edges(nodes) for nodes in (1, 2, 3, 4, 5)] == [2, 5, 9, 14, 20]
    assert [num_levels(layer) for layer in (0, 1, 2, 3, 12)] == [1, 2, 3, 3, 3]
    assert moves(3) == ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
    assert [len(moves(layers)) for layers in (1, 2, 3, 4)] == [1, 3, 6, 9]
    assert [list(targets(level)) for level in range(3)] == [[0, 1], [0, 1, 2], [1, 2]]
    assert (*OPS, "none") == PRIMITIVES


def test_free_widths():
    """From W = 5: 7.5, and twice 7.5; even numbers, the larger one of two that are as near."""
    assert [[channels(w, level, "free") for level in range(4)] for w in (4, 5, 6, 10)] == [
        [4, 6, 8, 16],
        [5, 8, 10, 20],
        [6, 10, 12, 24],
        [10, 16, 20, 40],
    ]
    assert [channels(5, level) for level in range(3)] == [5, 10, 20]
    assert [[*targets(level, "free")] for level in range(4)] == [
        [0, 1, 2],
        [0, 1, 2],
        [0, 1, 2, 3],
        [2, 3],
    ]
    assert [num_levels(layer, "free") for layer in (0, 1, 2, 12)] == [1, 3, 4, 4]
    assert ([*steps()], [*steps("free")]) == ([-1, 0, 1], [-2, -1, 0, 1, 2])
    assert moves(2, "free") == ((1, 0), (2, 0), (2, 1), (2, 2))


# The space


@pytest.mark.parametrize(("layers", "count"), [(1, 2), (2, 5), (3, 12), (4, 29)])
def test_paths(layers, count):
    space = IRNASSpace(layers, 1)
    assert space.size() == count * 5**2
    assert [space.decode([0, 0, 0, path]).levels for path in range(count)] == paths(layers)


def test_paths_of_any_depth_and_free_widths():
    expected = [path for layers in (1, 2, 3, 4) for path in free_paths(layers)]
    assert FREE.size() == len(expected) * 5**2 == (3 + 10 + 32 + 102) * 5**2
    found = [FREE.decode([0, 0, 0, path]) for path in range(len(expected))]
    assert [genotype.levels for genotype in found] == expected
    assert FREE.features(found[3])["layers"] == 2
    form = found[3].to_json()
    assert form["widths"] == "free"
    assert "widths" not in SPACE.decode([0] * 16).to_json(), "as it was before there were others"


def test_decisions_in_sampling_order():
    names = [decision.name for decision in SPACE.decisions]
    assert names[:3] == ["cell.node0.inputs", "cell.node0.op0", "cell.node0.op1"]
    assert names[-1] == "path"
    assert [decision.size for decision in SPACE.decisions[::3]] == [1, 3, 6, 10, 15, 29]
    assert collections.Counter(d.head for d in SPACE.decisions)["cell.op"] == 10
    assert SPACE.size() == math.prod([1, 3, 6, 10, 15, 29, *[5] * 10])


@given(genotypes(SPACE))
def test_edges_may_be_written_in_either_order(genotype):
    obj = genotype.to_json()
    for node in obj["nodes"]:
        node.reverse()
    assert SPACE.from_json(obj) == genotype


# Canonical form


@given(genotypes(SPACE, ops=(0, 4)) | genotypes(SPACE))
def test_canonical_is_in_the_space(genotype):
    canonical = genotype.canonical()
    assert canonical.levels == genotype.levels
    assert canonical.nodes <= genotype.nodes
    SPACE.encode(canonical)


def cell_graph(nodes):
    """The computation of a cell of three nodes, smallest over all names of its nodes."""
    forms = []
    for names in itertools.permutations("abc"):
        name = ["x", "y", *names]
        reads = [sorted((name[s], op) for op, s in node) for node in nodes]
        forms.append(sorted(zip(names, reads)))
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
    row = st.lists(value, min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=rows)


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


@given(table(9, 6), st.integers(0, 6))
def test_the_least_probable_skips_give_way(probabilities, allowed):
    def edges(nodes):
        firsts = (0, 2, 5)
        return {first + state: op for first, node in zip(firsts, nodes) for op, state in node}

    free, bounded = (edges(derive_nodes(probabilities, 3, most)) for most in (None, allowed))
    skips = [edge for edge, op in bounded.items() if op == "skip"]
    assert len(skips) <= allowed
    if [*free.values()].count("skip") <= allowed:
        assert bounded == free
    lost = {edge for edge, op in free.items() if op == "skip"} - {*skips}
    assert all(probabilities[one][4] <= probabilities[other][4] for one in lost for other in skips)


def product(levels, probabilities):
    rows = dict(zip(moves(len(levels)), probabilities, strict=True))
    result, before = 1.0, 0
    for layer, level in enumerate(levels, 1):
        result *= rows[layer, before][level - before + 1]
        before = level
    return result


@settings(max_examples=25)
@given(data=st.data())
def test_the_best_of_all_depths_and_widths(data):
    probabilities = data.draw(table(len(moves(3, "free")), 5))
    depths = data.draw(table(1, 3))[0]
    rows = dict(zip(moves(3, "free"), probabilities, strict=True))

    def worth(levels):
        steps = zip(itertools.count(1), (0, *levels), levels)
        product = math.prod(rows[layer, a][2 + b - a] for layer, a, b in steps)
        return depths[len(levels) - 1] * product ** (1 / len(levels))

    every = [path for layers in (1, 2, 3) for path in free_paths(layers)]
    found = viterbi(probabilities, 3, "free", depths)
    assert found in every
    assert worth(found) == pytest.approx(max(map(worth, every)))
    assert viterbi(probabilities, 3, "free") in free_paths(3), "where the depth is not searched"


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@given(data=st.data())
def test_viterbi_finds_the_best_path(layers, data):
    probabilities = data.draw(table(len(moves(layers)), 3))
    levels = viterbi(probabilities, layers)
    assert levels in paths(layers)
    assert product(levels, probabilities) == max(product(p, probabilities) for p in paths(layers))


def test_viterbi_at_the_borders_and_in_ties():
    assert viterbi([[1.0, 0.2, 0.01]] * 9, 4) == (0, 0, 0, 0)
    assert viterbi([[0.01, 0.2, 1.0]] * 9, 4) == (0, 0, 1, 2), "at level 2 it could only stay"
    half = [0.5, 0.5, 0.5]
    assert viterbi([half] * 9, 4) == (0, 0, 0, 0), "the lowest level at the end, and on the way"
    # level 1 at the end is best; from 0 and from 1 it is equally probable
    assert viterbi([half, [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], 2) == (0, 1)


# Errors


@pytest.mark.parametrize(
    ("levels", "widths", "message"),
    [
        ((0,) * 5, "free", "expected 1 to 4 levels and 1 nodes, got 5 and 1; make an IRNASSpace"),
        (
            (0, 1),
            "published",
            'expected levels of "free" widths, got those of "published"; make an IRNASSpace of',
        ),
    ],
)
def test_genotype_beyond_the_searched_space(levels, widths, message):
    genotype = IRNASGenotype(FREE.decode([0] * 4).nodes, levels, widths)
    for refused in (lambda: FREE.encode(genotype), lambda: FREE.from_json(genotype.to_json())):
        with pytest.raises(ValueError, match=re.escape(f"genotype: {message}")):
            refused()


def test_unknown_widths():
    with pytest.raises(ValueError, match=re.escape(f"IRNASSpace.{WIDTHS}; correct the value")):
        IRNASSpace(widths="x")


def test_genotype_of_another_space():
    message = (
        "genotype: expected 4 levels and 5 nodes, got 3 and 4; make an IRNASSpace of that size"
    )
    other = IRNASSpace(3, 4).decode([0] * 13)
    for refused in (lambda: SPACE.encode(other), lambda: SPACE.from_json(other.to_json())):
        with pytest.raises(ValueError, match=re.escape(message)):
            refused()


GOOD = IRNASSpace(2, 2).decode([0] * 7).to_json()
SKIP = ["skip", 0]
STATES = "node0: expected two different states of 0..1, the lower first, got"
WIDTHS = 'widths: expected "published" or "free", got \'x\''
FOUR = "levels: expected layer 2 at one of [0, 1, 2], which level 1 before it reaches, got 4"
LAYER = "levels: expected layer {} at one of [0, 1], which level 0 before it reaches, got {}"


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([1], 'genotype: expected an object of "space", "nodes" and "levels", got [1]'),
        ({"nodes": 1}, 'an object of "space", "nodes" and "levels", got [\'nodes\']'),
        (GOOD | {"space": "x"}, "space: expected \"ir_nas\", got 'x'; read the genotype with"),
        (GOOD | {"widths": "x"}, f"{WIDTHS}; read it with a newer nasfast"),
        (GOOD | {"widths": "free", "levels": [1, 4]}, FOUR),
        (GOOD | {"nodes": []}, "nodes: expected a list, [node, ..], got []"),
        (GOOD | {"nodes": None}, "nodes: expected a list, [node, ..], got None"),
        (
            GOOD | {"nodes": [[SKIP]]},
            "node0: expected a list of 2, [[op, state], [op, state]], got",
        ),
        (
            GOOD | {"nodes": [[SKIP, "x"]]},
            "node0.edge1: expected a list of 2, [op, state], got 'x'",
        ),
        (
            GOOD | {"nodes": [[SKIP, ["skip", "1"]]]},
            "node0.edge1: expected the number of a state, got '1'",
        ),
        (
            GOOD | {"nodes": [[SKIP, ["none", 1]]]},
            "node0.edge1: expected one of conv3x3, sep3x3, dil3x3, def3x3, skip, got 'none'",
        ),
        (GOOD | {"nodes": [[SKIP, ["skip", 2]]]}, f"{STATES} 0 and 2"),
        (GOOD | {"nodes": [[["skip", 1]] * 2]}, f"{STATES} 1 and 1"),
        (GOOD | {"levels": 3}, "levels: expected a list, [level, ..], got 3"),
        (GOOD | {"levels": [0, 2]}, LAYER.format(2, 2)),
        (GOOD | {"levels": [2]}, LAYER.format(1, 2)),
        (GOOD | {"levels": [0, True]}, LAYER.format(2, True)),
    ],
)
def test_malformed_json(obj, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        IRNASGenotype.from_json(obj)


def test_tables_of_another_size():
    with pytest.raises(ValueError, match=r"probabilities: expected 5 rows of 6, got 4 of 6"):
        derive_nodes([[0.1] * 6] * 4, 2)
    with pytest.raises(ValueError, match=r"depths: expected 1 rows of 2, got 1 of 3"):
        viterbi([[0.1] * 3] * 3, 2, depths=[0.1] * 3)
    with pytest.raises(ValueError, match=r"probabilities: expected 3 rows of 3, got 3 of 3, 6"):
        viterbi([[0.1] * 6, [0.1] * 3, [0.1] * 3], 2)
