"""mixed_op against its reference over drawn sizes, branches, settings and memory layouts."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_harness import arrange
from test_mixed_op import Sample, assert_close, call, convert, require_grad
from torch import Tensor

from nasfast.ops import mixed_op, mixed_op_reference
from nasfast.ops.mixed_op import FACTORS

# the same draws in every run; of the fixtures of conftest.py, once for all draws is enough
REPRODUCIBLE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LAYOUTS = ("contiguous", "channels_last", "strided")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    offset_groups = draw(st.sampled_from((1, 2, 3, 5)))
    batch = draw(st.sampled_from((0, 1, 2, 3, 5)))
    size = draw(st.tuples(*[st.integers(1, 14) | st.sampled_from((33, 70))] * 2))
    return Sample(
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
    )


def expand(tensor: Tensor) -> Tensor:
    """As the gradient of a sum is."""
    return tensor.flatten()[:1].sum().expand(tensor.shape)


@settings(REPRODUCIBLE, max_examples=250)
@given(samples(), st.sampled_from(DTYPES), st.sampled_from((*LAYOUTS, "expanded")), st.booleans())
def test_equals_reference(sample: Sample, dtype: torch.dtype, layout: str, into: bool) -> None:
    """Output and every gradient, against autograd of the reference in float64."""
    torch.manual_seed(0)
    few = sample.batch * sample.size[0] * sample.size[1] < 64 or sample.channels < 4
    if few and dtype != torch.float64:
        sample = replace(sample, batch_norm=False)  # what is left of few values is all rounding
    sample = sample.in_dtype(dtype)
    tensors = sample.tensors(dtype)
    doubles = convert(tensors, torch.float64)
    leaves, double_leaves = require_grad(tensors), require_grad(doubles)
    running = torch.randn_like(tensors[0]) if into else None
    expected, _ = call(mixed_op_reference, sample, doubles)
    if running is not None:
        expected = running.double() + expected
    output, _ = call(mixed_op, sample, tensors, into=running)
    assert output.dtype == dtype
    assert_close(output, expected, dtype)
    pixels = max(1, output.numel() // sample.channels)
    cotangent = torch.randn(output.shape).div(pixels**0.5).to(dtype)  # no overflow in float16
    cotangent = expand(cotangent) if layout == "expanded" else arrange(cotangent, layout)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    references = torch.autograd.grad(
        expected, double_leaves, cotangent.double(), materialize_grads=True
    )
    least = max(1.0, cotangent.double().norm().item())
    for leaf, gradient, reference in zip(leaves, gradients, references):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, reference, dtype, least=least)


@settings(REPRODUCIBLE, max_examples=40)
@given(samples())
def test_saved_and_recomputed_agree(sample: Sample) -> None:
    """To the last bit, and no matter whether gradients are expected at all."""
    torch.manual_seed(0)
    tensors = sample.tensors(torch.float32)
    plain, _ = call(mixed_op, sample, tensors)
    leaves = require_grad(tensors)
    found = []
    for recompute in (False, True):
        output, statistics = call(mixed_op, replace(sample, recompute=recompute), tensors)
        assert torch.equal(output, plain)
        found.append([statistics, *torch.autograd.grad(output.sin().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found))
