"""Separable convolution in training: depthwise, pointwise, batch normalisation and ReLU.

As modules these read and write each map about four times. Here the pointwise product takes tiles of
the depthwise convolution, and the statistics tiles of the product, while they are in the cache; so
do the gradients. The public function comes first, then the reference, the checks, and the
registration with ``torch.library``. There is a kernel for the CPU; on CUDA the reference runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nasfast.ops import _checks, _eager, _native, _register
from nasfast.ops._checks import Ints, Pair
from nasfast.ops.depthwise_conv2d import depthwise_conv2d_reference

_OP = "sep_conv"
_wrong = functools.partial(_checks.wrong, _OP)
_pair = functools.partial(_checks.pair, _OP)


def sep_conv(
    input: Tensor,  # [N, C, H, W]
    depthwise: Tensor,  # [C, 1, kh, kw]
    pointwise: Tensor,  # [Co, C, 1, 1]
    weight: Tensor,  # [Co]
    bias: Tensor,  # [Co]
    padding: Ints = 0,
    dilation: Ints = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # [N, Co, Ho, Wo] in the memory format of input, [2, Co]
    """ReLU of the two convolutions normalised by their own statistics, and those: mean and biased
    variance.

    The statistics take no gradient; they are for running averages. All parameters are float32
    beside a half-precision input, else of its dtype; the kernel's products round them as autocast
    does, and so are the maps between the operations. Autocast casts the input. Results are the
    same for any number of threads. Channels last is the native memory format; other maps are copied
    into it.

    Raises:
        TypeError: what is no tensor, no integer or no number.
        ValueError: tensors that do not fit together, or a batch of one pixel.
    """
    tensors = input, depthwise, pointwise, weight, bias
    padding, dilation = _pair("padding", padding), _pair("dilation", dilation)
    output, _, _, statistics = _eager.call(
        _OP,
        tensors,
        (*tensors, padding, dilation, _checks.number(_OP, "eps", eps)),
        _kernel,
        _differentiable,
        _plain,
        _check_kinds,
    )
    return output, statistics


def sep_conv_reference(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Ints = 0,
    dilation: Ints = 1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """:func:`sep_conv` in plain PyTorch: any device and float dtype."""
    padding, dilation = _pair("padding", padding), _pair("dilation", dilation)
    eps = _checks.number(_OP, "eps", eps)
    output, _, _, statistics = _plain(
        input, depthwise, pointwise, weight, bias, padding, dilation, eps
    )
    return output, statistics


def _plain(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Pair,
    dilation: Pair,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the maps of the two convolutions, and the statistics."""
    _check_kinds(input, depthwise, pointwise, weight, bias)
    _check(input, depthwise, pointwise, weight, bias, padding, dilation, eps)
    dtype, layout = input.dtype, _native.memory_format(input)
    middle = depthwise_conv2d_reference(input, depthwise.to(dtype), padding, dilation)
    raw = F.conv2d(middle, pointwise.to(dtype))
    variance, mean = torch.var_mean(raw.detach().to(weight.dtype), (0, 2, 3), correction=0)
    output = F.relu(F.batch_norm(raw, None, None, weight, bias, True, eps=eps))
    return output.contiguous(memory_format=layout), middle, raw, torch.stack([mean, variance])


def _reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_plain` with the maps as the kernel gives them."""
    output, *maps, statistics = _plain(*arguments)
    middle, raw = (_native.as_map(map.detach(), _native.storage(arguments[0])) for map in maps)
    return output, middle, raw, statistics


class Geometry(NamedTuple):
    """Sizes of one call: ``Params`` in csrc/sep_conv/sep_conv.h."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    eps: int
    """The bits of a double."""


def _check_kinds(input: Any, depthwise: Any, pointwise: Any, weight: Any, bias: Any) -> None:
    _checks.check_tensors(
        _OP, input=input, depthwise=depthwise, pointwise=pointwise, weight=weight, bias=bias
    )


def _check(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Pair,
    dilation: Pair,
    eps: float,
) -> Geometry:
    """Sizes of a call whose tensors fit together."""
    parameters = depthwise, pointwise, weight, bias
    if input is None or any(parameter is None for parameter in parameters):
        _check_kinds(input, *parameters)
    _checks.check_float(_OP, input)
    _checks.check_dimensions(_OP, "input", input, 4)
    _checks.check_dimensions(_OP, "depthwise", depthwise, 4)
    _checks.check_dimensions(_OP, "pointwise", pointwise, 4)
    _checks.check_settings(_OP, padding=padding, dilation=dilation)
    _checks.check_depthwise(_OP, "depthwise", depthwise, input)
    batch, channels, height, width = input.shape
    kernel_h, kernel_w = depthwise.shape[2:]
    out_channels = pointwise.shape[0]
    if pointwise.shape[1:] != (channels, 1, 1) or out_channels == 0:
        shape = f"of shape [Co, {channels}, 1, 1], Co above 0"
        remedy = "build the layer for the channels of its input"
        raise _wrong("pointwise", shape, tuple(pointwise.shape), remedy)
    sums = _native.accumulate(input.dtype)
    for name, tensor in zip(("depthwise", "pointwise", "weight", "bias"), parameters, strict=True):
        if tensor.dtype != sums:
            dtype = f"of {sums} beside an input of {input.dtype}"
            raise _wrong(name, dtype, tensor.dtype, f"convert it with {name}.to({sums})")
        _checks.check_device(_OP, name, tensor, input)
    for name, tensor in (("weight", weight), ("bias", bias)):
        remedy = "it has one value per output channel of pointwise"
        _checks.check_shape(_OP, name, tensor, (out_channels,), remedy)
    if not 0 < eps < math.inf:  # as F.batch_norm
        raise _wrong("eps", "above 0", eps, "change it")
    out_height, out_width = _checks.output_size(
        _OP, (height, width), (kernel_h, kernel_w), (1, 1), padding, dilation
    )
    pixels = batch * out_height * out_width
    if pixels < 2:
        raise _wrong(
            "input",
            "that gives at least 2 pixels a channel",
            f"shape {tuple(input.shape)}, which gives {pixels}",
            "a single one has no variance: normalise it with running statistics",
        )
    return Geometry(
        batch,
        channels,
        height,
        width,
        out_channels,
        out_height,
        out_width,
        kernel_h,
        kernel_w,
        *padding,
        *dilation,
        _native.double_bits(eps),
    )


def _check_backward(
    grad: Tensor, middle: Tensor, raw: Tensor, statistics: Tensor, *arguments: Any
) -> Geometry:
    """The same of a backward pass, where what the forward pass gave fits as well."""
    saved = {"grad": grad, "middle": middle, "raw": raw, "statistics": statistics}
    if any(tensor is None for tensor in saved.values()):
        _checks.check_tensors(_OP, optional=(), **saved)
    g, input = _check(*arguments), arguments[0]
    size = g.batch, g.out_channels, g.out_height, g.out_width
    remedy = "padding, dilation and pointwise decide it"
    _checks.check_like(_OP, "grad", grad, input)
    for name, shape in (
        ("grad", size),
        ("middle", (g.batch, g.channels, g.out_height, g.out_width)),
        ("raw", size),
    ):
        _checks.check_dimensions(_OP, name, saved[name], 4)
        _checks.check_shape(_OP, name, saved[name], shape, remedy)
    for name, tensor in (("middle", middle), ("raw", raw)):
        if tensor.dtype != _native.storage(input):
            dtype = f"of {_native.storage(input)} beside an input of {input.dtype}"
            raise _wrong(name, dtype, tensor.dtype, "pass what the forward pass returned")
        _checks.check_device(_OP, name, tensor, input)
    sums = _native.accumulate(input.dtype)
    if statistics.dtype != sums:
        raise _wrong("statistics", f"of {sums}", statistics.dtype, "pass those of the output")
    _checks.check_device(_OP, "statistics", statistics, input)
    _checks.check_shape(_OP, "statistics", statistics, (2, g.out_channels), "pass those of output")
    return g


def _sizes(g: Geometry) -> Geometry:
    """``Params``."""
    _checks.check_output(_OP, (g.batch, g.channels, g.out_height, g.out_width))
    _checks.check_output(_OP, (g.batch, g.out_channels, g.out_height, g.out_width))
    dilation = _checks.effective((g.kernel_h, g.kernel_w), (g.dilation_h, g.dilation_w))
    return g._replace(dilation_h=dilation[0], dilation_w=dilation[1])


@_native.pointers("sep_conv_forward")
def _forward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    g, last, sums = Geometry(*sizes), torch.channels_last, _native.accumulate(dtype)
    pixels, of = g.batch * g.out_height * g.out_width, _native.Pointer.of
    return (
        of("input", dtype, g.batch * g.channels * g.height * g.width, last),
        of("depthwise", sums, g.channels * g.kernel_h * g.kernel_w),
        of("pointwise", sums, g.out_channels * g.channels),
        of("weight", sums, g.out_channels),
        of("bias", sums, g.out_channels),
        of("output", dtype, pixels * g.out_channels, last),
        of("middle", dtype, pixels * g.channels, last),
        of("raw", dtype, pixels * g.out_channels, last),
        of("statistics", sums, 2 * g.out_channels),
    )


@_native.pointers("sep_conv_backward")
def _backward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    input, *parameters, output, middle, raw, statistics = _forward_pointers(dtype, sizes)
    return (
        output._replace(name="grad"),
        *(input, *parameters, middle, raw, statistics),
        input._replace(name="grad_input", needed=False),
        *(pointer._replace(name=f"grad_{pointer.name}") for pointer in parameters),
    )


def _kernel(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Pair,
    dilation: Pair,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = depthwise, pointwise, weight, bias
    g = _sizes(_check(input, *parameters, padding, dilation, eps))
    dtype = _native.storage(input)
    x, dense = _native.as_map(input, dtype), [p.contiguous() for p in parameters]
    middle = _native.empty_map(x, (g.batch, g.channels, g.out_height, g.out_width))
    raw = _native.empty_map(x, (g.batch, g.out_channels, g.out_height, g.out_width))
    y, statistics = torch.empty_like(raw), weight.new_empty(2, g.out_channels)
    _native.call("sep_conv_forward", dtype, g, (x, *dense, y, middle, raw, statistics))
    return _native.as_like(y, input), middle, raw, statistics


def _kernel_backward(
    grad: Tensor,  # [N, Co, Ho, Wo]
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    weight: Tensor,
    bias: Tensor,
    middle: Tensor,  # [N, C, Ho, Wo]
    raw: Tensor,  # [N, Co, Ho, Wo]
    statistics: Tensor,  # [2, Co]
    padding: Pair,
    dilation: Pair,
    eps: float,
    input_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = depthwise, pointwise, weight, bias
    g = _sizes(
        _check_backward(grad, middle, raw, statistics, input, *parameters, padding, dilation, eps)
    )
    dtype = _native.storage(input)
    dy, x, u, z = (_native.as_map(map, dtype) for map in (grad, input, middle, raw))
    dense = [p.contiguous() for p in parameters]
    dx = torch.empty_like(x) if input_wanted else None
    gradients = [torch.empty_like(p) for p in dense]
    _native.call(
        "sep_conv_backward",
        dtype,
        g,
        (dy, x, *dense, u, z, statistics.contiguous(), dx, *gradients),
    )
    d, p, w, b = gradients
    return input.new_empty(0) if dx is None else _native.as_like(dx, input), d, p, w, b


def _fake(
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: Pair,
    dilation: Pair,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = _check(input, depthwise, pointwise, weight, bias, padding, dilation, eps)
    size, last = (g.out_height, g.out_width), torch.channels_last
    output = input.new_empty((g.batch, g.out_channels, *size))
    middle = input.new_empty((g.batch, g.channels, *size), dtype=_native.storage(input))
    middle, raw = (map.contiguous(memory_format=last) for map in (middle, output.to(middle.dtype)))
    output = output.contiguous(memory_format=_native.memory_format(input))
    return output, middle, raw, weight.new_empty(2, g.out_channels)


def _fake_backward(
    grad: Tensor,
    input: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    weight: Tensor,
    bias: Tensor,
    middle: Tensor,
    raw: Tensor,
    statistics: Tensor,
    padding: Pair,
    dilation: Pair,
    eps: float,
    input_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = depthwise, pointwise, weight, bias
    _check_backward(grad, middle, raw, statistics, input, *parameters, padding, dilation, eps)
    dx = torch.empty_like(input, memory_format=_native.memory_format(input))
    d, p, w, b = (
        torch.empty_like(parameter, memory_format=torch.contiguous_format)
        for parameter in parameters
    )
    return dx if input_wanted else input.new_empty(0), d, p, w, b


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.padding, ctx.dilation, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    tensors = grad, *ctx.saved_tensors
    op = _eager.choose_backward(_OP, tensors, _kernel_backward)
    wanted = ctx.needs_input_grad[0]
    dx, *gradients = op(*tensors, ctx.padding, ctx.dilation, ctx.eps, wanted)
    return dx if wanted else None, *gradients, None, None, None


_differentiable = _eager.make_differentiable(_kernel, _setup, _backward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.padding, ctx.dilation, ctx.eps, ctx.wanted = inputs
    ctx.save_for_backward(*tensors[:6])  # all but what follows from them


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    def output(*tensors: Any) -> Tensor:
        arguments = *tensors, ctx.padding, ctx.dilation, ctx.eps
        return _plain(*arguments)[0]

    wanted = [ctx.wanted, True, True, True, True]
    second = _register.second_derivatives(output, ctx.saved_tensors, cotangents, wanted)
    return *second, None, None, None, None, None, None, None


def _autocast(device: str) -> Callable[..., Any]:
    """Casts the input as autocast does for a convolution; leaves float64 alone."""

    def op(input: Tensor, *rest: Any) -> Any:
        cast = [input, *rest]
        if input.dtype != torch.float64:
            cast[0] = _register.cast(input, torch.get_autocast_dtype(device))
            cast[1:5] = (_register.cast(parameter, torch.float32) for parameter in rest[:4])
        with torch.autocast(device, enabled=False):
            if _eager.is_differentiated_forward():
                return _plain(*cast)
            if _eager.is_eager(_OP, cast[:5]):
                return (_differentiable if torch.is_grad_enabled() else _kernel)(*cast)
            return torch.ops.nasfast.sep_conv.default(*cast)

    return op


def _is_converted(tensors: Sequence[Any], dtype: torch.dtype) -> bool:
    """Whether autocast has something to cast: not in training, where the map comes from another
    operation and the parameters are float32."""
    input, *parameters = (getattr(tensor, "dtype", None) for tensor in tensors)
    return input != torch.float64 and (input != dtype or {*parameters} != {torch.float32})


def _flops(*arguments: Any, out_shape: Sequence[Any], **rest: Any) -> int:
    """Two per multiply-add of the convolutions, as PyTorch counts them."""
    depthwise = arguments[1]
    batch, out_channels, height, width = out_shape[0]
    channels, _, kernel_h, kernel_w = depthwise
    return int(2 * batch * height * width * channels * (kernel_h * kernel_w + out_channels))


def _backward_flops(grad: Sequence[int], input: Sequence[int], *rest: Any, **shape: Any) -> int:
    depthwise, input_wanted = rest[0], rest[-1]
    forward = _flops(input, *rest, out_shape=[grad])
    batch, _, height, width = grad
    channels, _, kernel_h, kernel_w = depthwise
    alone = 2 * batch * height * width * channels * kernel_h * kernel_w
    return 2 * forward - (0 if input_wanted else int(alone))


_TENSORS = "Tensor input, Tensor depthwise, Tensor pointwise, Tensor weight, Tensor bias"
_SETTINGS = "int[2] padding, int[2] dilation, float eps"
_register.define(
    f"sep_conv({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _flops,
    _backward,
    _setup,
)
_register.define(
    f"sep_conv_backward(Tensor grad, {_TENSORS}, Tensor middle, Tensor raw, Tensor statistics, "
    f"{_SETTINGS}, bool input_wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward_flops,
    _double_backward,
    _setup_backward,
)
_register.autocast(_OP, _autocast, _is_converted)
_register.implement(
    _OP, _kernel, _kernel_backward, _reference, on_cuda="cuDNN, its normalisation and a ReLU"
)
