"""deform_conv2d: one list of samples feeds forward, gradients, opcheck and compilation."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_harness import (
    TOLERANCE,
    arrange,
    check_level,
    check_same_bits_for_any_thread_count,
    check_without_extension,
    every_level,
    native,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from nasfast.ops import DeformConv2d, _native, deform_conv2d, deform_conv2d_reference

OP = torch.ops.nasfast.deform_conv2d.default
OP_BACKWARD = torch.ops.nasfast.deform_conv2d_backward.default


@dataclass(frozen=True)
class Sample:
    """Sizes of one call; ``tensors`` draws the arguments."""

    id: str
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

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """input, offset, weight, bias, mask."""
        taps = self.kernel[0] * self.kernel[1] * self.offset_groups
        out = [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride
            )
        ]
        # odd 64ths of the spread: no sample lies near a pixel, where the gradient jumps
        odd = torch.randn(self.batch, 2 * taps, *out).mul(32).floor().mul(2).add(1)
        tensors = [
            torch.randn(self.batch, self.channels, *self.size),
            odd * (self.spread / 64),
            torch.randn(self.out_channels, self.channels // self.groups, *self.kernel),
            torch.randn(self.out_channels) if self.bias else None,
            torch.rand(self.batch, taps, *out) if self.mask else None,
        ]
        return [None if t is None else arrange(t.to(dtype), self.layout) for t in tensors]

    def arguments(self, tensors: list[Tensor | None]) -> tuple[Any, ...]:
        """All arguments of the function, in order."""
        *front, mask = tensors
        return (*front, self.stride, self.padding, self.dilation, mask)


def samples() -> list[Sample]:
    return [
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
        # backward in several rounds; weights that are large enough for large tiles
        Sample("rounds", batch=3, channels=8, size=(50, 60), layout="channels_last"),
        Sample("large-weight", batch=1, channels=200, out_channels=150, size=(17, 12)),
        Sample("many-offset-groups", channels=48, offset_groups=24, size=(7, 11)),
    ]


every_sample = pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.id)


def require_grad(tensors: list[Tensor | None]) -> list[Tensor]:
    """Marks the tensors that are there; returns them."""
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def forward_backward(sample: Sample, tensors: list[Tensor | None]) -> list[Tensor]:
    leaves = require_grad(tensors)
    output = deform_conv2d(*sample.arguments(tensors))
    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output).cumsum(-1))]


@every_sample
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.usefixtures("poison_empty")
def test_equals_reference(sample: Sample, dtype: torch.dtype) -> None:
    """Output and every gradient, against autograd of the reference in float64."""
    tensors = sample.tensors(dtype)
    doubles = [None if t is None else t.detach().double() for t in tensors]
    leaves, double_leaves = require_grad(tensors), require_grad(doubles)
    output = deform_conv2d(*sample.arguments(tensors))
    expected = deform_conv2d_reference(*sample.arguments(doubles))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[dtype])
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    references = torch.autograd.grad(expected, double_leaves, cotangent.double())
    for leaf, gradient, reference in zip(leaves, gradients, references):
        assert gradient.dtype == dtype
        assert gradient.shape == leaf.shape
        torch.testing.assert_close(gradient.double(), reference, **TOLERANCE[dtype])


@every_sample
def test_reference_in_float32(sample: Sample) -> None:
    tensors = sample.tensors(torch.float32)
    doubles = [None if t is None else t.double() for t in tensors]
    output = deform_conv2d_reference(*sample.arguments(tensors))
    expected = deform_conv2d_reference(*sample.arguments(doubles))
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
    output = function(*sample.arguments(tensors))
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[1][:, 8:10].eq(0).all()
    assert gradients[1][:, 14:16, 1].eq(0).all()
    assert gradients[4][:, 4].eq(0).all()


def test_gradcheck() -> None:
    sample = Sample("", batch=1, out_channels=4, size=(3, 4), groups=2, offset_groups=2)
    tensors = sample.tensors()
    require_grad(tensors)
    assert torch.autograd.gradcheck(deform_conv2d, sample.arguments(tensors))


@pytest.mark.parametrize("mask", [True, False])
def test_gradgradcheck(mask: bool) -> None:
    sample = Sample("", batch=1, channels=1, out_channels=1, size=(2, 3), kernel=(1, 2), mask=mask)
    tensors = sample.tensors()
    require_grad(tensors)
    assert torch.autograd.gradgradcheck(deform_conv2d, sample.arguments(tensors))


@pytest.mark.parametrize("create_graph", [False, True])
def test_second_derivatives_inside_a_graph(create_graph: bool) -> None:
    """Offset and cotangent depend on input and weight themselves, as in a gradient penalty."""
    input, offset, weight, _, mask = Sample("", size=(3, 4)).tensors()
    predict = torch.randn(18, 4, 3, 3, dtype=torch.float64) / 100

    def penalty(function: Any) -> list[Tensor]:
        leaves = require_grad([input, weight])
        moved = offset + F.conv2d(leaves[0], predict, padding=1)
        output = function(leaves[0], moved, weight, padding=1, mask=mask)
        (first,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        second = torch.autograd.grad(first.square().sum(), leaves, create_graph=create_graph)
        return [first, *second]

    for ours, reference in zip(penalty(deform_conv2d), penalty(deform_conv2d_reference)):
        torch.testing.assert_close(ours, reference, **TOLERANCE[torch.float64])


def test_expanded_gradient() -> None:
    """``output.sum().backward()`` hands over a gradient with stride 0."""
    sample = Sample("")
    tensors = sample.tensors()
    leaves = require_grad(tensors)
    output = deform_conv2d(*sample.arguments(tensors))
    expanded = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense))


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("id", ["groups-3-offset-groups-2", "large-weight"])
def test_single_gradient(wanted: int, id: str) -> None:
    """Each gradient alone equals the one computed with the others."""
    sample = next(sample for sample in samples() if sample.id == id)
    tensors = sample.tensors()
    expected = forward_backward(sample, tensors)[1 + wanted]
    detached = [t.detach() for t in tensors if t is not None]
    detached[wanted].requires_grad_()
    output = deform_conv2d(*sample.arguments(list(detached)))
    (gradient,) = torch.autograd.grad(
        output, [detached[wanted]], torch.ones_like(output).cumsum(-1)
    )
    assert torch.equal(gradient, expected)


@native
@pytest.mark.parametrize("id", ["plain", "groups-3-offset-groups-2", "wide", "batch-33", "rounds"])
def test_same_bits_for_any_thread_count(id: str) -> None:
    sample = next(sample for sample in samples() if sample.id == id)
    tensors = sample.tensors(torch.float32)
    check_same_bits_for_any_thread_count(lambda: forward_backward(sample, tensors))


@native
@every_level
def test_instruction_sets(level: str) -> None:
    """The kernels of each, in a process that is told to use them."""
    code = (
        "for sample in t.samples():\n"
        "    for dtype in (torch.float32, torch.float64):\n"
        "        t.test_equals_reference(sample, dtype)\n"
        "    t.check_half_precision(t.deform_conv2d, sample, torch.bfloat16)\n"
    )
    check_level(level, "deform_conv2d", code)


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_follows_input(layout: str, dtype: torch.dtype) -> None:
    sample = Sample("", layout=layout)
    tensors = sample.tensors(dtype)
    leaves = require_grad(tensors)
    output = deform_conv2d(*sample.arguments(tensors))
    reference = deform_conv2d_reference(*sample.arguments(tensors))
    gradient, *_ = torch.autograd.grad(output.sum(), leaves)
    for tensor in (output, reference, gradient):
        last = tensor.is_contiguous(memory_format=torch.channels_last)
        assert last == (layout == "channels_last")


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(function: Any, dtype: torch.dtype) -> None:
    check_half_precision(function, Sample("", size=(6, 40)), dtype)


def check_half_precision(function: Any, sample: Sample, dtype: torch.dtype) -> None:
    """Output and every gradient, against those of the same numbers in float32."""
    tensors = sample.tensors(dtype)
    floats = [None if t is None else t.detach().float() for t in tensors]
    leaves, float_leaves = require_grad(tensors), require_grad(floats)
    output = function(*sample.arguments(tensors))
    expected = deform_conv2d(*sample.arguments(floats))
    assert output.dtype == dtype
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    references = torch.autograd.grad(expected, float_leaves, cotangent.float())
    for value, reference in zip([output, *gradients], [expected, *references]):
        tolerance = dict(TOLERANCE[dtype])
        if reference.numel():
            tolerance["atol"] *= max(1, reference.abs().max().item())
        torch.testing.assert_close(value, reference.to(dtype), **tolerance)


def test_autocast_brings_inputs_to_one_dtype() -> None:
    """As for a convolution; a position in float32 stays exact, one in half precision is taken."""
    sample = Sample("")
    tensors = sample.tensors(torch.float32)
    input, offset, weight, bias, mask = tensors
    tensors[0], tensors[4] = input.bfloat16(), mask.half()
    leaves = require_grad(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = deform_conv2d(*sample.arguments(tensors))
    assert output.dtype == torch.bfloat16
    cast = [input.bfloat16(), offset, weight.bfloat16(), bias.bfloat16(), mask.half().float()]
    assert torch.equal(output, deform_conv2d(*sample.arguments(cast)))
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]


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


def test_autocast_leaves_float64_alone() -> None:
    sample = Sample("")
    tensors = sample.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = deform_conv2d(*sample.arguments(tensors))
    assert torch.equal(output, deform_conv2d(*sample.arguments(tensors)))


@pytest.mark.parametrize(
    "id", ["plain", "no-mask-no-bias", "stride-2-1", "batch-0", "strided", "channels-last"]
)
def test_opcheck(id: str) -> None:
    sample = next(sample for sample in samples() if sample.id == id)
    tensors = sample.tensors(torch.float32)
    require_grad(tensors)
    torch.library.opcheck(OP, sample.arguments(tensors))


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ([True] * 5, {}),
        ([True, False, True, False, False], {"test_utils": ("test_schema", "test_faketensor")}),
    ],
    ids=["all", "some"],
)
def test_opcheck_backward(wanted: list[bool], options: dict[str, Any]) -> None:
    sample = Sample("")
    tensors = sample.tensors(torch.float32)
    input, offset, weight, _, mask = require_grad(tensors)
    grad = torch.randn(2, 3, 6, 9)
    arguments = (grad, input, offset, weight, mask, [1, 1], [1, 1], [1, 1], wanted)
    torch.library.opcheck(OP_BACKWARD, arguments, **options)


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


def test_compile_under_autocast() -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 4, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(input), block(input), **TOLERANCE[torch.bfloat16])


def test_export() -> None:
    block = Block().eval()
    input = torch.randn(2, 4, 5, 7)
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height", min=3)
    program = torch.export.export(block, (input,), dynamic_shapes=({0: batch, 2: height},))
    assert "nasfast.deform_conv2d" in program.graph_module.code
    larger = torch.randn(3, 4, 11, 7)
    torch.testing.assert_close(program.module()(larger), block(larger))


def test_flops_are_those_of_the_convolution() -> None:
    sample = Sample("", out_channels=4, groups=2, stride=(2, 1))
    tensors = sample.tensors(torch.float32)
    require_grad(tensors)
    with FlopCounterMode(display=False) as ours:
        output = deform_conv2d(*sample.arguments(tensors))
    with FlopCounterMode(display=False) as convolution:
        F.conv2d(tensors[0], tensors[2], tensors[3], (2, 1), 1, groups=2)
    assert ours.get_total_flops() == convolution.get_total_flops() > 0
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 2 * ours.get_total_flops()


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
        "deform_conv2d: groups must be a divisor of in_channels 4 and out_channels 6, got 4; "
        "choose one that divides both"
    )


BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "integer": (
        {"input": torch.zeros(2, 4, 6, 9, dtype=torch.int64)},
        "input must be of a float dtype, got torch.int64; convert it with input.float()",
    ),
    "dimensions": (
        {"input": torch.zeros(4, 6, 9)},
        "input must be of 4 dimensions, got shape (4, 6, 9); reshape it (a single image is a "
        "batch of 1)",
    ),
    "dtype": (
        {"offset": torch.zeros(2, 18, 6, 9, dtype=torch.float64)},
        "offset must be of the dtype of input, torch.float32, got torch.float64; convert it with "
        "offset.to(input.dtype)",
    ),
    "dtype beside half": (
        {
            "input": torch.zeros(2, 4, 6, 9, dtype=torch.float16),
            "offset": torch.zeros(2, 18, 6, 9, dtype=torch.float64),
        },
        "offset must be of the dtype of input, torch.float16 (or torch.float32), got "
        "torch.float64; convert it with offset.to(input.dtype)",
    ),
    "device": (
        {"mask": torch.zeros(2, 9, 6, 9, device="meta")},
        "mask must be on the device of input, cpu, got meta; move it with mask.to(input.device)",
    ),
    "empty image": (
        {"input": torch.zeros(2, 4, 6, 0)},
        "input must be of a height and width above 0, got 6x0; pass an image",
    ),
    "not an integer": (
        {"stride": (1.0, 1.0)},
        "stride must be one integer or two (vertical, horizontal), got (1.0, 1.0); pass two",
    ),
    "pair": (
        {"stride": (1, 2, 3)},
        "stride must be one integer or two (vertical, horizontal), got (1, 2, 3); pass two",
    ),
    "stride": ({"stride": (1, 0)}, "stride must be at least 1, got (1, 0); change it"),
    "padding": ({"padding": -1}, "padding must be at least 0, got (-1, -1); change it"),
    "dilation": ({"dilation": 0}, "dilation must be at least 1, got (0, 0); change it"),
    "empty weight": (
        {"weight": torch.zeros(0, 4, 3, 3)},
        "weight must be of sizes above 0, got shape (0, 4, 3, 3); change the layer",
    ),
    "channels": (
        {"weight": torch.zeros(3, 3, 3, 3)},
        "weight must be [out_channels, in_channels / groups, kh, kw] with in_channels 4 and "
        "groups a divisor of both, got shape (3, 3, 3, 3); build the layer for the channels of "
        "its input",
    ),
    "groups": (
        {"weight": torch.zeros(3, 2, 3, 3)},
        "weight must be [out_channels, in_channels / groups, kh, kw] with in_channels 4 and "
        "groups a divisor of both, got shape (3, 2, 3, 3); build the layer for the channels of "
        "its input",
    ),
    "small image": (
        {"dilation": 4},
        "input must be as large as the dilated kernel 3x3, got 6x9, which gives an output of 0x3; "
        "enlarge the image or the padding",
    ),
    "offset channels": (
        {"offset": torch.zeros(2, 20, 6, 9)},
        "offset must be of 2 * offset_groups * kh * kw channels, offset_groups a divisor of 4, "
        "got 20 with kernel 3x3; change the layer that predicts it",
    ),
    "offset groups": (
        {"offset": torch.zeros(2, 54, 6, 9)},
        "offset must be of 2 * offset_groups * kh * kw channels, offset_groups a divisor of 4, "
        "got 54 with kernel 3x3; change the layer that predicts it",
    ),
    "offset size": (
        {"offset": torch.zeros(2, 18, 6, 8)},
        "offset must be of shape (2, 18, 6, 9), got (2, 18, 6, 8); stride, padding and dilation "
        "decide the height and width",
    ),
    "mask size": (
        {"mask": torch.zeros(2, 18, 6, 9)},
        "mask must be of shape (2, 9, 6, 9), got (2, 18, 6, 9); stride, padding and dilation "
        "decide the height and width",
    ),
    "bias": (
        {"bias": torch.zeros(4)},
        "bias must be of shape (3,), got (4,); it has one value per output channel",
    ),
}


@pytest.mark.parametrize("function", [deform_conv2d, deform_conv2d_reference])
@pytest.mark.parametrize(("change", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(function: Any, change: dict[str, Any], message: str) -> None:
    names = ("input", "offset", "weight", "bias", "mask")
    arguments = dict(zip(names, Sample("").tensors(torch.float32))) | {"padding": 1}
    with pytest.raises(ValueError) as error:
        function(**arguments | change)
    assert str(error.value) == f"deform_conv2d: {message}"


def test_bad_gradient() -> None:
    input, offset, weight, _, mask = Sample("").tensors(torch.float32)
    grad = torch.zeros(2, 3, 6, 8)
    with pytest.raises(ValueError) as error:
        OP_BACKWARD(grad, input, offset, weight, mask, [1, 1], [1, 1], [1, 1], [True] * 5)
    assert str(error.value) == (
        "deform_conv2d: grad must be of shape (2, 3, 6, 9), got (2, 3, 6, 8); stride, padding and "
        "dilation decide the height and width"
    )


@native
def test_image_of_2_to_the_31_elements() -> None:
    image = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**16, 2**15)
    offset = torch.zeros(1, 1, 1, 1).expand(1, 2, 2**16, 2**15)
    with pytest.raises(ValueError) as error:
        deform_conv2d(image, offset, torch.zeros(1, 1, 1, 1))
    assert str(error.value) == (
        "deform_conv2d: input must be of fewer than 2**31 elements an image, got 1x65536x32768; "
        "divide the image into tiles"
    )


MAP = torch.zeros(2, 3, 4, 5)
STRIDES = "got shape (2, 3, 4, 5) with strides (60, 20, 5, 1); make it contiguous before the call"


@pytest.mark.parametrize(
    ("layout", "tensor", "message"),
    [
        ("map", MAP, f"channels last, {STRIDES}"),
        ("slice", MAP, f"channels last, {STRIDES}"),
        (
            "dense",
            torch.zeros(6)[::2],
            "contiguous, got shape (3,) with strides (2,); make it contiguous before the call",
        ),
        (
            "map",
            MAP.double(),
            "torch.float32 on cpu, got torch.float64 on cpu; convert it before the call",
        ),
        (
            "map",
            MAP.to("meta"),
            "torch.float32 on cpu, got torch.float32 on meta; convert it before the call",
        ),
    ],
    ids=["map", "slice", "dense", "dtype", "device"],
)
def test_what_a_kernel_reads_is_checked(layout: str, tensor: Tensor, message: str) -> None:
    """The last door before the extension, which believes what it is given."""
    with pytest.raises(ValueError) as error:
        _native.check("op", torch.zeros(1), torch.float32, layout, tensor)
    assert str(error.value) == f"op: tensor must be {message}"


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
        deform_conv2d(*sample.arguments(sample.tensors()))
        assert len(plans) == 1
    deform_conv2d(*sample.arguments(sample.tensors(torch.float32)))
    last = Sample("", layout="channels_last")
    deform_conv2d(*last.arguments(last.tensors()))
    wider = Sample("", padding=(2, 2))
    deform_conv2d(*wider.arguments(wider.tensors()))
    assert len(plans) == 4
    for padding in range(3, 1100):
        plan = Sample("", size=(1, 1), kernel=(1, 1), padding=(padding, 0), batch=0)
        deform_conv2d(*plan.arguments(plan.tensors()))
    assert len(plans) <= 1024


def test_the_dispatcher_sees_what_it_must() -> None:
    """Modes, transforms and subclasses get the registered op; its kernel is called else."""
    sample = Sample("")
    tensors = sample.tensors(torch.float32)
    arguments = sample.arguments(tensors)
    assert _native.is_eager("deform_conv2d", *tensors) == (_native.C is not None)
    assert not _native.is_eager("other", *tensors)

    class Subclass(Tensor):
        pass

    assert not _native.is_eager("deform_conv2d", tensors[0].as_subclass(Subclass))
    assert not _native.is_eager("deform_conv2d", tensors[0].to("meta"))
    with FlopCounterMode(display=False) as counter:
        assert not _native.is_eager("deform_conv2d", *tensors)
        deform_conv2d(*arguments)
    assert counter.get_total_flops() > 0
    with torch.autocast("cpu"):
        assert not _native.is_eager("deform_conv2d", *tensors)
    traced = make_fx(lambda *tensors: deform_conv2d(*sample.arguments(list(tensors))))(*tensors)
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
    (expected,) = torch.autograd.grad(deform_conv2d(*sample.arguments(tensors)).sum(), input)
    tensors[2] = Wrapped(tensors[2])
    (gradient,) = torch.autograd.grad(deform_conv2d(*sample.arguments(tensors)).sum(), input)
    assert torch.equal(gradient, expected)


def test_gradients_beside_negative_views() -> None:
    """PyTorch keeps the sign of an imaginary part beside the memory."""
    sample = Sample("", layout="channels_last")
    tensors = sample.tensors(torch.float32)
    negated = [torch._neg_view(tensors[0]), *tensors[1:]]
    tensors[0] = -tensors[0]
    for got, expected in zip(*(forward_backward_of_weight(sample, t) for t in (negated, tensors))):
        torch.testing.assert_close(got, expected)


def forward_backward_of_weight(sample: Sample, tensors: list[Tensor | None]) -> list[Tensor]:
    weight = tensors[2].requires_grad_()
    output = deform_conv2d(*sample.arguments(tensors))
    return [output, *torch.autograd.grad(output.sum(), weight)]


@pytest.mark.parametrize("transform", ["grad", "jvp", "forward_ad", "grad of vmap", "vmap of grad"])
def test_transforms_differentiate_the_reference(transform: str) -> None:
    """What registered ops cannot do in PyTorch is done, and not taken for zero."""
    sample = Sample("", size=(3, 4))
    tensors = sample.tensors()
    tangents = torch.randn(2, *tensors[2].shape, dtype=torch.float64)

    def results(function: Any) -> Any:
        def of(weight: Tensor) -> Tensor:
            return function(*sample.arguments([*tensors[:2], weight, *tensors[3:]]))

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

    torch.testing.assert_close(results(deform_conv2d), results(deform_conv2d_reference))


def test_gradients_of_slices_are_channels_last() -> None:
    """As the convolution that predicts offset and mask wants them."""
    predicted = torch.randn(2, 27, 6, 9).contiguous(memory_format=torch.channels_last)
    offset, mask = (part.requires_grad_() for part in predicted.split((18, 9), 1))
    input, _, weight, _, _ = Sample("", layout="channels_last").tensors(torch.float32)
    output = deform_conv2d(input, offset, weight, padding=1, mask=mask)
    for gradient in torch.autograd.grad(output.sum(), (offset, mask)):
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [{"input": torch.int64}, {"weight": torch.float64}])
def test_autocast_hides_no_wrong_dtype(change: dict[str, torch.dtype]) -> None:
    names = ("input", "offset", "weight", "bias", "mask")
    arguments: dict[str, Any] = dict(zip(names, Sample("").tensors(torch.float32)))
    for name, dtype in change.items():
        arguments[name] = arguments[name].to(dtype)
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"must be of (a float|the) dtype"):
        deform_conv2d(**arguments, padding=1)


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


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients() -> None:
    """Several cotangents at once: vmap of the backward pass, one call for each."""
    sample = Sample("", size=(3, 4))
    tensors = sample.tensors()
    leaves = require_grad(tensors)
    output = deform_conv2d(*sample.arguments(tensors))
    cotangents = torch.randn(3, *output.shape, dtype=output.dtype)
    batched = torch.autograd.grad(output, leaves, cotangents, True, is_grads_batched=True)
    for i, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        torch.testing.assert_close([g[i] for g in batched], list(expected))


def to_cuda(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().cuda() for t in tensors]


@pytest.mark.cuda
@every_sample
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cuda_equals_reference(sample: Sample, dtype: torch.dtype, deterministic: bool) -> None:
    """Output and every gradient, against those of the same numbers in float64."""
    tensors = sample.tensors(dtype)
    doubles = [None if t is None else t.double() for t in tensors]
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.use_deterministic_algorithms(deterministic)
    try:
        output = forward_backward(sample, to_cuda(tensors))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    for value, reference in zip(output, forward_backward(sample, doubles)):
        assert value.dtype == dtype
        tolerance = dict(TOLERANCE[dtype])
        if reference.numel():
            tolerance["atol"] *= max(1, reference.abs().max().item())
        torch.testing.assert_close(value.cpu().double(), reference, **tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cuda_same_bits_in_every_run(dtype: torch.dtype) -> None:
    sample = Sample("", batch=2, channels=32, out_channels=32, size=(40, 60))
    tensors = to_cuda(sample.tensors(dtype))
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (forward_backward(sample, tensors) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in others for a, b in zip(first, run))


@pytest.mark.cuda
def test_cuda_graph() -> None:
    """Captured on a stream of its own, without a synchronisation; replayed with other values."""
    sample = Sample("", channels=16, out_channels=16, size=(20, 30), layout="channels_last")
    tensors = to_cuda(sample.tensors(torch.float32))
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
def test_cuda_compile_and_autocast() -> None:
    block = Block().cuda()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    input = torch.randn(2, 4, 5, 7, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = compiled(input)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, block(input), **TOLERANCE[torch.bfloat16])


def test_runs_without_the_extension() -> None:
    """Where ``nasfast._C`` cannot be imported, the op runs its reference and says so."""
    code = (
        "for sample in t.samples()[:3]:\n"
        "    t.test_equals_reference(sample, torch.float64)\n"
        "t.test_autocast_brings_inputs_to_one_dtype()\n"
    )
    check_without_extension("deform_conv2d", code)
