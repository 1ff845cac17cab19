"""The space of NAS-FCOS (Wang et al., CVPR 2020, arXiv 1906.04423): pyramids and heads."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from nasfast.spaces.base import (
    Decision,
    Space,
    check_choices,
    graph_features,
    mutate_choices,
    sample_choices,
)
from nasfast.utils.errors import UserError, shown

FPN_OPS = (
    "sep_conv_3x3",
    "sep_conv_3x3_dil3",
    "sep_conv_5x5_dil6",
    "skip_connect",
    "def_conv_3x3",
)
AGGREGATORS = ("psum", "cat")
HEAD_OPS = (
    "conv_1x1",
    "conv_3x3",
    "sep_conv_3x3",
    "sep_conv_3x3_dil3",
    "skip_connect",
    "def_conv_3x3",
)
REACH = {"sep_conv_3x3": 1, "sep_conv_3x3_dil3": 3, "sep_conv_5x5_dil6": 12, "def_conv_3x3": 1}
"""Pixels to each side that an operation of a pyramid sees, without offsets."""
SKIP, DEFORMABLE = "skip_connect", "def_conv_3x3"
TAPS, BLOCKS, LAYERS = 4, 7, 6
"""Inputs C2 to C5, blocks of a pyramid, layers of a head."""
OUTPUTS = 3
"""Levels that blocks give: P5, P4, P3."""

Part = Literal["fpn", "head", "joint"]


class Block(NamedTuple):
    """A block of the pyramid: ``aggregate(op0(pool[input0]), op1(pool[input1]))``."""

    input0: int
    """Index in the pool: 0 to 3 are C2 to C5, 4 + t is what block t gives."""
    input1: int
    op0: int
    """Index in FPN_OPS."""
    op1: int
    aggregator: int
    """Index in AGGREGATORS."""


@dataclass(frozen=True)
class HeadGenotype:
    """A head; the towers of classification and of regression have the same operations."""

    share: int
    """Layers before this one have weights of their own for each level; 0 to 6."""
    ops: tuple[int, ...]
    """Index in HEAD_OPS of each of the 6 layers."""


@dataclass(frozen=True)
class NASFCOSGenotype:
    """A pyramid and a head; None is the stock one of FCOS."""

    fpn: tuple[Block, ...] | None = None
    head: HeadGenotype | None = None

    @property
    def loose(self) -> tuple[int, ...]:
        """Blocks that no block reads. The last three give P5, P4 and P3, in this order; earlier
        ones are added to each of them."""
        blocks = self.fpn or ()
        read = {source - TAPS for block in blocks for source in block[:2]}
        return tuple(t for t in range(len(blocks)) if t not in read)

    @property
    def taps(self) -> tuple[int, ...]:
        """Inputs that a block reads; the stock pyramid reads C3 to C5."""
        if self.fpn is None:
            return (1, 2, 3)
        return tuple(sorted({i for block in self.fpn for i in block[:2] if i < TAPS}))

    @property
    def valid(self) -> bool:
        """Whether there is a block for each level."""
        return self.fpn is None or len(self.loose) >= OUTPUTS

    def canonical(self) -> NASFCOSGenotype:
        """One representative of the genotypes that differ in the order of the two halves of a
        block, in the order of the blocks, and in where the layers of a head that do nothing are.

        A sum does not depend on the order of its halves. The published concatenation does: its 1x1
        convolution has a group a channel, so that one input makes the first half of the channels
        and the other the second. Their order is free where only convolutions read the block, which
        weigh all its channels, and no level is made of it. The order of blocks is free where they
        do not read each other, but for those that give P5, P4 and P3.
        """
        head = self.head
        if head is not None:
            skip = HEAD_OPS.index(SKIP)
            kept = [(op, k < head.share) for k, op in enumerate(head.ops) if op != skip]
            ops = (*(op for op, _ in kept), *[skip] * (len(head.ops) - len(kept)))
            head = HeadGenotype(sum(own for _, own in kept), ops)
        fpn = None if self.fpn is None else min(self._block_orders(self.fpn))
        return NASFCOSGenotype(fpn, head)

    def _block_orders(self, blocks: tuple[Block, ...]) -> Iterator[tuple[Block, ...]]:
        """The blocks in an order in which each is the smallest that may come next; several orders
        where such blocks are equal."""
        skip, loose = FPN_OPS.index(SKIP), self.loose
        mixed = set(range(len(blocks))) - set(loose)
        before: list[set[int]] = []  # the blocks that each has to follow
        for a, b, x, y, _ in blocks:
            mixed -= {source - TAPS for source, op in ((a, x), (b, y)) if op == skip}
            before.append({source - TAPS for source in (a, b) if source >= TAPS})
        for t in loose[-OUTPUTS:]:
            before[t] |= {other for other in loose if other < t}

        def placed(order: tuple[int, ...], done: tuple[Block, ...]) -> Iterator[tuple[Block, ...]]:
            if len(order) == len(blocks):
                yield done
            new = {TAPS + old: TAPS + k for k, old in enumerate(order)}
            ready: dict[int, Block] = {}
            for t in set(range(len(blocks))) - set(order):
                if before[t] <= set(order):
                    a, b, x, y, aggregator = blocks[t]
                    halves = [(new.get(a, a), x), (new.get(b, b), y)]
                    if AGGREGATORS[aggregator] == "psum" or t in mixed:
                        halves.sort()
                    (a, x), (b, y) = halves
                    ready[t] = Block(a, b, x, y, aggregator)
            for t, block in ready.items():
                if block == min(ready.values()):
                    yield from placed((*order, t), (*done, block))

        return placed((), ())

    def to_json(self) -> dict[str, object]:
        """{"space": .., "fpn": [[input0, input1, op0, op1, aggregator], ..] or null,
        "head": {"share": .., "ops": [..]} or null}"""
        head = self.head and {"share": self.head.share, "ops": list(self.head.ops)}
        return {
            "space": "nas_fcos",
            "fpn": None if self.fpn is None else [list(block) for block in self.fpn],
            "head": head,
        }


FOUND = NASFCOSGenotype(
    tuple(
        Block(*block)
        for block in (
            (3, 3, 4, 4, 1),
            (3, 3, 4, 4, 1),
            (4, 3, 4, 3, 1),
            (1, 3, 4, 3, 1),
            (5, 3, 4, 4, 1),
            (4, 7, 4, 4, 1),
            (7, 2, 4, 4, 1),
        )
    ),
    HeadGenotype(0, (5, 1, 5, 0, 4, 4)),
)
"""What the authors found, searching on PASCAL VOC with ResNet-50."""
STOCK = NASFCOSGenotype()
"""FCOS with FPN."""


@dataclass(frozen=True)
class NASFCOSSpace(Space[NASFCOSGenotype]):
    """Pyramids, heads, or both."""

    name: ClassVar[str] = "nas_fcos"
    part: Part = "joint"
    """What is searched."""
    fixed: NASFCOSGenotype = STOCK
    """Has the other part."""
    primitives: Literal["all", "plain"] = "all"
    """plain: without the deformable convolution."""

    @property
    def _fpn(self) -> bool:
        return self.part in ("fpn", "joint")

    @property
    def _head(self) -> bool:
        return self.part in ("head", "joint")

    @cached_property
    def _fpn_ops(self) -> list[int]:
        return self._searched(FPN_OPS)

    @cached_property
    def _head_ops(self) -> list[int]:
        return self._searched(HEAD_OPS)

    def _searched(self, names: Sequence[str]) -> list[int]:
        plain = self.primitives == "plain"
        return [i for i, name in enumerate(names) if not (plain and name == DEFORMABLE)]

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """The blocks of the pyramid, then share index and operations of the head."""
        found: list[Decision] = []
        ops, aggregators = len(self._fpn_ops), len(AGGREGATORS)
        for t in range(BLOCKS if self._fpn else 0):
            name, pool = f"block{t}", TAPS + t
            found += (Decision(f"{name}.input{i}", f"input of {pool}", pool) for i in range(2))
            found += (Decision(f"{name}.op{i}", "fpn op", ops) for i in range(2))
            found.append(Decision(f"{name}.aggregator", "aggregator", aggregators))
        if self._head:
            found.append(Decision("share", "share", LAYERS + 1))
            size = len(self._head_ops)
            found += (Decision(f"head.op{k}", "head op", size) for k in range(LAYERS))
        return tuple(found)

    def valid(self, genotype: NASFCOSGenotype) -> bool:
        """Whether three blocks are loose, one for each level."""
        return genotype.valid

    def size(self) -> int:
        """Exact number of ordered genotypes: 2.858e23 pyramids, also those with too few loose
        blocks, and 326,592 heads."""
        return math.prod(decision.size for decision in self.decisions)

    def decode(self, choices: Sequence[int]) -> NASFCOSGenotype:
        """The genotype of one choice per decision, which may have too few loose blocks; UserError
        names a decision out of range."""
        check_choices(self.decisions, choices)
        fpn, head = self.fixed.fpn, self.fixed.head
        rest = list(choices)
        if self._fpn:
            blocks = []
            for _ in range(BLOCKS):
                a, b, x, y, aggregator = (rest.pop(0) for _ in range(5))
                blocks.append(Block(a, b, self._fpn_ops[x], self._fpn_ops[y], aggregator))
            fpn = tuple(blocks)
        if self._head:
            head = HeadGenotype(rest[0], tuple(self._head_ops[op] for op in rest[1:]))
        return NASFCOSGenotype(fpn, head)

    def encode(self, genotype: NASFCOSGenotype) -> tuple[int, ...]:
        """The choices that decode to `genotype`; UserError if it is not of this space."""
        choices: list[int] = []
        for searched, own, fixed, what in (
            (self._fpn, genotype.fpn, self.fixed.fpn, "pyramid"),
            (self._head, genotype.head, self.fixed.head, "head"),
        ):
            if searched and own is None:
                raise UserError(
                    f"genotype: expected a searched {what}, got the stock one; it is not of the "
                    f"space of {self.part} searches"
                )
            if not searched and own != fixed:
                raise UserError(
                    f"genotype: expected the {what} of this search, {fixed}, got {own}; give a "
                    "genotype of the same phase"
                )
        if self._fpn:
            for block in genotype.fpn or ():
                ops = (self._choice(self._fpn_ops, FPN_OPS, op) for op in block[2:4])
                choices += [*block[:2], *ops, block.aggregator]
        if self._head and genotype.head:
            ops = (self._choice(self._head_ops, HEAD_OPS, op) for op in genotype.head.ops)
            choices += [genotype.head.share, *ops]
        check_choices(self.decisions, choices)
        return tuple(choices)

    @staticmethod
    def _choice(allowed: list[int], names: Sequence[str], op: int) -> int:
        if op not in allowed:
            known = ", ".join(names[i] for i in allowed)
            got = names[op] if type(op) is int and 0 <= op < len(names) else shown(op)
            raise UserError(
                f"genotype: expected operations of {known}, got {got}; give one of the same "
                "--primitives"
            )
        return allowed.index(op)

    def sample(self, rng: random.Random) -> NASFCOSGenotype:
        """Uniform over ordered genotypes that are valid: 91 % are."""
        while True:
            genotype = self.decode(sample_choices(self.decisions, rng))
            if genotype.valid:
                return genotype

    def mutate(self, genotype: NASFCOSGenotype, rng: random.Random) -> NASFCOSGenotype:
        """Exactly one decision changes, to one of its other choices, uniformly among the changes
        that are valid; UserError if `genotype` is not."""
        choices = self.encode(_checked(genotype))
        while True:
            changed = self.decode(mutate_choices(self.decisions, choices, rng))
            if changed.valid:
                return changed

    def features(self, genotype: NASFCOSGenotype) -> Mapping[str, float]:
        """Of the pyramid; and of the head its operations, which of them have weights for each
        level, and which follow each other."""
        features: dict[str, float] = {}
        genotype = genotype.canonical()
        if self._fpn and genotype.fpn is not None:
            labels = [f"C{i + 2}" for i in range(TAPS)]
            sources = list[tuple[int, ...]]([()] * TAPS)
            pool = list(range(TAPS))
            for a, b, x, y, aggregator in genotype.fpn:
                at = len(labels)
                labels += [FPN_OPS[x], FPN_OPS[y], AGGREGATORS[aggregator]]
                sources += [(pool[a],), (pool[b],), (at, at + 1)]
                pool.append(at + 2)
            *rest, p5, p4, p3 = genotype.loose
            for name, level in zip(("P5", "P4", "P3"), (p5, p4, p3)):
                labels.append(name)
                sources.append(tuple(pool[TAPS + t] for t in (level, *rest)))
            at = len(labels)
            labels.append("pyramid")
            sources.append((at - 3, at - 2, at - 1))
            features |= graph_features(labels, sources, REACH, pairs=True)
        if self._head and genotype.head is not None:
            ops = [HEAD_OPS[op] for op in genotype.head.ops if HEAD_OPS[op] != SKIP]
            head = Counter(ops)
            head.update(f"{b} after {a}" for a, b in itertools.pairwise(ops))
            head.update(f"own {op}" for op in ops[: genotype.head.share])
            features |= {f"head: {name}": count for name, count in head.items()}
        return features

    def from_json(self, obj: object) -> NASFCOSGenotype:
        """Read `NASFCOSGenotype.to_json`, or the published list: 7 blocks, and with a head the
        share index and the operations, each block alone or in a list of its own.

        Raises:
            UserError: it is neither, a number is out of its range, or fewer than three blocks are
                loose.
        """
        keys = {"space", "fpn", "head"}
        if isinstance(obj, dict) and obj.keys() == keys and obj["space"] == self.name:
            fpn, pair = obj["fpn"], None
            if isinstance(obj["head"], dict) and obj["head"].keys() == {"share", "ops"}:
                pair = obj["head"]["share"], obj["head"]["ops"]
            elif obj["head"] is not None:
                raise _wrong("head", 'an object with "share" and "ops", or null', obj["head"])
        elif isinstance(obj, list | tuple) and len(obj) in (BLOCKS, BLOCKS + 2):
            fpn, rest = obj[:BLOCKS], [_unwrapped(each) for each in obj[BLOCKS:]]
            if rest and isinstance(rest[0], list | tuple) and len(rest[0]) == 1:
                rest[0] = rest[0][0]
            pair = (rest[0], rest[1]) if rest else None
        else:
            raise UserError(
                f'genotype: expected the keys "space" ("{self.name}"), "fpn" and "head", or a '
                f"list of {BLOCKS} blocks, alone or with [share] and [operations], got "
                f"{shown(obj)}; give a best.json or genotype that nasfast wrote"
            )
        return _checked(
            NASFCOSGenotype(
                None if fpn is None else _read_fpn(fpn), None if pair is None else _read_head(*pair)
            )
        )


def is_nas_fcos(obj: Sequence[Any]) -> bool:
    """Whether a list is a detector in the published form: its first block has five numbers."""
    return len(obj) in (BLOCKS, BLOCKS + 2) and _is_block(_unwrapped(obj[0]))


def _checked(genotype: NASFCOSGenotype) -> NASFCOSGenotype:
    """The genotype itself; UserError if it is not valid."""
    if not genotype.valid:
        raise UserError(
            f"genotype: expected at least {OUTPUTS} blocks that no other reads, for P3 to P5, got "
            f"{len(genotype.loose)}; it is no network of this space"
        )
    return genotype


def _read_fpn(value: object) -> tuple[Block, ...]:
    if not isinstance(value, list | tuple) or len(value) != BLOCKS:
        raise _wrong("fpn", f"a list of {BLOCKS} blocks", value)
    blocks = []
    for t, wrapped in enumerate(value):
        block = _unwrapped(wrapped)
        if not _is_block(block):
            raise _wrong(f"fpn block {t}", "[input0, input1, op0, op1, aggregator]", wrapped)
        sizes = (TAPS + t, TAPS + t, len(FPN_OPS), len(FPN_OPS), len(AGGREGATORS))
        for name, number, size in zip(Block._fields, block, sizes, strict=True):
            _check(f"fpn block {t}, {name}", number, size)
        blocks.append(Block(*block))
    return tuple(blocks)


def _read_head(share: object, ops: object) -> HeadGenotype:
    _check("head share", share, LAYERS + 1)
    if not isinstance(ops, list | tuple) or len(ops) != LAYERS:
        raise _wrong("head ops", f"a list of {LAYERS} operations", ops)
    for k, op in enumerate(ops):
        _check(f"head op {k}", op, len(HEAD_OPS))
    assert isinstance(share, int)
    return HeadGenotype(share, tuple(ops))


def _unwrapped(block: Any) -> Any:
    """Without the list around it that the published files have."""
    inner = isinstance(block, list | tuple) and len(block) == 1
    inner = inner and isinstance(block[0], list | tuple)
    return block[0] if inner else block


def _is_block(block: Any) -> bool:
    return (
        isinstance(block, list | tuple) and len(block) == 5 and all(type(i) is int for i in block)
    )


def _check(what: str, number: object, size: int) -> None:
    if type(number) is not int or not 0 <= number < size:
        raise _wrong(what, f"an integer in 0..{size - 1}", number)


def _wrong(what: str, expected: str, got: object) -> UserError:
    return UserError(
        f"genotype: {what}: expected {expected}, got {shown(got)}; give a best.json or genotype "
        "that nasfast wrote"
    )
