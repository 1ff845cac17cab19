"""Depthwise convolution: one kernel for each channel, stride 1, any padding and dilation.

The public function comes first, then the reference, the checks, and the registration with
``torch.library``. There is a kernel for the CPU; on CUDA the reference runs, which is cuDNN's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nasfast.ops import _checks, _eager, _native, _register
from nasfast.ops._checks import HALF, Ints, Pair

_OP = "depthwise_conv2d"
_pair = functools.partial(_checks.pair, _OP)


def depthwise_conv2d(
    input: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C, 1, kh, kw]
    padding: Ints = 0,
    dilation: Ints = 1,
) -> Tensor:  # [N, C, Ho, Wo], in the memory format of input
    """Convolution of every channel with a kernel of its own; outside the image the input is zero.

    There a tap adds nothing, whatever its weight: PyTorch's convolutions differ where that is NaN.

    Both tensors have one dtype; sums are in float32, or float64 for float64. Autocast casts both.
    Results are the same for any number of threads. Channels last is the native memory format;
    other maps are copied into it.

    Raises:
        TypeError: what is no tensor, or no integer.
        ValueError: tensors that do not fit together, with what was expected and what came.
    """
    padding, dilation = _pair("padding", padding), _pair("dilation", dilation)
    output: Tensor = _eager.call(
        _OP,
        (input, weight),
        (input, weight, padding, dilation),
        _kernel,
        _differentiable,
        depthwise_conv2d_reference,
        _check_kinds,
    )
    return output


def depthwise_conv2d_reference(
    input: Tensor, weight: Tensor, padding: Ints = 0, dilation: Ints = 1
) -> Tensor:
    """:func:`depthwise_conv2d` in plain PyTorch: any device and float dtype."""
    padding, dilation = _pair("padding", padding), _pair("dilation", dilation)
    _check_kinds(input, weight)
    _check(input, weight, padding, dilation)
    dtype, layout = input.dtype, _native.memory_format(input)
    if dtype in HALF and input.device.type == "cpu":
        # torch 2.13 gets weight gradients of dilated ones wrong in bfloat16
        input, weight = input.float(), weight.float()
    output = F.conv2d(input, weight, None, 1, padding, dilation, groups=input.shape[1])
    return output.to(dtype).contiguous(memory_format=layout)


class Geometry(NamedTuple):
    """Sizes of one call: ``Params`` in csrc/depthwise_conv2d/depthwise_conv2d.h."""

    batch: int
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int


def _check_kinds(input: Any, weight: Any) -> None:
    _checks.check_tensors(_OP, input=input, weight=weight)


def _check(
    input: Tensor, weight: Tensor, padding: Pair, dilation: Pair, grad: Tensor | None = None
) -> Geometry:
    """Sizes of a call whose tensors fit together."""
    if input is None or weight is None:
        _check_kinds(input, weight)
    _checks.check_float(_OP, input)
    for name, tensor in (("input", input), ("weight", weight), ("grad", grad)):
        if tensor is not None:
            _checks.check_dimensions(_OP, name, tensor, 4)
            _checks.check_like(_OP, name, tensor, input)
    _checks.check_settings(_OP, padding=padding, dilation=dilation)
    _checks.check_depthwise(_OP, "weight", weight, input)
    batch, channels, height, width = input.shape
    kernel_h, kernel_w = weight.shape[2:]
    kernel = kernel_h, kernel_w
    out_height, out_width = _checks.output_size(
        _OP, (height, width), kernel, (1, 1), padding, dilation
    )
    if grad is not None:
        remedy = "padding and dilation decide the height and width"
        size = (batch, channels, out_height, out_width)
        _checks.check_shape(_OP, "grad", grad, size, remedy)
    return Geometry(
        batch,
        channels,
        height,
        width,
        out_height,
        out_width,
        kernel_h,
        kernel_w,
        *padding,
        *dilation,
    )


def _sizes(g: Geometry) -> Geometry:
    """``Params``."""
    _checks.check_output(_OP, (g.batch, g.channels, g.out_height, g.out_width))
    if g.kernel_h != 1 and g.kernel_w != 1:
        return g
    dilation = _checks.effective((g.kernel_h, g.kernel_w), (g.dilation_h, g.dilation_w))
    return Geometry(*g[:-2], *dilation)


@_native.pointers("depthwise_conv2d_forward")
def _forward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    g, last = Geometry(*sizes), torch.channels_last
    maps = g.batch * g.channels
    return (
        _native.Pointer.of("input", dtype, maps * g.height * g.width, last),
        _native.Pointer.of("weight", dtype, g.channels * g.kernel_h * g.kernel_w),
        _native.Pointer.of("output", dtype, maps * g.out_height * g.out_width, last),
    )


@_native.pointers("depthwise_conv2d_backward")
def _backward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    input, weight, output = _forward_pointers(dtype, sizes)
    g = Geometry(*sizes)
    elements = g.channels * g.kernel_h * g.kernel_w
    return (
        output._replace(name="grad"),
        *(input, weight),
        input._replace(name="grad_input", needed=False),
        _native.Pointer.of("grad_weight", _native.accumulate(dtype), elements, needed=False),
    )


def _kernel(input: Tensor, weight: Tensor, padding: Pair, dilation: Pair) -> Tensor:
    g = _sizes(_check(input, weight, padding, dilation))
    entry, dtype = "depthwise_conv2d_forward", _native.storage(input)
    x, w = _native.as_map(input, dtype), weight.to(dtype).contiguous()
    y = _native.empty_map(x, (g.batch, g.channels, g.out_height, g.out_width))
    _native.call(entry, dtype, g, (x, w, y))
    return _native.as_like(y, input)


def _kernel_backward(
    grad: Tensor,  # [N, C, Ho, Wo]
    input: Tensor,
    weight: Tensor,
    padding: Pair,
    dilation: Pair,
    wanted: list[bool],  # of input, weight
) -> tuple[Tensor, Tensor]:
    if grad is None:
        _checks.check_tensors(_OP, grad=grad)
    _checks.check_wanted(_OP, wanted, 2)
    g = _sizes(_check(input, weight, padding, dilation, grad))
    entry, dtype = "depthwise_conv2d_backward", _native.storage(input)
    dy, x, w = (
        _native.as_map(grad, dtype),
        _native.as_map(input, dtype),
        weight.to(dtype).contiguous(),
    )
    dx = _native.empty_map(x, x.shape) if wanted[0] else None
    dw = torch.empty_like(w, dtype=_native.accumulate(dtype)) if wanted[1] else None
    _native.call(entry, dtype, g, (dy, x, w, dx, dw))
    none = input.new_empty(0)
    return (
        none if dx is None else _native.as_like(dx, input),
        none if dw is None else dw.to(weight.dtype),
    )


def _fake(input: Tensor, weight: Tensor, padding: Pair, dilation: Pair) -> Tensor:
    g = _check(input, weight, padding, dilation)
    shape = (g.batch, g.channels, g.out_height, g.out_width)
    return input.new_empty(shape).contiguous(memory_format=_native.memory_format(input))


def _fake_backward(
    grad: Tensor, input: Tensor, weight: Tensor, padding: Pair, dilation: Pair, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    if grad is None:
        _checks.check_tensors(_OP, grad=grad)
    _checks.check_wanted(_OP, wanted, 2)
    _check(input, weight, padding, dilation, grad)
    dx = torch.empty_like(input, memory_format=_native.memory_format(input))
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return dx if wanted[0] else input.new_empty(0), dw if wanted[1] else input.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(input, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    op = _eager.choose_backward(_OP, (grad, input, weight), _kernel_backward)
    gradients = op(grad, input, weight, ctx.padding, ctx.dilation, wanted)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None


_differentiable = _eager.make_differentiable(_kernel, _setup, _backward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, input, weight, ctx.padding, ctx.dilation, ctx.wanted = inputs
    ctx.save_for_backward(grad, input, weight)


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Output and gradients are linear in each of grad, input and weight: the same two ops again."""
    grad, input, weight = ctx.saved_tensors
    sizes = ctx.padding, ctx.dilation
    of_input, of_weight = (
        cotangent if want else torch.zeros_like(like)
        for cotangent, want, like in zip(cotangents, ctx.wanted, (input, weight), strict=True)
    )
    of_grad = depthwise_conv2d(of_input, weight, *sizes) + depthwise_conv2d(
        input, of_weight, *sizes
    )
    op = torch.ops.nasfast.depthwise_conv2d_backward.default
    dx, dw = op(grad, of_input, of_weight, *sizes, [True, True])
    return of_grad, dx, dw, None, None, None


def _autocast(device: str) -> Callable[..., Tensor]:
    """Casts as autocast does for a convolution; leaves float64 alone."""

    def op(input: Tensor, weight: Tensor, padding: Pair, dilation: Pair) -> Tensor:
        if input.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            input, weight = _register.cast(input, dtype), _register.cast(weight, dtype)
        with torch.autocast(device, enabled=False):
            return depthwise_conv2d(input, weight, padding, dilation)

    return op


def _flops(*arguments: Any, out_shape: Sequence[int], **rest: Any) -> int:
    """Two per multiply-add, as PyTorch counts a convolution."""
    batch, channels, height, width = out_shape
    _, _, kernel_h, kernel_w = arguments[1]
    return int(2 * batch * channels * height * width * kernel_h * kernel_w)


def _backward_flops(
    grad: Sequence[int], input: Sequence[int], weight: Sequence[int], *rest: Any, **shape: Any
) -> int:
    return int(sum(rest[-1])) * _flops(input, weight, out_shape=grad)


_SIZES = "int[2] padding, int[2] dilation"
_register.define(
    f"depthwise_conv2d(Tensor input, Tensor weight, {_SIZES}) -> Tensor",
    _fake,
    _flops,
    _backward,
    _setup,
)
_register.define(
    f"depthwise_conv2d_backward(Tensor grad, Tensor input, Tensor weight, {_SIZES}, "
    "bool[2] wanted) -> (Tensor, Tensor)",
    _fake_backward,
    _backward_flops,
    _double_backward,
    _setup_backward,
)
_register.autocast(_OP, _autocast)
_register.implement(_OP, _kernel, _kernel_backward, depthwise_conv2d_reference, on_cuda="cuDNN")
