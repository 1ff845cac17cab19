"""mixed_op: its samples for the suite, and what is its own."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_harness import (
    REPRODUCIBLE,
    TOLERANCE,
    Differentiable,
    Op,
    Tensors,
    arrange,
    native,
    require_grad,
)
from torch import Tensor

from nasfast.ops import Branches, mixed_op, mixed_op_reference
from nasfast.ops.mixed_op import FACTORS, MAPS

NORM_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.bfloat16: 8e-2,
    torch.float16: 8e-3,
}
"""Relative to the Euclidean norm."""
NAMES = ("input", "factors", *Branches._fields, "scale", "shift")
WEIGHTS = {  # of each branch, as slices of Branches._fields
    "conv3x3": slice(0, 1),
    "dil3x3": slice(1, 2),
    "def3x3": slice(2, 6),
    "sep3x3": slice(6, 10),
}


HALVES = (
    "plain",
    "affine-fixed",
    "recompute",
    "twenty-channels",
    "tiles",
    "three-rows",
    "batch-33",
)


@dataclass(frozen=True)
class Sample(Differentiable):
    """Sizes and settings of one call; ``tensors`` draws the arguments."""

    op = "mixed_op"
    names = NAMES
    exact: ClassVar[tuple[str, ...]] = ("factors", "deform_bias", "offset_bias", "scale", "shift")
    weight = 2
    alone_is_equal = False
    vanishing = True

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

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(TOLERANCE)[: 4 if self.id in HALVES else 2]

    def in_dtype(self, tolerance: torch.dtype) -> Sample:
        """The sample, decided where products are rounded, to half precision or tf32.

        Rounding takes values across the bend. Where d is its size in standard deviations of inner,
        a share of 0.8 d of the values is within it, and each such value has all of its gradient or
        none: an error of sqrt(0.8 d), 1 to 3 % in tf32 (d = 2^-11 to 2^-10), whatever computes it.
        """
        half = tolerance in (torch.bfloat16, torch.float16)
        return replace(self, decided=True, shift=True) if half else self

    def tensors(self, dtype: torch.dtype = torch.float64) -> Tensors:
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
        weights: Tensors = list(branches)
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

    def invoke(self, reference: bool, **named: Any) -> tuple[Tensor, Tensor]:
        branches = Branches(*(named.pop(name) for name in Branches._fields))
        options = {"batch_norm": self.batch_norm} | named
        if reference:
            return mixed_op_reference(branches=branches, **options)
        return mixed_op(branches=branches, recompute=self.recompute, **options)

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, self.batch_norm, 1e-5, self.recompute)

    def backward_arguments(self, tensors: Tensors, wanted: list[bool]) -> tuple[Any, ...]:
        _, *kept = torch.ops.nasfast.mixed_op.default(*self.arguments(tensors))
        return (*tensors, *kept, self.batch_norm, 1e-5, wanted)

    def draw_cotangent(self, output: Tensor, expected: Tensor) -> Tensor:
        pixels = max(1, output.numel() // self.channels)
        cotangent = torch.randn_like(output) / pixels**0.5  # no overflow in float16
        return arrange(cotangent, self.cotangent)

    def assert_close(
        self, got: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "", least: float = 1.0
    ) -> None:
        """Within the tolerance of ``dtype``, of the norm expected or of ``least``."""
        assert got.shape == expected.shape, what
        error = (got.double() - expected.double()).norm().item()
        norm = max(least, expected.double().norm().item())
        assert error <= NORM_TOLERANCE[dtype] * norm, f"{what}: error of {error}, norm of {norm}"

    def check_on(self, device: str, dtype: torch.dtype, tolerance: torch.dtype) -> None:
        scratch = importlib.import_module("nasfast.ops.mixed_op")._scratch_of_thread
        scratch.memory.fill_(255)  # NaN
        Differentiable.check_on(self.in_dtype(tolerance), device, dtype, tolerance)


AFFINE: dict[str, Any] = {"scale": True, "shift": True}
FIXED: dict[str, Any] = {"batch_norm": False}
SAMPLES = [
    Sample("plain"),
    Sample("plain-fixed", **FIXED),
    Sample("affine", **AFFINE),
    Sample("affine-fixed", **AFFINE, **FIXED),
    Sample("scale", scale=True),
    Sample("shift-fixed", shift=True, **FIXED),
    Sample("recompute", channels=10, size=(7, 5), recompute=True, **AFFINE),
    Sample("recompute-fixed", channels=10, size=(7, 5), recompute=True, **AFFINE, **FIXED),
    Sample("two-channels", channels=2, size=(5, 12)),
    Sample("one-channel", channels=1, offset_groups=1, size=(5, 12), **AFFINE),
    Sample("six-channels", channels=6, offset_groups=1, size=(8, 5), **AFFINE, **FIXED),
    Sample("ten-channels", channels=10, offset_groups=5, size=(9, 13)),
    Sample("twenty-channels", channels=20, size=(11, 14), layout="channels_last"),
    Sample("forty-channels", channels=40, size=(13, 10), layout="channels_last", **AFFINE),
    Sample("seventy-channels", batch=1, channels=70, offset_groups=5, size=(7, 9)),
    Sample("seventy-fixed", batch=1, channels=70, offset_groups=1, size=(7, 9), **FIXED),
    Sample("low", channels=6, size=(1, 23)),
    Sample("low-fixed", channels=6, size=(1, 23), **AFFINE, **FIXED),
    Sample("narrow", channels=6, size=(23, 1)),
    Sample("two-rows", channels=6, size=(2, 19), recompute=True),
    Sample("three-rows", channels=10, size=(3, 17)),
    Sample("one-pixel", batch=5, size=(1, 1)),
    Sample("one-value-fixed", batch=1, size=(1, 1), **FIXED),
    Sample("tiles", batch=1, channels=10, size=(29, 41), layout="channels_last"),
    Sample("tiles-fixed", batch=3, channels=6, size=(26, 31), **AFFINE, **FIXED),
    Sample("wide", batch=1, channels=4, size=(4, 210)),
    Sample("batch-0", batch=0, **AFFINE),
    Sample("batch-1", batch=1),
    Sample("batch-33", batch=33, channels=2, size=(3, 4)),
    Sample("batch-33-fixed", batch=33, channels=2, size=(3, 4), **FIXED),
    Sample("far", size=(11, 13), spread=15.0),
    Sample("strided", layout="strided", **AFFINE),
    Sample("no-skip", without=("skip",), recompute=True),
    Sample("only-def", channels=10, without=("conv3x3", "dil3x3", "sep3x3", "skip")),
    Sample("no-def-no-sep", channels=10, without=("def3x3", "sep3x3"), recompute=True),
]


LAYOUTS = ("contiguous", "channels_last", "strided")


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Sample, torch.dtype]:
    offset_groups = draw(st.sampled_from((1, 2, 3, 5)))
    batch = draw(st.sampled_from((0, 1, 2, 3, 5)))
    size = draw(st.tuples(*[st.integers(1, 14) | st.sampled_from((33, 70))] * 2))
    sample = Sample(
        "",
        batch=batch,
        channels=offset_groups * draw(st.sampled_from((1, 2, 3, 4, 8, 17))),
        size=size,
        offset_groups=offset_groups,
        without=tuple(draw(st.sets(st.sampled_from(FACTORS)))),
        scale=draw(st.booleans()),
        shift=draw(st.booleans()),
        batch_norm=draw(st.booleans()) and batch * size[0] * size[1] != 1,
        recompute=draw(st.booleans()),
        spread=draw(st.sampled_from((0.125, 1.0, 15.0))),
        layout=draw(st.sampled_from(LAYOUTS)),
        cotangent=draw(st.sampled_from((*LAYOUTS, "expanded"))),
    )
    dtype = draw(st.sampled_from([*TOLERANCE]))
    few = sample.batch * math.prod(size) < 64 or sample.channels < 4
    if few and dtype != torch.float64:
        sample = replace(sample, batch_norm=False)  # what is left of few values is all rounding
    return sample, dtype


ZEROS = torch.zeros
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "integer": (
        {"input": ZEROS(2, 4, 6, 9, dtype=torch.int64)},
        "input of a float dtype, got torch.int64; convert it with input.float()",
    ),
    "dimensions": (
        {"input": ZEROS(4, 6, 9)},
        "input of shape [N, C, H, W] with C, H and W above 0, got (4, 6, 9); reshape it (a "
        "single image is a batch of 1)",
    ),
    "empty image": (
        {"input": ZEROS(2, 4, 6, 0)},
        "input of shape [N, C, H, W] with C, H and W above 0, got (2, 4, 6, 0); reshape it "
        "(a single image is a batch of 1)",
    ),
    "one value": (
        {"input": ZEROS(1, 4, 1, 1)},
        "input of more than one value per channel, to have a variance, got shape "
        "(1, 4, 1, 1); use larger images or batches, or batch_norm=False",
    ),
    "incomplete deformable": (
        {"offset_bias": None},
        "branches.offset_bias together with deform, deform_bias, offset_weight, "
        "offset_bias, got None; give all of them or none",
    ),
    "incomplete separable": (
        {"depthwise1": None, "pointwise2": None},
        "branches.depthwise1 together with depthwise1, pointwise1, depthwise2, "
        "pointwise2, got None; give all of them or none",
    ),
    "offset channels": (
        {"offset_weight": ZEROS(36, 4, 3, 3)},
        "branches.offset_weight of 27 * offset_groups output channels, offset_groups a "
        "divisor of 4, got 36; change the layer that predicts the offsets",
    ),
    "offset groups": (
        {"offset_weight": ZEROS(81, 4, 3, 3)},
        "branches.offset_weight of 27 * offset_groups output channels, offset_groups a "
        "divisor of 4, got 81; change the layer that predicts the offsets",
    ),
    "no offset channels": (
        {"offset_weight": ZEROS(0, 4, 3, 3)},
        "branches.offset_weight of 27 * offset_groups output channels, offset_groups a "
        "divisor of 4, got 0; change the layer that predicts the offsets",
    ),
    "factors": ({"factors": ZEROS(6)}, "factors of shape (5,), got (6,); input has 4 channels"),
    "scale": ({"scale": ZEROS(4, 4)}, "scale of shape (5, 4), got (4, 4); input has 4 channels"),
    "shift": ({"shift": ZEROS(5, 3)}, "shift of shape (5, 4), got (5, 3); input has 4 channels"),
    "dtype": (
        {"conv": ZEROS(4, 4, 3, 3, dtype=torch.float64)},
        "branches.conv of the dtype of input, torch.float32, got torch.float64; convert "
        "it with branches.conv.to(input.dtype)",
    ),
    "dtype of factors": (
        {"factors": ZEROS(5, dtype=torch.bfloat16)},
        "factors of the dtype of input, torch.float32, got torch.bfloat16; convert it "
        "with factors.to(input.dtype)",
    ),
    "dtype beside half": (
        {"input": ZEROS(2, 4, 6, 9, dtype=torch.float16)},
        "branches.conv of the dtype of input, torch.float16, got torch.float32; convert "
        "it with branches.conv.to(input.dtype)",
    ),
    "factors beside half": (
        {"input": ZEROS(2, 4, 6, 9).half(), "factors": ZEROS(5, dtype=torch.float64)},
        "factors of the dtype of input, torch.float16 (or torch.float32), got "
        "torch.float64; convert it with factors.to(input.dtype)",
    ),
    "device": (
        {"dil": ZEROS(4, 4, 3, 3, device="meta")},
        "branches.dil on the device of input, cpu, got meta; move it with "
        "branches.dil.to(input.device)",
    ),
} | {
    name: (
        {name: ZEROS(1, 1)},
        f"branches.{name} of shape {shape}, got (1, 1); input has 4 channels",
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


def convolve(sample: Sample, tensors: Tensors) -> None:
    for weight in tensors[2:12]:
        if weight is not None and weight.dim() == 4:
            groups = sample.channels // weight.shape[1]
            F.conv2d(tensors[0], weight, padding=weight.shape[-1] // 2, groups=groups)


# batch norm of few values has derivatives of any size: the maps are not tiny
SMALL = Sample("small", batch=1, channels=2, size=(3, 4), **AFFINE)
LARGE = Sample("large", batch=4, channels=20, size=(96, 100), layout="channels_last")
MIXED_OP = Op(
    SAMPLES,
    few=[
        *("affine", "affine-fixed", "recompute", "plain-fixed", "no-skip", "shift-fixed"),
        *("batch-0", "strided", "no-def-no-sep", "forty-channels"),
    ],
    errors=ERRORS,
    parallel=[
        *("affine", "affine-fixed", "recompute", "twenty-channels", "tiles", "tiles-fixed"),
        "batch-33",
    ],
    drawn=drawn(),
    examples=250,
    gradcheck=[
        replace(SMALL, id=f"small-{norm}-{recompute}", batch_norm=norm, recompute=recompute)
        for norm in (True, False)
        for recompute in (True, False)
    ],
    gradgradcheck=[
        replace(SMALL, id=f"tiny-{norm}", offset_groups=1, size=(2, 3), batch_norm=norm)
        for norm in (True, False)
    ],
    wanted=[([True] * 14, False), ([i % 3 == 0 for i in range(14)], False)],
    bad_gradient="of shape (2, 4, 6, 9), got (2, 4, 6, 8); input has 4 channels",
    convolutions=convolve,
    large=[
        LARGE,
        replace(LARGE, id="large-recompute", recompute=True),
        replace(LARGE, id="large-fixed", batch_norm=False),
        replace(LARGE, id="large-10", channels=10, size=(160, 150)),
        replace(LARGE, id="large-40", channels=40),
        replace(LARGE, id="large-80", channels=80, offset_groups=4, size=(64, 64)),
        replace(LARGE, id="large-ragged", channels=26, size=(129, 65)),
    ],
)


def find(id: str) -> Sample:
    return next(sample for sample in SAMPLES if sample.id == id)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.usefixtures("poison_empty")
def test_every_combination_of_branches(batch_norm: bool, recompute: bool) -> None:
    options: dict[str, Any] = {"batch_norm": batch_norm, "recompute": recompute}
    for count in range(6):
        for without in itertools.combinations(FACTORS, count):
            affine = "conv3x3" in without
            Sample("", without=without, size=(5, 7), scale=affine, shift=affine, **options).check(
                torch.float64
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
    sample.assert_close(output, expected, torch.float64)


def test_factor_zero_leaves_skip_out() -> None:
    """Even where the input is not finite; its gradient is there all the same."""
    sample = Sample("", without=(*FACTORS,))
    tensors = sample.tensors(torch.float32)
    tensors[0][0, 1, 2, 3] = torch.inf
    factors = tensors[1].requires_grad_()
    output, _ = replace(sample, batch_norm=False).call(tensors)
    assert output.eq(0).all()
    tensors[0][0, 1, 2, 3] = 1
    output, _ = sample.call(tensors)
    (gradient,) = torch.autograd.grad(output.sum(), factors)
    torch.testing.assert_close(gradient[4], tensors[0].sum())


def test_eps() -> None:
    sample = Sample("", scale=True)
    tensors = sample.tensors()
    for eps in (0.0, 1e-3, 10.0):
        named = dict(zip(NAMES, tensors)) | {"eps": eps}
        output, expected = sample.invoke(False, **named)[0], sample.invoke(True, **named)[0]
        sample.assert_close(output, expected, torch.float64)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_recomputed_gradients_are_the_same_bits(sample: Sample) -> None:
    check_recomputed(sample)


@settings(REPRODUCIBLE, max_examples=40)
@given(drawn())
def test_saved_and_recomputed_agree(case: tuple[Sample, torch.dtype]) -> None:
    torch.manual_seed(0)
    check_recomputed(case[0])


def check_recomputed(sample: Sample) -> None:
    """To the last bit, and no matter whether gradients are expected at all."""
    tensors = sample.tensors(torch.float32)
    plain, _ = sample.call(tensors)
    saved, computed = (
        replace(sample, recompute=recompute).forward_backward(tensors)
        for recompute in (False, True)
    )
    assert torch.equal(saved[0], plain)
    assert all(torch.equal(a, b) for a, b in zip(saved, computed))


@pytest.mark.parametrize("reference", [False, True], ids=["op", "reference"])
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.usefixtures("poison_empty")
def test_offset_without_position(reference: bool, batch_norm: bool, value: float) -> None:
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
    output, _ = sample.call(expected)
    bias[8] = value  # y of tap 4
    leaves = require_grad(tensors)
    got, _ = sample.call(tensors, reference)
    sample.assert_close(got, output, torch.float32)
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
        for result in sample.forward_backward(tensors):
            assert result.numel()


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
