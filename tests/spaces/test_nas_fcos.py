"""Pyramids and heads of NAS-FCOS: what is published, what is valid, what is the same network."""

import collections
import dataclasses
import random
import re

import pytest
from drawn import genotypes
from hypothesis import given
from hypothesis import strategies as st

from nasfast.spaces.nas_fcos import (
    DEFORMABLE,
    FOUND,
    FPN_OPS,
    HEAD_OPS,
    STOCK,
    Block,
    HeadGenotype,
    NASFCOSGenotype,
    NASFCOSSpace,
    is_nas_fcos,
)
from nasfast.utils.errors import UserError

SPACE, SKIP, PSUM, CAT = NASFCOSSpace(), FPN_OPS.index("skip_connect"), 0, 1
DCN = FPN_OPS.index(DEFORMABLE), HEAD_OPS.index(DEFORMABLE)
PUBLISHED = [
    *([[3, 3, 4, 4, 1]], [[3, 3, 4, 4, 1]], [[4, 3, 4, 3, 1]], [[1, 3, 4, 3, 1]]),
    *([[5, 3, 4, 4, 1]], [[4, 7, 4, 4, 1]], [[7, 2, 4, 4, 1]], [0], [5, 1, 5, 0, 4, 4]),
]
"""The found architecture as the authors' configurations have it."""
CHAIN = [[0, 0, 0, 0, 0], *([t + 3, 0, 0, 0, 0] for t in range(1, 7))]
"""Each block reads the one before: a single block is loose."""


def pyramid(*blocks):
    """Of the given blocks and, before them, as many that read C2 alone."""
    filled = [(0, 0, 0, 0, PSUM)] * (7 - len(blocks))
    return NASFCOSGenotype(tuple(Block(*block) for block in (*filled, *blocks)))


def test_published_sizes():
    sizes = [NASFCOSSpace(part).size() for part in ("fpn", "head", "joint")]
    assert sizes[:2] == [285_768_000_000_000_000_000_000, 326_592]
    assert sizes[2] == sizes[0] * sizes[1]
    assert f"{sizes[0]:.3e}" == "2.858e+23"
    assert [len(NASFCOSSpace(part).decisions) for part in ("fpn", "head")] == [35, 7]
    assert NASFCOSSpace("head", primitives="plain").size() == 7 * 5**6


def test_found_architecture():
    assert SPACE.from_json(PUBLISHED) == FOUND
    assert SPACE.from_json([block[0] for block in PUBLISHED[:7]]) == NASFCOSGenotype(FOUND.fpn)
    assert is_nas_fcos(PUBLISHED)
    assert (FOUND.loose, FOUND.taps) == ((2, 4, 5, 6), (1, 2, 3))
    assert FOUND.valid
    assert (STOCK.loose, STOCK.taps, STOCK.valid) == ((), (1, 2, 3), True)
    assert SPACE.from_json(STOCK.to_json()) == STOCK


def test_samples_have_three_loose_blocks_and_published_frequencies():
    space, rng = NASFCOSSpace("fpn"), random.Random(0)
    loose = collections.Counter(len(space.sample(rng).loose) for _ in range(3000))
    for count, share in {3: 0.352, 4: 0.440, 5: 0.187, 6: 0.025}.items():
        assert loose[count] / 3000 == pytest.approx(share, abs=0.03)
    assert min(loose) == 3


@given(rng=st.randoms(use_true_random=False))
def test_mutations_have_three_loose_blocks(rng):
    space = NASFCOSSpace("fpn")
    genotype = space.sample(rng)
    for _ in range(20):
        genotype = space.mutate(genotype, rng)
        assert genotype.valid


@given(data=st.data(), part=st.sampled_from(["fpn", "head", "joint"]))
def test_plain_genotypes_have_no_deformable_convolution(data, part):
    plain, space = NASFCOSSpace(part, primitives="plain"), NASFCOSSpace(part)
    genotype = data.draw(genotypes(plain))
    assert not any(DCN[0] in block[2:4] for block in genotype.fpn or ())
    assert genotype.head is None or DCN[1] not in genotype.head.ops
    assert space.decode(space.encode(genotype)) == genotype  # the indices stay the published ones
    fpn = genotype.fpn and (*genotype.fpn[:6], genotype.fpn[6]._replace(op1=DCN[0]))
    other = NASFCOSGenotype(fpn, genotype.head and HeadGenotype(0, (DCN[1],) * 6))
    message = r"^genotype: expected operations of .*, got def_conv_3x3; give one of the same --pr"
    with pytest.raises(UserError, match=message):
        plain.encode(other)


def test_the_other_part_is_fixed():
    space = NASFCOSSpace("head", NASFCOSGenotype(FOUND.fpn))
    genotype = space.sample(random.Random(0))
    assert genotype.fpn == FOUND.fpn
    assert space.encode(genotype) == (genotype.head.share, *genotype.head.ops)
    with pytest.raises(
        UserError, match=r"^genotype: expected the pyramid of this search, .*, got "
    ):
        space.encode(dataclasses.replace(genotype, fpn=None))
    with pytest.raises(
        UserError, match=r"^genotype: expected a searched head, got the stock one; "
    ):
        space.encode(NASFCOSGenotype(FOUND.fpn))


# ---- canonical form


def orders(blocks, loose):
    """Every order of the blocks that gives the same levels, by trying all."""

    def extended(order):
        if len(order) == len(blocks):
            places = [order.index(t) for t in loose]
            if places[-3:] == sorted(places[-3:]) and max(places[:-3], default=-1) < places[-3]:
                yield order
        for t in set(range(len(blocks))) - set(order):
            if {i - 4 for i in blocks[t][:2] if i >= 4} <= set(order):
                yield from extended((*order, t))

    return extended(())


def renamed(blocks, order):
    new = {4 + old: 4 + k for k, old in enumerate(order)}
    return [(*(new.get(i, i) for i in blocks[t][:2]), *blocks[t][2:]) for t in order]


@given(data=st.data(), rng=st.randoms(use_true_random=False))
def test_canonical_form_is_the_first_of_all_that_are_the_same(data, rng):
    fpn = NASFCOSSpace("fpn").sample(rng).fpn
    if data.draw(st.booleans()):  # sums alone, whose halves turn
        fpn = tuple(block._replace(aggregator=PSUM) for block in fpn)
    else:  # concatenations alone, which are read or levels: those that convolutions read turn
        fpn = tuple(block._replace(aggregator=CAT) for block in fpn)
    genotype = NASFCOSGenotype(fpn)
    skipped = {i - 4 for b in fpn for i, op in zip(b[:2], b[2:4], strict=True) if op == SKIP}
    fixed = {t for t in range(7) if fpn[t].aggregator == CAT} & (skipped | set(genotype.loose))
    same = []
    for order in orders(fpn, genotype.loose):
        blocks = renamed(fpn, order)
        for k, (a, b, x, y, aggregator) in enumerate(blocks):
            if order[k] not in fixed and (a, x) > (b, y):
                blocks[k] = (b, a, y, x, aggregator)
        same.append(tuple(blocks))
    assert genotype.canonical().fpn == min(same)
    other = NASFCOSGenotype(tuple(Block(*block) for block in rng.choice(same)))
    assert other.canonical() == genotype.canonical()


@pytest.mark.parametrize(
    ("reader", "turns"),
    [
        ((9, 0, 0, 0, PSUM), True),  # a convolution weighs all channels
        ((9, 0, SKIP, 0, PSUM), False),  # a sum adds them one by one
        ((0, 9, 0, SKIP, CAT), False),
        ((0, 0, 0, 0, CAT), False),  # the block is a level
    ],
)
def test_halves_of_a_concatenation(reader, turns):
    one, other = (pyramid((*halves, CAT), reader) for halves in ((1, 2, 0, 4), (2, 1, 4, 0)))
    assert (one.canonical() == other.canonical()) == turns


def test_operations_are_part_of_the_halves():
    assert pyramid((1, 1, 0, 4, PSUM)).canonical() == pyramid((1, 1, 4, 0, PSUM)).canonical()
    assert pyramid((1, 2, 0, 4, PSUM)).canonical() != pyramid((1, 2, 4, 0, PSUM)).canonical()


@pytest.mark.parametrize(
    ("share", "ops", "canonical"),
    [
        (0, (4, 5, 4, 4, 1, 4), (0, (5, 1, 4, 4, 4, 4))),
        (3, (4, 5, 4, 4, 1, 4), (1, (5, 1, 4, 4, 4, 4))),
        (6, (4, 5, 4, 4, 1, 4), (2, (5, 1, 4, 4, 4, 4))),
        (6, (4,) * 6, (0, (4,) * 6)),
        (2, (0, 1, 2, 3, 5, 0), (2, (0, 1, 2, 3, 5, 0))),
    ],
)
def test_layers_that_do_nothing_are_last(share, ops, canonical):
    genotype = NASFCOSGenotype(None, HeadGenotype(share, ops))
    assert genotype.canonical().head == HeadGenotype(*canonical)


# ---- forms


def changed(**fields):
    return FOUND.to_json() | fields


def block(t, value):
    return changed(fpn=[*map(list, FOUND.fpn[:t]), value, *map(list, FOUND.fpn[t + 1 :])])


END = "; give a best.json or genotype that nasfast wrote"
KEYS = (
    'genotype: expected the keys "space" ("nas_fcos"), "fpn" and "head", or a list of 7 blocks, '
    "alone or with [share] and [operations], got "
)
BLOCK = "[input0, input1, op0, op1, aggregator]"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("x", f"{KEYS}'x'{END}"),
        ([], f"{KEYS}[]{END}"),
        ({}, f"{KEYS}{{}}{END}"),
        (PUBLISHED[:8], f"{KEYS}{repr(PUBLISHED[:8])[:77]}...{END}"),
        (changed(space="fast_nas"), f"{KEYS}{{'fpn': [[3, 3, "),
        (changed(more=1), f"{KEYS}{{'fpn': [[3, 3, "),
        (changed(fpn=[]), f"genotype: fpn: expected a list of 7 blocks, got []{END}"),
        (block(2, [1]), f"genotype: fpn block 2: expected {BLOCK}, got [1]{END}"),
        (block(2, [6, 0, 0, 0, 0]), "genotype: fpn block 2, input0: expected an integer in 0..5, "),
        (block(0, [0, 0, 0, 5, 0]), "genotype: fpn block 0, op1: expected an integer in 0..4, got"),
        (block(0, [0, 0, 0, 0, 2]), "genotype: fpn block 0, aggregator: expected an integer in 0."),
        (block(0, [0, True, 0, 0, 0]), f"genotype: fpn block 0: expected {BLOCK}, got [0, True, "),
        (changed(head=3), 'genotype: head: expected an object with "share" and "ops", or null, g'),
        (changed(head={"share": 0}), 'genotype: head: expected an object with "share" and "ops",'),
        (
            changed(head={"share": 7, "ops": [0] * 6}),
            f"genotype: head share: expected an integer in 0..6, got 7{END}",
        ),
        (
            [*PUBLISHED[:7], [0, 1], [0] * 6],
            f"genotype: head share: expected an integer in 0..6, got [0, 1]{END}",
        ),
        (
            [*PUBLISHED[:8], [0] * 5],
            f"genotype: head ops: expected a list of 6 operations, got [0, 0, 0, 0, 0]{END}",
        ),
        (
            [*PUBLISHED[:8], [0, 0, 0, 6, 0, 0]],
            f"genotype: head op 3: expected an integer in 0..5, got 6{END}",
        ),
        (
            CHAIN,
            "genotype: expected at least 3 blocks that no other reads, for P3 to P5, got 1; it is "
            "no network of this space",
        ),
    ],
)
def test_what_is_no_genotype(form, text):
    with pytest.raises(UserError, match=f"^{re.escape(text)}"):
        SPACE.from_json(form)


def test_what_is_no_network_has_no_mutations():
    space = NASFCOSSpace("fpn")
    chain = space.decode([i for block in CHAIN for i in block])
    assert not chain.valid
    assert not space.valid(chain)
    with pytest.raises(UserError, match=r"^genotype: expected at least 3 blocks that no "):
        space.mutate(chain, random.Random(0))
