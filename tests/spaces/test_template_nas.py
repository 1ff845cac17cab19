import collections
import itertools
import random
import re

import pytest
from drawn import genotypes
from hypothesis import given
from hypothesis import strategies as st

from nasfast.models.zoo import ZOO
from nasfast.spaces.template_nas import Layer, Template, TemplateNASGenotype, TemplateNASSpace
from nasfast.utils.errors import UserError

SPACE = TemplateNASSpace()
SMALL = TemplateNASSpace(num_templates=2, num_layers=4, num_taps=2)
ARCH0, ARCH1 = (ZOO[f"template_nas_arch{i}"].genotype for i in (0, 1))


def test_decisions_in_sampling_order():
    names = [decision.name for decision in SPACE.decisions]
    assert names[:4] == ["template0.op1", "template0.op2", "template0.aggregation", "template1.op1"]
    assert names[9:14] == [
        f"layer0.{n}" for n in ("input1", "input2", "template", "repeats", "stride")
    ]
    sizes = [decision.size for decision in SPACE.decisions]
    assert len(sizes) == 44
    assert sizes[:9] == [6, 6, 2] * 3
    assert sizes[9:] == [s for k in range(7) for s in (2 + k, 2 + k, 3, 4, 2 if k < 3 else 1)]
    assert SPACE.size() == 173_939_110_768_450_260_172_800
    heads = collections.Counter(decision.head for decision in SPACE.decisions)
    assert {heads[name] for name in ("op", "aggregation", "template", "repeats")} == {6, 3, 7}


@pytest.mark.parametrize(("genotype", "collected"), [(ARCH0, (2, 4, 5, 6)), (ARCH1, (3, 4, 5, 6))])
def test_published_architectures(genotype, collected):
    assert genotype.collected_layers == collected
    published = [list(map(list, part)) for part in (genotype.templates, genotype.layers)]
    assert SPACE.from_json(published) == genotype
    assert genotype.used_templates == (0, 1, 2)


# Canonical form


def same_network(genotype):
    """What a genotype says of its network: a graph whose nodes are layers, smallest over their
    names. A layer that applies its template once has branches in no order."""
    taps, count, first = genotype.num_taps, len(genotype.layers), genotype.downsampling
    forms = []
    for order in itertools.product(
        itertools.permutations(range(first)), itertools.permutations(range(first, count))
    ):
        name = [*(f"tap{i}" for i in range(taps)), *map(str, itertools.chain(*order))]
        nodes = []
        for k, layer in enumerate(genotype.layers):
            op1, op2, aggregation = genotype.templates[layer.template]
            branches = [(name[layer.input1], op1), (name[layer.input2], op2)]
            if layer.repeats == 0:
                branches.sort()
            nodes.append((int(name[taps + k]), branches, aggregation, layer.repeats, layer.stride))
        forms.append(sorted(nodes))
    return str(min(forms))


def renamed(genotype, rng):
    """The same network with other names, as far as its number of templates allows."""
    names = list(range(len(genotype.templates)))
    rng.shuffle(names)
    templates = [genotype.templates[names.index(t)] for t in range(len(names))]
    layers = [layer._replace(template=names[layer.template]) for layer in genotype.layers]
    for t, template in enumerate(templates):
        readers = [k for k, layer in enumerate(layers) if layer.template == t]
        if not readers:
            templates[t] = Template(*(rng.randrange(2) for _ in range(3)))
        elif rng.random() < 0.5 and not any(layers[k].repeats for k in readers):
            templates[t] = Template(template.op2, template.op1, template.aggregation)
            for k in readers:
                a, b = layers[k][:2]
                layers[k] = layers[k]._replace(input1=b, input2=a)
    for _ in range(6):  # two neighbours change places
        at, first = rng.randrange(len(layers) - 1), genotype.downsampling
        a, b = genotype.num_taps + at, genotype.num_taps + at + 1
        if at + 1 == first or a in layers[at + 1][:2]:
            continue
        new = {a: b, b: a}
        layers[at], layers[at + 1] = layers[at + 1], layers[at]
        layers = [
            layer._replace(
                input1=new.get(layer.input1, layer.input1),
                input2=new.get(layer.input2, layer.input2),
            )
            for layer in layers
        ]
    return TemplateNASGenotype(tuple(templates), tuple(layers), genotype.num_taps)


@given(genotypes(SPACE), st.randoms(use_true_random=False))
def test_other_names_have_one_canonical_form(genotype, rng):
    other = renamed(genotype, rng)
    assert other.canonical() == genotype.canonical() == genotype.canonical().canonical()
    assert type(genotype.canonical()) is TemplateNASGenotype
    SPACE.encode(genotype.canonical())


def test_canonical_forms_are_equal_exactly_when_the_networks_are():
    rng, pairs = random.Random(0), set()
    for _ in range(200):
        genotype = SMALL.decode([rng.randrange(min(d.size, 3)) for d in SMALL.decisions])
        alike = [genotype, *(renamed(genotype, rng) for _ in range(4)), genotype.canonical()]
        others = [SMALL.mutate(each, rng) for each in alike]
        pairs.update((each.canonical(), same_network(each)) for each in [*alike, *others])
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert len(pairs) < 1400


def test_what_is_free_and_what_is_not():
    def genotype(templates, *layers):
        space = TemplateNASSpace(len(templates), len(layers))
        return space.from_json([templates, list(layers)]).canonical()

    base = genotype([[0, 3, 1]], [0, 1, 0, 0, 0])
    assert base == genotype([[3, 0, 1]], [1, 0, 0, 0, 0])
    assert base != genotype([[0, 3, 1]], [1, 0, 0, 0, 0])
    # applied twice, the second input is read twice
    again = genotype([[0, 3, 1]], [0, 1, 0, 1, 0])
    assert again != genotype([[3, 0, 1]], [1, 0, 0, 1, 0])
    assert genotype([[0, 0, 1]], [0, 1, 0, 1, 0]) != genotype([[0, 0, 1]], [1, 0, 0, 1, 0])
    # of the other half of the layers, the maps are resized to the larger
    assert genotype([[0, 0, 0]], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]) != genotype(
        [[0, 0, 0]], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]
    )


# Errors


def test_genotype_of_another_space():
    message = "expected 3 templates, 7 layers and 2 taps, got 1, 1 and 2; make a TemplateNASSpace"
    with pytest.raises(UserError, match=message):
        SPACE.encode(TemplateNASGenotype((Template(0, 0, 0),), (Layer(0, 0, 0, 0, 0),)))


GOOD = ARCH0.to_json()
FEW = GOOD["templates"][1:]


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ("[]", "genotype: expected a list of 2, [templates, layers] or an object, got '[]'"),
        ({"cell": []}, 'expected the keys "space", "templates" and "layers", got [\'cell\']'),
        (GOOD | {"space": "x"}, "space: expected \"template_nas\", got 'x'; read the genotype wi"),
        (GOOD | {"templates": FEW}, "templates: expected a list of 3, [[op1, op2, aggregation], ."),
        (GOOD | {"templates": [[0], *FEW]}, "template0: expected a list of 3, [op1, op2, aggreg"),
        (GOOD | {"templates": [[0, 6, 0], *FEW]}, "template0.op2: expected one of 0 sep3x3, 1 se"),
        (
            GOOD | {"templates": [[0, 0, "sum"], *FEW]},
            "template0.aggregation: expected one of 0 ps",
        ),
        (GOOD | {"layers": None}, "layers: expected a list of 7, [[input1, input2, template, rep"),
        (GOOD | {"layers": [[]] * 7}, "layer0: expected a list of 5, [input1, input2, template, "),
        (GOOD | {"layers": [[2, 0, 0, 0, 0]] * 7}, "layer0.input1: expected an integer in 0..1, "),
        (GOOD | {"layers": [[0, 0, 0, 0, 1]] * 7}, "layer3.stride: expected an integer in 0..0, "),
    ],
)
def test_malformed_json(obj, message):
    with pytest.raises(UserError, match=re.escape(message)):
        SPACE.from_json(obj)
