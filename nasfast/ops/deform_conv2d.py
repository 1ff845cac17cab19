"""Modulated deformable convolution (DCNv2; Zhu et al., "Deformable ConvNets v2", CVPR 2019).

Argument order, shapes, border rule and state-dict keys are torchvision's. The public functions come
first, then the reference, the checks, and the registration with ``torch.library``.

Symbols in shapes: K = kh * kw taps, G = weight groups (C / weight.shape[1]), D = offset groups
(offset.shape[1] / 2K).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasfast.ops import _checks, _eager, _native, _register
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
        TypeError: what is no tensor, or no integer.
        ValueError: tensors that do not fit together, with what was expected and what came.
    """
    stride, padding, dilation = _pairs(stride, padding, dilation)
    output: Tensor = _eager.call(
        _OP,
        (input, offset, weight, bias, mask),
        (input, offset, weight, bias, stride, padding, dilation, mask),
        _kernel,
        _differentiable,
        deform_conv2d_reference,
        _check_kinds,
    )
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
        in_channels, out_channels, groups = (
            _checks.integer(_OP, name, value)
            for name, value in (
                ("in_channels", in_channels),
                ("out_channels", out_channels),
                ("groups", groups),
            )
        )
        for name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not 1 <= size < 2**31:
                raise _wrong(name, "from 1 to 2**31 - 1", size, "change it")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise _wrong(
                "groups",
                f"to divide in_channels {in_channels} and out_channels {out_channels}",
                groups,
                "choose another",
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair("kernel_size", kernel_size)
        self.stride = _pair("stride", stride)
        self.padding = _pair("padding", padding)
        self.dilation = _pair("dilation", dilation)
        if not 1 <= min(self.kernel_size) <= max(self.kernel_size) < 2**31:
            raise _wrong("kernel_size", "from 1 to 2**31 - 1", self.kernel_size, "change it")
        sizes = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        _checks.check_settings(_OP, **sizes)
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
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
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
    _check_kinds(input, offset, weight, bias, mask)
    g = _check(input, offset, weight, bias, stride, padding, dilation, mask)
    dtype, layout = input.dtype, _native.memory_format(input)
    input, offset, weight, bias, mask = _at_least_float32(input, offset, weight, bias, mask)
    n, c, d, k = g.batch, g.channels, g.offset_groups, g.kernel_h * g.kernel_w

    def positions(out: int, stride: int, pad: int) -> Tensor:
        return (torch.arange(out, device=input.device) * stride - pad).to(input.dtype)

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
    inside = inside.unsqueeze(2)
    columns = columns.where(inside, 0)
    if mask is not None:  # zero with its gradient outside, whatever it and the image hold
        mask = mask.reshape(n, d, 1, k, g.out_height, g.out_width)
        columns = columns * mask.where(inside, 0)
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


def _check_kinds(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> None:
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    _checks.check_tensors(_OP, optional=("bias", "mask"), **tensors)


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
    if input is None or offset is None or weight is None:
        _check_kinds(input, offset, weight, bias, mask)
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
            _checks.check_like(_OP, name, tensor, input, or_float32=position)
    _checks.check_settings(_OP, stride=stride, padding=padding, dilation=dilation)

    batch, channels, height, width = input.shape
    if height == 0 or width == 0:
        raise _wrong("input", "of a height and width above 0", f"{height}x{width}", "pass an image")
    groups = _groups(channels, weight)
    out_channels, _, *kernel = weight.shape
    out_height, out_width = _checks.output_size(
        _OP, (height, width), kernel, stride, padding, dilation
    )
    offset_groups = _offset_groups(channels, kernel, offset)
    samples, size = offset_groups * math.prod(kernel), (out_height, out_width)
    for name, tensor, shape in (
        ("offset", offset, (batch, 2 * samples, *size)),
        ("mask", mask, (batch, samples, *size)),
        ("grad", grad, (batch, out_channels, *size)),
    ):
        if tensor is not None:
            remedy = "stride, padding and dilation decide the height and width"
            _checks.check_shape(_OP, name, tensor, shape, remedy)
    if bias is not None:
        remedy = "it has one value per output channel"
        _checks.check_shape(_OP, "bias", bias, (out_channels,), remedy)
    return Geometry(
        *(batch, channels, height, width, out_channels, out_height, out_width),
        *(*kernel, *stride, *padding, *dilation, groups, offset_groups),
    )


def _groups(channels: int, weight: Tensor) -> int:
    if 0 in weight.shape:
        shape = f"shape {tuple(weight.shape)}"
        raise _wrong("weight", "of sizes above 0", shape, "change the layer")
    out_channels, group_channels = weight.shape[:2]
    groups = channels // group_channels
    if groups == 0 or channels % group_channels or out_channels % groups:
        raise _wrong(
            "weight",
            f"of shape [out_channels, in_channels / groups, kh, kw] with in_channels {channels} "
            "and groups a divisor of both",
            tuple(weight.shape),
            "build the layer for the channels of its input",
        )
    return groups


def _offset_groups(channels: int, kernel: Sequence[int], offset: Tensor) -> int:
    taps = math.prod(kernel)
    offset_groups = offset.shape[1] // (2 * taps)
    if offset_groups == 0 or offset.shape[1] % (2 * taps) or channels % offset_groups:
        raise _wrong(
            "offset",
            f"of 2 * offset_groups * kh * kw channels, offset_groups a divisor of {channels}",
            f"{offset.shape[1]} with kernel {kernel[0]}x{kernel[1]}",
            "change the layer that predicts it",
        )
    return offset_groups


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
    if input is None:
        _check_kinds(*tensors[:5])
    assert input is not None
    choices = _native.convolution_settings(input)
    key = (*map(_native.describe, tensors), *stride, *padding, *dilation, choices)
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 1024:
            _plans.clear()
        input, offset, weight, bias, mask, grad = tensors
        g = _check(input, offset, weight, bias, stride, padding, dilation, mask, grad)  # type: ignore[arg-type]
        if g.channels * g.height * g.width >= 2**31:  # the kernels count them in 32 bits
            size = f"{g.channels}x{g.height}x{g.width}"
            most = "of fewer than 2**31 elements an image"
            raise _wrong("input", most, size, "divide the image into tiles")
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
        to = (
            last
            if weight.is_cuda or _native.memory_format(weight) == last
            else torch.contiguous_format
        )
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
    _, offset, weight, _, mask, _ = ready
    assert weight is not None
    stride_h, stride_w = _checks.effective((g.out_height, g.out_width), (g.stride_h, g.stride_w))
    dilation_h, dilation_w = _checks.effective(
        (g.kernel_h, g.kernel_w), (g.dilation_h, g.dilation_w)
    )
    g = g._replace(
        stride_h=stride_h, stride_w=stride_w, dilation_h=dilation_h, dilation_w=dilation_w
    )
    offset_step, mask_step = (
        0 if map is None else _native.pixel_step(map) or 0 for map in (offset, mask)
    )
    return (
        *g,
        *Layout(
            offset_step, mask_step, _native.memory_format(weight) == torch.channels_last, *choices
        ),
    )


def _reads(
    dtype: torch.dtype, g: Geometry, layout: Layout
) -> tuple[_native.Pointer, _native.Pointer, _native.Pointer, _native.Pointer]:
    """The pointers of input, offset, mask and weight."""
    sums, last = _native.accumulate(dtype), torch.channels_last
    samples = g.offset_groups * g.kernel_h * g.kernel_w
    pixels = g.batch * g.out_height * g.out_width

    def sliced(name: str, channels: int, step: int, needed: bool) -> _native.Pointer:
        nbytes = pixels * channels * sums.itemsize
        if step == channels:
            return _native.Pointer(name, sums, nbytes, last, None, needed)

        def holds(tensor: Tensor) -> bool:
            return tensor.dim() == 4 and _native.pixel_step(tensor) == step

        return _native.Pointer(name, sums, nbytes, None, holds, needed)

    return (
        _native.Pointer.of("input", dtype, g.batch * g.channels * g.height * g.width, last),
        sliced("offset", samples * 2, layout.offset_step, True),
        sliced("mask", samples, layout.mask_step, False),
        _native.Pointer.of("weight", dtype, _weight_elements(g), _weight_layout(layout)),
    )


def _dense(pointer: _native.Pointer) -> _native.Pointer:
    """The gradient of what may be a slice."""
    name, dtype, nbytes, *_ = pointer
    return _native.Pointer(f"grad_{name}", dtype, nbytes, torch.channels_last, needed=False)


def _weight_elements(g: Geometry) -> int:
    return g.out_channels * (g.channels // g.groups) * g.kernel_h * g.kernel_w


def _weight_layout(layout: Layout) -> torch.memory_format:
    return torch.channels_last if layout.weight_channels_last else torch.contiguous_format


def _parts_of(sizes: tuple[int, ...]) -> tuple[Geometry, Layout]:
    """What ``Params`` consist of."""
    count = len(Geometry._fields)
    return Geometry(*sizes[:count]), Layout(*sizes[count : count + len(Layout._fields)])


@_native.pointers("deform_conv2d_forward")
def _forward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    g, layout = _parts_of(sizes)
    sums, size = _native.accumulate(dtype), g.batch * g.out_channels * g.out_height * g.out_width
    return (
        *_reads(dtype, g, layout),
        _native.Pointer.of("bias", sums, g.out_channels, needed=False),
        _native.Pointer.of("output", dtype, size, torch.channels_last),
    )


@_native.pointers("deform_conv2d_backward")
def _backward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    g, layout = _parts_of(sizes)
    sums = _native.accumulate(dtype)
    input, offset, mask, weight = _reads(dtype, g, layout)
    size = g.batch * g.out_channels * g.out_height * g.out_width
    return (
        _native.Pointer.of("grad", dtype, size, torch.channels_last),
        *(input, offset, mask, weight),
        input._replace(name="grad_input", needed=False),
        _dense(offset),
        _native.Pointer.of("grad_weight", sums, _weight_elements(g), _weight_layout(layout), False),
        _native.Pointer.of("grad_bias", sums, g.out_channels, needed=False),
        _dense(mask),
    )


@_native.pointers("deform_conv2d_columns_forward")
def _columns_forward_pointers(
    dtype: torch.dtype, sizes: tuple[int, ...]
) -> tuple[_native.Pointer, ...]:
    g, layout = _parts_of(sizes)
    input, offset, mask, _ = _reads(dtype, g, layout)
    elements = sizes[-1] * g.kernel_h * g.kernel_w * g.channels
    return input, offset, mask, _native.Pointer.of("columns", dtype, elements)


@_native.pointers("deform_conv2d_columns_backward")
def _columns_backward_pointers(
    dtype: torch.dtype, sizes: tuple[int, ...]
) -> tuple[_native.Pointer, ...]:
    input, offset, mask, columns = _columns_forward_pointers(dtype, sizes)
    sums, last = _native.accumulate(dtype), torch.channels_last
    return (
        columns._replace(name="grad_columns"),
        *(input, offset, mask, columns._replace(needed=False)),
        _native.Pointer.of("grad_input", sums, math.prod(sizes[:4]), last, False),
        _dense(offset),
        _dense(mask),
    )


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
    assert d is not None
    assert w is not None
    y = _native.empty_map(x, (g.batch, g.out_channels, g.out_height, g.out_width), x.dtype)
    sizes = sizes or _sizes(g, ready, _native.convolution_settings(x))
    if _by_columns(g, sizes, x):
        _columns_forward(g, sizes, x, d, m, w, b, y)
    else:
        _native.call("deform_conv2d_forward", x.dtype, sizes, (x, d, m, w, b, y))
    return _native.as_like(y, input)


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
    if grad is None:
        _checks.check_tensors(_OP, grad=grad)
    _checks.check_wanted(_OP, wanted, 5)
    tensors: tuple[Tensor | None, ...] = (input, offset, weight, None, mask, grad)
    g, sizes = _plan(tensors, stride, padding, dilation)
    ready = tensors if sizes else _ready(tensors)
    x, d, w, _, m, dy = ready
    assert x is not None
    assert d is not None
    assert w is not None
    dx = _native.empty_map(x, x.shape, x.dtype) if wanted[0] else None
    dd = _native.empty_map(x, d.shape, d.dtype) if wanted[1] else None
    dw = torch.empty_like(w, dtype=d.dtype) if wanted[2] else None
    db = w.new_empty(g.out_channels, dtype=d.dtype) if wanted[3] else None
    dm = _native.empty_map(x, m.shape, d.dtype) if m is not None and wanted[4] else None
    sizes = sizes or _sizes(g, ready, _native.convolution_settings(x))
    results = (dx, dd, dw, db, dm)
    if _by_columns(g, sizes, x):
        assert dy is not None
        _columns_backward(g, sizes, dy, x, d, m, w, *results)
    else:
        _native.call("deform_conv2d_backward", x.dtype, sizes, (dy, x, d, m, w, *results))
    return tuple(
        input.new_empty(0) if result is None or like is None else _native.as_like(result, like)
        for result, like in zip(results, (input, offset, weight, input, mask))
    )


# ---- columns: the samples of some pixels at a time in memory, and products by cuBLAS

_COLUMNS = 128 << 20
"""Bytes of columns at a time; at least one pixel's."""


def _by_columns(g: Geometry, sizes: tuple[int, ...], x: Tensor) -> bool:
    """Whether columns are the fastest way of a call on CUDA, and one that its settings allow.

    cuBLAS multiplies float32, tf32 and float64 several times as fast as the fused kernels do; it
    has no fixed order of sums without a setting of the process. The kernels of columns want
    chunks of channels with one offset group, and a grid of no more than 2^16 taps.
    """
    deterministic = sizes[-2]
    return (
        x.is_cuda
        and x.element_size() >= 4
        and not deterministic
        and g.batch > 0
        and g.groups == 1
        and g.offset_groups * g.kernel_h * g.kernel_w < 2**16
        and g.channels // g.offset_groups % max(16 // x.element_size(), 4) == 0
        and x.data_ptr() % 16 == 0
    )


def _columns_forward(
    g: Geometry,
    sizes: tuple[int, ...],
    x: Tensor,
    d: Tensor,
    m: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
) -> None:
    """The call of the fused kernel, with the same tensors."""
    output, matrix, bias = (
        _rows(y),
        _rows(w, g.out_channels).t(),
        None if b is None else b.to(x.dtype),
    )
    with _precision(sizes):
        for first, columns in _parts(g, x):
            _sample(sizes, first, x, d, m, columns)
            out = output[first : first + len(columns)]
            if bias is None:
                torch.mm(columns, matrix, out=out)
            else:
                torch.addmm(bias, columns, matrix, out=out)


def _columns_backward(
    g: Geometry,
    sizes: tuple[int, ...],
    dy: Tensor,
    x: Tensor,
    d: Tensor,
    m: Tensor | None,
    w: Tensor,
    dx: Tensor | None,
    dd: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    dm: Tensor | None,
) -> None:
    """Likewise. The columns take the place of their gradient."""
    grad, matrix = _rows(dy), _rows(w, g.out_channels)
    of_weight = None if dw is None else _rows(dw, g.out_channels)
    sums = dx
    if dx is not None:
        sums = dx if dx.dtype == d.dtype else torch.empty_like(dx, dtype=d.dtype)
        sums.zero_()
    of_samples = sums is not None or dd is not None or dm is not None
    with _precision(sizes):
        for first, columns in _parts(g, x) if of_samples or dw is not None else ():
            part = grad[first : first + len(columns)]
            if of_samples:
                torch.mm(part, matrix, out=columns)
                pointers = (columns, x, d, m, columns if dw is not None else None, sums, dd, dm)
                part_sizes = (*sizes, first, len(columns))
                _native.call("deform_conv2d_columns_backward", x.dtype, part_sizes, pointers)
            else:
                _sample(sizes, first, x, d, m, columns)
            if of_weight is not None:
                options: Any = {"out": of_weight, "beta": int(first > 0)}
                if of_weight.dtype != x.dtype:
                    options["out_dtype"] = of_weight.dtype
                torch.addmm(of_weight, part.t(), columns, **options)
    if db is not None:
        torch.sum(grad, 0, dtype=db.dtype, out=db)
    if dx is not None and sums is not None and sums is not dx:
        dx.copy_(sums)


def _rows(map: Tensor, count: int = -1) -> Tensor:
    """A channels-last map as [N * H * W, C], or with ``count`` N as [N, H * W * C]; a view."""
    last = map.permute(0, 2, 3, 1)
    return last.view(-1, map.shape[1]) if count < 0 else last.view(count, -1)


def _parts(g: Geometry, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first pixel of each part, all of nearly one size, and memory for its columns."""
    pixels, depth = g.batch * g.out_height * g.out_width, g.kernel_h * g.kernel_w * g.channels
    parts = -(-pixels * depth * x.element_size() // _COLUMNS)
    step = -(-pixels // min(parts, pixels))
    columns = x.new_empty(step, depth)
    for first in range(0, pixels, step):
        yield first, columns[: pixels - first]


def _sample(
    sizes: tuple[int, ...], first: int, x: Tensor, d: Tensor, m: Tensor | None, columns: Tensor
) -> None:
    part_sizes = (*sizes, first, len(columns))
    _native.call("deform_conv2d_columns_forward", x.dtype, part_sizes, (x, d, m, columns))


@contextmanager
def _precision(sizes: tuple[int, ...]) -> Iterator[None]:
    """Float32 products with or without tf32, as ``sizes`` say, whatever is set for others."""
    matmul: Any = torch.backends.cuda.matmul
    before, wanted = matmul.fp32_precision, "tf32" if sizes[-1] else "ieee"
    if (before == "tf32") == bool(sizes[-1]):
        yield
        return
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before


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
    layout = _native.memory_format(input)
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
    if grad is None:
        _checks.check_tensors(_OP, grad=grad)
    _checks.check_wanted(_OP, wanted, 5)
    g = _check(input, offset, weight, None, stride, padding, dilation, mask, grad)

    def like(tensor: Tensor | None, want: bool) -> Tensor:
        if tensor is None or not want:
            return input.new_empty(0)
        return torch.empty_like(tensor, memory_format=_native.memory_format(tensor))

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
    tensors = grad, input, offset, weight, mask
    op = _eager.choose_backward(_OP, tensors, _kernel_backward)
    gradients = op(*tensors, *ctx.sizes, wanted)
    dx, dd, dw, db, dm = (g if want else None for g, want in zip(gradients, wanted))
    return dx, dd, dw, db, None, None, None, dm


_differentiable = _eager.make_differentiable(_kernel, _setup, _backward)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, stride, padding, dilation, ctx.wanted = inputs
    ctx.sizes = stride, padding, dilation
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    grad, input, offset, weight, mask = ctx.saved_tensors
    stride, padding, dilation = ctx.sizes
    bias = weight.new_zeros(weight.shape[0])

    def output(input: Any, offset: Any, weight: Any, bias: Any, mask: Any) -> Tensor:
        sizes = stride, padding, dilation
        return deform_conv2d_reference(input, offset, weight, bias, *sizes, mask)

    saved = grad, input, offset, weight, bias, mask
    second = _register.second_derivatives(output, saved, cotangents, ctx.wanted)
    return *second[:4], second[5], None, None, None, None


def _autocast(device: str) -> Callable[..., Tensor]:
    """Casts as autocast does for a convolution, but leaves positions in float32; and float64."""

    def op(
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        mask: Tensor | None,
    ) -> Tensor:
        dtype, cast = torch.get_autocast_dtype(device), _register.cast
        with torch.autocast(device, enabled=False):
            if input.dtype != torch.float64:
                input, weight, bias = cast(input, dtype), cast(weight, dtype), cast(bias, dtype)
                offset = offset if offset.dtype == dtype else cast(offset, torch.float32)
                mask = mask if mask is None or mask.dtype == dtype else cast(mask, torch.float32)
            return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)

    return op


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
