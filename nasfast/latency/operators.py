"""What a deployed network consists of: operators, each with what its time depends on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from torch import nn

from nasfast.training.trace import Call, Form, trace
from nasfast.utils.errors import UserError

_VIEWS = {"view", "slice", "select", "expand", "split_with_sizes", "unsqueeze", "permute"}
_CONSTANT = {"empty", "zeros_like", "ones", "arange"}
_ACTIVATIONS = {"relu": "relu", "relu_": "relu", "hardtanh": "relu6", "hardtanh_": "relu6"}
_NAMES = {
    "upsample_bilinear2d": "resize",
    "max_pool2d_with_indices": "max_pool",
    "sum": "mean",
    "native_group_norm": "group_norm",
    "clone": "copy",
    "replication_pad2d": "pad",
} | _ACTIVATIONS
_CASTING = {"convolution", "deform_conv2d"}
"""What autocast gives its inputs in half precision."""
_NORMALIZING = {"native_batch_norm", "native_group_norm"}


@dataclass(frozen=True)
class Operator:
    """One step of a network. What follows a convolution in its place, normalisation and activation,
    is part of it."""

    kind: str
    """"conv", "deform_conv", "resize", "cat", "add" .."""
    reads: tuple[tuple[int, ...], ...]
    """Shapes of the maps that it reads, ``[N, C, H, W]``."""
    makes: tuple[int, ...]
    """Shape of its result."""
    weight: tuple[int, ...] = ()
    """Shape of a convolution's weight."""
    settings: tuple[int, ...] = ()
    """Of a convolution: stride, padding and dilation, two each, and groups. Of a pool: the side of
    its window, and its stride."""
    normalized: bool = False
    """Whether BatchNorm is part of it."""
    activation: str = ""
    """"relu" or "relu6" where it is part of it."""
    wide: tuple[bool, ...] = ()
    """Under autocast, which of the maps that it reads are float32; empty where none is."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a convolution."""
        return math.prod(self.makes) * math.prod(self.weight[1:]) if self.weight else 0

    @property
    def cells(self) -> int:
        """Values that it reads and writes."""
        return sum(map(math.prod, (*self.reads, self.makes, *[self.weight] * bool(self.weight))))

    @property
    def group(self) -> str:
        """Operators whose times are alike: "dense" and "pointwise" convolutions, those of a channel
        each, deformable ones, and the "rest", which moves memory."""
        if self.kind == "deform_conv":
            return "deformable"
        if self.kind != "conv":
            return "rest"
        if self.settings[-1] == self.weight[0] > 1:
            return "depthwise"
        return "pointwise" if self.weight[2:] == (1, 1) else "dense"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; UserError for another form."""
        try:
            made = cls(**{k: _tuples(v) for k, v in obj.items()})
            sides = [*made.makes, *made.weight, *made.settings]
            sides += [side for read in made.reads for side in read]
            if any(type(side) is not int or side < 0 for side in sides) or not made.makes:
                raise ValueError(f"sizes {sides}")
            if made.weight and (len(made.weight), len(made.settings)) != (4, 7):
                raise ValueError(f"weight {made.weight}, settings {made.settings}")
        except (TypeError, ValueError) as error:
            raise UserError(f"operator: expected one of nasfast, got {obj}: {error}") from error
        return made


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def operators_of(module: nn.Module, inputs: object, *, autocast: bool = False) -> Counter[Operator]:
    """The operators of a network in evaluation mode, and how often it has each.

    Args:
        module: it is traced, not run.
        inputs: tensors on the device "meta".
        autocast: whether it runs under autocast: then convolutions give half precision, what reads
            a float32 map or a parameter gives float32, and other operators keep what they read.
    """
    found: list[Operator] = []
    maker: dict[int, int] = {}  # number of a map to the position of the operator that made it
    narrow = set[int]()  # numbers of the maps in half precision
    for call in trace(module, inputs).calls:
        name = call.name.partition(".")[2]
        if autocast and (name in _CASTING or all(number in narrow for number in _maps(call))):
            narrow.add(call.made)
        if name in _VIEWS or name in _CONSTANT:
            continue
        before = maker.get(call.read[0], -1) if call.read else -1
        fused = _fused(found[before], name) if before >= 0 else None
        if fused is not None:
            found[before] = fused
            maker[call.made] = before
            continue
        operator = _operator(name, call)
        if operator is None:
            continue
        wide = tuple(number not in narrow for number in _maps(call)[: len(operator.reads)])
        if autocast and any(wide):
            operator = replace(operator, wide=wide)
        maker[call.made] = len(found)
        found.append(operator)
    return Counter(found)


def _maps(call: Call) -> list[int]:
    """Numbers of what a call reads, without a normalisation's parameters."""
    return list(call.read[:1] if call.name.partition(".")[2] in _NORMALIZING else call.read)


def _fused(before: Operator, name: str) -> Operator | None:
    """The operator with what comes after it, where the two are one when deployed."""
    if before.kind not in ("conv", "deform_conv") or before.activation:
        return None
    if name == "native_batch_norm" and not before.normalized:
        return replace(before, normalized=True)
    return replace(before, activation=_ACTIVATIONS[name]) if name in _ACTIVATIONS else None


def _operator(name: str, call: Call) -> Operator | None:
    result = call.result if isinstance(call.result, Form) else call.result[0]
    maps = [form for form in _forms(call.args) if len(form.shape) > 2]
    if len(result.shape) < 3 or not maps:
        return None  # of a few values
    if name == "convolution":
        x, weight, _, stride, padding, dilation, _, _, groups = call.args
        settings = (*stride, *padding, *dilation, groups)
        made, kernel = tuple(result.shape), tuple(weight.shape)
        return Operator("conv", (tuple(x.shape),), made, kernel, settings)
    if name == "deform_conv2d":
        x, offset, weight, _, stride, padding, dilation = call.args[:7]
        settings = (*stride, *padding, *dilation, x.shape[1] // weight.shape[1])
        reads = (tuple(x.shape), tuple(offset.shape))
        made, kernel = tuple(result.shape), tuple(weight.shape)
        return Operator("deform_conv", reads, made, kernel, settings)
    settings = ()
    if name == "max_pool2d_with_indices":
        settings = (call.args[1][0], call.args[2][0])
    shapes = tuple(tuple(form.shape) for form in maps)
    return Operator(_NAMES.get(name, name), shapes, tuple(result.shape), settings=settings)


def _forms(args: Sequence[Any]) -> list[Form]:
    found = []
    for value in args:
        if isinstance(value, Form):
            found.append(value)
        elif isinstance(value, tuple):
            found += _forms(value)
    return found
