"""The space of NAS-FCOS (Wang et al., CVPR 2020, arXiv 1906.04423): pyramids and heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


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
