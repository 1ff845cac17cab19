"""Random calls of every op, in a process of its own: ``python tests/hardening/fuzz_ops.py -h``.

A call is a function of (target, seed, number), so that one that fell is repeated alone. It must
give what the plain reference gives, or refuse its arguments with an error that names the op, or,
for a registered op, with one of PyTorch's dispatcher. Fresh memory holds NaN: what was never
written shows.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import random
import re
import resource
import signal
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nasfast import ops
from nasfast.ops import _native

SECONDS = 30  # of a call, at most
SPARE = 6 << 30  # bytes of address space that calls may take
EXTREME = (0, -1, 2**31, 2**47, 2**61, 2**63 - 1, 2**63, 10**30, -(2**63), -(10**30))
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Arguments = dict[str, Any]


class Call(NamedTuple):
    """A call that is to be made, and what makes it."""

    arguments: Arguments
    run: Callable[[Arguments], Sequence[Any]]
    """Results, gradients among them."""
    expect: Callable[[Arguments], Sequence[Any]]
    """The same by the reference, of arguments in float64."""
    fixed: tuple[str, ...] = ()
    """Arguments that follow from others: with other values there is nothing to compare with."""
    least: float = 1.0
    """Of the values that a result is near relative to."""
    finite: tuple[str, ...] = ()
    """Arguments with which results are compared where they are finite: kernels fold factors."""
    jumps: bool = False
    """Whether rounding can turn a ReLU inside on or off, or move a sample to the next pixel."""


class Failure(Exception):
    """A call that did what none may do."""


# ---- drawing


class Draw:
    """The random choices of one call."""

    def __init__(self, target: str, seed: int, number: int) -> None:
        self.random = random.Random(f"{target} {seed} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def between(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def pair(self, least: int, most: int) -> tuple[int, int]:
        return self.between(least, most), self.between(least, most)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of a random layout; at times with values that are not finite."""
        return self.lay_out(torch.randn(shape, generator=self.generator).to(dtype))

    def shifts(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Offsets in 32nds of a pixel, which no arithmetic rounds; some lie far, or nowhere."""
        found = torch.randint(-96, 97, shape, generator=self.generator) / 32
        if self.chance(0.3):
            far = torch.tensor(
                [math.nan, math.inf, -math.inf, 1e30, -1e30, -1.0, 5.0, 1e-40, 2**31]
            )
            chosen = torch.rand(shape, generator=self.generator) < self.one(0.02, 0.3)
            which = torch.randint(0, len(far), shape, generator=self.generator)
            found = torch.where(chosen, far[which], found)
        return self.lay_out(found.to(dtype))

    def lay_out(self, tensor: Tensor) -> Tensor:
        layout = self.one("plain", "plain", "last", "last", "strided", "sliced", "transposed")
        if tensor.dim() == 4 and layout == "last":
            return tensor.contiguous(memory_format=torch.channels_last)
        if layout == "strided":
            return torch.stack([tensor, tensor], -1)[..., 0]
        if tensor.dim() == 4 and layout == "sliced":
            n, c, h, w = tensor.shape
            wide = tensor.new_full((n, c + 3, h, w), math.nan)
            return wide.contiguous(memory_format=torch.channels_last)[:, 2 : 2 + c].copy_(tensor)
        if layout == "transposed" and tensor.dim() > 1:
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        return tensor

    def ints(self, value: int | tuple[int, int]) -> Any:
        """A setting in one of the forms that are allowed."""
        if isinstance(value, tuple) and value[0] == value[1] and self.chance(0.3):
            return self.one(value[0], np.int64(value[0]), torch.tensor(value[0]))
        return [*value] if isinstance(value, tuple) and self.chance(0.3) else value

    def wrong_tensor(self, tensor: Tensor | None) -> tuple[Any, bool]:
        """Another argument in a tensor's place, and whether it has the same values."""
        if tensor is None:
            return self.one(0, [], "None", torch.zeros(3)), False
        plain = tensor.detach()
        number = plain.float() if plain.is_floating_point() else plain
        made: dict[str, Callable[[], Any]] = {
            "None": lambda: None,
            "number": lambda: self.one(0, 1.5, True, 10**30),
            "list": lambda: number.tolist(),
            "numpy": lambda: number.numpy(),
            "text": lambda: "tensor",
            "sparse": plain.to_sparse,
            "csr": lambda: plain.reshape(len(plain) if plain.dim() else 1, -1).to_sparse_csr(),
            "mkldnn": lambda: number.float().to_mkldnn(),
            "meta": lambda: plain.to("meta"),
            "quantised": lambda: torch.quantize_per_tensor(number.float(), 0.1, 3, torch.qint8),
            "complex": lambda: plain.to(torch.complex64),
            "bool": lambda: plain.bool(),
            "integer": lambda: plain.nan_to_num(0, 0, 0).to(self.one(torch.int64, torch.int8)),
            "float": lambda: plain.to(self.one(*DTYPES)),
            "float8": lambda: number.to(torch.float8_e4m3fn),
            "scalar": lambda: plain.sum(),
            "empty": lambda: plain.new_empty(0),
            "no batch": lambda: plain[:0],
            "more dims": lambda: plain[None],
            "fewer dims": lambda: plain.sum(0) if plain.dim() else plain,
            "shorter": lambda: plain[..., :-1] if plain.dim() else plain,
            "longer": lambda: torch.cat([plain, plain]) if plain.dim() else plain,
            "flat": lambda: plain.flatten(),
            "expanded": lambda: plain.flatten()[:1].sum().to(plain.dtype).expand(plain.shape),
            "overlapping": lambda: (
                plain.flatten().repeat(2).as_strided(plain.shape, [1] * plain.dim())
            ),
            "flipped": lambda: plain.flip(-1) if plain.dim() else plain,
            "nested": lambda: torch.nested.nested_tensor([plain.flatten().float()]),
            "zeros": lambda: torch._efficientzerotensor(plain.shape, dtype=plain.dtype),
            "special": lambda: self.special(plain),
        }
        same: dict[str, Callable[[], Any]] = {
            "strided": lambda: torch.stack([plain, plain], -1)[..., 0],
            "subclass": lambda: plain.clone().as_subclass(Subclass),
            "parameter": lambda: torch.nn.Parameter(plain, requires_grad=False),
            "negative": lambda: (
                torch._neg_view(plain.neg()) if plain.is_floating_point() else plain
            ),
            "inference": lambda: inference(plain),
        }
        try:
            if self.chance(0.25):
                return same[self.one(*same)](), True
            return made[self.one(*made)](), False
        except (RuntimeError, TypeError, IndexError):  # PyTorch cannot make such a one
            return object(), False

    def special(self, tensor: Tensor) -> Tensor:
        """With some values that are not finite."""
        if not tensor.is_floating_point():
            return tensor
        chosen = torch.rand(tensor.shape, generator=self.generator) < 0.1
        return tensor.masked_fill(chosen, self.one(math.nan, math.inf, -math.inf))

    def wrong_number(self, value: Any) -> Any:
        pool = [*EXTREME, None, "same", "1", 1.5, math.nan, math.inf, True, [], [1], (1, 2, 3)]
        pool += [(1, -1), (2**63 - 1, 1), [1, 10**30], np.int64(3), np.zeros(2), torch.zeros(2)]
        pool += [torch.tensor(2), torch.tensor(1.5), {}, object, torch.float16, ("a", 1)]
        return self.one(*pool)


class Subclass(Tensor):
    """As users write them."""


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# ---- what is called


def double(value: Any) -> Any:
    """Arguments for the reference."""
    if isinstance(value, ops.Branches):
        return ops.Branches(*map(double, value))
    if not isinstance(value, Tensor):
        return value
    value = value.detach().as_subclass(Tensor).resolve_neg()
    if value._is_zerotensor():
        value = torch.zeros(value.shape, dtype=value.dtype)
    return value.double().clone() if value.is_floating_point() else value


def gradients(
    outputs: Sequence[Tensor], arguments: Arguments, leaves: Sequence[str], cotangent: Tensor
) -> list[Tensor | None]:
    """Of the first output, by the arguments that take part."""
    chosen = [arguments[name] for name in leaves if isinstance(arguments[name], Tensor)]
    if not outputs[0].requires_grad:
        return [torch.zeros_like(leaf) for leaf in chosen]
    grad = cotangent.to(outputs[0].dtype)
    found = torch.autograd.grad(outputs[0], chosen, grad, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for grad, leaf in zip(found, chosen, strict=True)
    ]


def differentiable(
    draw: Draw,
    arguments: Arguments,
    tensors: Sequence[str],
    run: Callable[..., Any],
    reference: Callable[..., Any],
) -> tuple[Callable[[Arguments], Any], Callable[[Arguments], Any]]:
    """Functions that call and differentiate, by a random part of the tensors."""
    leaves = [name for name in tensors if arguments[name] is not None and draw.chance(0.4)]
    taken: list[str] = []  # by the call; the reference follows it
    seed, layout = draw.between(0, 2**40), draw.one("plain", "expanded", "last")

    def cotangent(like: Tensor) -> Tensor:
        if layout == "expanded":
            return torch.ones((), dtype=like.dtype).expand(like.shape)
        generator = torch.Generator().manual_seed(seed)
        made = torch.randn(like.shape, generator=generator).to(torch.bfloat16).to(like.dtype)
        last = layout == "last" and made.dim() == 4
        return made.contiguous(memory_format=torch.channels_last) if last else made

    def evaluate(function: Callable[..., Any], arguments: Arguments) -> list[Any]:
        arguments = dict(arguments)
        for name in leaves:
            value = arguments[name]
            floats = isinstance(value, Tensor) and value.is_floating_point()
            if floats and not value.is_inference():
                arguments[name] = value.detach().requires_grad_()
        outputs = function(**arguments)
        outputs = [*outputs] if isinstance(outputs, tuple) else [outputs]
        if function is run:
            taken[:] = [
                name
                for name in leaves
                if isinstance(arguments[name], Tensor) and arguments[name].requires_grad
            ]
        wanted = taken
        if not wanted:
            return outputs
        return outputs + gradients(outputs, arguments, wanted, cotangent(outputs[0].detach()))

    return (lambda a: evaluate(run, a)), (lambda a: evaluate(reference, a))


def out_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def deform_arguments(draw: Draw) -> Arguments:
    """A right call of deform_conv2d."""
    dtype = draw.one(*DTYPES)
    groups, offset_groups = draw.one(1, 1, 2, 3), draw.one(1, 1, 2, 3)
    channels = math.lcm(groups, offset_groups) * draw.between(1, 6)
    n, (h, w) = draw.one(0, 1, 1, 2, 3), draw.pair(1, 9)
    while True:
        kernel, stride = draw.pair(1, 4), draw.pair(1, 3)
        padding, dilation = draw.pair(0, 3), draw.pair(1, 3)
        out = [
            out_size(*sizes)
            for sizes in zip((h, w), kernel, stride, padding, dilation, strict=True)
        ]
        if min(out) > 0:
            break
    if draw.chance(0.05):  # what means nothing may be of any size
        stride = tuple(2**61 if size == 1 else s for size, s in zip(out, stride, strict=True))
        dilation = tuple(2**63 - 1 if k == 1 else d for k, d in zip(kernel, dilation, strict=True))
    samples = offset_groups * math.prod(kernel)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    of_positions = draw.one(dtype, wide)
    mask, bias = draw.chance(0.6), draw.chance(0.6)
    out_channels = groups * draw.between(1, 6)
    input = draw.normal(n, channels, h, w, dtype=dtype)
    return {
        "input": draw.special(input) if draw.chance(0.1) else input,
        "offset": draw.shifts(n, 2 * samples, *out, dtype=of_positions),
        "weight": draw.normal(out_channels, channels // groups, *kernel, dtype=dtype),
        "bias": draw.normal(out_channels, dtype=dtype) if bias else None,
        "stride": draw.ints(stride),
        "padding": draw.ints(padding),
        "dilation": draw.ints(dilation),
        "mask": draw.normal(n, samples, *out, dtype=of_positions) if mask else None,
    }


DEFORM = ("input", "offset", "weight", "bias", "mask")


def deform_conv2d(draw: Draw) -> Call:
    arguments = deform_arguments(draw)
    return Call(
        arguments,
        *differentiable(draw, arguments, DEFORM, ops.deform_conv2d, ops.deform_conv2d_reference),
    )


def registered(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(torch.ops.nasfast, name).default
    return op


def plain_pairs(arguments: Arguments) -> Arguments:
    """Settings as the dispatcher takes them."""

    def two(value: Any) -> list[int]:
        return [*map(int, value)] if isinstance(value, list | tuple) else [int(value)] * 2

    names = ("stride", "padding", "dilation")
    return {name: two(v) if name in names else v for name, v in arguments.items()}


def deform_conv2d_registered(draw: Draw) -> Call:
    arguments = plain_pairs(deform_arguments(draw))
    return Call(
        arguments,
        *differentiable(
            draw, arguments, DEFORM, registered("deform_conv2d"), ops.deform_conv2d_reference
        ),
    )


def wanted_gradients(
    reference: Callable[..., Tensor], names: Sequence[str | None]
) -> Callable[[Arguments], list[Tensor | None]]:
    """What a registered backward pass returns, by autograd; None where nothing is to compare."""

    def expect(arguments: Arguments) -> list[Tensor | None]:
        others = {k: v for k, v in arguments.items() if k not in ("grad", "wanted")}
        wanted = arguments.get("wanted", [True] * len(names))
        leaves = [name for name in names if name is not None and others.get(name) is not None]
        for name in leaves:
            others[name] = others[name].requires_grad_()
        output = reference(**others)
        if output.shape != arguments["grad"].shape:
            raise Failure("a gradient of another shape than the output was taken")
        found = torch.autograd.grad(
            output, [others[name] for name in leaves], arguments["grad"], materialize_grads=True
        )
        by_name = dict(zip(leaves, found, strict=True))
        return [
            by_name.get(name) if want else None for name, want in zip(names, wanted, strict=True)
        ]

    return expect


def empty_is_none(results: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [result if want else None for result, want in zip(results, wanted, strict=True)]


def deform_conv2d_backward(draw: Draw) -> Call:
    forward = plain_pairs(deform_arguments(draw))
    output = ops.deform_conv2d_reference(**forward)
    bias = forward.pop("bias")
    wanted = [draw.chance(0.6) for _ in range(5)]
    arguments = {
        "grad": draw.normal(*output.shape, dtype=output.dtype),
        **{name: forward[name] for name in ("input", "offset", "weight", "mask")},
        **{name: forward[name] for name in ("stride", "padding", "dilation")},
        "wanted": wanted,
    }
    del bias

    def reference(**others: Any) -> Tensor:
        return ops.deform_conv2d_reference(**others)

    def expect(arguments: Arguments) -> list[Tensor | None]:
        bias = arguments["weight"].new_zeros(arguments["weight"].shape[0])
        found = wanted_gradients(reference, DEFORM)(arguments | {"bias": bias})
        return found[:4] + ([None] if arguments["mask"] is None else found[4:])

    def run(arguments: Arguments) -> list[Tensor | None]:
        results = registered("deform_conv2d_backward")(*arguments.values())
        found = empty_is_none(results, arguments["wanted"])
        return found[:4] + ([None] if arguments["mask"] is None else found[4:])

    return Call(arguments, run, expect)


def deform_module(draw: Draw) -> Call:
    """DeformConv2d, whose arguments are those of its constructor."""
    groups = draw.one(1, 2)
    arguments = {
        "in_channels": 4,
        "out_channels": 2 * groups,
        "kernel_size": draw.ints((3, 3)),
        "stride": draw.ints((1, 1)),
        "padding": draw.ints((1, 1)),
        "dilation": draw.ints((1, 1)),
        "groups": groups,
        "input": draw.normal(1, 4, 5, 5),
        "offset": draw.shifts(1, 18, 5, 5, dtype=torch.float32),
    }
    seed = draw.between(0, 2**40)

    def run(arguments: Arguments) -> list[Tensor]:
        torch.manual_seed(seed)
        *settings, input, offset = arguments.values()
        return [ops.DeformConv2d(*settings)(input, offset).detach()]

    def expect(arguments: Arguments) -> list[Tensor]:
        torch.manual_seed(seed)
        *settings, input, offset = arguments.values()
        module = ops.DeformConv2d(*settings).double()
        sizes = module.stride, module.padding, module.dilation
        output = ops.deform_conv2d_reference(input, offset, module.weight, module.bias, *sizes)
        return [output.detach()]

    return Call(arguments, run, expect)


def depthwise_arguments(draw: Draw) -> Arguments:
    dtype, channels, n = draw.one(*DTYPES), draw.between(1, 40), draw.one(0, 1, 2)
    h, w = draw.pair(1, 12)
    while True:
        kernel, padding, dilation = draw.pair(1, 5), draw.pair(0, 5), draw.pair(1, 4)
        sizes = zip((h, w), kernel, (1, 1), padding, dilation, strict=True)
        if min(out_size(*each) for each in sizes) > 0:
            break
    if draw.chance(0.05):
        dilation = tuple(2**63 - 1 if k == 1 else d for k, d in zip(kernel, dilation, strict=True))
    if draw.chance(0.05):  # only the middle of the kernel meets the image
        kernel, padding = (3, 3), (2 ** draw.one(3, draw.between(24, 46)),) * 2
        dilation = padding
    return {
        "input": draw.normal(n, channels, h, w, dtype=dtype),
        "weight": draw.normal(channels, 1, *kernel, dtype=dtype),
        "padding": draw.ints(padding),
        "dilation": draw.ints(dilation),
    }


def depthwise_conv2d(draw: Draw) -> Call:
    arguments = depthwise_arguments(draw)
    run, reference = ops.depthwise_conv2d, ops.depthwise_conv2d_reference
    return Call(arguments, *differentiable(draw, arguments, ("input", "weight"), run, reference))


def depthwise_conv2d_registered(draw: Draw) -> Call:
    arguments = plain_pairs(depthwise_arguments(draw))
    run, reference = registered("depthwise_conv2d"), ops.depthwise_conv2d_reference
    return Call(arguments, *differentiable(draw, arguments, ("input", "weight"), run, reference))


def depthwise_conv2d_backward(draw: Draw) -> Call:
    forward = plain_pairs(depthwise_arguments(draw))
    output = ops.depthwise_conv2d_reference(**forward)
    wanted = [draw.chance(0.7), draw.chance(0.7)]
    grad = draw.normal(*output.shape, dtype=output.dtype)
    arguments = {"grad": grad, **forward, "wanted": wanted}

    def run(arguments: Arguments) -> list[Tensor | None]:
        results = registered("depthwise_conv2d_backward")(*arguments.values())
        return empty_is_none(results, arguments["wanted"])

    names = ("input", "weight")
    return Call(arguments, run, wanted_gradients(ops.depthwise_conv2d_reference, names))


def norm_arguments(draw: Draw) -> Arguments:
    dtype, channels = draw.one(*DTYPES), draw.between(1, 40)
    n, (h, w) = draw.between(1, 3), draw.pair(3, 9)
    wide = _native.accumulate(dtype)
    return {
        "input": draw.normal(n, channels, h, w, dtype=dtype),
        "weight": draw.normal(channels, dtype=wide),
        "bias": draw.normal(channels, dtype=wide),
        "eps": draw.one(1e-5, 1e-3, 0.1, 1),
    }


NORM = ("input", "weight", "bias")


def norm_reference(input: Any, weight: Any, bias: Any, eps: Any) -> tuple[Tensor, Tensor]:
    return ops.batch_norm_relu_reference(input, weight, bias, eps)


def batch_norm_relu(draw: Draw) -> Call:
    arguments = norm_arguments(draw)
    functions = differentiable(draw, arguments, NORM, ops.batch_norm_relu, norm_reference)
    return Call(arguments, *functions, least=100, finite=("weight", "bias"), jumps=True)


def batch_norm_relu_registered(draw: Draw) -> Call:
    arguments = norm_arguments(draw)
    functions = differentiable(draw, arguments, NORM, registered("batch_norm_relu"), norm_reference)
    return Call(arguments, *functions, least=100, finite=("weight", "bias"), jumps=True)


def batch_norm_relu_backward(draw: Draw) -> Call:
    forward = norm_arguments(draw)
    output, statistics = ops.batch_norm_relu(**forward)
    eps = forward.pop("eps")
    grad = draw.normal(*output.shape, dtype=output.dtype)
    arguments = {"grad": grad, **forward, "statistics": statistics, "eps": eps}

    def reference(statistics: Tensor, **others: Any) -> Tensor:
        return norm_reference(**others)[0]

    def run(arguments: Arguments) -> Sequence[Tensor]:
        found: Sequence[Tensor] = registered("batch_norm_relu_backward")(*arguments.values())
        return found

    expect = wanted_gradients(reference, NORM)
    return Call(
        arguments, run, expect, ("statistics", "eps", "input"), least=100, finite=("weight", "bias")
    )


def sep_arguments(draw: Draw) -> Arguments:
    dtype = draw.one(*DTYPES)
    wide = _native.accumulate(dtype)
    channels, out_channels = draw.between(1, 40), draw.between(1, 40)
    kernel, padding, dilation = draw.pair(1, 5), draw.pair(0, 9), draw.pair(1, 3)
    size = draw.pair(13, 16)  # as large as any of the dilated kernels
    if draw.chance(0.05):  # only the middle of the kernel meets the image
        kernel, padding = (3, 3), (2 ** draw.one(3, draw.between(24, 46)),) * 2
        dilation = padding
    return {
        "input": draw.normal(draw.one(1, 2), channels, *size, dtype=dtype),
        "depthwise": draw.normal(channels, 1, *kernel, dtype=wide),
        "pointwise": draw.normal(out_channels, channels, 1, 1, dtype=wide),
        "weight": draw.normal(out_channels, dtype=wide),
        "bias": draw.normal(out_channels, dtype=wide),
        "padding": draw.ints(padding),
        "dilation": draw.ints(dilation),
        "eps": draw.one(1e-3, 0.1, 1),
    }


SEPARABLE = ("input", "depthwise", "pointwise", "weight", "bias")


def sep_conv(draw: Draw) -> Call:
    arguments = sep_arguments(draw)
    functions = differentiable(draw, arguments, SEPARABLE, ops.sep_conv, ops.sep_conv_reference)
    return Call(arguments, *functions, least=300, finite=SEPARABLE[1:], jumps=True)


def sep_outputs(**arguments: Any) -> tuple[Tensor, ...]:
    """Output and statistics of the registered op, without the maps between."""
    output, *_, statistics = registered("sep_conv")(*arguments.values())
    return output, statistics


def sep_conv_registered(draw: Draw) -> Call:
    arguments = plain_pairs(sep_arguments(draw))
    functions = differentiable(draw, arguments, SEPARABLE, sep_outputs, ops.sep_conv_reference)
    return Call(arguments, *functions, least=300, finite=SEPARABLE[1:], jumps=True)


def sep_conv_backward(draw: Draw) -> Call:
    forward = plain_pairs(sep_arguments(draw))
    output, middle, raw, statistics = registered("sep_conv")(*forward.values())
    tensors = {name: forward.pop(name) for name in SEPARABLE}
    saved = {"middle": middle, "raw": raw, "statistics": statistics}
    grad = draw.normal(*output.shape, dtype=output.dtype)
    arguments = {"grad": grad, **tensors, **saved, **forward, "input_wanted": True}

    def reference(middle: Any, raw: Any, statistics: Any, input_wanted: Any, **others: Any) -> Any:
        return ops.sep_conv_reference(**others)[0]

    def run(arguments: Arguments) -> Sequence[Tensor]:
        found: Sequence[Tensor] = registered("sep_conv_backward")(*arguments.values())
        return found

    fixed = (*SEPARABLE, *saved, *forward, "input_wanted")
    expect = wanted_gradients(reference, SEPARABLE)
    return Call(arguments, run, expect, fixed, least=300, finite=SEPARABLE[1:], jumps=True)


def mixed_arguments(draw: Draw) -> Arguments:
    """Of the registered op: names of the branches stand beside the others."""
    dtype = draw.one(*DTYPES)
    offset_groups = draw.one(1, 1, 2)
    c = offset_groups * draw.between(1, 5)
    n, (h, w) = draw.one(1, 2), draw.pair(4, 8)
    batch_norm = draw.chance(0.5)
    if not batch_norm and draw.chance(0.1):
        n = 0
    wide = _native.accumulate(dtype)
    free = draw.one(dtype, wide)
    arguments: Arguments = {
        "input": draw.normal(n, c, h, w, dtype=dtype),
        "factors": draw.normal(5, dtype=free),
    }
    shapes = dict(
        zip(
            ops.Branches._fields,
            [
                *[(c, c, 3, 3)] * 3,
                (c,),
                (offset_groups * 27, c, 3, 3),
                (offset_groups * 27,),
                *[(c, 1, 3, 3), (c, c, 1, 1)] * 2,
            ],
            strict=True,
        )
    )
    there = [draw.chance(0.6) for _ in range(4)]
    for name, shape in shapes.items():
        branch = ["conv", "dil", "de", "d", "o"].index(
            name if name in ("conv", "dil") else "de" if name[:3] in ("def", "off") else "d"
        )
        scale = 0.05 if name.startswith("offset") else 0.5
        tensor = draw.normal(*shape, dtype=free if name.endswith("_bias") else dtype)
        arguments[name] = tensor * scale if there[branch] else None
    constants = [draw.normal(5, c, dtype=free) if draw.chance(0.5) else None for _ in range(2)]
    arguments["scale"], arguments["shift"] = constants
    return arguments | {
        "batch_norm": batch_norm,
        "eps": draw.one(1e-3, 0.1, 1.0),
        "recompute": draw.chance(0.5),
    }


MIXED = ("input", "factors", *ops.Branches._fields, "scale", "shift")


def mixed_reference(
    input: Any,
    factors: Any,
    scale: Any,
    shift: Any,
    batch_norm: bool,
    eps: float,
    recompute: bool = False,
    **branches: Any,
) -> tuple[Tensor, Tensor]:
    names = ops.Branches._fields
    b = ops.Branches(*(branches[name] for name in names))
    return ops.mixed_op_reference(
        input, factors, b, scale, shift, batch_norm=bool(batch_norm), eps=eps
    )


def mixed_public(
    input: Any,
    factors: Any,
    scale: Any,
    shift: Any,
    batch_norm: Any,
    eps: Any,
    recompute: Any,
    **branches: Any,
) -> tuple[Tensor, Tensor]:
    b = ops.Branches(*(branches[name] for name in ops.Branches._fields))
    return ops.mixed_op(
        input, factors, b, scale, shift, batch_norm=batch_norm, eps=eps, recompute=recompute
    )


def mixed_op(draw: Draw) -> Call:
    arguments = mixed_arguments(draw)
    functions = differentiable(draw, arguments, MIXED, mixed_public, mixed_reference)
    return Call(arguments, *functions, least=30, finite=(*MIXED, "grad"), jumps=True)


def mixed_op_registered(draw: Draw) -> Call:
    arguments = mixed_arguments(draw)

    def run(**arguments: Any) -> tuple[Tensor, Tensor]:
        output, statistics, *_ = registered("mixed_op")(*arguments.values())
        return output, statistics

    return Call(
        arguments,
        *differentiable(draw, arguments, MIXED, run, mixed_reference),
        least=30,
        finite=(*MIXED, "grad"),
        jumps=True,
    )


def mixed_op_backward(draw: Draw) -> Call:
    forward = mixed_arguments(draw)
    output, *kept = registered("mixed_op")(*forward.values())
    grad = draw.normal(*output.shape, dtype=output.dtype)
    arguments = {"grad": grad, **{name: forward[name] for name in MIXED}}
    arguments |= dict(zip(("statistics", "raw", "offset"), kept, strict=True))
    arguments |= {"batch_norm": forward["batch_norm"], "eps": forward["eps"]}
    arguments["wanted"] = [draw.chance(0.6) for _ in MIXED]

    def reference(statistics: Any, raw: Any, offset: Any, **others: Any) -> Tensor:
        return mixed_reference(**others)[0]

    def run(arguments: Arguments) -> list[Tensor | None]:
        found = registered("mixed_op_backward")(*arguments.values())
        there = [
            want and arguments[name] is not None
            for name, want in zip(MIXED, arguments["wanted"], strict=True)
        ]
        return empty_is_none(found, there)

    # with batch statistics, what the forward pass kept follows from the rest
    fixed = ("statistics", "raw", "offset", "eps", "batch_norm", *MIXED)
    return Call(
        arguments,
        run,
        wanted_gradients(reference, MIXED),
        fixed,
        least=30,
        finite=(*MIXED, "grad"),
        jumps=True,
    )


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNTOUCHED = 99  # in the memory of a batch


def gather_arguments(draw: Draw) -> Arguments:
    stored = draw.one(*FLOATS, torch.uint8)
    to = stored if stored == torch.uint8 else draw.one(*FLOATS)
    shape = tuple(draw.between(0 if draw.chance(0.1) else 1, 9) for _ in range(draw.between(1, 3)))
    offset, samples = 16 * draw.between(0, 3), draw.between(1, 5)
    size = -(-(offset + math.prod(shape) * stored.itemsize) // 16) * 16
    memory = torch.randint(
        0,
        256,
        (samples, size + 16 * draw.between(0, 2)),
        dtype=torch.uint8,
        generator=draw.generator,
    )
    rows = draw.between(0, 6)
    indices = torch.randint(0, samples, (rows,), generator=draw.generator)
    return {
        "data": memory[:, :size],
        "indices": indices,
        "offset": offset,
        "shape": shape,
        "dtype": stored,
        "out": torch.full((rows, *shape), UNTOUCHED, dtype=to),
        "threads": draw.one(1, 2, 3),
    }


def gather_reference(arguments: Arguments) -> list[Tensor]:
    arguments = {k: v for k, v in arguments.items() if k != "threads"}
    return [ops.feature_gather_reference(**arguments)]


def feature_gather(draw: Draw) -> Call:
    return Call(gather_arguments(draw), lambda a: [ops.feature_gather(**a)], gather_reference)


def feature_gather_registered(draw: Draw) -> Call:
    def run(arguments: Arguments) -> list[Tensor]:
        registered("feature_gather")(*arguments.values())
        return [arguments["out"]]

    return Call(gather_arguments(draw), run, gather_reference)


def gather_fields(draw: Draw) -> Call:
    """Of several fields; indices may be of other data."""
    arguments = gather_arguments(draw)
    if draw.chance(0.5):
        extreme = torch.tensor([-1, 5, 2**40, -(2**63), 2**63 - 1])
        away = torch.rand(arguments["indices"].shape, generator=draw.generator) < 0.3
        which = torch.randint(0, 5, arguments["indices"].shape, generator=draw.generator)
        arguments["indices"] = torch.where(away, extreme[which], arguments["indices"])
    count = draw.one(1, 1, 2, 17)
    outs = [arguments["out"]] + [arguments["out"].clone() for _ in range(count - 1)]
    field = arguments.pop("offset"), arguments.pop("shape"), arguments.pop("dtype")
    del arguments["out"]
    arguments |= {"fields": [ops.Field(*field)] * count, "outs": outs}

    def run(arguments: Arguments) -> list[Tensor]:
        ops.gather_fields(**arguments)
        return list(arguments["outs"])

    def expect(arguments: Arguments) -> list[Tensor]:
        data, indices = arguments["data"], arguments["indices"]
        outs = arguments["outs"]
        for field, out in zip(arguments["fields"], outs, strict=True):
            for row, index in enumerate(indices.tolist()):
                if 0 <= index < len(data):
                    block = data[index, field.offset :][: field.nbytes].clone()
                    out[row] = block.view(field.dtype).view(field.shape)
        return list(outs)

    return Call(arguments, run, expect)


TARGETS: dict[str, Callable[[Draw], Call]] = {
    "batch_norm_relu": batch_norm_relu,
    "batch_norm_relu.registered": batch_norm_relu_registered,
    "batch_norm_relu.backward": batch_norm_relu_backward,
    "deform_conv2d": deform_conv2d,
    "deform_conv2d.module": deform_module,
    "deform_conv2d.registered": deform_conv2d_registered,
    "deform_conv2d.backward": deform_conv2d_backward,
    "depthwise_conv2d": depthwise_conv2d,
    "depthwise_conv2d.registered": depthwise_conv2d_registered,
    "depthwise_conv2d.backward": depthwise_conv2d_backward,
    "feature_gather": feature_gather,
    "feature_gather.fields": gather_fields,
    "feature_gather.registered": feature_gather_registered,
    "mixed_op": mixed_op,
    "mixed_op.registered": mixed_op_registered,
    "mixed_op.backward": mixed_op_backward,
    "sep_conv": sep_conv,
    "sep_conv.registered": sep_conv_registered,
    "sep_conv.backward": sep_conv_backward,
}
"""What is called; the part before the point is the op."""
REGISTERED = {
    name.replace(".registered", "").replace(".backward", "_backward")
    for name in TARGETS
    if name.endswith((".registered", ".backward"))
}

# ---- one call, and what is thought of it


def make(target: str, seed: int, number: int) -> tuple[Call, str]:
    """A call, and what is wrong with its arguments: mostly nothing, or one of them."""
    draw = Draw(target, seed, number)
    call = TARGETS[target](draw)
    changes = 0 if draw.chance(0.4) else 1 if draw.chance(0.8) else 2
    said = []
    compared = True
    arguments = dict(call.arguments)
    for name in draw.random.sample(sorted(arguments), min(changes, len(arguments))):
        value = arguments[name]
        if name == "outs":
            at = draw.between(0, len(value) - 1)
            changed, _ = draw.wrong_tensor(value[at])
            arguments[name] = draw.one(
                [*value[:at], changed, *value[at + 1 :]], value[:-1], None, tuple(value)
            )
            same = False
        elif isinstance(value, Tensor) or (value is None and name not in ("threads",)):
            arguments[name], same = draw.wrong_tensor(value)
        elif name in ("batch_norm", "recompute"):
            arguments[name], same = draw.one(not value, "True", None, 1.5, 2**63, [1]), False
        elif name == "dtype":
            arguments[name], same = draw.one(None, "float16", *FLOATS, torch.int8, 3), False
        elif name == "fields":
            field = value[0]
            other = draw.one(
                field._replace(offset=draw.wrong_number(0)),
                field._replace(shape=draw.one((-1,), [2, 3], None, (2**62, 4), (1.5,), "ab")),
                field._replace(dtype=draw.one(None, torch.int8, "x", *FLOATS)),
                tuple(field),
                None,
            )
            arguments[name], same = draw.one([other] * len(value), value[:-1], None, []), False
        elif name == "shape":
            pool = [(-1,), [*value], (2**62, 4), (1.5,), "ab", None, 3, (), (*value, 1), (-1, -4)]
            arguments[name], same = draw.one(*pool), False
        elif name == "wanted":
            arguments[name], same = draw.one([], [True], None, [True] * 30, 1, "yes", [3.0]), False
        else:
            arguments[name], same = draw.wrong_number(value), False
        compared = compared and (same or name not in call.fixed)
        said.append(f"{name}={brief(arguments[name])}")
    return call._replace(arguments=arguments, fixed=("",) * (not compared)), ", ".join(said)


def brief(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {value.layout}"
        shape = "nested" if value.is_nested else list(value.shape)
        return f"{type(value).__name__}{shape} {value.dtype}{layout} {value.device}"
    return re.sub(r"\s+", " ", repr(value))[:120]


# What PyTorch says before an op is reached, or of memory that is not there.
DISPATCHER = re.compile(
    r"nasfast::\w+\(\) |Overflow when unpacking|Could not run 'nasfast::|"
    r"Unable to cast|no kernel|Cannot (access|copy)|Inference tensors|inference tensor|"
    r"There were no tensor arguments|ZeroTensors are immutable|Expected Tensor but got None"
)
MEMORY = re.compile(r"can't allocate memory|not enough memory|Storage size calculation overflowed")


def judge(target: str, call: Call, said: str) -> str:
    """What became of a call: "equal", "refused", "dispatcher" or "memory".

    Raises:
        Failure: it did what none may do.
    """
    op = target.partition(".")[0]
    copies = {
        name: duplicate(value, name not in ("out", "outs"))
        for name, value in call.arguments.items()
    }
    try:
        results = [*call.run(call.arguments)]
    except (ValueError, TypeError) as error:
        if re.match(rf"{op}(_forward|_backward)?: expected ", str(error)):
            if not said:
                raise Failure(f"a right call was refused: {error}") from error
            return "refused"
        if "." in target and DISPATCHER.search(str(error)):
            return "dispatcher"
        raise Failure(f"{type(error).__name__} does not name the op: {error}") from error
    except (RuntimeError, NotImplementedError) as error:
        if MEMORY.search(str(error)) and said:
            return "memory"
        if said and DISPATCHER.search(str(error)):
            return "dispatcher"
        raise Failure(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise Failure(f"{type(error).__name__}: {error}") from error
    folded = [copies.get(name) for name in call.finite]
    if call.fixed or any(isinstance(t, Tensor) and not t.isfinite().all() for t in folded):
        return "not compared"
    if any(isinstance(v, Tensor) and v.is_meta for v in call.arguments.values()):
        return "meta"
    compare(call, copies, results)
    return "equal"


def duplicate(value: Any, wide: bool) -> Any:
    """What a call may overwrite, or the reference is given in float64."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return [duplicate(each, wide) for each in value]
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        return value
    if wide:
        return double(value)
    return value.detach().as_subclass(Tensor).clone()


def compare(call: Call, copies: Arguments, results: Sequence[Any]) -> None:
    """Results against those of the reference."""
    exact = "out" in copies or "outs" in copies  # in place, in the dtype that they have
    try:
        expected = [*call.expect(copies)]
    except Failure:
        raise
    except Exception as error:
        raise Failure(f"the reference refuses what was taken: {error}") from error
    dtype = next(
        (
            v.dtype
            for v in call.arguments.values()
            if isinstance(v, Tensor) and v.dtype in TOLERANCE
        ),
        torch.float32,
    )
    tolerance = 0.0 if exact else TOLERANCE[dtype]
    read = [copies.get(name) for name in ("weight", "grad")]
    infinite = any(isinstance(t, Tensor) and not t.isfinite().all() for t in read)
    if len(results) != len(expected):
        raise Failure(f"{len(results)} results, the reference has {len(expected)}")
    for at, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        if result is None and wanted is None:
            continue
        if result is None or wanted is None or result.shape != wanted.shape:
            shapes = [None if t is None else list(t.shape) for t in (result, wanted)]
            raise Failure(f"result {at} has the shape {shapes[0]}, the reference's {shapes[1]}")
        where = at, result.detach(), wanted.detach(), tolerance, call.least, infinite
        try:
            near(*where)
        except Failure:
            if not call.jumps:
                raise
            near(*where, slack=8 * largest_jump(call, copies, at, wanted.detach(), dtype))


STEP = {torch.float64: 2**-50, torch.bfloat16: 2**-9}  # float16 is computed in float32, 2**-21


def largest_jump(
    call: Call, copies: Arguments, at: int, wanted: Tensor, dtype: torch.dtype
) -> float:
    """How far a result moves where all arguments are rounded otherwise."""
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for _ in range(16):
        near_by = dict(copies)
        for name, value in copies.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                near_by[name] = value.detach() * (1 + noise * STEP.get(dtype, 2**-21))
        moved = call.expect(near_by)[at].detach() - wanted
        largest = max(largest, float(moved.abs().max()))
    return largest


def near(
    at: int,
    result: Tensor,
    wanted: Tensor,
    tolerance: float,
    least: float,
    infinite: bool,  # PyTorch multiplies what is with zeros, kernels leave these out
    slack: float = 0.0,
) -> None:
    got, want = result.double(), wanted.double()
    finite = (
        want.isfinite() & (want.abs() <= torch.finfo(result.dtype).max)
        if (result.is_floating_point())
        else torch.ones_like(want, dtype=torch.bool)
    )
    if not torch.equal(got.isfinite() & finite, finite):
        count = int((finite & ~got.isfinite()).sum())
        raise Failure(f"result {at}: {count} values are not finite where the reference's are")
    if not infinite and (got.isfinite() & ~finite).any():
        count = int((got.isfinite() & ~finite).sum())
        raise Failure(f"result {at}: {count} values are finite where the reference's are not")
    if not finite.any():
        return
    scale = max(least if tolerance else 1.0, float(want[finite].abs().max()))
    worst = (float((got - want)[finite].abs().max()) - slack) / scale
    if worst > tolerance:
        raise Failure(f"result {at} is off by {worst:.3g} of {scale:.3g}, tolerance {tolerance}")


# ---- the process


def limit_memory() -> None:
    """Little address space, so that an absurd allocation fails at once."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="call of the first target")
    parser.add_argument("--count", type=int, default=1, help="of calls of each target, from 0 on")
    parser.add_argument("--progress", type=Path, help="file of 16 bytes: target and call that run")
    arguments = parser.parse_args()
    file = None
    if arguments.progress is not None:
        opened = arguments.progress.open("r+b")
        file = mmap.mmap(opened.fileno(), 16)
    warnings.simplefilter("ignore")  # of PyTorch, about tensors that it makes
    limit_memory()
    torch.use_deterministic_algorithms(True)  # NaN in fresh memory
    for at, target in enumerate(arguments.targets):
        first = arguments.first if at == 0 else 0
        for number in range(first, max(arguments.count, first + 1)):
            if file is not None:
                file[:] = struct.pack("2q", at, number)
            signal.alarm(SECONDS)
            said, line = "the arguments", {"target": target, "number": number}
            try:
                call, said = make(target, arguments.seed, number)
                line["outcome"] = judge(target, call, said)
            except Failure as failure:
                line |= {"outcome": "failed", "changed": said, "failure": str(failure)[:600]}
            signal.alarm(0)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
