"""Mixed operation of a gradient search: the weighted sum of the branches of an edge.

The continuous relaxation of DARTS (Liu et al., ICLR 2019, eq. 2) over the primitives of IR-NAS
(Zhang et al., CVPR 2020): with r = ReLU(input),

- conv3x3: a 3x3 convolution of r; dil3x3: the same with dilation 2;
- def3x3: a deformable 3x3 convolution of r (DCNv2), offsets and masks from a convolution of r;
- sep3x3: pointwise(depthwise(ReLU(norm(inner)))), where inner = pointwise(depthwise(r));
- skip: input itself;

each but skip normalised, times its factor, summed. All branches are computed in one pass over r,
and no branch's result is ever written; :func:`mixed_op_reference` says the same in plain PyTorch.

Symbols in shapes: D = offset groups; maps, the normalised ones, in the order conv3x3, sep3x3,
dil3x3, def3x3, inner.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nasfast.ops import _checks, _eager, _native, _register
from nasfast.ops.deform_conv2d import deform_conv2d_reference

FACTORS = ("conv3x3", "sep3x3", "dil3x3", "def3x3", "skip")
"""What ``factors`` weigh, in order."""
MAPS = (*FACTORS[:4], "inner")
"""What is normalised, in order."""

# Codes of nasfast::mixed_op::Norm in csrc/mixed_op/mixed_op.h.
_FIXED, _BATCH, _GIVEN = 0, 1, 2

_OP = "mixed_op"
_wrong = functools.partial(_checks.wrong, _OP)


class Branches(NamedTuple):
    """Weights of the branches; a branch whose weights are None is not there."""

    conv: Tensor | None = None  # [C, C, 3, 3]
    dil: Tensor | None = None  # [C, C, 3, 3]
    deform: Tensor | None = None  # [C, C, 3, 3], with the next three
    deform_bias: Tensor | None = None  # [C]
    offset_weight: Tensor | None = None  # [D * 27, C, 3, 3]: D * 18 offsets, D * 9 mask logits
    offset_bias: Tensor | None = None  # [D * 27]
    depthwise1: Tensor | None = None  # [C, 1, 3, 3], with the next three
    pointwise1: Tensor | None = None  # [C, C, 1, 1]
    depthwise2: Tensor | None = None  # [C, 1, 3, 3]
    pointwise2: Tensor | None = None  # [C, C, 1, 1]


def mixed_op(
    input: Tensor,  # [N, C, H, W]
    factors: Tensor,  # [5], in the order of FACTORS; a skip of factor 0 is not there
    branches: Branches,
    scale: Tensor | None = None,  # [5, C], in the order of MAPS; None is 1
    shift: Tensor | None = None,  # [5, C]; None is 0
    *,
    batch_norm: bool = True,
    eps: float = 1e-5,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:  # [N, C, H, W] in channels last, [5, 2, C]
    """The mixed operation, and mean and biased variance of every normalised map.

    Args:
        batch_norm: True normalises a map by its statistics over the batch, before scale and shift;
            False is scale and shift alone: no normalisation, or one by running statistics
            folded into them. All linear branches are then one convolution with a sparse kernel.
        eps: added to the variance.
        recompute: keep nothing but the input for the backward pass, which then computes the
            branches again; else their results before normalisation are kept.

    The statistics take no gradient; they are 0 for what is not normalised by the batch, and for an
    empty one. Where the input of a ReLU is NaN, its gradient is 0, not NaN as PyTorch's. Sums are
    in float32, or float64 for float64; factors, biases, scale and shift may be float32 beside a
    half-precision input. Autocast casts the input and the weights.

    Raises:
        TypeError: what is no tensor, no number or no bool.
        ValueError: tensors that do not fit together, with what was expected and what came.
    """
    eps = _checks.number(_OP, "eps", eps)
    _checks.flag(_OP, "batch_norm", batch_norm)
    _checks.flag(_OP, "recompute", recompute)
    _check_kinds(input, factors, branches, scale, shift)
    if _eager.is_differentiated_forward():
        return mixed_op_reference(
            input, factors, branches, scale, shift, batch_norm=batch_norm, eps=eps
        )
    output, statistics, *_ = torch.ops.nasfast.mixed_op.default(
        input, factors, *branches, scale, shift, batch_norm, eps, recompute
    )
    return output, statistics


def mixed_op_reference(
    input: Tensor,
    factors: Tensor,
    branches: Branches,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    batch_norm: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """:func:`mixed_op` in plain PyTorch: any device and float dtype, differentiable twice."""
    eps = _checks.number(_OP, "eps", eps)
    _checks.flag(_OP, "batch_norm", batch_norm)
    _check_kinds(input, factors, branches, scale, shift)
    b = branches
    g = _check(input, factors, b, scale, shift, batch_norm, eps)
    half = input.dtype in _checks.HALF
    sums = torch.float32 if half else input.dtype
    x = input.to(sums)
    b = Branches(*(None if weight is None else weight.to(sums) for weight in b))
    statistics = [x.new_zeros(2, g.channels)] * len(MAPS)

    def norm(name: str, raw: Tensor) -> Tensor:
        at = MAPS.index(name)
        if batch_norm and g.batch:
            variance, mean = torch.var_mean(raw, (0, 2, 3), correction=0)
            statistics[at] = torch.stack([mean, variance]).detach()
            raw = (raw - mean[:, None, None]) * (variance + eps).rsqrt()[:, None, None]
        if scale is not None:
            raw = raw * scale[at, :, None, None]
        return raw if shift is None else raw + shift[at, :, None, None]

    r = F.relu(x)
    outputs = {"skip": x}
    if b.conv is not None:
        outputs["conv3x3"] = norm("conv3x3", F.conv2d(r, b.conv, padding=1))
    if b.dil is not None:
        outputs["dil3x3"] = norm("dil3x3", F.conv2d(r, b.dil, padding=2, dilation=2))
    if b.deform is not None:
        assert b.offset_weight is not None
        maps = F.conv2d(r, b.offset_weight, b.offset_bias, padding=1)
        offset, logits = torch.split(maps, [g.offset_groups * 18, g.offset_groups * 9], 1)
        raw = deform_conv2d_reference(
            r, offset, b.deform, b.deform_bias, padding=1, mask=logits.sigmoid()
        )
        outputs["def3x3"] = norm("def3x3", raw)
    if b.depthwise1 is not None:
        assert b.pointwise1 is not None
        assert b.depthwise2 is not None
        assert b.pointwise2 is not None

        def separable(r: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(r, depthwise, padding=1, groups=g.channels), pointwise)

        inner = F.relu(norm("inner", separable(r, b.depthwise1, b.pointwise1)))
        outputs["sep3x3"] = norm("sep3x3", separable(inner, b.depthwise2, b.pointwise2))
    terms = [
        factors[i].to(sums) * outputs[name] for i, name in enumerate(FACTORS) if name in outputs
    ]
    return torch.stack(terms).sum(0).to(input.dtype), torch.stack(statistics)


class Sizes(NamedTuple):
    """``Params`` of csrc/mixed_op/mixed_op.h."""

    batch: int
    channels: int
    height: int
    width: int
    offset_groups: int
    norm: int = _FIXED
    eps: int = 0  # the bits of a double
    add: int = 0
    deterministic: int = 0
    tf32: int = 0


_OPTIONAL = (*(f"branches.{name}" for name in Branches._fields), "scale", "shift")
_TOGETHER = (
    ("deform", "deform_bias", "offset_weight", "offset_bias"),
    ("depthwise1", "pointwise1", "depthwise2", "pointwise2"),
)


def _check_kinds(input: Any, factors: Any, branches: Any, scale: Any, shift: Any) -> None:
    if not isinstance(branches, Branches):
        raise _checks.wrong_kind(_OP, "branches", "Branches", branches, "pass ops.Branches(..)")
    _checks.check_tensors(_OP, input=input, factors=factors)
    for name, tensor in zip(_OPTIONAL, (*branches, scale, shift), strict=True):
        if tensor is not None and (
            type(tensor) not in _eager.PLAIN
            or tensor.layout is not torch.strided
            or tensor.is_nested
        ):
            _checks.check_tensors(_OP, optional=[name], **{name: tensor})


def _check(
    input: Tensor,
    factors: Tensor,
    branches: Branches,
    scale: Tensor | None,
    shift: Tensor | None,
    batch_norm: bool,
    eps: float,
    grad: Tensor | None = None,
) -> Sizes:
    """Sizes of a call whose tensors fit together."""
    if input is None or factors is None:
        _check_kinds(input, factors, branches, scale, shift)
    if batch_norm and not 0 <= eps < math.inf:
        raise _wrong("eps", "of at least 0", eps, "change it")
    _checks.check_float(_OP, input)
    if input.dim() != 4 or 0 in input.shape[1:]:
        raise _wrong(
            "input",
            "of shape [N, C, H, W] with C, H and W above 0",
            tuple(input.shape),
            "reshape it (a single image is a batch of 1)",
        )
    n, c, height, width = input.shape
    offset_groups = _check_branches(c, branches)
    constants = {"factors": (len(FACTORS),), "scale": (len(MAPS), c), "shift": (len(MAPS), c)}
    shapes: dict[str, tuple[int, ...]] = constants | {"grad": (n, c, height, width)}
    tensors = {"factors": factors, "scale": scale, "shift": shift, "grad": grad}
    for name, shape in _weight_shapes(c, offset_groups).items():
        shapes[f"branches.{name}"] = shape
        tensors[f"branches.{name}"] = getattr(branches, name)
    for name, tensor in tensors.items():
        if tensor is not None:
            free = name in constants or name.endswith("_bias")
            _checks.check_shape(_OP, name, tensor, shapes[name], f"input has {c} channels")
            _checks.check_like(_OP, name, tensor, input, or_float32=free)
    if batch_norm and n * height * width == 1:
        raise _wrong(
            "input",
            "of more than one value per channel, to have a variance",
            f"shape {tuple(input.shape)}",
            "use larger images or batches, or batch_norm=False",
        )
    return Sizes(n, c, height, width, offset_groups)


def _check_branches(channels: int, branches: Branches) -> int:
    """Offset groups of branches whose weights are all given or all None."""
    for group in _TOGETHER:
        missing = [name for name in group if getattr(branches, name) is None]
        if missing and len(missing) < len(group):
            raise _wrong(
                f"branches.{missing[0]}",
                f"together with {', '.join(group)}",
                "None",
                "give all of them or none",
            )
    if branches.offset_weight is None:
        return 1
    _checks.check_dimensions(_OP, "branches.offset_weight", branches.offset_weight, 4)
    outputs = branches.offset_weight.shape[0]
    offset_groups = outputs // 27
    if offset_groups == 0 or outputs % 27 or channels % offset_groups:
        raise _wrong(
            "branches.offset_weight",
            f"of 27 * offset_groups output channels, offset_groups a divisor of {channels}",
            outputs,
            "change the layer that predicts the offsets",
        )
    return offset_groups


def _weight_shapes(c: int, offset_groups: int) -> dict[str, tuple[int, ...]]:
    square, depthwise, pointwise = (c, c, 3, 3), (c, 1, 3, 3), (c, c, 1, 1)
    outputs = offset_groups * 27
    deformable = square, (c,), (outputs, c, 3, 3), (outputs,)
    shapes = square, square, *deformable, *(depthwise, pointwise) * 2
    return dict(zip(Branches._fields, shapes, strict=True))


def _branch_pointers(dtype: torch.dtype, g: Sizes, first: int) -> list[_native.Pointer]:
    """``Branches`` in csrc/mixed_op/mixed_op.h, which begins at pointer ``first``."""
    sums, last = _native.accumulate(dtype), torch.channels_last
    constants = len(MAPS) * g.channels
    found = []
    for name, shape in _weight_shapes(g.channels, g.offset_groups).items():
        kind, layout = (dtype, last) if len(shape) == 4 else (sums, torch.contiguous_format)
        group = next((group for group in _TOGETHER if name in group[1:]), None)
        needed = False if group is None else first + Branches._fields.index(group[0])
        found.append(_native.Pointer.of(name, kind, math.prod(shape), layout, needed))
    return [
        *found,
        _native.Pointer.of("factors", sums, len(FACTORS)),
        _native.Pointer.of("scale", sums, constants, needed=False),
        _native.Pointer.of("shift", sums, constants, needed=False),
    ]


def _kept_pointers(dtype: torch.dtype, g: Sizes, first: int) -> tuple[_native.Pointer, ...]:
    """Raw maps, offsets and statistics, with the branches from pointer ``first`` on."""
    sums, last = _native.accumulate(dtype), torch.channels_last
    pixels = g.batch * g.height * g.width
    deform, normalised = first + Branches._fields.index("deform"), g.norm != _FIXED
    return (
        _native.Pointer.of("raw", dtype, len(MAPS) * pixels * g.channels, last, normalised),
        _native.Pointer.of("offset", sums, pixels * g.offset_groups * 27, last, deform),
        _native.Pointer.of("statistics", sums, len(MAPS) * 2 * g.channels, needed=normalised),
    )


@_native.pointers("mixed_op_forward")
def _forward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    g = Sizes(*sizes)
    map = math.prod(g[:4])
    return (
        _native.Pointer.of("input", dtype, map, torch.channels_last),
        *_branch_pointers(dtype, g, 1),
        *_kept_pointers(dtype, g, 1),
        _native.Pointer.of("output", dtype, map, torch.channels_last, g.norm != _GIVEN),
    )


@_native.pointers("mixed_op_backward")
def _backward_pointers(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[_native.Pointer, ...]:
    g, sums = Sizes(*sizes), _native.accumulate(dtype)
    input = _native.Pointer.of("input", dtype, math.prod(g[:4]), torch.channels_last)
    branches = _branch_pointers(dtype, g, 2)
    return (
        input._replace(name="grad"),
        *(input, *branches, *_kept_pointers(dtype, g, 2)),
        input._replace(name="grad_input", needed=False),
        *[b._replace(name=f"grad_{b.name}", needed=False) for b in _branch_pointers(sums, g, 2)],
    )


class _Ready(NamedTuple):
    """Tensors in dtypes and layouts that the kernels read."""

    input: Tensor  # channels last
    branches: tuple[Tensor | None, ...]  # in the order of nasfast::mixed_op::Branches

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    @property
    def sums(self) -> torch.dtype:
        return _native.accumulate(self.input.dtype)


def _ready(
    input: Tensor, factors: Tensor, b: Branches, scale: Tensor | None, shift: Tensor | None
) -> _Ready:
    dtype = _native.storage(input)
    sums = _native.accumulate(dtype)

    def weight(tensor: Tensor | None) -> Tensor | None:
        last = torch.channels_last
        return None if tensor is None else tensor.to(dtype).contiguous(memory_format=last)

    def constant(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(sums).contiguous()

    x = input.to(dtype).contiguous(memory_format=torch.channels_last)
    weights = [weight(b.conv), weight(b.dil), weight(b.deform), weight(b.offset_weight)]
    separable = [weight(tensor) for tensor in b[6:]]
    constants = [constant(t) for t in (b.deform_bias, b.offset_bias, factors, scale, shift)]
    conv, dil, deform, offset = weights
    deform_bias, offset_bias, *rest = constants
    return _Ready(x, (conv, dil, deform, deform_bias, offset, offset_bias, *separable, *rest))


def _map(like: Tensor, channels: int, dtype: torch.dtype, count: int = 1) -> Tensor:
    """Memory for maps in channels last: [count * N, channels, H, W]."""
    n, _, height, width = like.shape
    return _native.empty_map(like, (count * n, channels, height, width), dtype)


class _Scratch(threading.local):
    """Memory that a thread keeps for maps which no call keeps: as much as the largest call needs.

    Fresh memory would be scattered over the heap between the results of calls, and several times as
    much of it. CUDA's allocator does not need such help.
    """

    memory = torch.empty(0, dtype=torch.uint8)

    def map(self, like: Tensor, channels: int, dtype: torch.dtype, count: int, at: int) -> Tensor:
        """As :func:`_map`, from byte ``at`` of the memory on."""
        n, _, height, width = like.shape
        shape = (count * n, height, width, channels)
        end = at + math.prod(shape) * dtype.itemsize
        return self.memory[at:end].view(dtype).view(shape).permute(0, 3, 1, 2)


_scratch_of_thread = _Scratch()


def _scratch(
    g: Sizes, ready: _Ready, batch_norm: bool, deform: bool, keep: bool
) -> tuple[Tensor | None, ...]:
    """Memory for the raw maps, and for offsets and masks; fresh where a call keeps them."""
    x, count, offsets = ready.input, len(MAPS), g.offset_groups * 27
    if keep or x.is_cuda:
        return (
            _map(x, g.channels, ready.dtype, count) if batch_norm else None,
            _map(x, offsets, ready.sums) if deform else None,
        )
    scratch = _scratch_of_thread
    end = count * x.numel() * ready.dtype.itemsize if batch_norm else 0
    end += -end % 64
    size = end + x.numel() // g.channels * offsets * ready.sums.itemsize
    if scratch.memory.numel() < size:
        with torch.inference_mode(False):  # later calls may be outside of it
            scratch.memory = torch.empty(size, dtype=torch.uint8)
    return (
        scratch.map(x, g.channels, ready.dtype, count, 0) if batch_norm else None,
        scratch.map(x, offsets, ready.sums, 1, end) if deform else None,
    )


def _with_settings(g: Sizes, input: Tensor, norm: int, eps: float) -> Sizes:
    deterministic, tf32 = _native.convolution_settings(input)
    bits = _native.double_bits(eps)
    return g._replace(norm=norm, eps=bits, deterministic=deterministic, tf32=tf32)


def _forward(
    g: Sizes,
    ready: _Ready,
    raw: Tensor | None,
    offset: Tensor | None,
    statistics: Tensor,
    output: Tensor | None,
) -> None:
    tensors = (ready.input, *ready.branches, raw, offset, statistics, output)
    _native.call("mixed_op_forward", ready.dtype, g, tensors)


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """output, statistics, and raw maps and offsets where a backward pass needs them kept."""
    input, factors, *weights, scale, shift, batch_norm, eps, recompute = arguments
    b = Branches(*weights)
    g = _check(input, factors, b, scale, shift, batch_norm, eps)
    ready = _ready(input, factors, b, scale, shift)
    output = _map(ready.input, g.channels, ready.dtype)
    statistics = ready.input.new_zeros((len(MAPS), 2, g.channels), dtype=ready.sums)
    keep = batch_norm and not recompute
    raw, offset = _scratch(g, ready, batch_norm, b.deform is not None, keep)
    if input.numel():
        g = _with_settings(g, input, _BATCH if batch_norm else _FIXED, eps)
        _forward(g, ready, raw, offset, statistics, output)

    def kept(tensor: Tensor | None) -> Tensor:
        return tensor if keep and tensor is not None else input.new_empty(0)

    return output.to(input.dtype), statistics, kept(raw), kept(offset)


def _check_backward(arguments: Sequence[Any]) -> Sizes:
    """Sizes of a backward pass whose tensors fit together, with those that were kept for it."""
    grad, input, factors, *weights, scale, shift, statistics, raw, offset, norm, eps, wanted = (
        arguments
    )
    _checks.check_tensors(_OP, grad=grad, statistics=statistics, raw=raw, offset=offset)
    _checks.check_wanted(_OP, wanted, 14)
    b = Branches(*weights)
    g = _check(input, factors, b, scale, shift, norm, eps, grad)
    if not norm:
        return g
    dtype = input.dtype if input.is_cuda else _native.storage(input)
    sums, remedy = _native.accumulate(dtype), "pass what the forward pass returned"
    size = g.batch, g.height, g.width
    expected: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "statistics": (statistics, sums, (len(MAPS), 2, g.channels))
    }
    if raw.numel():
        expected["raw"] = raw, dtype, (len(MAPS) * size[0], g.channels, *size[1:])
        if b.deform is not None:
            expected["offset"] = offset, sums, (size[0], g.offset_groups * 27, *size[1:])
    for name, (tensor, dtype, shape) in expected.items():
        _checks.check_shape(_OP, name, tensor, shape, remedy)
        _checks.check_device(_OP, name, tensor, input)
        if tensor.dtype != dtype:
            raise _wrong(name, f"of {dtype}", tensor.dtype, remedy)
    return g


def _kernel_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of input, factors, weights of branches, scale and shift; empty if not wanted."""
    g = _check_backward(arguments)
    grad, input, factors, *weights, scale, shift, statistics, raw, offset, norm, eps, wanted = (
        arguments
    )
    b = Branches(*weights)
    sources = (input, factors, *b, scale, shift)
    ready = _ready(input, factors, b, scale, shift)
    if input.numel() == 0:
        return tuple(
            torch.zeros_like(t) if want and t is not None else input.new_empty(0)
            for t, want in zip(sources, wanted, strict=True)
        )
    dy = grad.to(ready.dtype).contiguous(memory_format=torch.channels_last)
    g = _with_settings(g, input, _BATCH if norm else _FIXED, eps)
    last = torch.channels_last
    kept = raw.contiguous(memory_format=last) if norm and raw.numel() else None
    sampled = kept is not None and b.deform is not None
    map = offset.contiguous(memory_format=last) if sampled else None
    statistics = statistics.contiguous()
    if not norm or kept is None:
        kept, map = _scratch(g, ready, norm, b.deform is not None, False)
        if norm:
            _forward(g._replace(norm=_GIVEN), ready, kept, map, statistics, None)

    def like(tensor: Tensor | None, want: bool) -> Tensor | None:
        if tensor is None or not want:
            return None
        dtype = ready.dtype if tensor is input else ready.sums
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        return torch.empty(tensor.shape, dtype=dtype, device=tensor.device, memory_format=layout)

    results = [like(tensor, want) for tensor, want in zip(sources, wanted, strict=True)]
    dx, df, dconv, ddil, ddef, ddef_bias, doffset, doffset_bias, *separable, dscale, dshift = (
        results
    )
    tensors = (
        *(dy, ready.input, *ready.branches, kept, map, statistics if norm else None),
        *(dx, dconv, ddil, ddef, ddef_bias, doffset, doffset_bias, *separable, df, dscale, dshift),
    )
    _native.call("mixed_op_backward", ready.dtype, g, tensors)
    # gradients of weights in half precision come in float32
    pairs = enumerate(zip(results, sources, strict=True))
    halves = {i: r for i, (r, t) in pairs if r is not None and r.dtype != t.dtype}
    for i, result in zip(halves, _native.convert([*halves.values()], input.dtype), strict=True):
        results[i] = result
    return tuple(
        input.new_empty(0) if result is None else result.to(source.dtype)
        for result, source in zip(results, sources, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.batch_norm, ctx.eps, _ = inputs
    _, *kept = output  # statistics, raw maps and offsets
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    sources = saved[:14]
    wanted = list(ctx.needs_input_grad[:14])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        gradients = _differentiate(ctx, sources, wanted, grad)
    else:
        op = torch.ops.nasfast.mixed_op_backward.default
        gradients = op(grad, *saved, ctx.batch_norm, ctx.eps, wanted)
    found = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return (*found, None, None, None)


def _differentiate(
    ctx: Any, sources: Sequence[Tensor | None], wanted: list[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, through the reference."""
    with torch.enable_grad():
        # views, so that differentiation stops here and not in the graph that made the tensors
        views: list[Any] = [
            None if tensor is None else tensor.view_as(tensor) for tensor in sources
        ]
        input, factors, *weights, scale, shift = views
        output, _ = mixed_op_reference(
            input, factors, Branches(*weights), scale, shift, batch_norm=ctx.batch_norm, eps=ctx.eps
        )
        chosen = [view for view, want in zip(views, wanted, strict=True) if want]
        found = iter(
            torch.autograd.grad(output, chosen, grad, create_graph=True, allow_unused=True)
        )
    return [next(found) if want else None for want in wanted]


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    input, factors, *weights, scale, shift, batch_norm, eps, recompute = arguments
    b = Branches(*weights)
    g = _check(input, factors, b, scale, shift, batch_norm, eps)
    dtype = input.dtype if input.is_cuda else _native.storage(input)
    sums = _native.accumulate(dtype)
    keep = batch_norm and not recompute
    none = input.new_empty(0)
    return (
        _map(input, g.channels, input.dtype),
        input.new_empty((len(MAPS), 2, g.channels), dtype=sums),
        _map(input, g.channels, dtype, len(MAPS)) if keep else none,
        _map(input, g.offset_groups * 27, sums) if keep and b.deform is not None else none.clone(),
    )


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _check_backward(arguments)
    _, input, *rest = arguments
    sources, wanted = (input, *rest[:13]), arguments[-1]
    device: torch.device = input.device

    def like(tensor: Tensor | None, want: bool) -> Tensor:
        if tensor is None or not want:
            return torch.empty(0, dtype=input.dtype, device=device)
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        return torch.empty_like(tensor, memory_format=layout)

    return tuple(like(tensor, want) for tensor, want in zip(sources, wanted, strict=True))


def _autocast(device: str) -> Callable[..., tuple[Tensor, ...]]:
    """Casts input and weights as autocast does for a convolution; float64 stays."""

    def op(*arguments: Any) -> tuple[Tensor, ...]:
        input, factors, *weights, scale, shift, batch_norm, eps, recompute = arguments
        single = functools.partial(_register.cast, dtype=torch.float32)
        b = Branches(*weights)
        halves = [input, *b._replace(deform_bias=None, offset_bias=None)]
        with torch.autocast(device, enabled=False):
            dtype = torch.get_autocast_dtype(device)
            x, *weights = _register.cast_together(_OP, halves, dtype)
            biases = {"deform_bias": single(b.deform_bias), "offset_bias": single(b.offset_bias)}
            b = Branches(*weights)._replace(**biases)
            tensors = (x, single(factors), *b, single(scale), single(shift))
            result: tuple[Tensor, ...] = torch.ops.nasfast.mixed_op.default(
                *tensors, batch_norm, eps, recompute
            )
        return result

    return op


def _reference(*arguments: Any) -> tuple[Tensor, ...]:
    """Where there is no kernel, PyTorch differentiates the reference."""
    input, factors, *weights, scale, shift, batch_norm, eps, _ = arguments
    output, statistics = mixed_op_reference(
        input, factors, Branches(*weights), scale, shift, batch_norm=batch_norm, eps=eps
    )
    return output, statistics, input.new_empty(0), input.new_empty(0)


def _flops(input: Sequence[int], factors: Any, *arguments: Any, **rest: Any) -> int:
    """Of the convolutions, two per multiply-add, as PyTorch counts them."""
    n, _, height, width = input
    weights = [shape for shape in arguments[:10] if shape is not None and len(shape) == 4]
    return int(2 * n * height * width * sum(math.prod(shape) for shape in weights))


def _backward_flops(grad: Sequence[int], *arguments: Any, **rest: Any) -> int:
    """One product for the gradient of a convolution's input, one for that of its weight."""
    return 2 * _flops(*arguments)


_WEIGHTS = ", ".join(f"Tensor? {name}" for name in Branches._fields)
_TENSORS = f"Tensor input, Tensor factors, {_WEIGHTS}, Tensor? scale, Tensor? shift"
_register.define(
    f"mixed_op({_TENSORS}, bool batch_norm, float eps, bool recompute) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _flops,
    _backward,
    _setup,
)
_register.define(
    f"mixed_op_backward(Tensor grad, {_TENSORS}, Tensor statistics, Tensor raw, Tensor offset, "
    f"bool batch_norm, float eps, bool[14] wanted) -> ({', '.join(['Tensor'] * 14)})",
    _fake_backward,
    _backward_flops,
)
_register.autocast(_OP, _autocast)
_register.implement(_OP, _kernel, _kernel_backward, _reference)
