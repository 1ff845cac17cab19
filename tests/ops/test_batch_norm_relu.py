"""batch_norm_relu: its samples for the suite, and what is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from op_harness import Differentiable, Op, Tensors, arrange
from torch import Tensor, nn

from nasfast.ops import _eager, _native, batch_norm_relu, batch_norm_relu_reference


@dataclass(frozen=True)
class Sample(Differentiable):
    """Sizes of one call; ``tensors`` draws the arguments."""

    op = "batch_norm_relu"
    names = ("input", "weight", "bias")
    weight = 1

    batch: int = 2
    channels: int = 5
    size: tuple[int, int] = (6, 9)
    mean: float = 1.0
    layout: str = "channels_last"

    def tensors(self, dtype: torch.dtype = torch.float64) -> Tensors:
        input = torch.randn(self.batch, self.channels, *self.size) * 2 + self.mean
        weight, bias = torch.randn(2, self.channels, dtype=_native.accumulate(dtype))
        return [arrange(input.to(dtype), self.layout), weight.clone(), bias.clone()]

    def invoke(self, reference: bool, **named: Any) -> tuple[Tensor, ...]:
        return (batch_norm_relu_reference if reference else batch_norm_relu)(**named)

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, 1e-5)

    def backward_arguments(self, tensors: Tensors, wanted: list[bool]) -> tuple[Any, ...]:
        return (*tensors, self.call(tensors)[1], 1e-5)

    def draw_cotangent(self, output: Tensor, expected: Tensor) -> Tensor:
        # where rounding decides which side of the ReLU an element is on, it takes no part
        return torch.randn_like(output).masked_fill((output > 0) != (expected > 0), 0)


SAMPLES = [
    Sample("plain"),
    Sample("two-pixels", batch=2, size=(1, 1)),
    Sample("batch-33", batch=33, channels=2, size=(3, 4)),
    Sample("wide", channels=87, batch=1),  # every width of vector
    Sample("chunks", channels=48, size=(23, 37)),
    Sample("far-mean", channels=16, size=(30, 40), mean=300.0),
    Sample("many-channels", channels=9000, batch=1, size=(2, 3)),
    Sample("contiguous", layout="contiguous"),
    Sample("strided", layout="strided"),
]


BATCH_NORM_RELU = Op(
    SAMPLES,
    few=["plain", "contiguous", "strided", "batch-33"],
    errors={
        "integer": (
            {"input": torch.ones(2, 5, 6, 9).int()},
            "input of a float dtype, got torch.int32; convert it with input.float()",
        ),
        "dimensions": (
            {"input": torch.ones(5, 6, 9)},
            "input of 4 dimensions, got shape (5, 6, 9); reshape it (a single image is a batch of "
            "1)",
        ),
        "one pixel": (
            {"input": torch.ones(1, 5, 1, 1)},
            "input of at least 2 pixels a channel, got shape (1, 5, 1, 1); a single one has no "
            "variance: normalise it with running statistics",
        ),
        "channels": (
            {"weight": torch.ones(2)},
            "weight of shape (5,), got (2,); it has one value per channel of input",
        ),
        "dtype": (
            {"input": torch.ones(2, 5, 6, 9).bfloat16(), "bias": torch.ones(5).bfloat16()},
            "bias of torch.float32 beside an input of torch.bfloat16, got torch.bfloat16; convert "
            "it with bias.to(torch.float32)",
        ),
        "device": (
            {"weight": torch.ones(5, device="meta")},
            "weight on the device of input, cpu, got meta; move it with weight.to(input.device)",
        ),
        "eps": ({"eps": -1.0}, "eps above 0, got -1.0; change it"),
    },
    parallel=["wide", "chunks"],
    drawn=st.tuples(
        st.builds(
            Sample,
            st.just("drawn"),
            st.integers(2, 5),
            st.integers(1, 70),
            st.tuples(st.integers(1, 20), st.integers(1, 20)),
        ),
        st.just(torch.float64),
    ),
    examples=40,
    gradcheck=[Sample("small", channels=2, size=(3, 2))],
    gradgradcheck=[Sample("small", channels=2, size=(3, 2))],
    wanted=[([True] * 3, True)],
    bad_gradient=(
        "like input, torch.float32 of shape (2, 5, 6, 9), got torch.float32 of shape (2, 5, 6, 8); "
        "convert it"
    ),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_normalisation_and_relu(dtype: torch.dtype) -> None:
    """The same as the modules, to the last rounding but one."""
    input, weight, bias = Sample("", size=(20, 30)).tensors(dtype)
    output, statistics = batch_norm_relu(input, weight, bias)
    expected = F.relu(F.batch_norm(input, None, None, weight, bias, training=True))
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-5)
    norm = nn.BatchNorm2d(5, momentum=1.0)
    norm(input.float())
    torch.testing.assert_close(statistics[0], norm.running_mean)
    torch.testing.assert_close(statistics[1] * 1200 / 1199, norm.running_var)


@pytest.mark.parametrize("function", [batch_norm_relu, batch_norm_relu_reference])
def test_not_a_number_stays_one(function: Any) -> None:
    input, weight, bias = Sample("").tensors(torch.float32)
    with torch.no_grad():
        input[0, 1, 2, 3] = float("nan")
    output, _ = function(input, weight, bias)
    assert output.isnan().all((0, 2, 3)).tolist() == [False, True, False, False, False]
    assert output[:, 0].isfinite().all()


def test_autocast_leaves_it_alone() -> None:
    """As it leaves batch normalisation alone: the input's dtype decides."""
    tensors = Sample("").tensors(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = batch_norm_relu(*tensors)
        floats, _ = batch_norm_relu(tensors[0].float(), *tensors[1:])
    assert torch.equal(output, batch_norm_relu(*tensors)[0])
    assert floats.dtype == torch.float32


def test_autocast_needs_no_dispatcher() -> None:
    """It converts none of the tensors, so that the kernel is called as it is without."""
    tensors = Sample("").tensors(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert _eager.is_eager("batch_norm_relu", tensors) == (_native.C is not None)


@pytest.mark.cuda
def test_on_cuda_it_is_the_reference() -> None:
    assert _native.BACKENDS["batch_norm_relu"]["cuda"] == "cuDNN and a ReLU"
    Sample("").check_on("cuda", torch.float32, torch.float32)
