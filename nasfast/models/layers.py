"""The operations that cells are made of. All keep shape: ``[N, C, H, W]`` to ``[N, C, H, W]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.ops import batch_norm_relu, depthwise_conv2d, sep_conv
from nasfast.ops.convolution import convolution_dtype, in_float32, learns_in_bfloat16
from nasfast.spaces.fast_nas import PRIMITIVES
from nasfast.utils.errors import UserError


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to ``size`` = (H, W) with half-pixel centres; no work when it fits."""
    if (x.shape[-2], x.shape[-1]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def size_of(x: Tensor) -> tuple[int, int]:
    """Spatial size (H, W) of a map."""
    return x.shape[-2], x.shape[-1]


def pad(x: Tensor, multiple: int) -> Tensor:
    """Maps ``[N, C, H, W]`` whose last row and column are repeated up to multiples."""
    height, width = size_of(x)
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def largest(maps: list[Tensor]) -> tuple[int, int]:
    """Spatial size (H, W) of the map with the largest area, the first among equals."""
    winner = max(maps, key=lambda x: x.shape[-2] * x.shape[-1])
    return winner.shape[-2], winner.shape[-1]


def check_images(model: str, images: Tensor, channels: int) -> None:
    """UserError unless ``images`` is ``[N, channels, H, W]``."""
    if images.dim() != 4 or images.shape[1] != channels:
        raise UserError(
            f"{model}: expected images [N, {channels}, H, W], got shape {list(images.shape)}; "
            "read the data with the channels of the model"
        )


def runs_own_ops(x: Tensor) -> bool:
    """Whether to use our ops that have a kernel for the CPU only. A compiler, or an export, does
    more with PyTorch's own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its ``forward``: pruning, weight normalisation,
    sharding and whoever looks at maps act there."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _Pairs(torch.autograd.Function):
    # steps of two channels are slow: only additions and copies take them

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        products = x * weight.view(-1, 1, 1)
        return products[:, ::2] + products[:, 1::2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        twice = torch.empty_like(x)
        twice[:, ::2] = grad
        twice[:, 1::2] = grad
        grad_weight = (twice * x).sum((0, 2, 3)).view_as(weight)
        return twice.mul_(weight.view(-1, 1, 1)), grad_weight


def weigh_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """The 1x1 convolution whose groups make one channel of two, ``[N, 2C, H, W]`` with
    ``[C, 2, 1, 1]`` to ``[N, C, H, W]``, as two products; autocast casts both.

    PyTorch's takes one group after the other on a CPU, five times as long.
    """
    dtype = convolution_dtype(x)
    result: Tensor = _Pairs.apply(x.to(dtype), weight.to(dtype))  # type: ignore[no-untyped-call]
    return result


class Conv2d(nn.Conv2d):
    """Convolution without bias that keeps height and width, or with a stride gives each side over
    it, rounded up; safe under bfloat16 on a CPU.

    There the weight gradient of a dilated convolution is wrong in torch 2.13 (oneDNN reads memory
    that nothing wrote; the values differ from run to run) if its channels are no multiple of 16.
    Such a convolution runs in float32, which is also the faster way. A depthwise one is
    :func:`nasfast.ops.depthwise_conv2d`; where its stride divides its dilation it reads only the
    pixels whose coordinates the stride divides, and is one of stride 1 on them (30 times as fast).
    With any other stride it learns in float32, see :class:`StridedDepthwiseConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        dilation: int = 1,
        groups: int = 1,
        stride: int = 1,
    ) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride,
            padding,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.sizes = padding // stride, dilation // stride  # of the pixels that the stride leaves
        ragged = bool(in_channels % 16 or out_channels % 16)
        self._pairs = kernel == stride == 1 and in_channels == 2 * out_channels == 2 * groups
        self.is_depthwise = groups == in_channels == out_channels > 1 and dilation % stride == 0
        self._strided = groups == in_channels == out_channels > 1 and stride > 1
        self._float32_on_cpu = dilation > 1 and (groups > 1 or ragged)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_depthwise and runs_own_ops(x):
            step = self.stride[0]
            if step > 1:
                x = x[..., ::step, ::step].contiguous(memory_format=torch.channels_last)
            return depthwise_conv2d(x, self.weight, *self.sizes)
        if self._pairs and runs_own_ops(x):
            return weigh_pairs(x, self.weight)
        wide = self._strided and learns_in_bfloat16(self, x)
        if wide or (self._float32_on_cpu and x.device.type == "cpu"):
            return in_float32(self, x)
        return super().forward(x)


def normalized(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(x)``. One value a channel has no variance: such a batch of one map ``[1, C, 1, 1]`` is
    normalised with the running statistics, in training as well."""
    stats = norm.running_mean, norm.running_var
    # others than PyTorch's own take statistics from several processes
    own = type(norm) is nn.BatchNorm2d and norm.training and stats[0] is not None
    if own and x.numel() == x.shape[1]:
        return F.batch_norm(x, *stats, norm.weight, norm.bias, eps=norm.eps)
    y: Tensor = norm(x)
    return y


def norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``relu(normalized(x, norm))``; in training on a CPU as the one operation
    :func:`batch_norm_relu`."""
    if not (norm.training and runs_own_ops(x) and _runs_fused(x, norm)):
        # whoever looks at the module's output may keep it, and a hook on its backward pass forbids
        # changes of it
        return F.relu(normalized(x, norm), inplace=not has_hooks(norm))
    y, statistics = batch_norm_relu(x, norm.weight, norm.bias, norm.eps)
    _track(norm, statistics, x.numel() // x.shape[1])
    return y


def _track(norm: nn.BatchNorm2d, statistics: Tensor, pixels: int) -> None:
    """Running averages of the module after a batch of so many pixels a channel: mean and biased
    variance ``[2, C]``."""
    if not norm.track_running_stats:
        return
    mean, variance = statistics
    # read once: attributes of modules are slow
    running_mean, running_var = norm.running_mean, norm.running_var
    batches, momentum = norm.num_batches_tracked, cast(float, norm.momentum)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * (pixels / (pixels - 1)), momentum)
    if batches is not None:
        batches.add_(1)


def _runs_fused(x: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether :func:`batch_norm_relu` does what the module does in training on maps like ``x``."""
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        type(norm) is nn.BatchNorm2d  # others take statistics from several processes
        and norm.affine
        and norm.bias is not None
        and norm.weight.dtype == sums  # not so of networks in half precision
        and norm.momentum is not None
        and 0 < norm.eps < math.inf  # PyTorch's module has the words for others
        and x.numel() > x.shape[1]
        and not has_hooks(norm)
    )


class ConvBN(nn.Sequential):
    """Convolution without bias, BatchNorm with or without scale and shift; keeps the size."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, affine: bool = True
    ) -> None:
        super().__init__(
            Conv2d(in_channels, out_channels, kernel), nn.BatchNorm2d(out_channels, affine=affine)
        )


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, BatchNorm, ReLU; output size equals input size."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1
    ) -> None:
        super().__init__(
            Conv2d(in_channels, out_channels, kernel, dilation),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, _ = self
        return norm_relu(conv(x), cast(nn.BatchNorm2d, norm))


class SepConv(nn.Sequential):
    """Depthwise, pointwise, BatchNorm, ReLU (nothing between the first two), once for each stride;
    the first changes the channels."""

    def __init__(
        self,
        channels: int,
        kernel: int,
        dilation: int = 1,
        strides: Sequence[int] = (1,),
        out_channels: int | None = None,
    ) -> None:
        layers: list[nn.Module] = []
        out = out_channels or channels
        for stride in strides:
            layers += [
                Conv2d(channels, channels, kernel, dilation, channels, stride),
                ConvBNReLU(channels, out),
            ]
            channels = out
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        layers = [*self]
        for depthwise, pointwise in zip(layers[::2], layers[1::2], strict=True):
            x = separable(x, cast(Conv2d, depthwise), cast(ConvBNReLU, pointwise))
        return x


def separable(x: Tensor, depthwise: Conv2d, pointwise: ConvBNReLU) -> Tensor:
    """``pointwise(depthwise(x))``; in training on a CPU as the one operation :func:`sep_conv`."""
    if not (depthwise.training and runs_own_ops(x) and _is_separable(x, depthwise, pointwise)):
        y: Tensor = pointwise(depthwise(x))
        return y
    norm = cast(nn.BatchNorm2d, pointwise[1])
    y, statistics = sep_conv(
        x,
        depthwise.weight,
        cast(Tensor, pointwise[0].weight),
        norm.weight,
        norm.bias,
        *depthwise.sizes,
        norm.eps,
    )
    _track(norm, statistics, y.numel() // y.shape[1])
    return y


def _is_separable(x: Tensor, depthwise: Conv2d, pointwise: ConvBNReLU) -> bool:
    """Whether :func:`sep_conv` does what the modules do in training."""
    if type(depthwise) is not Conv2d or type(pointwise) is not ConvBNReLU or len(pointwise) != 3:
        return False
    conv, norm, relu = pointwise
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.dim() == 4
        and x.dtype.is_floating_point
        and depthwise.is_depthwise
        and depthwise.stride == (1, 1)
        and depthwise.bias is None
        and type(conv) is Conv2d
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and depthwise.weight.dtype == conv.weight.dtype == sums
        # without autocast a convolution refuses a map of another dtype
        and (x.dtype == sums or torch.is_autocast_enabled("cpu"))
        and type(relu) is nn.ReLU
        and isinstance(norm, nn.BatchNorm2d)
        and norm.training
        and _runs_fused(x, norm)
        and not any(has_hooks(module) for module in (depthwise, pointwise, conv, relu))
    )


class DepthwiseSeparable(nn.Sequential):
    """Depthwise 3x3, BatchNorm, ReLU, pointwise, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__(
            Conv2d(in_channels, in_channels, 3, dilation, groups=in_channels),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            ConvBNReLU(in_channels, out_channels),
        )


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        total: Tensor = x.sum((2, 3), keepdim=True)
        return total / (x.shape[2] * x.shape[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        share: Tensor = grad / (ctx.shape[2] * ctx.shape[3])
        return share.expand(ctx.shape).contiguous(memory_format=torch.channels_last)


def global_mean(x: Tensor) -> Tensor:
    """Mean over the pixels, ``[N, C, H, W]`` to ``[N, C, 1, 1]``.

    ``Tensor.mean`` first copies a bfloat16 map to float32, and its gradient has stride 0, which is
    slow to add to that of other readers of the map.
    """
    result: Tensor = _GlobalMean.apply(x)  # type: ignore[no-untyped-call]
    return result


class GlobalAveragePool(nn.Module):
    """Global mean, 1x1 convolution, BatchNorm, ReLU, back to the input's size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = normalized(self.conv(global_mean(x)), self.bn)
        everywhere = F.relu(y).expand(-1, -1, x.shape[-2], x.shape[-1])
        # sums of dense maps are fast
        return everywhere.contiguous(memory_format=torch.channels_last)


class Zero(nn.Module):
    """No connection. Unlike ``0 * x`` it does not carry NaN on."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


OPS: dict[str, Callable[[int, int], nn.Module]] = {
    "conv1x1": lambda c, repeats: ConvBNReLU(c, c, 1),
    "conv3x3": lambda c, repeats: ConvBNReLU(c, c, 3),
    "sep3x3": lambda c, repeats: SepConv(c, 3, strides=[1] * repeats),
    "sep5x5": lambda c, repeats: SepConv(c, 5, strides=[1] * repeats),
    "gap": lambda c, repeats: GlobalAveragePool(c),
    "conv3x3_d3": lambda c, repeats: ConvBNReLU(c, c, 3, dilation=3),
    "conv3x3_d12": lambda c, repeats: ConvBNReLU(c, c, 3, dilation=12),
    "sep3x3_d3": lambda c, repeats: SepConv(c, 3, 3, [1] * repeats),
    "sep5x5_d6": lambda c, repeats: SepConv(c, 5, 6, [1] * repeats),
    "skip": lambda c, repeats: nn.Identity(),
    "none": lambda c, repeats: Zero(),
}
"""Primitive name to builder ``(channels, repeats of separable convolutions) -> module``."""


def build_op(index: int, channels: int, sep_repeats: int) -> nn.Module:
    """Build primitive ``index`` of ``PRIMITIVES`` at a channel count."""
    return OPS[PRIMITIVES[index]](channels, sep_repeats)


class _Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.channels = [map.shape[1] for map in maps]
        return torch.cat(maps, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts = torch.split(grad, ctx.channels, 1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)


def concatenate(*maps: Tensor) -> Tensor:
    """Channels of several maps ``[N, C_i, H, W]``, side by side.

    The gradients that ``torch.cat`` gives its parts are slices of channels, on which BatchNorm and
    ReLU of channels-last maps take several times as long; here they are contiguous maps.
    """
    result: Tensor = _Concatenate.apply(*maps)  # type: ignore[no-untyped-call]
    return result


class _Planes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.format = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=ctx.format)


def in_planes(x: Tensor) -> Tensor:
    """A map ``[N, C, H, W]`` in one piece a channel; its gradient has the memory format of ``x``.

    PyTorch's own copy hands the gradient on in planes, in which the backward pass of what made a
    channels-last map takes several times as long.
    """
    result: Tensor = _Planes.apply(x)  # type: ignore[no-untyped-call]
    return result


def to_blocks(images: Tensor, side: int) -> Tensor:
    """Each block of pixels as one: ``[N, c, H, W]`` to ``[N, c side^2, ceil(H / side), ceil(W /
    side)]``. Blocks that leave the image repeat its last row and column."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % side, 0, -height % side), mode="replicate")
    return F.pixel_unshuffle(padded, side)


def change_slowly(images: Tensor, blocks: Tensor, side: int) -> Tensor:
    """gain * image + offset, for images ``[N, c, H, W]`` and a gain and an offset of each value of
    a block, ``[N, 2 c, ceil(H / side), ceil(W / side)]``, which are enlarged bilinearly, in the
    images' dtype: steps of bfloat16 would be seen in a sky."""
    maps = F.interpolate(blocks.to(images.dtype), scale_factor=side, mode="bilinear")
    gain, offset = maps[..., : images.shape[-2], : images.shape[-1]].chunk(2, 1)
    return gain * images + offset
