"""deform_conv2d against its reference over drawn sizes, groups, strides and memory layouts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from op_harness import TOLERANCE, arrange
from test_deform_conv2d import Sample, require_grad
from torch import Tensor

from nasfast.ops import deform_conv2d, deform_conv2d_reference

# the same draws in every run; of the fixtures of conftest.py, once for all draws is enough
REPRODUCIBLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Slice(NamedTuple):
    """Layout of some channels of a wider channels-last tensor."""

    before: int  # channels
    after: int


Layout = str | Slice


class Case(NamedTuple):
    sample: Sample
    layouts: tuple[Layout, ...]  # of input, offset, weight, mask and cotangent
    dtype: torch.dtype
    single: bool  # offset and mask are float32, though the others may be of a half type
    on_pixels: bool  # whole offsets: positions on pixels and exactly on the borders
    seed: int

    def tensors(self) -> list[Tensor | None]:
        """input, offset, weight, bias, mask."""
        torch.manual_seed(self.seed)
        input, offset, weight, bias, mask = self.sample.tensors(self.dtype)
        if self.on_pixels and offset is not None:
            offset = offset.round()
        if self.single and self.dtype != torch.float64:
            offset, mask = (None if t is None else t.float() for t in (offset, mask))
        drawn = zip((input, offset, weight, mask), self.layouts)
        input, offset, weight, mask = (None if t is None else lay_out(t, to) for t, to in drawn)
        return [input, offset, weight, bias, mask]


def lay_out(tensor: Tensor, layout: Layout) -> Tensor:
    if isinstance(layout, Slice):
        n, c, h, w = tensor.shape
        wide = tensor.new_full((n, layout.before + c + layout.after, h, w), math.nan)
        part = wide.contiguous(memory_format=torch.channels_last)[:, layout.before :][:, :c]
        return part.copy_(tensor)
    if layout == "expanded":  # as the gradient of a sum is
        return tensor.flatten()[:1].sum().expand(tensor.shape)
    return arrange(tensor, layout)


@st.composite
def sizes(
    draw: st.DrawFn, most: int = 10, widths: tuple[int, ...] = (1, 2, 5, 8, 19, 33)
) -> Sample:
    """``most`` bounds height and width, ``widths`` are channels of a group."""

    def pair(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(least, most), st.integers(least, most))

    kernel, stride, padding, dilation = (
        draw(pair(1, 3)),
        draw(pair(1, 3)),
        draw(pair(0, 2)),
        draw(pair(1, 2)),
    )
    least = (max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation))
    height, width = (draw(st.integers(size, max(size, most))) for size in least)
    groups, offset_groups = draw(pair(1, 3))
    return Sample(
        "",
        batch=draw(st.sampled_from((1, 2, 3, 0))),
        channels=math.lcm(groups, offset_groups) * draw(st.sampled_from(widths)),
        out_channels=groups * draw(st.sampled_from(widths)),
        size=(height, width),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
        spread=draw(st.sampled_from((0.25, 2.0, 50.0))),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    slices = st.builds(Slice, st.sampled_from((0, 1, 18)), st.sampled_from((0, 3, 9)))
    layout = st.sampled_from(("contiguous", "channels_last", "strided")) | slices
    return Case(
        draw(sizes()),
        (*(draw(layout) for _ in range(4)), draw(layout | st.just("expanded"))),
        draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within the tolerance of ``dtype``, absolute in units of the largest value expected."""
    assert got.shape == expected.shape
    tolerance = dict(TOLERANCE[dtype])
    tolerance["atol"] *= max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected, **tolerance)


# what ``conv(x).split((18, 9), 1)`` of a channels_last convolution hands over
SPLIT = Case(
    Sample("", channels=8, out_channels=8, layout="contiguous"),
    ("channels_last", Slice(0, 9), "channels_last", Slice(18, 0), "channels_last"),
    torch.float32,
    False,
    False,
    0,
)


@settings(REPRODUCIBLE, max_examples=1500)
@example(SPLIT)
@example(SPLIT._replace(dtype=torch.bfloat16))
@given(cases())
def test_equals_reference(case: Case) -> None:
    """Output and every gradient, against autograd of the reference in float64."""
    tensors = case.tensors()
    doubles = [None if t is None else t.double() for t in tensors]
    leaves, double_leaves = require_grad(tensors), require_grad(doubles)
    output = deform_conv2d(*case.sample.arguments(tensors))
    expected = deform_conv2d_reference(*case.sample.arguments(doubles))
    assert output.dtype == case.dtype
    assert_close(output.detach(), expected.detach(), case.dtype)
    cotangent = lay_out(torch.randn(output.shape).to(case.dtype), case.layouts[-1])
    gradients = torch.autograd.grad(output, leaves, cotangent)
    references = torch.autograd.grad(expected, double_leaves, cotangent.double())
    for leaf, gradient, reference in zip(leaves, gradients, references):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, reference, case.dtype)


@settings(REPRODUCIBLE, max_examples=60)
@given(sizes(most=3, widths=(1, 2)), st.integers(0, 2**16))
def test_gradcheck(sample: Sample, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = sample.tensors()
    require_grad(tensors)
    assert torch.autograd.gradcheck(deform_conv2d, sample.arguments(tensors))
