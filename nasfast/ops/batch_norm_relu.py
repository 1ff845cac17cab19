"""Batch normalisation in training, and the ReLU behind it, as one operation.

PyTorch writes what lies between the two: forward and backward move thirteen maps through memory,
where this moves eight, and keeps the input alone. The public function comes first, then the
reference, the checks, and the registration with ``torch.library``. There is a kernel for the CPU;
on CUDA the reference runs, whose normalisation is cuDNN's.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nasfast.ops import _checks, _eager, _native, _register

_OP = "batch_norm_relu"
_wrong = functools.partial(_checks.wrong, _OP)


def batch_norm_relu(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in the memory format of input, [2, C]
    """ReLU of the input normalised by its own statistics, and those: mean and biased variance.

    The statistics take no gradient; they are for running averages. Weight and bias are float32
    beside a half-precision input, else of its dtype, as for ``F.batch_norm``. Results are the same
    for any number of threads. Channels last is the native memory format; other maps are copied into
    it.

    Raises:
        TypeError: what is no tensor, or no number.
        ValueError: tensors that do not fit together, or a batch of one pixel.
    """
    output, statistics = _eager.call(
        _OP,
        (input, weight, bias),
        (input, weight, bias, _checks.number(_OP, "eps", eps)),
        _kernel,
        _differentiable,
        batch_norm_relu_reference,
        _check_kinds,
    )
    return output, statistics


def batch_norm_relu_reference(
    input: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`batch_norm_relu` in plain PyTorch: any device and float dtype."""
    _check_kinds(input, weight, bias)
    pixels = _check(input, weight, bias, _checks.number(_OP, "eps", eps)).pixels
    mean, variance = torch.zeros_like(weight).detach(), torch.ones_like(weight).detach()
    # a running average of momentum 1 is the batch's own
    normal = F.batch_norm(input, mean, variance, weight, bias, True, momentum=1.0, eps=eps)
    statistics = torch.stack([mean, variance * ((pixels - 1) / pixels)])
    return F.relu(normal).contiguous(memory_format=_native.memory_format(input)), statistics


class Sizes(NamedTuple):
    """``Params`` in csrc/batch_norm_relu/batch_norm_relu.h."""

    pixels: int
    channels: int
    eps: int
    """The bits of a double."""


def _check_kinds(input: Any, weight: Any, bias: Any) -> None:
    _checks.check_tensors(_OP, input=input, weight=weight, bias=bias)


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grad: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Sizes:
    """Sizes of a call whose tensors fit together."""
    if input is None or weight is None or bias is None:
        _check_kinds(input, weight, bias)
    _checks.check_float(_OP, input)
    _checks.check_dimensions(_OP, "input", input, 4)
    batch, channels, height, width = input.shape
    pixels = batch * height * width
    if pixels < 2 or channels == 0:
        raise _wrong(
            "input",
            "of at least 2 pixels a channel",
            f"shape {tuple(input.shape)}",
            "a single one has no variance: normalise it with running statistics",
        )
    sums = _native.accumulate(input.dtype)
    for name, tensor, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("statistics", statistics, (2, channels)),
    ):
        if tensor is None:
            continue
        _checks.check_shape(_OP, name, tensor, shape, "it has one value per channel of input")
        if tensor.dtype != sums:
            dtype = f"of {sums} beside an input of {input.dtype}"
            raise _wrong(name, dtype, tensor.dtype, f"convert it with {name}.to({sums})")
        _checks.check_device(_OP, name, tensor, input)
    if grad is not None and (grad.shape, grad.dtype) != (input.shape, input.dtype):
        like = f"like input, {input.dtype} of shape {tuple(input.shape)}"
        raise _wrong("grad", like, f"{grad.dtype} of shape {tuple(grad.shape)}", "convert it")
    if grad is not None:
        _checks.check_device(_OP, "grad", grad, input)
    if not 0 < eps < math.inf:  # as F.batch_norm
        raise _wrong("eps", "above 0", eps, "change it")
    return Sizes(pixels, channels, _native.double_bits(eps))


@_native.pointers("batch_norm_relu_forward")
def _forward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    pixels, channels, _ = sizes
    sums, map, last = _native.accumulate(dtype), pixels * channels, torch.channels_last
    return (
        _native.Pointer.of("input", dtype, map, last),
        _native.Pointer.of("weight", sums, channels),
        _native.Pointer.of("bias", sums, channels),
        _native.Pointer.of("output", dtype, map, last),
        _native.Pointer.of("statistics", sums, 2 * channels),
    )


@_native.pointers("batch_norm_relu_backward")
def _backward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    input, weight, bias, output, statistics = _forward_pointers(dtype, sizes)
    return (
        output._replace(name="grad"),
        *(input, weight, bias, statistics),
        input._replace(name="grad_input"),
        weight._replace(name="grad_weight"),
        bias._replace(name="grad_bias"),
    )


def _kernel(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    sizes = _check(input, weight, bias, eps)
    entry, dtype = "batch_norm_relu_forward", _native.storage(input)
    x, w, b = _native.as_map(input, dtype), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    statistics = w.new_empty(2, sizes.channels)
    _native.call(entry, dtype, sizes, (x, w, b, y, statistics))
    return _native.as_like(y, input), statistics


def _kernel_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if grad is None or statistics is None:
        _checks.check_tensors(_OP, grad=grad, statistics=statistics)
    sizes = _check(input, weight, bias, eps, grad, statistics)
    entry, dtype = "batch_norm_relu_backward", _native.storage(input)
    dy, x = _native.as_map(grad, dtype), _native.as_map(input, dtype)
    w, b, s = weight.contiguous(), bias.contiguous(), statistics.contiguous()
    dx, dw, db = torch.empty_like(x), torch.empty_like(w), torch.empty_like(b)
    _native.call(entry, dtype, sizes, (dy, x, w, b, s, dx, dw, db))
    return _native.as_like(dx, input), dw, db


def _fake(input: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(input, weight, bias, eps)
    output = torch.empty_like(input, memory_format=_native.memory_format(input))
    return output, weight.new_empty(2, len(weight))


def _fake_backward(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if grad is None or statistics is None:
        _checks.check_tensors(_OP, grad=grad, statistics=statistics)
    _check(input, weight, bias, eps, grad, statistics)
    output = torch.empty_like(input, memory_format=_native.memory_format(input))
    return output, torch.empty_like(weight), torch.empty_like(bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, weight, bias, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, weight, bias, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = grad, *ctx.saved_tensors
    op = _eager.choose_backward(_OP, tensors, _kernel_backward)
    return *op(*tensors, ctx.eps), None


_differentiable = _eager.make_differentiable(_kernel, _setup, _backward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.eps = inputs  # all but the statistics
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    def output(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm_relu_reference(input, weight, bias, ctx.eps)[0]

    second = _register.second_derivatives(output, ctx.saved_tensors, cotangents, [True] * 3)
    return *second, None, None


_register.define(
    "batch_norm_relu(Tensor input, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    _fake,
    backward=_backward,
    setup=_setup,
)
_register.define(
    "batch_norm_relu_backward(Tensor grad, Tensor input, Tensor weight, Tensor bias, "
    "Tensor statistics, float eps) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    backward=_double_backward,
    setup=_setup_backward,
)
_register.implement(
    _OP, _kernel, _kernel_backward, batch_norm_relu_reference, on_cuda="cuDNN and a ReLU"
)
