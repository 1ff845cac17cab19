"""The space of NAS-FCOS (Wang et al., CVPR 2020, arXiv 1906.04423): pyramids and heads."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from nasfast.spaces.base import Decision, check_choices, mutate_choices, sample_choices
from nasfast.utils.errors import UserError

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

    @property
    def deformable(self) -> bool:
        """Whether it has a deformable convolution."""
        blocks, head = self.fpn or (), self.head.ops if self.head else ()
        return any(FPN_OPS[op] == DEFORMABLE for b in blocks for op in b[2:4]) or any(
            HEAD_OPS[op] == DEFORMABLE for op in head
        )

    def canonical(self) -> NASFCOSGenotype:
        """One representative of the genotypes that differ in the order of the two halves of a
        block, and in where the layers of a head that do nothing are.

        A sum does not depend on the order. The published concatenation does: its 1x1 convolution
        has a group a channel, so that one input makes the first half of the channels and the other
        the second. The order is free where every reader of the block weighs all channels.
        """
        head = self.head
        if head is not None:
            skip = HEAD_OPS.index(SKIP)
            kept = [(op, k < head.share) for k, op in enumerate(head.ops) if op != skip]
            ops = (*(op for op, _ in kept), *[skip] * (len(head.ops) - len(kept)))
            head = HeadGenotype(sum(own for _, own in kept), ops)
        if self.fpn is None:
            return NASFCOSGenotype(None, head)
        free, skip = set(range(len(self.fpn))) - set(self.loose), FPN_OPS.index(SKIP)
        for a, b, x, y, _ in self.fpn:
            free -= {source - TAPS for source, op in ((a, x), (b, y)) if op == skip}
        blocks = []
        for t, (a, b, x, y, aggregator) in enumerate(self.fpn):
            turns = AGGREGATORS[aggregator] == "psum" or t in free
            (a, x), (b, y) = sorted([(a, x), (b, y)]) if turns else [(a, x), (b, y)]
            blocks.append(Block(a, b, x, y, aggregator))
        return NASFCOSGenotype(tuple(blocks), head)

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


class NASFCOSSpace:
    """Pyramids, heads, or both.

    A pyramid with fewer than three loose blocks is no network: `sample` and `mutate` never give
    one, `decode` does, and a search rejects it (`Phase.valid`).

    Args:
        part: what is searched.
        fixed: the other part.
        primitives: "plain" leaves the deformable convolution out.
    """

    name = "nas_fcos"

    def __init__(
        self,
        part: Part = "joint",
        fixed: NASFCOSGenotype = STOCK,
        primitives: Literal["all", "plain"] = "all",
    ) -> None:
        self.part, self.fixed, self.primitives = part, fixed, primitives
        self._fpn, self._head = part in ("fpn", "joint"), part in ("head", "joint")
        plain = primitives == "plain"
        self._fpn_ops, self._head_ops = (
            [i for i, name in enumerate(names) if not (plain and name == DEFORMABLE)]
            for names in (FPN_OPS, HEAD_OPS)
        )
        self.decisions = tuple(self._decisions())

    def _decisions(self) -> list[Decision]:
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
        return found

    def size(self) -> int:
        """As `Space` says; pyramids with too few loose blocks are counted, as published."""
        return math.prod(decision.size for decision in self.decisions)

    def decode(self, choices: Sequence[int]) -> NASFCOSGenotype:
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
            got = names[op] if type(op) is int and 0 <= op < len(names) else repr(op)
            raise UserError(f"genotype: expected operations of {known}, got {got}")
        return allowed.index(op)

    def sample(self, rng: random.Random) -> NASFCOSGenotype:
        """Uniform over ordered genotypes that are networks."""
        while True:
            genotype = self.decode(sample_choices(self.decisions, rng))
            if genotype.valid:
                return genotype

    def mutate(self, genotype: NASFCOSGenotype, rng: random.Random) -> NASFCOSGenotype:
        """Exactly one decision changes, to one of its other choices, uniformly among the changes
        that give a network."""
        choices = self.encode(genotype)
        while True:
            changed = self.decode(mutate_choices(self.decisions, choices, rng))
            if changed.valid:
                return changed

    def from_json(self, obj: object) -> NASFCOSGenotype:
        """Read `NASFCOSGenotype.to_json`, or the published list: 7 blocks, and with a head the
        share index and the operations, each block alone or in a list of its own.

        Raises:
            UserError: it is neither, a number is out of its range, or fewer than three blocks are
                loose.
        """
        return read_genotype(obj)


def is_nas_fcos(obj: Sequence[Any]) -> bool:
    """Whether a list is a detector in the published form: its first block has five numbers."""
    return len(obj) in (BLOCKS, BLOCKS + 2) and _is_block(_unwrapped(obj[0]))


def read_genotype(obj: object) -> NASFCOSGenotype:
    """As `NASFCOSSpace.from_json`."""
    keys = {"space", "fpn", "head"}
    if isinstance(obj, dict) and obj.keys() == keys and obj["space"] == NASFCOSSpace.name:
        fpn, head = obj.get("fpn"), obj.get("head")
        if head is not None and not isinstance(head, dict):
            raise _wrong("head", 'an object with "share" and "ops", or null', head)
        pair = (head.get("share"), head.get("ops")) if head is not None else None
    elif isinstance(obj, list) and len(obj) in (BLOCKS, BLOCKS + 2):
        fpn, rest = obj[:BLOCKS], [_unwrapped(each) for each in obj[BLOCKS:]]
        share = rest[0][0] if rest and isinstance(rest[0], list) and len(rest[0]) == 1 else None
        pair = (share, rest[1]) if rest else None
    else:
        raise UserError(
            f'genotype: expected the keys "space" ("{NASFCOSSpace.name}"), "fpn" and "head", or a '
            f"list of {BLOCKS} blocks, alone or with [share] and [operations], got {_short(obj)}; "
            "give a best.json or genotype that nasfast wrote"
        )
    genotype = NASFCOSGenotype(
        None if fpn is None else _read_fpn(fpn), None if pair is None else _read_head(*pair)
    )
    if not genotype.valid:
        raise UserError(
            f"genotype: expected at least {OUTPUTS} blocks that no other reads, for P3 to P5, got "
            f"{len(genotype.loose)}; it is no network of this space"
        )
    return genotype


def _read_fpn(value: object) -> tuple[Block, ...]:
    if not isinstance(value, list) or len(value) != BLOCKS:
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
    if not isinstance(ops, list) or len(ops) != LAYERS:
        raise _wrong("head ops", f"a list of {LAYERS} operations", ops)
    for k, op in enumerate(ops):
        _check(f"head op {k}", op, len(HEAD_OPS))
    assert isinstance(share, int)
    return HeadGenotype(share, tuple(ops))


def _unwrapped(block: Any) -> Any:
    """Without the list around it that the published files have."""
    inner = isinstance(block, list) and len(block) == 1 and isinstance(block[0], list)
    return block[0] if inner else block


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 5 and all(type(i) is int for i in block)


def _check(what: str, number: object, size: int) -> None:
    if type(number) is not int or not 0 <= number < size:
        raise _wrong(what, f"an integer in 0..{size - 1}", number)


def _wrong(what: str, expected: str, got: object) -> UserError:
    return UserError(
        f"genotype: {what}: expected {expected}, got {_short(got)}; give a best.json or genotype "
        "that nasfast wrote"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
