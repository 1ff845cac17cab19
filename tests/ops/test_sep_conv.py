"""sep_conv: its samples for the suite, and what is its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from op_harness import TOLERANCE, Differentiable, Op, Tensors, arrange
from torch import Tensor

from nasfast.ops import _eager, _native, sep_conv, sep_conv_reference


@dataclass(frozen=True)
class Sample(Differentiable):
    """Sizes of one call; ``tensors`` draws the arguments."""

    op = "sep_conv"
    names = ("input", "depthwise", "pointwise", "weight", "bias")
    exact: ClassVar[tuple[str, ...]] = ("depthwise", "pointwise", "weight", "bias")
    weight = 2
    vanishing = True

    batch: int = 2
    channels: int = 5
    size: tuple[int, int] = (6, 19)
    out_channels: int = 7
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    mean: float = 0.0
    layout: str = "channels_last"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        # maps far from zero are rounded by more than they vary in half precision
        return (torch.float64, torch.float32) if self.mean else tuple(TOLERANCE)

    def tensors(self, dtype: torch.dtype = torch.float64) -> Tensors:
        sums, taps = _native.accumulate(dtype), self.kernel[0] * self.kernel[1]
        input = torch.randn(self.batch, self.channels, *self.size) + self.mean
        depthwise = torch.randn(self.channels, 1, *self.kernel) / taps**0.5
        pointwise = torch.randn(self.out_channels, self.channels, 1, 1) / self.channels**0.5
        weight, bias = torch.randn(2, self.out_channels)
        parameters = (depthwise, pointwise, weight.clone(), bias.clone())
        return [arrange(input.to(dtype), self.layout), *(p.to(sums) for p in parameters)]

    def invoke(self, reference: bool, **named: Any) -> tuple[Tensor, ...]:
        function = sep_conv_reference if reference else sep_conv
        return function(**{"padding": self.padding, "dilation": self.dilation} | named)

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, self.padding, self.dilation, 1e-5)

    def backward_arguments(self, tensors: Tensors, wanted: list[bool]) -> tuple[Any, ...]:
        saved = torch.ops.nasfast.sep_conv(*self.arguments(tensors))[1:]
        return (*tensors, *(s.detach() for s in saved), *self.arguments(tensors)[5:], *wanted)

    def draw_cotangent(self, output: Tensor, expected: Tensor) -> Tensor:
        # where rounding decides which side of the ReLU an element is on, it takes no part
        return torch.randn_like(output).masked_fill((output > 0) != (expected > 0), 0)


def convolve(sample: Sample, tensors: Tensors) -> None:
    input, depthwise, pointwise, *_ = tensors
    settings = sample.padding, sample.dilation, sample.channels
    F.conv2d(F.conv2d(input, depthwise, None, 1, *settings), pointwise)


SAMPLES = [
    Sample("plain"),
    Sample("5x5", kernel=(5, 5), padding=(2, 2), size=(9, 12)),
    Sample("dilation-3", padding=(3, 3), dilation=(3, 3)),
    Sample("5x5-dilation-6", kernel=(5, 5), padding=(12, 12), dilation=(6, 6), size=(11, 23)),
    Sample("dilation-2-3", padding=(0, 2), dilation=(2, 3)),
    Sample("kernel-4x3", kernel=(4, 3), padding=(0, 2)),
    Sample("kernel-2x7", kernel=(2, 7), padding=(1, 3), dilation=(1, 2)),  # taps two at a time
    Sample("kernel-3x1", kernel=(3, 1), padding=(4, 0)),  # padding that no output needs
    Sample("kernel-1x3", kernel=(1, 3), padding=(0, 4)),
    Sample("far-taps", padding=(90, 90), dilation=(90, 90)),  # wider than the image
    Sample("wide", channels=87, out_channels=151, batch=1),  # every width of vector, panels
    Sample("deep", channels=290, out_channels=3, size=(4, 5)),  # several runs of the depth
    Sample("batch-33", batch=33, channels=2, size=(3, 4)),
    Sample("bands", batch=3, channels=4, size=(50, 83)),  # several partial sums, parts of rows
    Sample("far-mean", channels=16, size=(30, 40), padding=(0, 0), mean=30.0),
    Sample("one-pixel", batch=33, size=(1, 1), channels=16),
    Sample("contiguous", layout="contiguous"),
    Sample("strided", layout="strided"),
]


IMAGE, DEPTHWISE = torch.ones(2, 5, 6, 19), torch.ones(5, 1, 3, 3)
SMALL = Sample(
    "small", batch=1, channels=2, size=(3, 4), out_channels=3, padding=(1, 2), dilation=(1, 2)
)
SEP_CONV = Op(
    SAMPLES,
    few=["plain", "contiguous", "dilation-2-3", "strided"],
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
        "dimensions of pointwise": (
            {"pointwise": torch.ones(7, 5)},
            "pointwise of 4 dimensions, got shape (7, 5); reshape it (a single image is a batch of "
            "1)",
        ),
        "dtype": (
            {"depthwise": DEPTHWISE.double()},
            "depthwise of torch.float32 beside an input of torch.float32, got torch.float64; "
            "convert it with depthwise.to(torch.float32)",
        ),
        "device": (
            {"pointwise": torch.ones(7, 5, 1, 1, device="meta")},
            "pointwise on the device of input, cpu, got meta; move it with "
            "pointwise.to(input.device)",
        ),
        "channels": (
            {"depthwise": torch.ones(6, 1, 3, 3)},
            "depthwise of shape [5, 1, kh, kw], one kernel for each channel of input, got "
            "(6, 1, 3, 3); build the layer for the channels of its input",
        ),
        "channels of pointwise": (
            {"pointwise": torch.ones(7, 6, 1, 1)},
            "pointwise of shape [Co, 5, 1, 1], Co above 0, got (7, 6, 1, 1); build the layer for "
            "the channels of its input",
        ),
        "channels of the norm": (
            {"bias": torch.ones(5)},
            "bias of shape (7,), got (5,); it has one value per output channel of pointwise",
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
        "empty batch": (
            {"input": IMAGE[:0]},
            "input that gives at least 2 pixels a channel, got shape (0, 5, 6, 19), which gives 0; "
            "a single one has no variance: normalise it with running statistics",
        ),
        "one pixel": (
            {"input": IMAGE[:1, :, :1, :1]},
            "input that gives at least 2 pixels a channel, got shape (1, 5, 1, 1), which gives 1; "
            "a single one has no variance: normalise it with running statistics",
        ),
        "padding": ({"padding": -1}, "padding of at least 0, got (-1, -1); change it"),
        "dilation": ({"dilation": (1, 0)}, "dilation of at least 1, got (1, 0); change it"),
        "three": (
            {"padding": (1, 2, 3)},
            "padding as one integer or two (vertical, horizontal), got (1, 2, 3); pass two",
        ),
        "eps": ({"eps": -1.0}, "eps above 0, got -1.0; change it"),
    },
    parallel=["plain", "5x5-dilation-6", "wide", "bands"],
    drawn=st.tuples(
        st.builds(
            Sample,
            st.just("drawn"),
            st.integers(1, 3),
            st.integers(1, 40),
            st.tuples(st.integers(1, 20), st.integers(1, 20)),
            st.integers(1, 40),
            st.tuples(st.integers(1, 5), st.integers(1, 5)),
            st.just((9, 9)),
            st.tuples(st.integers(1, 4), st.integers(1, 4)),
        ),
        st.just(torch.float64),
    ),
    examples=40,
    gradcheck=[SMALL],
    gradgradcheck=[SMALL],
    # float32 rounds second derivatives by more than opcheck allows; gradgradcheck has them
    wanted=[([True], False), ([False], False)],
    bad_gradient=(
        "of shape (2, 7, 6, 19), got (2, 7, 6, 18); padding, dilation and pointwise decide it"
    ),
    convolutions=convolve,
)


def test_autocast_needs_a_dispatcher_only_to_cast() -> None:
    tensors = Sample("").tensors(torch.bfloat16)
    floats = Sample("").tensors(torch.float32)
    halves = [tensors[0], *(parameter.bfloat16() for parameter in tensors[1:])]
    with torch.autocast("cpu", torch.bfloat16):
        assert _eager.is_eager("sep_conv", tensors) == (_native.C is not None)
        assert not _eager.is_eager("sep_conv", floats)
        assert not _eager.is_eager("sep_conv", halves)
