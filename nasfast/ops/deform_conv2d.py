"""Modulated deformable convolution (DCNv2; Zhu et al., "Deformable ConvNets v2", CVPR 2019).

Argument order, shapes, border rule and state-dict keys are torchvision's. The public functions come
first, then the reference, the checks, and the registration with ``torch.library``.

Symbols in shapes: K = kh * kw taps, G = weight groups (C / weight.shape[1]), D = offset groups
(offset.shape[1] / 2K).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasfast.ops import _checks, _native, _register
from nasfast.ops._checks import HALF, Ints, Pair

_OP = "deform_conv2d"
_wrong = functools.partial(_checks.wrong, _OP)
_pair = functools.partial(_checks.pair, _OP)


def deform_conv2d(
    input: Tensor,  # [N, C, H, W]
    offset: Tensor,  # [N, D * K * 2, Ho, Wo], (dy, dx) of each tap, in pixels
    weight: Tensor,  # [Co, C / G, kh, kw]
    bias: Tensor | None = None,  # [Co]
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    mask: Tensor | None = None,  # [N, D * K, Ho, Wo], factor of each sample
) -> Tensor:  # [N, Co, Ho, Wo], in the memory format of input
    """Convolution whose taps sample ``input`` bilinearly at offset positions.

    Outside the image the input is zero: a sample counts where -1 < y < H and -1 < x < W. Elsewhere,
    and for offsets that are not finite, the sample and its gradients are zero.

    All tensors have one dtype, but beside a float16 or bfloat16 input, offset and mask may be
    float32, which keeps positions exact; sums are in float32. Autocast casts input, weight and
    bias, and leaves a float32 offset and mask as they are.

    Channels last is the native memory format, and a slice of the channels of such a map (as of one
    convolution that predicts offset and mask) is read in place; other maps are copied into it.

    Raises:
        ValueError: tensors that do not fit together, with what was expected and what came.
    """
    stride, padding, dilation = _pairs(stride, padding, dilation)
    arguments = input, offset, weight, bias, stride, padding, dilation, mask
    output: Tensor
    if _native.is_eager("deform_conv2d", input, offset, weight, bias, mask):
        if torch.is_grad_enabled():
            output = DeformConv2dFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        else:
            output = _kernel(*arguments)
    elif _native.is_differentiated_forward():
        output = deform_conv2d_reference(*arguments)
    else:
        output = torch.ops.nasfast.deform_conv2d.default(*arguments)
    return output


class DeformConv2d(nn.Module):
    """Layer of :func:`deform_conv2d`; offset and mask are arguments of ``forward``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise _wrong(
                "groups",
                f"a divisor of in_channels {in_channels} and out_channels {out_channels}",
                groups,
                "choose one that divides both",
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair("kernel_size", kernel_size)
        self.stride = _pair("stride", stride)
        self.padding = _pair("padding", padding)
        self.dilation = _pair("dilation", dilation)
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialisation of ``nn.Conv2d``."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return deform_conv2d(
            input,
            offset,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            mask,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, bias={self.bias is not None}"
        )


def deform_conv2d_reference(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`deform_conv2d` in plain PyTorch: any device and float dtype, differentiable twice."""
    stride, padding, dilation = _pairs(stride, padding, dilation)
    g = _check(input, offset, weight, bias, stride, padding, dilation, mask)
    dtype, layout = input.dtype, _layout(input)
    input, offset, weight, bias, mask = _at_least_float32(input, offset, weight, bias, mask)
    n, c, d, k = g.batch, g.channels, g.offset_groups, g.kernel_h * g.kernel_w

    def positions(out: int, stride: int, pad: int) -> Tensor:
        return torch.arange(out, device=input.device, dtype=input.dtype) * stride - pad

    tap = torch.arange(k, device=input.device)
    tap_y = (tap // g.kernel_w * g.dilation_h).view(k, 1, 1)
    tap_x = (tap % g.kernel_w * g.dilation_w).view(k, 1, 1)
    offset = offset.reshape(n, d, k, 2, g.out_height, g.out_width)
    # sample positions [N, D, K, Ho, Wo]
    y = positions(g.out_height, g.stride_h, g.pad_h).view(-1, 1) + tap_y + offset[:, :, :, 0]
    x = positions(g.out_width, g.stride_w, g.pad_w) + tap_x + offset[:, :, :, 1]
    inside = (y > -1) & (y < g.height) & (x > -1) & (x < g.width)
    y, x = y.where(inside, 0), x.where(inside, 0)

    # a border of zeros to sample from
    padded = F.pad(input, (1, 1, 1, 1)).reshape(n, d, c // d, (g.height + 2) * (g.width + 2))
    top, left = y.floor(), x.floor()
    wy, wx = (y - top).unsqueeze(2), (x - left).unsqueeze(2)  # [N, D, 1, K, Ho, Wo]

    def corner(dy: int, dx: int) -> Tensor:  # [N, D, C/D, K, Ho, Wo]
        index = (top.long() + 1 + dy) * (g.width + 2) + left.long() + 1 + dx
        index = index.flatten(2).unsqueeze(2).expand(-1, -1, c // d, -1)
        return padded.gather(3, index).view(n, d, c // d, k, g.out_height, g.out_width)

    columns = (1 - wy) * ((1 - wx) * corner(0, 0) + wx * corner(0, 1)) + wy * (
        (1 - wx) * corner(1, 0) + wx * corner(1, 1)
    )
    if mask is not None:
        columns = columns * mask.reshape(n, d, 1, k, g.out_height, g.out_width)
    columns = columns.where(inside.unsqueeze(2), 0)
    columns = columns.reshape(n, g.groups, c // g.groups * k, g.out_height * g.out_width)
    matrix = weight.reshape(g.groups, g.out_channels // g.groups, c // g.groups * k)
    output = (matrix @ columns).reshape(n, g.out_channels, g.out_height, g.out_width)
    if bias is not None:
        output = output + bias.view(-1, 1, 1)
    return output.to(dtype).contiguous(memory_format=layout)


class Geometry(NamedTuple):
    """Sizes of one call: the first fields of ``Params`` in csrc/deform_conv2d/deform_conv2d.h."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    groups: int
    offset_groups: int


class Layout(NamedTuple):
    """The rest of ``Params``: how the tensors lie in memory, and choices of the CUDA kernels."""

    offset_step: int
    mask_step: int
    weight_channels_last: int
    deterministic: int
    tf32: int


def _pairs(stride: Ints, padding: Ints, dilation: Ints) -> tuple[Pair, Pair, Pair]:
    return _pair("stride", stride), _pair("padding", padding), _pair("dilation", dilation)


def _check(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
    grad: Tensor | None = None,
) -> Geometry:
    """Sizes of a call whose tensors fit together."""
    _checks.check_float(_OP, input)
    for name, tensor, dims in (
        ("input", input, 4),
        ("offset", offset, 4),
        ("weight", weight, 4),
        ("bias", bias, 1),
        ("mask", mask, 4),
        ("grad", grad, 4),
    ):
        if tensor is not None:
            position = name in ("offset", "mask")
            _checks.check_dimensions(_OP, name, tensor, dims)
            _checks.check_dtype(_OP, name, tensor, input, or_float32=position)
            _checks.check_device(_OP, name, tensor, input)
    _checks.check_settings(_OP, stride=stride, padding=padding, dilation=dilation)

    batch, channels, height, width = input.shape
    if height == 0 or width == 0:
        raise _wrong("input", "of a height and width above 0", f"{height}x{width}", "pass an image")
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    if 0 in weight.shape:
        raise _wrong(
            "weight", "of sizes above 0", f"shape {tuple(weight.shape)}", "change the layer"
        )
    groups = channels // group_channels
    if groups == 0 or channels % group_channels or out_channels % groups:
        raise _wrong(
            "weight",
            f"[out_channels, in_channels / groups, kh, kw] with in_channels {channels} and groups "
            "a divisor of both",
            f"shape {tuple(weight.shape)}",
            "build the layer for the channels of its input",
        )
    kernel = kernel_h, kernel_w
    out_height, out_width = _checks.output_size(
        _OP, (height, width), kernel, stride, padding, dilation
    )
    taps = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups == 0 or offset.shape[1] % (2 * taps) or channels % offset_groups:
        raise _wrong(
            "offset",
            f"of 2 * offset_groups * kh * kw channels, offset_groups a divisor of {channels}",
            f"{offset.shape[1]} with kernel {kernel_h}x{kernel_w}",
            "change the layer that predicts it",
        )
    for name, tensor, shape in (
        ("offset", offset, (batch, 2 * offset_groups * taps, out_height, out_width)),
        ("mask", mask, (batch, offset_groups * taps, out_height, out_width)),
        ("grad", grad, (batch, out_channels, out_height, out_width)),
    ):
        if tensor is not None and tensor.shape != shape:
            remedy = "stride, padding and dilation decide the height and width"
            raise _wrong(name, f"of shape {shape}", tuple(tensor.shape), remedy)
    if bias is not None and bias.shape != (out_channels,):
        remedy = "it has one value per output channel"
        raise _wrong("bias", f"of shape {(out_channels,)}", tuple(bias.shape), remedy)
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
        *stride,
        *padding,
        *dilation,
        groups,
        offset_groups,
    )


def _layout(tensor: Tensor) -> torch.memory_format:
    last = torch.channels_last
    if tensor.is_contiguous() or tensor.dim() != 4 or _native.pixel_step(tensor) is None:
        return torch.contiguous_format
    return last


def _at_least_float32(*tensors: Tensor | None) -> list[Any]:
    """float16 and bfloat16 tensors in float32; others, and None, as they are."""
    return [t.float() if t is not None and t.dtype in HALF else t for t in tensors]


class Plan(NamedTuple):
    """What is known of a call before its tensors are: made once for all calls alike."""

    geometry: Geometry
    sizes: tuple[int, ...] | None  # ``Params``, where the tensors can be read as they are


_plans: dict[tuple[object, ...], Plan] = {}


def _plan(
    tensors: tuple[Tensor | None, ...],  # input, offset, weight, bias, mask, grad
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Plan:
    """The checked plan of a call, from the cache where there is one of the same description.

    A call costs some tens of microseconds of Python, several times that after large operations,
    which leave none of it in the caches: as much as the convolution of a small map.
    """
    input = tensors[0]
    assert input is not None
    choices = _choices(input)
    key = (*map(_native.describe, tensors), *stride, *padding, *dilation, choices)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 1024:
            _plans.clear()
        input, offset, weight, bias, mask, grad = tensors
        g = _check(input, offset, weight, bias, stride, padding, dilation, mask, grad)  # type: ignore[arg-type]
        if g.channels * g.height * g.width >= 2**31:  # the kernels count them in 32 bits
            size = f"{g.channels}x{g.height}x{g.width}"
            wanted = "of fewer than 2**31 elements an image"
            raise _wrong("input", wanted, size, "divide the image into tiles")
        ready = _ready(tensors)
        same = all(a is b for a, b in zip(ready, tensors))
        plan = _plans[key] = Plan(g, _sizes(g, ready, choices) if same else None)
    return plan


def _ready(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The tensors of :func:`_plan` in dtypes and layouts that the kernels read."""
    input, offset, weight, bias, mask, grad = tensors
    assert input is not None
    assert weight is not None
    dtype = _native.storage(input)
    sums = _native.accumulate(dtype)
    last = torch.channels_last
    if not weight.is_contiguous(memory_format=last):
        keep = weight.is_contiguous() and not weight.is_cuda
        to = last if weight.is_cuda or _layout(weight) == last else torch.contiguous_format
        weight = weight if keep else weight.contiguous(memory_format=to)

    def pixels(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.to(sums)
        sliced = _native.pixel_step(tensor) is not None
        return tensor if sliced else tensor.contiguous(memory_format=last)

    return (
        input.to(dtype).contiguous(memory_format=last),
        pixels(offset),
        weight.to(dtype),
        None if bias is None else bias.to(sums).contiguous(),
        pixels(mask),
        None if grad is None else grad.to(dtype).contiguous(memory_format=last),
    )


def _sizes(
    g: Geometry, ready: tuple[Tensor | None, ...], choices: tuple[bool, bool]
) -> tuple[int, ...]:
    input, offset, weight, bias, mask, grad = ready
    assert input is not None
    assert weight is not None
    entry, dtype = "deform_conv2d", input.dtype
    sums = _native.accumulate(dtype)
    _native.check(entry, input, dtype, "map", input)
    _native.check(entry, input, sums, "slice", offset)
    _native.check(entry, input, dtype, "dense", weight)
    _native.check(entry, input, sums, "dense", bias)
    _native.check(entry, input, sums, "slice", mask)
    _native.check(entry, input, dtype, "map", grad)
    offset_step, mask_step = (
        0 if map is None else _native.pixel_step(map) or 0 for map in (offset, mask)
    )
    return (*g, *Layout(offset_step, mask_step, _layout(weight) == torch.channels_last, *choices))


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    last = torch.channels_last
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=last)


def _finish(tensor: Tensor, like: Tensor) -> Tensor:
    """A result in the dtype and layout of ``like``."""
    last = torch.channels_last
    if tensor.dtype == like.dtype and like.dim() == 4 and like.is_contiguous(memory_format=last):
        return tensor  # which is so, too
    layout = _layout(like) if tensor.dim() == 4 else torch.contiguous_format
    if tensor.dtype == like.dtype and tensor.is_contiguous(memory_format=layout):
        return tensor
    result = torch.empty(tensor.shape, dtype=like.dtype, device=like.device, memory_format=layout)
    return result.copy_(tensor)


def _choices(tensor: Tensor) -> tuple[bool, bool]:
    """deterministic, tf32: as PyTorch's own convolutions follow the global settings."""
    if not tensor.is_cuda:
        return False, False
    cudnn: Any = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.conv.fp32_precision == "tf32"


def _kernel(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> Tensor:
    tensors: tuple[Tensor | None, ...] = (input, offset, weight, bias, mask, None)
    g, sizes = _plan(tensors, stride, padding, dilation)
    ready = tensors if sizes else _ready(tensors)
    x, d, w, b, m, _ = ready
    assert x is not None
    y = _empty(x, (g.batch, g.out_channels, g.out_height, g.out_width), x.dtype)
    sizes = sizes or _sizes(g, ready, _choices(x))
    _native.call("deform_conv2d_forward", x.dtype, sizes, (x, d, m, w, b, y))
    return _finish(y, input)


def _kernel_backward(
    grad: Tensor,  # [N, Co, Ho, Wo]
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    wanted: list[bool],  # of input, offset, weight, bias, mask
) -> tuple[Tensor, ...]:
    tensors: tuple[Tensor | None, ...] = (input, offset, weight, None, mask, grad)
    g, sizes = _plan(tensors, stride, padding, dilation)
    ready = tensors if sizes else _ready(tensors)
    x, d, w, _, m, dy = ready
    assert x is not None
    assert d is not None
    assert w is not None
    dx = _empty(x, x.shape, x.dtype) if wanted[0] else None
    dd = _empty(x, d.shape, d.dtype) if wanted[1] else None
    dw = torch.empty_like(w, dtype=d.dtype) if wanted[2] else None
    db = w.new_empty(g.out_channels, dtype=d.dtype) if wanted[3] else None
    dm = _empty(x, m.shape, d.dtype) if m is not None and wanted[4] else None
    sizes = sizes or _sizes(g, ready, _choices(x))
    results = (dx, dd, dw, db, dm)
    _native.call("deform_conv2d_backward", x.dtype, sizes, (dy, x, d, m, w, *results))
    return tuple(
        input.new_empty(0) if result is None or like is None else _finish(result, like)
        for result, like in zip(results, (input, offset, weight, input, mask))
    )


def _fake(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> Tensor:
    g = _check(input, offset, weight, bias, stride, padding, dilation, mask)
    shape = (g.batch, g.out_channels, g.out_height, g.out_width)
    layout = _layout(input)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)


def _fake_backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    g = _check(input, offset, weight, None, stride, padding, dilation, mask, grad)

    def like(tensor: Tensor | None, want: bool) -> Tensor:
        if tensor is None or not want:
            return input.new_empty(0)
        return torch.empty_like(tensor, memory_format=_layout(tensor))

    return (
        like(input, wanted[0]),
        like(offset, wanted[1]),
        like(weight, wanted[2]),
        weight.new_empty(g.out_channels if wanted[3] else 0),
        like(mask, wanted[4]),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, _, *ctx.sizes, mask = inputs
    ctx.save_for_backward(input, offset, weight, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[argument] for argument in (0, 1, 2, 3, 7)]
    plain = _native.is_eager("deform_conv2d", grad, input, offset, weight, mask)
    eager = plain and not torch.is_grad_enabled()
    op: Any = _kernel_backward if eager else torch.ops.nasfast.deform_conv2d_backward.default
    gradients = op(grad, input, offset, weight, mask, *ctx.sizes, wanted)
    dx, dd, dw, db, dm = (g if want else None for g, want in zip(gradients, wanted))
    return dx, dd, dw, db, None, None, None, dm


class DeformConv2dFunction(torch.autograd.Function):
    """What autograd does with the registered op, without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _kernel(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, stride, padding, dilation, ctx.wanted = inputs
    ctx.sizes = stride, padding, dilation
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives, rarely needed, by differentiating the reference twice."""
    create_graph = torch.is_grad_enabled()
    stride, padding, dilation = ctx.sizes
    with torch.enable_grad():
        # views, so that differentiation stops here and not in the graph that made the tensors
        tensors: list[Any] = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in ctx.saved_tensors
        ]
        grad, input, offset, weight, mask = tensors
        bias = weight.new_zeros(weight.shape[0]).requires_grad_()
        output = deform_conv2d_reference(
            input, offset, weight, bias, stride, padding, dilation, mask
        )
        chosen = [
            (tensor, cotangent)
            for tensor, cotangent, want in zip(
                (input, offset, weight, bias, mask), cotangents, ctx.wanted
            )
            if want and tensor is not None
        ]
        sources, cotangents = zip(*chosen)
        gradients = torch.autograd.grad(output, sources, grad, create_graph=True)
        second = torch.autograd.grad(
            gradients,
            [tensor for tensor in tensors if tensor is not None],
            cotangents,
            create_graph=create_graph,
            allow_unused=True,
        )
    rest = iter(second)
    return (*(None if tensor is None else next(rest) for tensor in tensors), None, None, None, None)


def _autocast(device: str) -> Callable[..., Tensor]:
    """Casts as autocast does for a convolution, but leaves positions in float32; and float64."""

    def leg(
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        mask: Tensor | None,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(tensor: Any, to: torch.dtype) -> Any:
            floating = tensor is not None and tensor.dtype in (torch.float32, *HALF)
            return tensor.to(to) if floating else tensor

        with torch.autocast(device, enabled=False):
            if input.dtype != torch.float64:
                input, weight, bias = cast(input, dtype), cast(weight, dtype), cast(bias, dtype)
                offset = offset if offset.dtype == dtype else cast(offset, torch.float32)
                mask = mask if mask is None or mask.dtype == dtype else cast(mask, torch.float32)
            return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

    return leg


def _vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> tuple[Tensor, int]:
    """One call for the whole vmapped dimension: as groups if weights differ, else as a batch."""
    b = info.batch_size
    groups = any(in_dims[argument] is not None for argument in (2, 3))

    def fold(tensor: Tensor | None, dim: int | None, into: int) -> Any:
        if tensor is None:
            return None
        tensor = tensor.expand(b, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.movedim(0, into).flatten(into, into + 1)

    into = int(groups)
    input, offset, mask = (
        fold(tensor, in_dims[argument], into)
        for tensor, argument in ((input, 0), (offset, 1), (mask, 7))
    )
    if groups:
        weight, bias = fold(weight, in_dims[2], 0), fold(bias, in_dims[3], 0)
    output = deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    shape = (*output.shape[:into], b, output.shape[into] // b, *output.shape[into + 1 :])
    return output.reshape(shape).movedim(into, 0), 0


def _flops(*arguments: Any, out_shape: Sequence[int], **rest: Any) -> int:
    """Of the matrix product, two per multiply-add, as PyTorch counts a convolution."""
    batch, _, height, width = out_shape
    return int(2 * batch * height * width * math.prod(arguments[2]))


def _backward_flops(grad: Sequence[int], *arguments: Any, **rest: Any) -> int:
    """One product for the gradients that pass through the samples, one for the weight."""
    of_input, of_offset, of_weight, _, of_mask = arguments[-1]
    products = int(of_input or of_offset or of_mask) + int(of_weight)
    return products * _flops(*arguments, out_shape=grad)


_SIZES = "int[2] stride, int[2] padding, int[2] dilation"
_register.define(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, "
    f"{_SIZES}, Tensor? mask) -> Tensor",
    _fake,
    _flops,
    _backward,
    _setup,
)
_register.define(
    "deform_conv2d_backward(Tensor grad, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
    f"{_SIZES}, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _backward_flops,
    _double_backward,
    _setup_backward,
)
torch.library.register_vmap("nasfast::deform_conv2d", _vmap, lib=_register.LIBRARY)
_register.autocast(_OP, _autocast)
_register.implement(_OP, _kernel, _kernel_backward, deform_conv2d_reference)
