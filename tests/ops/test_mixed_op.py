"""mixed_op: one list of samples feeds forward, gradients, opcheck and compilation."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_harness import (
    arrange,
    check_level,
    check_same_bits_for_any_thread_count,
    check_without_extension,
    every_level,
    native,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from nasfast.ops import Branches, mixed_op, mixed_op_reference
from nasfast.ops.mixed_op import FACTORS, MAPS

OP = torch.ops.nasfast.mixed_op.default
OP_BACKWARD = torch.ops.nasfast.mixed_op_backward.default
# Relative to the Euclidean norm.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 8e-2,
    torch.float16: 8e-3,
}
NAMES = ("input", "factors", *Branches._fields, "scale", "shift")
WEIGHTS = {  # of each branch, as slices of Branches._fields
    "conv3x3": slice(0, 1),
    "dil3x3": slice(1, 2),
    "def3x3": slice(2, 6),
    "sep3x3": slice(6, 10),
}


@dataclass(frozen=True)
class Sample:
    """Sizes and settings of one call; ``tensors`` draws the arguments."""

    id: str
    batch: int = 2
    channels: int = 4
    size: tuple[int, int] = (6, 9)
    offset_groups: int = 2
    without: tuple[str, ...] = ()  # branches that are not there
    scale: bool = False
    shift: bool = False
    batch_norm: bool = True
    recompute: bool = False
    spread: float = 1.0  # largest bias of an offset, pixels
    layout: str = "contiguous"
    decided: bool = False  # no value near the bend of the inner ReLU; needs shift

    def in_dtype(self, dtype: torch.dtype) -> Sample:
        """The sample, in half precision decided: rounding would take values across the bend."""
        half = dtype in (torch.bfloat16, torch.float16)
        return replace(self, decided=True, shift=True) if half else self

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """In the order of NAMES.

        Offsets are odd 256ths of a pixel if spread is odd, and exact: no sample lies near a pixel,
        where the gradient jumps.
        """
        c, d = self.channels, self.offset_groups

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape) / max(1, torch.Size(shape[1:]).numel()) ** 0.5

        def odd(*shape: int, parts: int) -> Tensor:  # in -1..1
            return (2 * torch.randint(-parts // 2, parts // 2, shape) + 1) / parts

        branches = Branches(
            draw(c, c, 3, 3),
            draw(c, c, 3, 3),
            draw(c, c, 3, 3),
            draw(c),
            torch.randint(-3, 4, (d * 27, c, 3, 3)) / 16,
            odd(d * 27, parts=256) * self.spread,
            *(draw(c, 1, 3, 3), draw(c, c, 1, 1)) * 1,
            *(draw(c, 1, 3, 3), draw(c, c, 1, 1)),
        )
        weights: list[Tensor | None] = list(branches)
        for name in self.without:
            if name != "skip":
                weights[WEIGHTS[name]] = [None] * len(weights[WEIGHTS[name]])
        shift = torch.randn(5, c)
        if self.decided:
            shift[4] = torch.tensor([5.0, 5.0, -5.0]).repeat(c)[:c]
        there = torch.tensor([name not in self.without for name in FACTORS])
        tensors = [
            odd(self.batch, c, *self.size, parts=16) * 2,
            torch.rand(5).add(0.5) * there,
            *weights,
            torch.rand(5, c).add(0.5) if self.scale else None,
            shift if self.shift else None,
        ]
        return [None if t is None else arrange(t.to(dtype), self.layout) for t in tensors]


def call(
    function: Any, sample: Sample, tensors: list[Tensor | None], **options: Any
) -> tuple[Tensor, Tensor]:
    input, factors, *weights, scale, shift = tensors
    options["batch_norm"] = sample.batch_norm
    if function is mixed_op:
        options.setdefault("recompute", sample.recompute)
    result: tuple[Tensor, Tensor] = function(
        input, factors, Branches(*weights), scale, shift, **options
    )
    return result


def samples() -> list[Sample]:
    affine = {"scale": True, "shift": True}
    fixed = {"batch_norm": False}
    return [
        Sample("plain"),
        Sample("plain-fixed", **fixed),
        Sample("affine", **affine),
        Sample("affine-fixed", **affine, **fixed),
        Sample("scale", scale=True),
        Sample("shift-fixed", shift=True, **fixed),
        Sample("recompute", channels=10, size=(7, 5), recompute=True, **affine),
        Sample("recompute-fixed", channels=10, size=(7, 5), recompute=True, **affine, **fixed),
        Sample("two-channels", channels=2, size=(5, 12)),
        Sample("one-channel", channels=1, offset_groups=1, size=(5, 12), **affine),
        Sample("six-channels", channels=6, offset_groups=1, size=(8, 5), **affine, **fixed),
        Sample("ten-channels", channels=10, offset_groups=5, size=(9, 13)),
        Sample("twenty-channels", channels=20, size=(11, 14), layout="channels_last"),
        Sample("forty-channels", channels=40, size=(13, 10), layout="channels_last", **affine),
        Sample("seventy-channels", batch=1, channels=70, offset_groups=5, size=(7, 9)),
        Sample("seventy-fixed", batch=1, channels=70, offset_groups=1, size=(7, 9), **fixed),
        Sample("low", channels=6, size=(1, 23)),
        Sample("low-fixed", channels=6, size=(1, 23), **affine, **fixed),
        Sample("narrow", channels=6, size=(23, 1)),
        Sample("two-rows", channels=6, size=(2, 19), recompute=True),
        Sample("three-rows", channels=10, size=(3, 17)),
        Sample("one-pixel", batch=5, size=(1, 1)),
        Sample("one-value-fixed", batch=1, size=(1, 1), **fixed),
        Sample("tiles", batch=1, channels=10, size=(29, 41), layout="channels_last"),
        Sample("tiles-fixed", batch=3, channels=6, size=(26, 31), **affine, **fixed),
        Sample("wide", batch=1, channels=4, size=(4, 210)),
        Sample("batch-0", batch=0, **affine),
        Sample("batch-1", batch=1),
        Sample("batch-33", batch=33, channels=2, size=(3, 4)),
        Sample("batch-33-fixed", batch=33, channels=2, size=(3, 4), **fixed),
        Sample("far", size=(11, 13), spread=15.0),
        Sample("strided", layout="strided", **affine),
        Sample("no-skip", without=("skip",), recompute=True),
        Sample("only-def", channels=10, without=("conv3x3", "dil3x3", "sep3x3", "skip")),
        Sample("no-def-no-sep", channels=10, without=("def3x3", "sep3x3")),
    ]


def find(id: str) -> Sample:
    return next(sample for sample in samples() if sample.id == id)


every_sample = pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.id)


def require_grad(tensors: list[Tensor | None]) -> list[Tensor]:
    """Marks the tensors that are there; returns them."""
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def convert(tensors: list[Tensor | None], *to: Any) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(*to).clone() for t in tensors]


def assert_close(
    got: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "", least: float = 1.0
) -> None:
    """Within the tolerance of ``dtype`` of the norm expected, or of ``least`` if that is less."""
    assert got.shape == expected.shape, what
    error = (got.double() - expected.double()).norm().item()
    norm = max(least, expected.double().norm().item())
    assert error <= TOLERANCE[dtype] * norm, f"{what}: error of {error}, norm of {norm}"


def forward_backward(sample: Sample, tensors: list[Tensor | None], **options: Any) -> list[Tensor]:
    """Output, statistics, and every gradient."""
    leaves = require_grad(tensors)
    output, statistics = call(mixed_op, sample, tensors, **options)
    cotangent = torch.ones_like(output).cumsum(-1).sin()
    found = torch.autograd.grad(output, leaves, cotangent)
    return [output.detach(), statistics, *found]


def check_against_reference(sample: Sample, dtype: torch.dtype) -> None:
    """Output, statistics and every gradient, against the reference in float64."""
    sample = sample.in_dtype(dtype)
    tensors = sample.tensors(dtype)
    doubles = convert(tensors, torch.float64)
    leaves, double_leaves = require_grad(tensors), require_grad(doubles)
    importlib.import_module("nasfast.ops.mixed_op")._scratch_of_thread.memory.fill_(255)  # NaN
    names = [name for name, tensor in zip(NAMES, tensors) if tensor is not None]
    output, statistics = call(mixed_op, sample, tensors)
    expected, expected_statistics = call(mixed_op_reference, sample, doubles)
    assert output.dtype == dtype
    assert_close(output, expected, dtype)
    assert not statistics.requires_grad
    assert statistics.dtype == (dtype if dtype == torch.float64 else torch.float32)
    if sample.batch:
        assert_close(statistics, expected_statistics, dtype, "statistics")
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    references = torch.autograd.grad(
        expected, double_leaves, cotangent.double(), materialize_grads=True
    )
    for name, leaf, gradient, reference in zip(names, leaves, gradients, references):
        assert gradient.dtype == leaf.dtype, name
        # normalisation makes some gradients vanish, all but their rounding
        assert_close(gradient, reference, dtype, name, least=max(1.0, cotangent.norm().item()))


@every_sample
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.usefixtures("poison_empty")
def test_equals_reference(sample: Sample, dtype: torch.dtype) -> None:
    check_against_reference(sample, dtype)


HALVES = (
    "plain",
    "affine-fixed",
    "recompute",
    "twenty-channels",
    "tiles",
    "three-rows",
    "batch-33",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("id", HALVES)
@pytest.mark.usefixtures("poison_empty")
def test_half_precision(id: str, dtype: torch.dtype) -> None:
    check_against_reference(find(id), dtype)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.usefixtures("poison_empty")
def test_every_combination_of_branches(batch_norm: bool, recompute: bool) -> None:
    options: dict[str, Any] = {"batch_norm": batch_norm, "recompute": recompute}
    for count in range(6):
        for without in itertools.combinations(FACTORS, count):
            affine = "conv3x3" in without
            check_against_reference(
                Sample("", without=without, size=(5, 7), scale=affine, shift=affine, **options),
                torch.float64,
            )


def test_reference_is_the_sum_of_its_branches() -> None:
    """Each from functions of PyTorch."""
    sample = Sample("", channels=6, spread=0.0, scale=True, shift=True)
    input, factors, *weights, scale, shift = sample.tensors()
    b = Branches(*weights)
    zero = b.offset_weight.clone()
    zero[: 18 * sample.offset_groups] = 0
    b = b._replace(offset_weight=zero, offset_bias=b.offset_bias * 0)

    def norm(x: Tensor, name: str) -> Tensor:
        i = MAPS.index(name)
        return F.batch_norm(x, None, None, scale[i], shift[i], training=True)

    r = F.relu(input)
    depthwise = F.conv2d(r, b.depthwise1, padding=1, groups=6)
    inner = F.relu(norm(F.conv2d(depthwise, b.pointwise1), "inner"))
    depthwise = F.conv2d(inner, b.depthwise2, padding=1, groups=6)
    masks = F.conv2d(r, zero[36:], padding=1).sigmoid()  # [N, D * 9, H, W]
    columns = F.unfold(r, 3, padding=1).view(2, 2, 3, 9, -1) * masks.view(2, 2, 1, 9, -1)
    deformed = b.deform.flatten(1) @ columns.flatten(1, 3) + b.deform_bias[:, None]
    branches = [
        norm(F.conv2d(r, b.conv, padding=1), "conv3x3"),
        norm(F.conv2d(depthwise, b.pointwise2), "sep3x3"),
        norm(F.conv2d(r, b.dil, padding=2, dilation=2), "dil3x3"),
        norm(deformed.view_as(input), "def3x3"),
        input,
    ]
    expected = sum(factor * branch for factor, branch in zip(factors, branches))
    output, _ = mixed_op_reference(input, factors, b, scale, shift)
    assert_close(output, expected, torch.float64)


def test_factor_zero_leaves_skip_out() -> None:
    """Even where the input is not finite; its gradient is there all the same."""
    sample = Sample("", without=(*FACTORS,))
    tensors = sample.tensors(torch.float32)
    tensors[0][0, 1, 2, 3] = torch.inf
    factors = tensors[1].requires_grad_()
    output, _ = call(mixed_op, replace(sample, batch_norm=False), tensors)
    assert output.eq(0).all()
    tensors[0][0, 1, 2, 3] = 1
    output, _ = call(mixed_op, sample, tensors)
    (gradient,) = torch.autograd.grad(output.sum(), factors)
    torch.testing.assert_close(gradient[4], tensors[0].sum())


def test_eps() -> None:
    sample = Sample("", scale=True)
    tensors = sample.tensors()
    for eps in (0.0, 1e-3, 10.0):
        output, _ = call(mixed_op, sample, tensors, eps=eps)
        expected, _ = call(mixed_op_reference, sample, tensors, eps=eps)
        assert_close(output, expected, torch.float64)


# batch norm of few values has derivatives of any size: the maps are not tiny
SMALL = Sample("", batch=1, channels=2, size=(3, 4), scale=True, shift=True)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradcheck(batch_norm: bool, recompute: bool) -> None:
    sample = replace(SMALL, batch_norm=batch_norm, recompute=recompute)
    tensors = require_grad(sample.tensors())
    assert torch.autograd.gradcheck(lambda *t: call(mixed_op, sample, list(t))[0], tensors)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_gradgradcheck(batch_norm: bool) -> None:
    sample = replace(SMALL, offset_groups=1, size=(2, 3), batch_norm=batch_norm)
    tensors = sample.tensors()
    leaves = require_grad([tensors[0], tensors[1], tensors[2], tensors[7], tensors[8]])

    def function(*leaves: Tensor) -> Tensor:
        replaced = dict(zip((0, 1, 2, 7, 8), leaves))
        return call(mixed_op, sample, [replaced.get(i, t) for i, t in enumerate(tensors)])[0]

    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("create_graph", [False, True])
def test_second_derivatives_inside_a_graph(create_graph: bool) -> None:
    """Input and factors depend on what is differentiated, as in a second-order search."""
    sample = Sample("", size=(4, 5))
    tensors = sample.tensors()
    alphas, weight = torch.randn(5, dtype=torch.float64), tensors[2]

    def penalty(function: Any) -> list[Tensor]:
        leaves = require_grad([alphas, weight])
        varied = [tensors[0] * weight.sum(), alphas.softmax(0), *tensors[2:]]
        output, _ = call(function, sample, varied)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), leaves, create_graph=create_graph
        )
        return [*first, *second]

    for ours, reference in zip(penalty(mixed_op), penalty(mixed_op_reference)):
        assert_close(ours, reference, torch.float64)


@pytest.mark.parametrize("id", ["plain", "plain-fixed", "recompute"])
def test_expanded_gradient(id: str) -> None:
    """``output.sum().backward()`` hands over a gradient with stride 0."""
    sample = find(id)
    tensors = sample.tensors()
    leaves = require_grad(tensors)
    output, _ = call(mixed_op, sample, tensors)
    expanded = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense))


@pytest.mark.parametrize("id", ["affine", "affine-fixed", "recompute", "forty-channels"])
@pytest.mark.usefixtures("poison_empty")
def test_single_gradient(id: str) -> None:
    """Each gradient alone equals the one computed with the others."""
    sample = find(id)
    tensors = sample.tensors()
    _, _, *expected = forward_backward(sample, tensors)
    for i, gradient in zip((i for i, t in enumerate(tensors) if t is not None), expected):
        detached = [None if t is None else t.detach() for t in tensors]
        detached[i].requires_grad_()
        output, _ = call(mixed_op, sample, detached)
        cotangent = torch.ones_like(output).cumsum(-1).sin()
        (alone,) = torch.autograd.grad(output, detached[i], cotangent)
        assert_close(alone, gradient, torch.float64, NAMES[i])


@every_sample
def test_recomputed_gradients_are_the_same_bits(sample: Sample) -> None:
    tensors = sample.tensors(torch.float32)
    runs = [forward_backward(sample, tensors, recompute=recompute) for recompute in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@native
@pytest.mark.parametrize(
    "id",
    ["affine", "affine-fixed", "recompute", "twenty-channels", "tiles", "tiles-fixed", "batch-33"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_bits_for_any_thread_count(id: str, dtype: torch.dtype) -> None:
    sample = find(id)
    tensors = sample.tensors(dtype)
    check_same_bits_for_any_thread_count(lambda: forward_backward(sample, tensors))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("id", ["plain", "affine-fixed", "only-def", "batch-0"])
@pytest.mark.usefixtures("poison_empty")
def test_into(id: str, layout: str, grad: bool) -> None:
    sample = find(id)
    tensors = sample.tensors()
    expected = forward_backward(sample, tensors)
    leaf = torch.randn_like(tensors[0]).requires_grad_()
    wanted = leaf.detach() + expected[0]
    with torch.set_grad_enabled(grad):
        running = arrange(leaf * 1, layout)
        running = running.clone() if layout == "strided" else running
        output, _ = call(mixed_op, sample, tensors, into=running)
    assert_close(output, wanted, torch.float64)
    if layout == "channels_last":
        assert output.data_ptr() == running.data_ptr()
    if grad:
        cotangent = torch.ones_like(output).cumsum(-1).sin()
        leaves = [leaf, *(t for t in tensors if t is not None)]
        gradient, *others = torch.autograd.grad(output, leaves, cotangent)
        assert torch.equal(gradient, cotangent)
        assert all(torch.equal(a, b) for a, b in zip(others, expected[2:]))


def test_into_what_must_stay() -> None:
    """A leaf, and a view, whose base others may read."""
    sample = Sample("")
    tensors = sample.tensors()
    require_grad(tensors)
    output, _ = call(mixed_op, sample, tensors)
    last = torch.channels_last
    base = torch.randn(2, 4, 6, 9, dtype=torch.float64).contiguous(memory_format=last)
    kept = base.clone()
    for into in (base.clone().requires_grad_(), base[:], base.flip(0)[:], base[:1].expand_as(base)):
        before = into.detach().clone()
        result, _ = call(mixed_op, sample, tensors, into=into)
        assert torch.equal(into, before)
        assert_close(result, before + output, torch.float64)
        if into.requires_grad:
            assert torch.autograd.grad(result.sum(), into)[0].eq(1).all()
    assert torch.equal(base, kept)


def test_into_that_another_node_needs_is_an_error() -> None:
    """As with every in-place operation of PyTorch."""
    sample = Sample("")
    tensors = sample.tensors()
    require_grad(tensors)
    running = tensors[0] * 2
    other = running.square()
    call(mixed_op, sample, tensors, into=running)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.sum().backward()


def test_into_under_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        sample = Sample("", batch_norm=False)
        tensors = sample.tensors(dtype)
        running = torch.randn(2, 4, 6, 9).to(dtype)
        expected = running + call(mixed_op, sample, tensors)[0]
        output, _ = call(mixed_op, sample, tensors, into=running)
        assert output.dtype == dtype
        assert_close(output, expected, dtype)


@native
@every_level
def test_instruction_sets(level: str) -> None:
    """The kernels of each, in a process that is told to use them."""
    code = (
        "torch.use_deterministic_algorithms(True)\n"
        "for sample in t.samples():\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        t.check_against_reference(sample, dtype)\n"
        "for id in t.HALVES:\n"
        "    t.check_against_reference(t.find(id), torch.bfloat16)\n"
    )
    check_level(level, "mixed_op", code)


@pytest.mark.parametrize("function", [mixed_op, mixed_op_reference])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.usefixtures("poison_empty")
def test_offset_without_position(function: Any, batch_norm: bool, value: float) -> None:
    """Such a sample is zero, and nothing else changes: as if its mask were zero."""
    sample = Sample("", channels=10, batch_norm=batch_norm)
    tensors = sample.tensors(torch.float32)
    bias, weight = tensors[NAMES.index("offset_bias")], tensors[NAMES.index("offset_weight")]
    logits = 18 * sample.offset_groups
    masked = bias.clone()
    masked[logits + 4] = -torch.inf
    weight[logits + 4] = 0
    expected = [*tensors]
    expected[NAMES.index("offset_bias")] = masked
    output, _ = call(mixed_op, sample, expected)
    bias[8] = value  # y of tap 4
    leaves = require_grad(tensors)
    got, _ = call(function, sample, tensors)
    assert_close(got, output, torch.float32)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.square().sum(), leaves))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_hostile_values_do_no_harm(dtype: torch.dtype) -> None:
    """Whatever comes out, memory of others is left alone and every call returns."""
    hostile = (torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 2.0**31, -(2.0**63), 1e-40)
    for value, name in itertools.product(hostile, ("input", "offset_weight", "offset_bias")):
        sample = Sample("", channels=10, size=(5, 11), batch_norm=value > 0, recompute=value > 1)
        tensors = sample.tensors(dtype)
        flat = tensors[NAMES.index(name)].view(-1)
        flat[::7] = value
        for result in forward_backward(sample, tensors):
            assert result.numel()


def test_layout_is_channels_last() -> None:
    for layout in ("contiguous", "channels_last"):
        sample = Sample("", layout=layout)
        output, statistics, *gradients = forward_backward(sample, sample.tensors(torch.float32))
        for tensor in (output, gradients[0]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert statistics.is_contiguous()


def test_autocast_casts_as_for_a_convolution() -> None:
    """Biases, factors, scale and shift stay in float32, so that positions keep their precision."""
    sample = find("affine")
    tensors = sample.tensors(torch.float32)
    tensors[0] = tensors[0].half()
    leaves = require_grad(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, statistics = call(mixed_op, sample, tensors)
    assert output.dtype == torch.bfloat16
    assert statistics.dtype == torch.float32
    single = ("factors", "deform_bias", "offset_bias", "scale", "shift")
    cast = [t if name in single else t.bfloat16() for name, t in zip(NAMES, tensors)]
    assert torch.equal(output, call(mixed_op, sample, cast)[0])
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]


def test_autocast_leaves_float64_alone() -> None:
    sample = Sample("")
    tensors = sample.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = call(mixed_op, sample, tensors)
    assert torch.equal(output, call(mixed_op, sample, tensors)[0])


@pytest.mark.parametrize("function", [mixed_op, mixed_op_reference])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_in_float32(function: Any, dtype: torch.dtype) -> None:
    """Beside half precision, positions keep what float32 holds of them."""
    image = torch.arange(300, dtype=dtype).view(1, 1, 1, 300) * 512
    kernel = torch.zeros(1, 1, 3, 3, dtype=dtype)
    kernel[0, 0, 1, 1] = 2  # the masks are 1/2
    offset = torch.zeros(27)
    offset[9] = 1 / 512  # x of tap 4
    branches = Branches(
        deform=kernel,
        deform_bias=torch.zeros(1),
        offset_weight=torch.zeros(27, 1, 3, 3, dtype=dtype),
        offset_bias=offset,
    )
    factors = torch.tensor([0, 0, 0, 1, 0], dtype=torch.float32)
    image = image.clamp_max(torch.finfo(dtype).max)
    output, _ = function(image, factors, branches, batch_norm=False)
    assert output.dtype == dtype
    assert output[0, 0, 0, :2].tolist() == [1, 512 if dtype == torch.bfloat16 else 513]


@pytest.mark.parametrize(
    "id",
    ["affine", "affine-fixed", "recompute", "no-skip", "shift-fixed", "batch-0", "strided"],
)
def test_opcheck(id: str) -> None:
    sample = find(id)
    tensors = sample.tensors(torch.float32)
    require_grad(tensors)
    torch.library.opcheck(OP, (*tensors, sample.batch_norm, 1e-5, sample.recompute))


@pytest.mark.parametrize("id", ["affine", "affine-fixed", "recompute"])
@pytest.mark.parametrize("all_wanted", [True, False])
def test_opcheck_backward(id: str, all_wanted: bool) -> None:
    sample = find(id)
    tensors = sample.tensors(torch.float32)
    settings = (sample.batch_norm, 1e-5)
    output, *kept = OP(*tensors, *settings, sample.recompute)
    wanted = [all_wanted or i % 3 == 0 for i in range(14)]
    arguments = (torch.randn_like(output), *tensors, *kept, *settings, wanted)
    torch.library.opcheck(OP_BACKWARD, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("id", ["affine", "affine-fixed", "recompute"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(id: str, dynamic: bool) -> None:
    torch.compiler.reset()
    sample = find(id)
    weights = sample.tensors(torch.float32)[1:]

    def block(x: Tensor) -> Tensor:
        return call(mixed_op, sample, [x, *weights], into=x * 2)[0]

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = require_grad(weights)
    for size in ((5, 7), (6, 9)):
        input = torch.randn(2, sample.channels, *size, requires_grad=True)
        output, expected = compiled(input), block(input)
        assert torch.equal(output, expected)
        ours, others = (
            torch.autograd.grad(y.sin().sum(), [input, *leaves]) for y in (output, expected)
        )
        for got, wanted in zip(ours, others):
            torch.testing.assert_close(got, wanted)


def test_compile_under_autocast() -> None:
    sample = find("affine")
    weights = sample.tensors(torch.float32)[1:]

    def block(x: Tensor) -> Tensor:
        return call(mixed_op, sample, [x, *weights])[0]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 4, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(input)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, block(input))


def test_export() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sample = find("affine-fixed")
            for name, tensor in zip(NAMES[1:], self.sample.tensors(torch.float32)[1:]):
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return call(mixed_op, self.sample, [x, *self.buffers()])[0]

    block = Block()
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height", min=3)
    input = torch.randn(2, 4, 5, 7)
    program = torch.export.export(block, (input,), dynamic_shapes=({0: batch, 2: height},))
    assert "nasfast.mixed_op" in program.graph_module.code
    larger = torch.randn(3, 4, 11, 7)
    assert torch.equal(program.module()(larger), block(larger))


@pytest.mark.parametrize("id", ["plain", "plain-fixed", "no-def-no-sep", "recompute"])
def test_flops_are_those_of_the_convolutions(id: str) -> None:
    sample = find(id)
    tensors = sample.tensors(torch.float32)
    require_grad(tensors)
    with FlopCounterMode(display=False) as ours:
        output, _ = call(mixed_op, sample, tensors)
    with FlopCounterMode(display=False) as convolutions:
        for weight in tensors[2:12]:
            if weight is not None and weight.dim() == 4:
                groups = sample.channels // weight.shape[1]
                F.conv2d(tensors[0], weight, padding=weight.shape[-1] // 2, groups=groups)
    assert ours.get_total_flops() == convolutions.get_total_flops() > 0
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * ours.get_total_flops()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("transform", ["grad", "jvp", "forward_ad", "grad of vmap", "vmap of grad"])
def test_transforms_differentiate_the_reference(transform: str, batch_norm: bool) -> None:
    """What registered ops cannot do in PyTorch is done, and not taken for zero."""
    sample = Sample("", size=(3, 4), batch_norm=batch_norm)
    tensors = sample.tensors()
    tangents = torch.randn(2, *tensors[2].shape, dtype=torch.float64)

    def results(function: Any) -> Any:
        def of(weight: Tensor) -> Tensor:
            return call(function, sample, [*tensors[:2], weight, *tensors[3:]])[0]

        if transform == "grad":
            return torch.func.grad(lambda weight: of(weight).square().sum())(tensors[2])
        if transform == "jvp":
            return torch.func.jvp(of, (tensors[2],), (tangents[0],))[1]
        if transform == "grad of vmap":
            return torch.func.grad(lambda weights: torch.vmap(of)(weights).square().sum())(tangents)
        if transform == "vmap of grad":
            return torch.vmap(torch.func.grad(lambda weight: of(weight).square().sum()))(tangents)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(of(forward_ad.make_dual(tensors[2], tangents[0]))).tangent

    torch.testing.assert_close(results(mixed_op), results(mixed_op_reference))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_batched_gradients() -> None:
    """One call for each element."""
    sample = Sample("", size=(3, 4))
    tensors = sample.tensors()
    images = torch.randn(3, *tensors[0].shape, dtype=torch.float64)
    outputs = torch.vmap(lambda x: call(mixed_op, sample, [x, *tensors[1:]])[0])(images)
    for image, output in zip(images, outputs):
        assert_close(output, call(mixed_op, sample, [image, *tensors[1:]])[0], torch.float64)
    leaves = require_grad(tensors)
    output, _ = call(mixed_op, sample, tensors)
    batched = torch.autograd.grad(output, leaves, images, True, is_grads_batched=True)
    for i, cotangent in enumerate(images):
        expected = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        torch.testing.assert_close([g[i] for g in batched], list(expected))


def test_the_dispatcher_sees_what_it_must() -> None:
    """A mode and inference mode get the same numbers, by the registered op or by its kernel."""
    sample = find("affine")
    tensors = sample.tensors(torch.float32)
    expected = call(mixed_op, sample, tensors)[0]
    running = torch.randn_like(expected)
    with FlopCounterMode(display=False):
        assert torch.equal(call(mixed_op, sample, tensors)[0], expected)
        assert_close(
            call(mixed_op, sample, tensors, into=running)[0], running + expected, torch.float32
        )
    with torch.inference_mode():
        assert torch.equal(call(mixed_op, sample, tensors)[0], expected)


ZEROS = torch.zeros
BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "integer": (
        {"input": ZEROS(2, 4, 6, 9, dtype=torch.int64)},
        "input must be of a float dtype, got torch.int64; convert it with input.float()",
    ),
    "dimensions": (
        {"input": ZEROS(4, 6, 9)},
        "input must be [N, C, H, W] with C, H and W above 0, got shape (4, 6, 9); reshape it (a "
        "single image is a batch of 1)",
    ),
    "empty image": (
        {"input": ZEROS(2, 4, 6, 0)},
        "input must be [N, C, H, W] with C, H and W above 0, got shape (2, 4, 6, 0); reshape it "
        "(a single image is a batch of 1)",
    ),
    "one value": (
        {"input": ZEROS(1, 4, 1, 1)},
        "input must be of more than one value per channel, to have a variance, got shape "
        "(1, 4, 1, 1); use larger images or batches, or batch_norm=False",
    ),
    "incomplete deformable": (
        {"offset_bias": None},
        "branches.offset_bias must be given together with deform, deform_bias, offset_weight, "
        "offset_bias, got None; give all of them or none",
    ),
    "incomplete separable": (
        {"depthwise1": None, "pointwise2": None},
        "branches.depthwise1 must be given together with depthwise1, pointwise1, depthwise2, "
        "pointwise2, got None; give all of them or none",
    ),
    "offset channels": (
        {"offset_weight": ZEROS(36, 4, 3, 3)},
        "branches.offset_weight must be of 27 * offset_groups output channels, offset_groups a "
        "divisor of 4, got 36; change the layer that predicts the offsets",
    ),
    "offset groups": (
        {"offset_weight": ZEROS(81, 4, 3, 3)},
        "branches.offset_weight must be of 27 * offset_groups output channels, offset_groups a "
        "divisor of 4, got 81; change the layer that predicts the offsets",
    ),
    "no offset channels": (
        {"offset_weight": ZEROS(0, 4, 3, 3)},
        "branches.offset_weight must be of 27 * offset_groups output channels, offset_groups a "
        "divisor of 4, got 0; change the layer that predicts the offsets",
    ),
    "factors": (
        {"factors": ZEROS(6)},
        "factors must be of shape (5,), got (6,); input has 4 channels",
    ),
    "scale": (
        {"scale": ZEROS(4, 4)},
        "scale must be of shape (5, 4), got (4, 4); input has 4 channels",
    ),
    "shift": (
        {"shift": ZEROS(5, 3)},
        "shift must be of shape (5, 4), got (5, 3); input has 4 channels",
    ),
    "dtype": (
        {"conv": ZEROS(4, 4, 3, 3, dtype=torch.float64)},
        "branches.conv must be of the dtype of input, torch.float32, got torch.float64; convert "
        "it to torch.float32",
    ),
    "dtype of factors": (
        {"factors": ZEROS(5, dtype=torch.bfloat16)},
        "factors must be of the dtype of input, torch.float32, got torch.bfloat16; convert it to "
        "torch.float32",
    ),
    "dtype beside half": (
        {"input": ZEROS(2, 4, 6, 9, dtype=torch.float16)},
        "branches.conv must be of the dtype of input, torch.float16, got torch.float32; convert "
        "it to torch.float16",
    ),
    "factors beside half": (
        {"input": ZEROS(2, 4, 6, 9).half(), "factors": ZEROS(5, dtype=torch.float64)},
        "factors must be of the dtype of input, torch.float16 (or torch.float32), got "
        "torch.float64; convert it to torch.float16",
    ),
    "device": (
        {"dil": ZEROS(4, 4, 3, 3, device="meta")},
        "branches.dil must be on the device of input, cpu, got meta; move it to cpu",
    ),
} | {
    name: (
        {name: ZEROS(1, 1)},
        f"branches.{name} must be of shape {shape}, got (1, 1); input has 4 channels",
    )
    for name, shape in {
        "conv": (4, 4, 3, 3),
        "dil": (4, 4, 3, 3),
        "deform": (4, 4, 3, 3),
        "deform_bias": (4,),
        "offset_bias": (54,),
        "depthwise1": (4, 1, 3, 3),
        "pointwise1": (4, 4, 1, 1),
        "depthwise2": (4, 1, 3, 3),
        "pointwise2": (4, 4, 1, 1),
    }.items()
}


@pytest.mark.parametrize("function", [mixed_op, mixed_op_reference])
@pytest.mark.parametrize(("change", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(function: Any, change: dict[str, Any], message: str) -> None:
    sample = Sample("")
    arguments = dict(zip(NAMES, sample.tensors(torch.float32))) | change
    with pytest.raises(ValueError) as error:
        call(function, sample, list(arguments.values()))
    assert str(error.value) == f"mixed_op: {message}"


@native
@pytest.mark.parametrize(
    ("into", "message"),
    [
        (ZEROS(2, 4, 6, 8), "of shape (2, 4, 6, 9), got (2, 4, 6, 8); input has 4 channels"),
        (
            ZEROS(2, 4, 6, 9, dtype=torch.float64),
            "of the dtype of input, torch.float32, got torch.float64; convert it to torch.float32",
        ),
    ],
    ids=["shape", "dtype"],
)
def test_bad_into(into: Tensor, message: str) -> None:
    sample = Sample("")
    with pytest.raises(ValueError) as error:
        call(mixed_op, sample, sample.tensors(torch.float32), into=into)
    assert str(error.value) == f"mixed_op: into must be {message}"


def test_into_is_not_the_input() -> None:
    sample = Sample("")
    tensors = sample.tensors(torch.float32)
    with pytest.raises(ValueError) as error:
        call(mixed_op, sample, tensors, into=tensors[0])
    assert str(error.value) == (
        "mixed_op: into must be another tensor than input, got input itself; pass input.clone()"
    )


def test_bad_gradient() -> None:
    tensors = Sample("").tensors(torch.float32)
    _, *kept = OP(*tensors, True, 1e-5, False)
    with pytest.raises(ValueError) as error:
        OP_BACKWARD(ZEROS(2, 4, 6, 8), *tensors, *kept, True, 1e-5, [True] * 14)
    assert str(error.value) == (
        "mixed_op: grad must be of shape (2, 4, 6, 9), got (2, 4, 6, 8); input has 4 channels"
    )


def cuda_forward_backward(sample: Sample, tensors: list[Tensor | None]) -> list[Tensor]:
    return forward_backward(sample, convert(tensors, "cuda"))


@pytest.mark.cuda
@every_sample
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cuda_equals_reference(sample: Sample, dtype: torch.dtype, deterministic: bool) -> None:
    """Output, statistics and every gradient, against those of the same numbers in float64."""
    sample = sample.in_dtype(dtype)
    tensors = sample.tensors(dtype)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = cuda_forward_backward(sample, tensors)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    for value, reference in zip(found, forward_backward(sample, convert(tensors, torch.float64))):
        assert_close(value.cpu(), reference, dtype, least=max(1.0, sample.batch * 4.0))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cuda_same_bits_in_every_run(dtype: torch.dtype) -> None:
    sample = Sample("", channels=20, size=(40, 60), recompute=True)
    tensors = sample.tensors(dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (cuda_forward_backward(sample, tensors) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in others for a, b in zip(first, run))


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", [False, True])
def test_cuda_graph(recompute: bool) -> None:
    """Captured on a stream of its own, without a synchronisation; replayed with other values."""
    sample = Sample("", channels=20, size=(20, 30), layout="channels_last", recompute=recompute)
    tensors = convert(sample.tensors(torch.float32), "cuda")
    forward_backward(sample, tensors)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = forward_backward(sample, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tensors[0].data.copy_(torch.randn_like(tensors[0]))
    graph.replay()
    for value, expected in zip(captured, forward_backward(sample, tensors)):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
def test_cuda_autocast() -> None:
    sample = find("affine")
    tensors = convert(sample.tensors(torch.float32), "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output, _ = call(mixed_op, sample, tensors)
    assert output.dtype == torch.bfloat16
    assert_close(output, call(mixed_op, sample, tensors)[0], torch.bfloat16)


def test_runs_without_the_extension() -> None:
    """Where ``nasfast._C`` cannot be imported, the op runs its reference and says so."""
    code = (
        "for sample in t.samples()[:4]:\n"
        "    t.check_against_reference(sample, torch.float64)\n"
        "t.test_autocast_leaves_float64_alone()\n"
        "t.test_autocast_casts_as_for_a_convolution()\n"
    )
    check_without_extension("mixed_op", code)
