"""What every space keeps to. A new one gets a line in SPACES."""

import collections
import dataclasses
import itertools
import json
import random
import re

import pytest
from drawn import genotypes
from hypothesis import given
from hypothesis import strategies as st

from nasfast.spaces import FastNASSpace, IRNASSpace, NASFCOSSpace, TemplateNASSpace
from nasfast.spaces.base import graph_features
from nasfast.utils.errors import UserError

# as it is searched, and one small enough to try everything
SPACES = {
    "fast_nas": (FastNASSpace(), FastNASSpace(num_layers=1, num_blocks=1, num_taps=2)),
    "ir_nas": (IRNASSpace(layers=4, nodes=5), IRNASSpace(layers=1, nodes=2)),
    "ir_nas free": (
        IRNASSpace(layers=4, nodes=5, widths="free", searched_depth=True),
        IRNASSpace(layers=2, nodes=1, widths="free", searched_depth=True),
    ),
    "nas_fcos": (NASFCOSSpace(), NASFCOSSpace("head", primitives="plain")),
    "template_nas": (TemplateNASSpace(), TemplateNASSpace(1, 1, 2)),
}
each = pytest.mark.parametrize("name", SPACES)


@each
def test_decisions(name):
    for space in SPACES[name]:
        assert space.name == name.split()[0]
        names = [decision.name for decision in space.decisions]
        assert len(names) == len(set(names))
        heads = {(decision.head, decision.size) for decision in space.decisions}
        assert len(heads) == len({head for head, _ in heads}), "a head has one size"


@each
def test_size_counts_every_genotype_once(name):
    _, space = SPACES[name]
    every = itertools.product(*(range(decision.size) for decision in space.decisions))
    decoded = {space.decode(choices): choices for choices in every}
    assert len(decoded) == space.size()
    assert all(space.encode(genotype) == choices for genotype, choices in decoded.items())


@each
@given(data=st.data())
def test_round_trips(name, data):
    space, _ = SPACES[name]
    genotype = data.draw(genotypes(space))
    assert space.decode(space.encode(genotype)) == genotype
    form = json.loads(json.dumps(genotype.to_json()))
    assert form["space"] == space.name
    assert space.from_json(form) == genotype
    assert hash(space.from_json(form)) == hash(genotype)
    canonical = genotype.canonical()
    assert canonical.canonical() == canonical == space.decode(space.encode(canonical))


@each
@given(data=st.data(), rng=st.randoms(use_true_random=False))
def test_samples_and_mutations_are_in_the_space(name, data, rng):
    space, _ = SPACES[name]
    space.encode(space.sample(rng))
    genotype = data.draw(genotypes(space))
    before, after = space.encode(genotype), space.encode(space.mutate(genotype, rng))
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@each
def test_samples_and_mutations_are_uniform(name):
    _, space = SPACES[name]
    rng = random.Random(0)
    parent = space.sample(rng)
    before = space.encode(parent)
    samples = [space.encode(space.sample(rng)) for _ in range(4000)]
    changed = collections.Counter()
    for _ in range(1000 * len(before)):
        after = space.encode(space.mutate(parent, rng))
        changed.update((i, b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    for i, decision in enumerate(space.decisions):
        sampled = collections.Counter(choices[i] for choices in samples)
        assert set(sampled) == set(range(decision.size))
        assert max(sampled.values()) < 1.25 * 4000 / decision.size
        if others := [b for b in range(decision.size) if b != before[i]]:
            counts = [changed[i, b] for b in others]
            each = 1000 * len(before) / sum(d.size > 1 for d in space.decisions)
            assert sum(counts) == pytest.approx(each, rel=0.1)
            assert all(count * len(counts) == pytest.approx(each, rel=0.4) for count in counts)


@each
@pytest.mark.parametrize("beyond", ["size", -1, 0.0, True])
def test_choice_out_of_range(name, beyond):
    space, _ = SPACES[name]
    for index, decision in enumerate(space.decisions):
        choices = [0] * len(space.decisions)
        choices[index] = decision.size if beyond == "size" else beyond
        message = (
            f"{decision.name}: expected an integer in 0..{decision.size - 1}, got "
            f"{choices[index]!r}; check that the genotype was made for this space"
        )
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            space.decode(choices)


@each
def test_what_is_of_another_space(name):
    space, small = SPACES[name]
    count = len(space.decisions)
    with pytest.raises(UserError, match=f"expected {count} integers, one per decision, got 3;"):
        space.decode([0] * 3)
    other = small.decode([0] * len(small.decisions))
    for refused in (other, other.to_json()):
        with pytest.raises(UserError, match="expected"):
            space.encode(space.from_json(refused) if isinstance(refused, dict) else refused)
    for field in dataclasses.fields(space):
        if field.type is not int:
            continue
        message = f"{type(space).__name__}.{field.name}: expected (at least 1|1 to \\d+), got 0"
        with pytest.raises(UserError, match=message):
            dataclasses.replace(space, **{field.name: 0})


@each
@given(data=st.data())
def test_features_are_those_of_the_canonical_form(name, data):
    space, _ = SPACES[name]
    genotype = data.draw(genotypes(space))
    features = dict(space.features(genotype))
    assert features == dict(space.features(genotype.canonical()))
    assert all(isinstance(value, int | float) for value in features.values())


@each
def test_features_tell_architectures_apart(name):
    space, _ = SPACES[name]
    rng = random.Random(0)
    drawn = {space.sample(rng).canonical() for _ in range(50)}
    described = {tuple(sorted(space.features(genotype).items())) for genotype in drawn}
    assert len(described) > 0.9 * len(drawn)


def test_features_of_a_graph():
    labels = ["in", "conv", "gap", "sum", "conv", "out"]
    sources = [(), (0,), (0,), (1, 2), (3,), (3, 4)]
    assert graph_features(labels, sources, {"conv": 2}, {"gap"}, pairs=True) == {
        "in": 1,
        "conv": 2,
        "gap": 1,
        "sum": 1,
        "out": 1,
        "share of in": 1,
        "share of conv": 0.5 + 0.5,  # half of the output comes from the second, half of the sum
        "share of gap": 0.5,
        "share of sum": 1,
        "share of out": 1,
        "share that sees": 0.5,
        "mean reach": 2.0,  # 1 on average at the sum, and 2 more for half of the output
        "longest reach": 4,
        "longest chain": 4,
        "conv of in": 1,
        "gap of in": 1,
        "sum of conv": 1,
        "sum of gap": 1,
        "conv of sum": 1,
        "out of sum": 1,
        "out of conv": 1,
    }
