import math
import random

import pytest

from nasfast.latency.operators import Operator
from nasfast.latency.table import GROUPS, LatencyTable


def convolution(channels, side, kernel=3, groups=1):
    maps = (1, channels, side, side)
    weight = (channels, channels // groups, kernel, kernel)
    return Operator("conv", (maps,), maps, weight, (1, 1, 1, 1, 1, 1, groups))


def one_of(group, channels, side):
    maps = (1, channels, side, side)
    weight = (channels, channels, 3, 3)
    return {
        "dense": convolution(channels, side),
        "pointwise": convolution(channels, side, 1),
        "depthwise": convolution(channels, side, 3, channels),
        "deformable": Operator(
            "deform_conv", (maps, (1, 18, side, side)), maps, weight, (1, 1, 1, 1, 1, 1, 1)
        ),
        "rest": Operator("add", (maps, maps), maps),
    }[group]


def time_of(operator):
    return 1e-6 * operator.cells + 1e-9 * operator.macs


SIZES = [(channels, side) for channels in (8, 16, 32) for side in (8, 16, 32)]
TIMES = {o: time_of(o) for group in GROUPS for size in SIZES for o in [one_of(group, *size)]}
TABLE = LatencyTable(TIMES)


def networks(count, factors, constant):
    rng = random.Random(0)
    found = []
    for _ in range(count):
        operators = {o: rng.randint(1, 5) for o in rng.sample(list(TIMES), 12)}
        sums = TABLE.sums(operators)
        found.append((operators, constant + sum(factors[g] * sums[g] for g in GROUPS)))
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_groups(group):
    assert one_of(group, 8, 8).group == group


def test_factors_and_constant_are_found():
    factors, constant = dict(zip(GROUPS, (0.8, 1.3, 1.1, 0.9, 1.5), strict=True)), 0.3
    table = TABLE.fitted(networks(200, factors, constant))
    assert table.factors == pytest.approx(factors, rel=0.1)
    assert table.constant == pytest.approx(constant, rel=0.1)
    for operators, time in networks(10, factors, constant):
        assert table.predict(operators) == pytest.approx(time, rel=0.02)


@pytest.mark.parametrize("worst", [*GROUPS, "constant"])
def test_no_factor_is_negative(worst):
    factors = dict.fromkeys(GROUPS, 1.0) | {worst: -0.5}
    found = networks(60, factors, -0.1 if worst == "constant" else 1.0)
    table = TABLE.fitted([(operators, time) for operators, time in found if time > 0])
    assert min(*table.factors.values(), table.constant) >= 0
    assert (table.constant if worst == "constant" else table.factors[worst]) < 0.1


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("same", [False, True])
def test_few_or_equal_networks(count, same):
    found = networks(2, dict.fromkeys(GROUPS, 2.0), 0.0)[:count]
    table = TABLE.fitted(found[:1] * 5 if same else found)
    assert all(0 <= value < 10 for value in (*table.factors.values(), table.constant))
    for operators, time in found[:1]:
        assert table.predict(operators) == pytest.approx(time, rel=0.2)


@pytest.mark.parametrize("group", GROUPS)
def test_what_was_not_timed_is_like_its_neighbours(group):
    """Also where nothing of its group was timed."""
    new = one_of(group, 24, 24)
    less, more = one_of(group, 16, 16), one_of(group, 32, 32)
    assert time_of(less) < TABLE.estimate(new) < time_of(more)
    assert TABLE.sums({new: 2})[group] == 2 * TABLE.estimate(new)
    others = LatencyTable({o: t for o, t in TIMES.items() if o.group != group})
    assert 0.1 < others.estimate(new) / time_of(new) < 10
    one = LatencyTable({less: time_of(less)})
    assert one.estimate(less) == pytest.approx(time_of(less), rel=0.1)
    assert math.isfinite(one.estimate(one_of(group, 2**14, 2**14)))
