"""The choice of operations by what their absence costs."""

import json

import pytest
import torch

from nasfast.searches.perturbation import Perturbation, edges_of
from nasfast.spaces.ir_nas import OPS, PRIMITIVES, SKIP, derive_nodes, num_edges

NODES = 3
EDGES = num_edges(NODES)
GAINS = torch.rand(EDGES, len(PRIMITIVES), generator=torch.Generator().manual_seed(0))
"""What each operation takes from the loss where it runs."""


def probabilities():
    """By which skip is the largest everywhere, as after a collapse."""
    table = torch.full((EDGES, len(PRIMITIVES)), 0.1)
    table[:, SKIP] = 0.5
    return table


def loss(mix):
    """Of what is active; the factors do not count."""
    return -sum(GAINS[edge, k].item() for edge, row in enumerate(mix.active) for k in row)


def finished(choices):
    while choices.made < choices.total:
        choices.choose(probabilities(), loss)
        yield choices.mix(probabilities())


def test_what_costs_most_stays():
    choices = Perturbation(NODES, 0)
    assert choices.total == EDGES + NODES - 1
    *_, mix = finished(choices)
    best = GAINS[:, : len(OPS)].argmax(1).tolist()
    worth = GAINS[torch.arange(EDGES), best] - GAINS[:, PRIMITIVES.index("none")]
    for node in range(NODES):
        edges = edges_of(node)
        kept = sorted(sorted(edges, key=lambda edge: -worth[edge])[:2])
        assert [edge for edge in edges if mix.active[edge] != (5,)] == kept
        assert all(mix.active[edge] == (best[edge],) for edge in kept)
    expected = torch.zeros(EDGES, len(PRIMITIVES))
    for edge, (k,) in enumerate(mix.active):
        expected[edge, k] = 1
    assert torch.equal(mix.weights, expected)
    for node, pair in enumerate(derive_nodes(mix.weights.tolist(), NODES)):
        edges = edges_of(node)
        assert all(mix.active[edges[state]] == (OPS.index(op),) for op, state in pair)


def test_no_more_skips_than_allowed():
    choices = Perturbation(NODES, 0, max_skips=2)
    gains = GAINS.clone()
    gains[:, SKIP] = 2.0

    def loss(mix):
        return -sum(gains[edge, k].item() for edge, row in enumerate(mix.active) for k in row)

    while choices.made < EDGES:
        choices.choose(probabilities(), loss)
    chosen = choices.mix(probabilities()).weights.argmax(1)
    first_two = [edge for (edge,) in choices._order[:2]]
    assert (chosen == SKIP).nonzero().flatten().tolist() == sorted(first_two)


def test_an_absent_operation_has_no_factor_and_the_others_keep_theirs():
    seen = []
    choices = Perturbation(NODES, 0)
    choices.choose(probabilities(), lambda mix: seen.append(mix) or 0.0)
    assert len(seen) == len(OPS)
    first = choices._order[0][0]
    for k, mix in enumerate(seen):
        expected = probabilities()
        expected[first, k] = 0
        assert torch.equal(mix.weights, expected)
        assert mix.active[first] == tuple(j for j in range(len(PRIMITIVES)) if j != k)
    assert choices.mix(probabilities()).active[first] == (0,)  # of equal losses the first
    assert choices.last == f"edge {first}: conv3x3"


@pytest.mark.parametrize("made", [1, 5, 10])
def test_the_state_and_the_seed_decide(made):
    choices, other = Perturbation(NODES, 0), Perturbation(NODES, 0)
    for _ in range(made):
        choices.choose(probabilities(), loss)
    other.load_state_dict(json.loads(json.dumps(choices.state_dict())))
    for one, two in zip(finished(choices), finished(other), strict=True):
        assert one.active == two.active
    assert Perturbation(NODES, 1)._order != choices._order == Perturbation(NODES, 0)._order
