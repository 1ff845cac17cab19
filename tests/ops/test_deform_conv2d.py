"""deform_conv2d: its samples for the suite, and what is its own."""

from __future__ import annotations

import importlib
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
    Slice,
    Tensors,
    arrange,
    lay_out,
    native,
    require_grad,
)
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from nasfast.ops import DeformConv2d, _eager, _native, deform_conv2d, deform_conv2d_reference


@dataclass(frozen=True)
class Sample(Differentiable):
    """Sizes of one call; ``tensors`` draws the arguments."""

    op = "deform_conv2d"
    names = ("input", "offset", "weight", "bias", "mask")
    exact: ClassVar[tuple[str, ...]] = ("offset", "mask")  # under autocast
    weight = 2

    batch: int = 2
    channels: int = 4
    out_channels: int = 3
    size: tuple[int, int] = (6, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True
    spread: float = 2.0  # standard deviation of the offsets, pixels
    layout: str = "contiguous"
    layouts: tuple[str | Slice, ...] = ()  # of input, offset, weight and mask, if they differ
    single: bool = False  # offset and mask are float32, though the others may be of a half type
    on_pixels: bool = False  # whole offsets: positions on pixels and exactly on the borders

    def tensors(self, dtype: torch.dtype = torch.float64) -> Tensors:
        taps = self.kernel[0] * self.kernel[1] * self.offset_groups
        out = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride
            )
        ]
        # odd 64ths of the spread: no sample lies near a pixel, where the gradient jumps
        odd = torch.randn(self.batch, 2 * taps, *out).mul(32).floor().mul(2).add(1)
        offset = odd * (self.spread / 64)
        positions = torch.float32 if self.single and dtype != torch.float64 else dtype
        input, weight, offset, mask = (
            torch.randn(self.batch, self.channels, *self.size).to(dtype),
            torch.randn(self.out_channels, self.channels // self.groups, *self.kernel).to(dtype),
            (offset.round() if self.on_pixels else offset).to(positions),
            torch.rand(self.batch, taps, *out).to(positions),
        )
        bias = arrange(torch.randn(self.out_channels).to(dtype), self.layout)
        maps = zip((input, offset, weight, mask), self.layouts or (self.layout,) * 4)
        input, offset, weight, mask = (lay_out(tensor, layout) for tensor, layout in maps)
        return [input, offset, weight, bias if self.bias else None, mask if self.mask else None]

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def invoke(self, reference: bool, **named: Any) -> tuple[Tensor, ...]:
        function = deform_conv2d_reference if reference else deform_conv2d
        return (function(**self.sizes | named),)

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors[:4], *self.sizes.values(), tensors[4])

    def backward_arguments(self, tensors: Tensors, wanted: list[bool]) -> tuple[Any, ...]:
        input, offset, weight, _, mask = tensors
        return (input, offset, weight, mask, *self.sizes.values(), wanted)


SAMPLES = [
    Sample("plain"),
    Sample("no-mask-no-bias", mask=False, bias=False),
    Sample("stride-2-1", stride=(2, 1), padding=(0, 2)),
    Sample("kernel-1x3", kernel=(1, 3), padding=(0, 1)),
    Sample("dilation", size=(9, 8), dilation=(2, 3), padding=(2, 1)),
    Sample("groups-2", channels=6, out_channels=4, groups=2),
    Sample("groups-3-offset-groups-2", channels=12, out_channels=6, groups=3, offset_groups=2),
    Sample("wide", batch=1, channels=70, out_channels=37, offset_groups=2, size=(5, 9)),
    Sample("batch-0", batch=0),
    Sample("batch-33", batch=33, channels=2, size=(3, 4)),
    Sample("one-pixel", size=(1, 1)),
    Sample("far", spread=50.0),
    Sample("strided", layout="strided"),
    Sample("channels-last", layout="channels_last", out_channels=5),
    # backward of many tiles; in several rounds and by several streams of images; weights that are
    # large enough for large tiles
    Sample("tiles", batch=3, channels=8, size=(50, 60), layout="channels_last"),
    Sample("rounds", batch=3, channels=40, size=(50, 60), layout="channels_last"),
    Sample("large-weight", batch=1, channels=200, out_channels=150, size=(17, 12)),
    Sample("many-offset-groups", channels=48, offset_groups=24, size=(7, 11)),
]


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
def drawn(draw: st.DrawFn) -> tuple[Sample, torch.dtype]:
    slices = st.builds(Slice, st.sampled_from((0, 1, 18)), st.sampled_from((0, 3, 9)))
    layout = st.sampled_from(("contiguous", "channels_last", "strided")) | slices
    sample = replace(
        draw(sizes()),
        layouts=tuple(draw(layout) for _ in range(4)),
        cotangent=draw(layout | st.just("expanded")),
        single=draw(st.booleans()),
        on_pixels=draw(st.booleans()),
    )
    return sample, draw(st.sampled_from([*TOLERANCE]))


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "integer": (
        {"input": torch.zeros(2, 4, 6, 9, dtype=torch.int64)},
        "input of a float dtype, got torch.int64; convert it with input.float()",
    ),
    "dimensions": (
        {"input": torch.zeros(4, 6, 9)},
        "input of 4 dimensions, got shape (4, 6, 9); reshape it (a single image is a batch of 1)",
    ),
    "dtype": (
        {"offset": torch.zeros(2, 18, 6, 9, dtype=torch.float64)},
        "offset of the dtype of input, torch.float32, got torch.float64; convert it with "
        "offset.to(input.dtype)",
    ),
    "dtype beside half": (
        {
            "input": torch.zeros(2, 4, 6, 9, dtype=torch.float16),
            "offset": torch.zeros(2, 18, 6, 9, dtype=torch.float64),
        },
        "offset of the dtype of input, torch.float16 (or torch.float32), got "
        "torch.float64; convert it with offset.to(input.dtype)",
    ),
    "device": (
        {"mask": torch.zeros(2, 9, 6, 9, device="meta")},
        "mask on the device of input, cpu, got meta; move it with mask.to(input.device)",
    ),
    "empty image": (
        {"input": torch.zeros(2, 4, 6, 0)},
        "input of a height and width above 0, got 6x0; pass an image",
    ),
    "not an integer": (
        {"stride": (1.0, 1.0)},
        "stride as one integer or two (vertical, horizontal), got (1.0, 1.0); pass two",
    ),
    "pair": (
        {"stride": (1, 2, 3)},
        "stride as one integer or two (vertical, horizontal), got (1, 2, 3); pass two",
    ),
    "stride": ({"stride": (1, 0)}, "stride of at least 1, got (1, 0); change it"),
    "padding": ({"padding": -1}, "padding of at least 0, got (-1, -1); change it"),
    "dilation": ({"dilation": 0}, "dilation of at least 1, got (0, 0); change it"),
    "empty weight": (
        {"weight": torch.zeros(0, 4, 3, 3)},
        "weight of sizes above 0, got shape (0, 4, 3, 3); change the layer",
    ),
    "channels": (
        {"weight": torch.zeros(3, 3, 3, 3)},
        "weight of shape [out_channels, in_channels / groups, kh, kw] with in_channels 4 and "
        "groups a divisor of both, got (3, 3, 3, 3); build the layer for the channels of "
        "its input",
    ),
    "groups": (
        {"weight": torch.zeros(3, 2, 3, 3)},
        "weight of shape [out_channels, in_channels / groups, kh, kw] with in_channels 4 and "
        "groups a divisor of both, got (3, 2, 3, 3); build the layer for the channels of "
        "its input",
    ),
    "small image": (
        {"dilation": 4},
        "input as large as the dilated kernel 3x3, got 6x9, which gives an output of 0x3; "
        "enlarge the image or the padding",
    ),
    "offset channels": (
        {"offset": torch.zeros(2, 20, 6, 9)},
        "offset of 2 * offset_groups * kh * kw channels, offset_groups a divisor of 4, "
        "got 20 with kernel 3x3; change the layer that predicts it",
    ),
    "offset groups": (
        {"offset": torch.zeros(2, 54, 6, 9)},
        "offset of 2 * offset_groups * kh * kw channels, offset_groups a divisor of 4, "
        "got 54 with kernel 3x3; change the layer that predicts it",
    ),
    "offset size": (
        {"offset": torch.zeros(2, 18, 6, 8)},
        "offset of shape (2, 18, 6, 9), got (2, 18, 6, 8); stride, padding and dilation "
        "decide the height and width",
    ),
    "mask size": (
        {"mask": torch.zeros(2, 18, 6, 9)},
        "mask of shape (2, 9, 6, 9), got (2, 18, 6, 9); stride, padding and dilation "
        "decide the height and width",
    ),
    "bias": (
        {"bias": torch.zeros(4)},
        "bias of shape (3,), got (4,); it has one value per output channel",
    ),
}


def convolve(sample: Sample, tensors: Tensors) -> None:
    input, _, weight, bias, _ = tensors
    F.conv2d(input, weight, bias, **sample.sizes, groups=sample.groups)


# what ``conv(x).split((18, 9), 1)`` of a channels-last convolution hands over
LAST = "channels_last"
SPLIT = (LAST, Slice(0, 9), LAST, Slice(18, 0))
TINY = Sample("tiny", batch=1, channels=1, out_channels=1, size=(2, 3), kernel=(1, 2))
DEFORM_CONV2D = Op(
    [*SAMPLES, Sample("split", channels=8, out_channels=8, layouts=SPLIT, cotangent=LAST)],
    few=[
        *("plain", "no-mask-no-bias", "stride-2-1", "groups-3-offset-groups-2", "batch-0"),
        *("strided", "channels-last", "large-weight"),
    ],
    errors=ERRORS,
    parallel=["plain", "groups-3-offset-groups-2", "wide", "batch-33", "rounds"],
    drawn=drawn(),
    examples=1500,
    gradcheck=[Sample("small", batch=1, out_channels=4, size=(3, 4), groups=2, offset_groups=2)],
    gradgradcheck=[TINY, replace(TINY, id="tiny-no-mask", mask=False)],
    wanted=[([True] * 5, True), ([True, False, True, False, False], False)],
    bad_gradient=(
        "of shape (2, 3, 6, 9), got (2, 3, 6, 8); stride, padding and dilation decide the height "
        "and width"
    ),
    convolutions=convolve,
    # 16,384 pixels are 128 of the largest tiles, which needs three quarters of the multiprocessors
    large=[
        Sample(f"{c}-{to}", 4, c, to, (64, 64), layout=LAST, single=c == 256)
        for c in (72, 256)
        for to in (64, 128, 256, 320)
    ],
)


@settings(REPRODUCIBLE, max_examples=60)
@given(sizes(most=3, widths=(1, 2)))
def test_gradcheck(sample: Sample) -> None:
    torch.manual_seed(0)
    tensors = sample.tensors()
    require_grad(tensors)
    assert torch.autograd.gradcheck(lambda *t: sample.call(t)[0], tensors)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_reference_in_float32(sample: Sample) -> None:
    tensors = sample.tensors(torch.float32)
    doubles = [None if t is None else t.double() for t in tensors]
    output, expected = sample.call(tensors, True)[0], sample.call(doubles, True)[0]
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("groups", [1, 2])
def test_zero_offsets_are_a_convolution(function: Any, groups: int) -> None:
    sample = Sample("", out_channels=4, groups=groups, stride=(2, 1), spread=0, mask=False)
    input, offset, weight, bias, _ = sample.tensors()
    output = function(input, offset, weight, bias, (2, 1), 1)
    expected = F.conv2d(input, weight, bias, (2, 1), 1, groups=groups)
    torch.testing.assert_close(output, expected, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
def test_border_rule(function: Any) -> None:
    """A sample fades to zero over the last pixel outside the image."""
    image = torch.ones(1, 1, 2, 3, dtype=torch.float64)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for shift, value in ((-0.25, 0.75), (-1.0, 0.0), (-3.0, 0.0), (1.0, 1.0), (1.5, 0.5), (2, 0.0)):
        offset = torch.zeros(1, 2, 2, 3, dtype=torch.float64)
        offset[:, 0] = shift
        assert function(image, offset, weight)[0, 0, 0, 0].item() == value


@pytest.mark.usefixtures("poison_empty")
@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
def test_offset_without_position(function: Any, value: float) -> None:
    """Such a sample is zero and so are its gradients; the others are what they would be."""
    sample = Sample("", size=(4, 5), offset_groups=2)
    input, offset, weight, bias, mask = sample.tensors(torch.float32)
    assert offset is not None
    assert mask is not None
    masked = mask.clone()
    masked[:, 4] = masked[:, 7, 1] = 0
    expected = function(input, offset, weight, bias, 1, 1, 1, masked)
    offset[:, 8] = offset[:, 15, 1] = value  # y of tap 4, x of tap 7 in one row
    tensors = [input, offset, weight, bias, mask]
    leaves = require_grad(tensors)
    (output,) = sample.call(tensors, function is deform_conv2d_reference)
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[1][:, 8:10].eq(0).all()
    assert gradients[1][:, 14:16, 1].eq(0).all()
    assert gradients[4][:, 4].eq(0).all()


@native
def test_convolutions_after_ours() -> None:
    """Both may use the matrix registers of a thread, and set them up anew."""
    image = torch.randn(1, 64, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3).bfloat16()
    offset = torch.randn(1, 18, 16, 16)
    expected = F.conv2d(image, weight, padding=1)
    ours = deform_conv2d(image, offset, weight, padding=1)
    for _ in range(3):
        assert torch.equal(F.conv2d(image, weight, padding=1), expected)
        assert torch.equal(deform_conv2d(image, offset, weight, padding=1), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_in_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    sample = Sample("", size=(6, 40))
    tensors = sample.tensors(dtype)
    floats = [None if t is None else t.float() for t in tensors]
    results = []
    for leaves in (tensors, floats):
        required = require_grad(leaves)
        (output,) = sample.call(leaves, True)
        results.append([output, *torch.autograd.grad(output.sum(), required)])
    for value, reference in zip(*results):
        assert value.dtype == dtype
        sample.assert_close(value, reference, dtype)


def test_autocast_takes_positions_in_half_precision() -> None:
    sample = Sample("")
    input, offset, weight, bias, mask = sample.tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (output,) = sample.call([input, offset, weight, bias, mask.half()])
    cast = [input.bfloat16(), offset, weight.bfloat16(), bias.bfloat16(), mask.half().float()]
    assert torch.equal(output, sample.call(cast)[0])


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_in_float32(function: Any, dtype: torch.dtype) -> None:
    """Beside half precision, positions keep what float32 holds of them."""
    image = torch.arange(300, dtype=dtype).view(1, 1, 1, 300).requires_grad_()
    offset = torch.full((1, 2, 1, 300), 1 / 512).requires_grad_()
    offset.data[:, 0] = 0
    output = function(image * 512, offset, torch.ones(1, 1, 1, 1, dtype=dtype))
    assert output.dtype == dtype
    assert output[0, 0, 0, :2].tolist() == [1, 512 if dtype == torch.bfloat16 else 513]
    (gradient,) = torch.autograd.grad(output.sum(), offset)
    assert gradient.dtype == torch.float32
    assert gradient[0, 1, 0, 0] == 512


class Block(torch.nn.Module):
    """A layer that predicts its own offsets and mask."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = torch.nn.Conv2d(4, 27, 3, padding=1)
        self.conv = DeformConv2d(4, 5, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        offset, mask = self.predict(input).split((18, 9), 1)
        output: Tensor = self.conv(input, offset, mask.sigmoid())
        return output


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((5, 7), (6, 9)):
        input = torch.randn(2, 4, *size, requires_grad=True)
        copy = input.detach().requires_grad_()
        output, expected = compiled(input), block(copy)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(input.grad, copy.grad)


def test_module() -> None:
    """torchvision's parameter names and shapes; the initialisation of Conv2d."""
    module = DeformConv2d(4, 6, (3, 5), stride=2, padding=(1, 2), groups=2)
    expected = torch.nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), groups=2)
    assert {k: v.shape for k, v in module.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }
    torch.manual_seed(1)
    module.reset_parameters()
    torch.manual_seed(1)
    expected.reset_parameters()
    assert torch.equal(module.weight, expected.weight)
    input = torch.randn(2, 4, 7, 8)
    output = module(input, torch.zeros(2, 30, 4, 4))
    torch.testing.assert_close(output, expected(input), **TOLERANCE[torch.float32])
    assert DeformConv2d(4, 6, 3, bias=False).bias is None
    assert repr(module) == (
        "DeformConv2d(4, 6, kernel_size=(3, 5), stride=(2, 2), padding=(1, 2), dilation=(1, 1), "
        "groups=2, bias=True)"
    )


def test_module_rejects_groups() -> None:
    with pytest.raises(ValueError) as error:
        DeformConv2d(4, 6, 3, groups=4)
    assert str(error.value) == (
        "deform_conv2d: expected groups to divide in_channels 4 and out_channels 6, got 4; "
        "choose another"
    )


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_outside_are_zero_with_their_gradients(function: Any, bad: float) -> None:
    """Whatever the first pixel, or their own mask, holds: 0 * NaN is not computed."""
    image = torch.randn(1, 2, 4, 5)
    image[:, :, 0, 0] = bad
    offset = torch.full((1, 18, 4, 5), 0.25)
    outside = torch.rand(1, 9, 4, 5) < 0.5
    offset[:, ::2][outside] = 100.0
    offset[:, 2, 1, 1] = math.nan  # of the second tap: outside as well
    outside[0, 1, 1, 1] = True
    mask = torch.rand(1, 9, 4, 5).masked_fill(outside, bad)
    leaves = [t.requires_grad_() for t in (image, offset, torch.randn(3, 2, 3, 3), mask)]
    output = function(*leaves[:3], padding=1, mask=mask)
    _, of_offset, _, of_mask = torch.autograd.grad(output.sum(), leaves)
    assert of_mask[outside].eq(0).all()
    for axis in (0, 1):
        assert of_offset[:, axis::2][outside].eq(0).all()
    (of_image,) = torch.autograd.grad(function(*leaves[:3], padding=1, mask=mask).sum(), image)
    assert of_image.isfinite().all()


@native
def test_image_of_2_to_the_31_elements() -> None:
    image = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**16, 2**15)
    offset = torch.zeros(1, 1, 1, 1).expand(1, 2, 2**16, 2**15)
    with pytest.raises(ValueError) as error:
        deform_conv2d(image, offset, torch.zeros(1, 1, 1, 1))
    assert str(error.value) == (
        "deform_conv2d: expected input of fewer than 2**31 elements an image, got 1x65536x32768; "
        "divide the image into tiles"
    )


MAP = torch.zeros(2, 3, 4, 5)
STRIDES = "got shape (2, 3, 4, 5) with strides (60, 20, 5, 1); make it contiguous before the call"


def test_slices_of_channels() -> None:
    """Read in place where the pixels lie evenly apart."""
    last = torch.zeros(2, 7, 4, 5).contiguous(memory_format=torch.channels_last)
    assert _native.pixel_step(last) == 7
    assert _native.pixel_step(last[:, 2:5]) == 7
    assert _native.pixel_step(last[:, 2:5, :, 1:]) is None
    assert _native.pixel_step(last[:, 2:5].flip(3)) == 3
    assert _native.pixel_step(last.contiguous()) is None


@native
def test_calls_of_one_description_are_checked_once() -> None:
    """Another dtype, layout, size or setting is another description."""
    plans = importlib.import_module("nasfast.ops.deform_conv2d")._plans
    plans.clear()
    sample = Sample("")
    for _ in range(2):
        sample.call(sample.tensors())
        assert len(plans) == 1
    sample.call(sample.tensors(torch.float32))
    last = Sample("", layout="channels_last")
    last.call(last.tensors())
    wider = Sample("", padding=(2, 2))
    wider.call(wider.tensors())
    assert len(plans) == 4
    for padding in range(3, 1100):
        plan = Sample("", size=(1, 1), kernel=(1, 1), padding=(padding, 0), batch=0)
        plan.call(plan.tensors())
    assert len(plans) <= 1024


def test_the_dispatcher_sees_what_it_must() -> None:
    """Modes, transforms and subclasses get the registered op; its kernel is called else."""
    sample = Sample("")
    tensors = sample.tensors(torch.float32)
    assert _eager.is_eager("deform_conv2d", tensors) == (_native.C is not None)
    assert not _eager.is_eager("other", tensors)

    class Subclass(Tensor):
        pass

    assert not _eager.is_eager("deform_conv2d", [tensors[0].as_subclass(Subclass)])
    assert not _eager.is_eager("deform_conv2d", [tensors[0].to("meta")])
    with FlopCounterMode(display=False) as counter:
        assert not _eager.is_eager("deform_conv2d", tensors)
        sample.call(tensors)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu"):
        assert not _eager.is_eager("deform_conv2d", tensors)
    traced = make_fx(lambda *tensors: sample.call(tensors))(*tensors)
    assert "nasfast.deform_conv2d" in traced.code


class Wrapped(Tensor):
    """A tensor without memory of its own, as quantised weights are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, arguments: Any, options: Any = None
    ) -> Any:
        inner = [a.inner if isinstance(a, Wrapped) else a for a in arguments]
        return function(*inner, **(options or {}))


def test_gradients_beside_tensors_without_memory() -> None:
    sample = Sample("", layout="channels_last")
    tensors = sample.tensors(torch.float32)
    input = tensors[0].requires_grad_()
    (expected,) = torch.autograd.grad(sample.call(tensors)[0].sum(), input)
    tensors[2] = Wrapped(tensors[2])
    (gradient,) = torch.autograd.grad(sample.call(tensors)[0].sum(), input)
    assert torch.equal(gradient, expected)


def test_gradients_beside_negative_views() -> None:
    """PyTorch keeps the sign of an imaginary part beside the memory."""
    sample = Sample("", layout="channels_last")
    tensors = sample.tensors(torch.float32)
    negated = [torch._neg_view(tensors[0]), *tensors[1:]]
    tensors[0] = -tensors[0]
    for got, expected in zip(*(forward_backward_of_weight(sample, t) for t in (negated, tensors))):
        torch.testing.assert_close(got, expected)


def forward_backward_of_weight(sample: Sample, tensors: Tensors) -> list[Tensor]:
    weight = tensors[2].requires_grad_()
    (output,) = sample.call(tensors)
    return [output, *torch.autograd.grad(output.sum(), weight)]


def test_gradients_of_slices_are_channels_last() -> None:
    """As the convolution that predicts offset and mask needs them."""
    predicted = torch.randn(2, 27, 6, 9).contiguous(memory_format=torch.channels_last)
    offset, mask = (part.requires_grad_() for part in predicted.split((18, 9), 1))
    input, _, weight, _, _ = Sample("", layout="channels_last").tensors(torch.float32)
    output = deform_conv2d(input, offset, weight, padding=1, mask=mask)
    for gradient in torch.autograd.grad(output.sum(), (offset, mask)):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "in_dims",
    [(0, 0, None, None, 0), (1, None, None, None, 0), (0, 0, 0, 0, 0), (None, 2, 3, None, None)],
    ids=["images", "some images", "all", "weights"],
)
def test_vmap(in_dims: tuple[int | None, ...], mask: bool) -> None:
    sample = Sample("", channels=4, out_channels=4, groups=2, offset_groups=2, mask=mask)
    drawn = [sample.tensors() for _ in range(3)]
    stacked = [
        parts[0] if dim is None or parts[0] is None else torch.stack(parts, dim)  # type: ignore[arg-type]
        for parts, dim in zip(zip(*drawn), in_dims)
    ]

    def call(*tensors: Any) -> Tensor:
        return deform_conv2d(*tensors[:4], 1, 1, 1, tensors[4] if mask else None)

    if not mask:
        stacked, in_dims = stacked[:4], in_dims[:4]
    output = torch.vmap(call, in_dims)(*stacked)
    for i in range(3):
        chosen = [
            part if dim is None else part.select(dim, i) for part, dim in zip(stacked, in_dims)
        ]
        torch.testing.assert_close(output[i], call(*chosen), **TOLERANCE[torch.float64])
