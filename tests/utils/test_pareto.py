"""Fronts and hypervolume, against their definitions."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasfast.utils.pareto import (
    Scale,
    additions,
    contributions,
    dominates,
    front,
    hypervolume,
    ranks,
    spread,
)

SIDE = 4


grid = st.integers(0, SIDE)


def point_lists(least=1, values=grid):
    """Points of one to four objectives; on a grid of so few values many are equal."""
    return st.integers(1, 4).flatmap(
        lambda size: st.lists(st.tuples(*[values] * size), min_size=least, max_size=9)
    )


reals = point_lists(values=st.floats(-5, 5).map(lambda x: round(x, 3)))


def cells(points, size):
    """Cells of the grid below (SIDE, ..) that some of the points dominate."""
    corners = itertools.product(range(SIDE), repeat=size)
    return sum(any(all(x <= c for x, c in zip(p, corner)) for p in points) for corner in corners)


@given(point_lists())
def test_front_and_ranks_are_those_of_the_definition(points):
    rest, rank = list(range(len(points))), 0
    expected = [0] * len(points)
    while rest:
        best = [i for i in rest if not any(dominates(points[j], points[i]) for j in rest)]
        if rank == 0:
            assert {points[i] for i in best} == {points[i] for i in front(points)}
        for i in best:
            expected[i] = rank
        rest, rank = [i for i in rest if i not in best], rank + 1
    assert ranks(points) == expected
    found = front(points)
    assert found == [points.index(points[i]) for i in found]  # of equal ones the first, in order


@given(point_lists(least=0))
def test_hypervolume_is_the_number_of_dominated_cells(points):
    size = len(points[0]) if points else 2
    reference = (SIDE,) * size
    assert hypervolume(points, reference) == cells(points, size)
    assert contributions(points, reference) == [
        cells(points, size) - cells(points[:i] + points[i + 1 :], size) for i in range(len(points))
    ]


@given(reals, st.data())
def test_additions_tell_what_is_dominated(points, data):
    others = data.draw(st.lists(st.sampled_from(points), min_size=1, max_size=4))
    others += [tuple(x + data.draw(st.sampled_from([-0.5, 0, 0.5])) for x in p) for p in others]
    scale = Scale(points)
    before = hypervolume(scale(points), scale.reference)
    for other, gain in zip(others, additions(points, others), strict=True):
        more = hypervolume(scale([*points, other]), scale.reference) - before
        if any(dominates(p, other) for p in points):
            assert gain < 0
        elif other in points:
            assert gain == 0
        if gain > 0:
            assert gain == pytest.approx(more)
        else:
            assert more == pytest.approx(0, abs=1e-9)


def test_additions_rank_what_adds_nothing_by_its_distance():
    points = [(0.0, 4.0), (2.0, 2.0), (4.0, 0.0)]
    near, far, equal, good, better = additions(points, [(2, 3), (4, 4), (2, 2), (1, 2), (-1, -1)])
    assert far < near < equal == 0 < good < better
    assert (near, far) == pytest.approx((-0.25, -0.5))


@given(reals, st.integers(1, 12))
def test_spread_begins_with_the_extremes_and_never_repeats(points, count):
    points = [points[i] for i in front(points)]
    chosen = spread(points, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(points))
    assert [points[i][0] for i in chosen] == sorted(points[i][0] for i in chosen)
    lowest = [min(column) for column in zip(*points)]
    for objective in range(min(count, len(lowest))):
        assert lowest[objective] in [points[i][objective] for i in chosen]


def test_spread_covers_what_lies_between():
    points = [(0.0, 10.0), (0.1, 9.9), (5.0, 5.0), (9.9, 0.1), (10.0, 0.0)]
    assert [spread(points, n) for n in (1, 2, 3)] == [[0], [0, 4], [0, 2, 4]]


def test_what_is_equal_in_all_has_a_scale():
    assert Scale([(2.0, 3.0)])([(2.0, 4.0)]) == [(0.0, 1.0)]
    assert math.isfinite(additions([(2.0, 3.0)], [(2.0, 9.0)])[0])
