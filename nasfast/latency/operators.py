"""What a deployed network consists of: operators, each with what its time depends on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from nasfast.training.trace import Call, Form, trace
from nasfast.utils.errors import UserError

_CONSTANT = {"empty", "zeros_like", "ones", "arange"}
_ACTIVATIONS = {"relu": "relu", "relu_": "relu", "hardtanh": "relu6", "hardtanh_": "relu6"}
_NAMES = {
    "convolution": "conv",
    "deform_conv2d": "deform_conv",
    "upsample_bilinear2d": "resize",
    "max_pool2d_with_indices": "max_pool",
    "sum": "mean",
    "native_group_norm": "group_norm",
    "clone": "copy",
    "_to_copy": "cast",
    "upsample_bicubic2d": "bicubic",
    "replication_pad2d": "pad",
} | _ACTIVATIONS


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
    its window, and its stride. Of GroupNorm: the groups."""
    bias: bool = False
    """Whether a convolution has one of its own."""
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
    def axis(self) -> int:
        """The one along which maps are joined."""
        return next((i for i, side in enumerate(self.makes) if side != self.reads[0][i]), 1)

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
            _check(made)
        except (TypeError, ValueError) as error:
            raise UserError(f"operator: expected one of nasfast, got {obj}: {error}") from error
        return made


def _check(operator: Operator) -> None:
    """ValueError where fields do not fit together, or are out of all bounds."""
    convolves = operator.kind in ("conv", "deform_conv")
    shapes = [*operator.reads, operator.makes, *[operator.weight] * convolves]
    flags = (operator.bias, operator.normalized, *operator.wide)
    sizes = (len(operator.weight), len(operator.settings))
    if not (
        type(operator.kind) is str
        and all(1 <= len(shape) <= 5 for shape in shapes)
        and all(_is_count(side, 1) for shape in shapes for side in shape)
        and all(_is_count(value, 0) for value in operator.settings)
        and operator.reads
        and (sizes == (4, 7) if convolves else not operator.weight)
        and operator.activation in ("", *_ACTIVATIONS.values())
        and all(type(flag) is bool for flag in flags)
    ):
        raise ValueError("fields of other types or sizes")


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 2**31


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def operators_of(module: nn.Module, inputs: object, *, autocast: str = "") -> Counter[Operator]:
    """The operators of a network in evaluation mode, and how often it has each.

    Args:
        module: it is traced, not run.
        inputs: tensors on the device "meta".
        autocast: type of the device, where it runs under autocast to bfloat16.
    """
    calls = trace(module, inputs, autocast).calls
    found: list[Operator] = []
    maker: dict[int, int] = {}  # number of a map to the position of the operator that made it
    for call, only in zip(calls, _only_readers(calls), strict=True):
        name = call.name.partition(".")[2]
        if call.view or name in _CONSTANT:
            continue
        before = maker.get(call.read[0], -1) if only else -1
        fused = _fused(found[before], name) if before >= 0 else None
        if fused is not None:
            found[before] = fused
            maker[call.made[0]] = before
            continue
        operator = _operator(name, call)
        if operator is None:
            maker.pop(call.made[0], None)
            continue
        if autocast:
            wide = tuple(form.dtype == torch.float32 for form in _maps(name, call))
            operator = replace(operator, wide=wide if any(wide) else ())
        maker[call.made[0]] = len(found)
        found.append(operator)
    return Counter(found)


def _only_readers(calls: Sequence[Call]) -> list[bool]:
    """Of each call, whether nothing else reads the map that it reads first: what makes that map
    cannot end with this call where its own result is needed too."""
    changes = Counter[int]()  # of maps, by operations in place
    firsts, readers = list[tuple[int, int] | None](), Counter[tuple[int, int]]()
    for call in calls:
        read = [(number, changes[number]) for number in call.read]
        readers.update(set(read))
        firsts.append(read[0] if read else None)
        changes.update(set(call.read) & set(call.made))
    return [first is not None and readers[first] == 1 for first in firsts]


def _fused(before: Operator, name: str) -> Operator | None:
    """The operator with what comes after it, where the two are one when deployed."""
    if before.kind not in ("conv", "deform_conv") or before.activation:
        return None
    if name == "native_batch_norm" and not before.normalized:
        return replace(before, normalized=True)
    return replace(before, activation=_ACTIVATIONS[name]) if name in _ACTIVATIONS else None


def _maps(name: str, call: Call) -> list[Form]:
    """What is read, without weights and what else has few values."""
    if name == "convolution":
        return [call.args[0]]
    if name == "deform_conv2d":
        x, offset, *_, mask = call.args
        return [x, offset] if mask is None else [x, offset, mask]
    return [form for form in _forms(call.args) if len(form.shape) > 2]


def _operator(name: str, call: Call) -> Operator | None:
    result = call.result if isinstance(call.result, Form) else call.result[0]
    reads = tuple(tuple(form.shape) for form in _maps(name, call))
    if len(result.shape) < 3 or not reads:
        return None  # of a few values
    makes = tuple(result.shape)
    if name in ("convolution", "deform_conv2d"):
        place = 1 if name == "convolution" else 2
        weight, bias, stride, padding, dilation = call.args[place : place + 5]
        groups = call.args[0].shape[1] // weight.shape[1]
        settings = (*stride, *padding, *dilation, groups)
        kind = _NAMES[name]
        return Operator(kind, reads, makes, tuple(weight.shape), settings, bias is not None)
    settings = ()
    if name == "max_pool2d_with_indices":
        settings = (call.args[1][0], call.args[2][0])
    elif name == "native_group_norm":
        settings = (call.args[6],)
    return Operator(_NAMES.get(name, name), reads, makes, settings=settings)


def _forms(args: Sequence[Any]) -> list[Form]:
    found = []
    for value in args:
        if isinstance(value, Form):
            found.append(value)
        elif isinstance(value, tuple):
            found += _forms(value)
    return found
