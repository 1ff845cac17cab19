"""depthwise_conv2d: its samples for the suite, and what is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from op_harness import TOLERANCE, Differentiable, Op, Tensors, arrange
from torch import Tensor

from nasfast.ops import _native, depthwise_conv2d, depthwise_conv2d_reference


@dataclass(frozen=True)
class Sample(Differentiable):
    """Sizes of one call; ``tensors`` draws the arguments."""

    op = "depthwise_conv2d"
    names = ("input", "weight")
    exact: ClassVar[tuple[str, ...]] = ()
    weight = 1

    batch: int = 2
    channels: int = 5
    size: tuple[int, int] = (6, 19)
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    layout: str = "channels_last"

    def tensors(self, dtype: torch.dtype = torch.float64) -> Tensors:
        input = torch.randn(self.batch, self.channels, *self.size)
        weight = torch.randn(self.channels, 1, *self.kernel)
        return [arrange(tensor.to(dtype), self.layout) for tensor in (input, weight)]

    def invoke(self, reference: bool, **named: Any) -> tuple[Tensor, ...]:
        function = depthwise_conv2d_reference if reference else depthwise_conv2d
        return (function(**{"padding": self.padding, "dilation": self.dilation} | named),)

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, self.padding, self.dilation)

    def backward_arguments(self, tensors: Tensors, wanted: list[bool]) -> tuple[Any, ...]:
        return (*tensors, self.padding, self.dilation, wanted)


def convolve(sample: Sample, tensors: Tensors) -> None:
    F.conv2d(*tensors, None, 1, sample.padding, sample.dilation, groups=sample.channels)


SAMPLES = [
    Sample("plain"),
    Sample("5x5", kernel=(5, 5), padding=(2, 2), size=(9, 12)),
    Sample("dilation-3", padding=(3, 3), dilation=(3, 3)),
    Sample("5x5-dilation-6", kernel=(5, 5), padding=(12, 12), dilation=(6, 6), size=(11, 23)),
    Sample("dilation-2-3", padding=(0, 2), dilation=(2, 3)),
    Sample("kernel-4x3", kernel=(4, 3), padding=(0, 2)),
    Sample("kernel-3x1", kernel=(3, 1), padding=(4, 0)),  # padding that no output needs
    Sample("kernel-2x7", kernel=(2, 7), padding=(1, 3)),
    Sample("wide", channels=87, batch=1),  # every width of vector
    Sample("batch-0", batch=0),
    Sample("batch-33", batch=33, channels=2, size=(3, 4)),
    Sample("bands", batch=1, size=(37, 5)),  # several partial sums
    Sample("one-pixel", size=(1, 1)),
    Sample("contiguous", layout="contiguous"),
    Sample("strided", layout="strided"),
]


IMAGE, WEIGHT = torch.ones(2, 5, 6, 19), torch.ones(5, 1, 3, 3)
SMALL = Sample("small", batch=1, channels=2, size=(3, 4), padding=(1, 2), dilation=(1, 2))
DEPTHWISE_CONV2D = Op(
    SAMPLES,
    few=["plain", "contiguous", "dilation-2-3", "batch-0", "strided"],
    errors={
        "integer": (
            {"input": IMAGE.int()},
            "input of a float dtype, got torch.int32; convert it with input.float()",
        ),
        "dimensions": (
            {"input": IMAGE[0]},
            "input of 4 dimensions, got shape (5, 6, 19); reshape it (a single image is a batch of "
            "1)",
        ),
        "dtype": (
            {"weight": WEIGHT.double()},
            "weight of the dtype of input, torch.float32, got torch.float64; convert it with "
            "weight.to(input.dtype)",
        ),
        "device": (
            {"weight": WEIGHT.to("meta")},
            "weight on the device of input, cpu, got meta; move it with weight.to(input.device)",
        ),
        "channels": (
            {"weight": torch.ones(6, 1, 3, 3)},
            "weight of shape [5, 1, kh, kw], one kernel for each channel of input, got "
            "(6, 1, 3, 3); build the layer for the channels of its input",
        ),
        "small image": (
            {"dilation": (6, 1)},
            "input as large as the dilated kernel 3x3, got 6x19, which gives an output of -4x19; "
            "enlarge the image or the padding",
        ),
        "empty image": (
            {"input": IMAGE[..., :0]},
            "input of sizes above 0, got shape (2, 5, 6, 0); pass an image",
        ),
        "padding": ({"padding": -1}, "padding of at least 0, got (-1, -1); change it"),
        "dilation": ({"dilation": (1, 0)}, "dilation of at least 1, got (1, 0); change it"),
        "three": (
            {"padding": (1, 2, 3)},
            "padding as one integer or two (vertical, horizontal), got (1, 2, 3); pass two",
        ),
        "not an integer": (
            {"dilation": 1.5},
            "dilation as one integer or two (vertical, horizontal), got 1.5; pass two",
        ),
    },
    parallel=["plain", "5x5-dilation-6", "wide", "bands"],
    drawn=st.tuples(
        st.builds(
            Sample,
            st.just("drawn"),
            st.integers(1, 3),
            st.integers(1, 40),
            st.tuples(st.integers(1, 20), st.integers(1, 20)),
            st.tuples(st.integers(1, 5), st.integers(1, 5)),
            st.just((9, 9)),
            st.tuples(st.integers(1, 4), st.integers(1, 4)),
        ),
        st.just(torch.float64),
    ),
    examples=60,
    gradcheck=[SMALL],
    gradgradcheck=[SMALL],
    wanted=[([True, True], True), ([True, False], True), ([False, True], True)],
    bad_gradient=(
        "of shape (2, 5, 6, 19), got (2, 5, 6, 18); padding and dilation decide the height and "
        "width"
    ),
    convolutions=convolve,
)


@pytest.mark.parametrize("function", [depthwise_conv2d, depthwise_conv2d_reference])
def test_by_hand(function: Any) -> None:
    image = torch.arange(1.0, 5).view(1, 1, 2, 2)
    weight = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).view(1, 1, 2, 2)
    assert function(image, weight).flatten().tolist() == [4321]
    corners = function(image, weight, 1, 2).flatten().tolist()  # each reads one corner
    assert corners == [4000, 300, 20, 1]


@pytest.mark.cuda
def test_on_cuda_it_is_the_reference() -> None:
    assert _native.BACKENDS["depthwise_conv2d"]["cuda"] == "cuDNN"
    tensors = [t.cuda().requires_grad_() for t in Sample("").tensors(torch.float32)]
    with torch.autocast("cuda", torch.bfloat16):
        output = depthwise_conv2d(*tensors, 1)
    assert output.dtype == torch.bfloat16
    expected = F.conv2d(*(t.bfloat16() for t in tensors), padding=1, groups=5)
    torch.testing.assert_close(output, expected, **TOLERANCE[torch.bfloat16])
    assert [g.dtype for g in torch.autograd.grad(output.sum(), tensors)] == [torch.float32] * 2
