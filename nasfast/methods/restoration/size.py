"""Widths fitted to a number of parameters, so that networks of one size class meet."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nasfast.models.mixed_op import build_branch
from nasfast.models.restorer import Restorer, RestorerConfig, build_head
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.training.cost import count_parameters
from nasfast.utils.cli import flag_value
from nasfast.utils.config import count_of
from nasfast.utils.errors import UserError

TOLERANCE = 0.25
"""How far a fitted network may be from the number asked for, as a part of it."""
MAX_WIDTH = 2**10


@dataclass(frozen=True)
class Size:
    """Parameters of a network of any architecture."""

    low: int = 0
    high: int = 2**63
    target: int | None = None
    """The width of each architecture is the one that comes closest to it; None leaves widths as
    they are."""

    @classmethod
    def of(cls, text: str | int | None) -> Size:
        """The size class of "90K", or of "LOW:HIGH"; any size for None.

        Raises:
            UserError: another form, or an empty range.
        """
        if text is None:
            return cls()
        match = re.fullmatch(r"(\d[\d_]*):(\d[\d_]*)", str(text))
        if match and int(match[1]) <= int(match[2]):
            return cls(int(match[1]), int(match[2]))
        target = None if match else _count(text)
        if target is None:
            raise UserError(
                "params: expected a number of parameters, such as 90K, or LOW:HIGH, such as "
                f"60000:80000, got {text!r}; correct the value"
            )
        return cls(int((1 - TOLERANCE) * target), int((1 + TOLERANCE) * target), target)

    def fitted(
        self, genotype: IRNASGenotype, config: RestorerConfig, channels: int, scale: int = 1
    ) -> RestorerConfig:
        """The configuration that the architecture has in this size class."""
        if self.target is None:
            return config
        width = fitted_width(genotype, self.target, config, channels, scale)
        return dataclasses.replace(config, width=width)

    def require(self, parameters: int) -> None:
        """Raise UserError where a fitted network is not of the class."""
        if self.target is not None and parameters not in self:
            raise UserError(
                f"params: expected a number that the architecture comes within {TOLERANCE:.0%} of, "
                f"got {self.target:,}; its width makes it {parameters:,}, give that"
            )

    def __contains__(self, parameters: int) -> bool:
        return self.low <= parameters <= self.high


def sized(given: Sequence[str] | Mapping[str, Any]) -> bool:
    """Whether a command line, or settings by name, say what decides the size of a network.

    Raises:
        UserError: they give a width, and a number of parameters to fit it to.
    """
    given = given if isinstance(given, Mapping) else _flags(given)
    network: Any = given.get("network", {})
    inner = (
        network.get("width") if isinstance(network, Mapping) else getattr(network, "width", None)
    )
    width, params = given.get("network.width", inner), given.get("params")
    if width is not None and Size.of(params).target is not None:
        raise UserError(
            f"params: expected --params or --network.width, got both, {params} and {width}; leave "
            "one out"
        )
    return width is not None or "params" in given


def _flags(argv: Sequence[str]) -> dict[str, str | None]:
    found = {name: flag_value(argv, f"--{name}") for name in ("params", "network.width")}
    return {k: None if v == "None" else v for k, v in found.items() if v is not None}


def _count(text: str | int) -> int | None:
    try:
        return count_of(text, "params")
    except UserError:
        return None


def fitted_width(
    genotype: IRNASGenotype, target: int, config: RestorerConfig, channels: int, scale: int
) -> int:
    """The width, up to 1024, whose network comes closest to a number of parameters; of two that
    come as close, the smaller one.

    Args:
        genotype: the architecture.
        target: the number of parameters.
        config: the sizes around it; its width does not matter.
        channels: of the images.
        scale: by which the network enlarges.
    """
    return _fitted_width(genotype, target, dataclasses.replace(config, width=1), channels, scale)


@functools.lru_cache(2**16)
def _fitted_width(
    genotype: IRNASGenotype, target: int, config: RestorerConfig, channels: int, scale: int
) -> int:
    step = width_step(genotype)
    parameters = parameters_by_width(genotype, config, channels, scale)
    low, high = 1, MAX_WIDTH // step  # in steps; more width has more parameters
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if parameters(step * middle) >= target else (middle + 1, high)
    return min(
        (step * n for n in (low - 1, low) if n), key=lambda width: abs(parameters(width) - target)
    )


def width_step(genotype: IRNASGenotype) -> int:
    """2 where widths must be even: a deformable convolution of the lowest level has two groups of
    channels that share offsets."""
    deformable = any(op == "def3x3" for node in genotype.nodes for op, _ in node)
    return 2 if deformable and 0 in genotype.levels else 1


def parameters_by_width(
    genotype: IRNASGenotype, config: RestorerConfig, channels: int, scale: int = 1
) -> Callable[[int], int]:
    """Parameters of a network of any width: of its convolutions, of what brings states to the cells
    and the head, and of what every network has."""
    config = dataclasses.replace(config, width=1)
    ops = [_branch(op) for node in genotype.nodes for op, _ in node if op != "skip"]
    joints = _joints(len(genotype.nodes), config)
    frame = _frame(len(genotype.nodes), 0 in genotype.levels, config, channels, scale)

    def parameters(width: int) -> int:
        states = genotype.channels(width)
        return frame(width) + joints(states) + sum(op(size) for op in ops for size in states)

    return parameters


def _joints(nodes: int, config: RestorerConfig) -> Callable[[tuple[int, ...]], int]:
    """Parameters of the pointwise convolutions with BatchNorm before the cells, and of the head, by
    the channels of the cells' states."""
    head = _head(config)

    def parameters(states: tuple[int, ...]) -> int:
        maps = [config.stem, config.stem, *(nodes * size for size in states)]
        inputs = zip(maps, maps[1:], states, strict=False)
        return head(maps[-1]) + sum((a + b + 4) * size for a, b, size in inputs)

    return parameters


@functools.cache
def _head(config: RestorerConfig) -> Callable[[int], int]:
    """Parameters of the head by the channels that it reads."""
    return _quadratic(lambda size: build_head(size, config))


@functools.cache
def _frame(
    nodes: int, has_low: bool, config: RestorerConfig, channels: int, scale: int
) -> Callable[[int], int]:
    """Parameters by width of stem and decoder, with or without a layer at level 0: what a network
    of one layer of identities has beside its joints."""
    cell = (("skip", 0), ("skip", 1))
    bare = IRNASGenotype((cell,) * nodes, (0 if has_low else 1,))
    joints = _joints(nodes, config)
    whole = _quadratic(
        lambda width: Restorer(bare, dataclasses.replace(config, width=width), channels, scale)
    )
    return lambda width: whole(width) - joints(bare.channels(width))


@functools.cache
def _branch(op: str) -> Callable[[int], int]:
    """Parameters of an operation by its width."""
    return _quadratic(lambda width: build_branch(op, width))


def _quadratic(build: Callable[[int], nn.Module]) -> Callable[[int], int]:
    """Parameters by width, from those at 2, 4 and 6: a convolution has as many as the product of
    two widths, so they are a polynomial of degree 2."""
    with torch.device("meta"):
        first, second, third = (count_parameters(build(width)) for width in (2, 4, 6))
    slope, bend = second - first, third - 2 * second + first

    def parameters(width: int) -> int:  # Newton's form, in steps of 2
        past = width - 2
        return first + (4 * past * slope + past * (past - 2) * bend) // 8

    return parameters
