"""depthwise_conv2d: one list of samples feeds forward, gradients, opcheck and compilation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
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
from torch.utils.flop_counter import FlopCounterMode

from nasfast.ops import depthwise_conv2d, depthwise_conv2d_reference

OP = torch.ops.nasfast.depthwise_conv2d.default
OP_BACKWARD = torch.ops.nasfast.depthwise_conv2d_backward.default


@dataclass(frozen=True)
class Sample:
    """Sizes of one call; ``tensors`` draws the arguments."""

    id: str
    batch: int = 2
    channels: int = 5
    size: tuple[int, int] = (6, 19)
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    layout: str = "channels_last"

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.padding, self.dilation

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """input, weight."""
        input = torch.randn(self.batch, self.channels, *self.size)
        weight = torch.randn(self.channels, 1, *self.kernel)
        tensors = (arrange(tensor.to(dtype), self.layout) for tensor in (input, weight))
        return [tensor.requires_grad_() for tensor in tensors]


def samples() -> list[Sample]:
    return [
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


every_sample = pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.id)


def check_reference(sample: Sample, dtype: torch.dtype) -> None:
    """Output and both gradients, against autograd of the reference in float64."""
    tensors = sample.tensors(dtype)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = depthwise_conv2d(*tensors, *sample.sizes)
    expected = depthwise_conv2d_reference(*doubles, *sample.sizes)
    cotangent = torch.randn_like(output)
    gradients = torch.autograd.grad(output, tensors, cotangent)
    references = torch.autograd.grad(expected, doubles, cotangent.double())
    for value, reference in zip([output, *gradients], [expected, *references], strict=True):
        assert value.dtype == dtype
        tolerance = dict(TOLERANCE[dtype])
        if reference.numel():
            tolerance["atol"] *= max(1, reference.abs().max().item())
        torch.testing.assert_close(value.double(), reference, **tolerance)


@every_sample
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.usefixtures("poison_empty")
def test_equals_reference(sample: Sample, dtype: torch.dtype) -> None:
    check_reference(sample, dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.builds(
        Sample,
        st.just("drawn"),
        st.integers(1, 3),
        st.integers(1, 40),
        st.tuples(st.integers(1, 20), st.integers(1, 20)),
        st.tuples(st.integers(1, 5), st.integers(1, 5)),
        st.just((9, 9)),
        st.tuples(st.integers(1, 4), st.integers(1, 4)),
    )
)
def test_equals_reference_for_drawn_sizes(sample: Sample) -> None:
    check_reference(sample, torch.float64)


@native
@every_level
def test_instruction_sets(level: str) -> None:
    """The kernels of each, in a process that is told to use them."""
    code = (
        "for sample in t.samples():\n"
        "    for dtype in t.TOLERANCE:\n"
        "        t.check_reference(sample, dtype)\n"
    )
    check_level(level, "depthwise_conv2d", code)


def test_runs_without_the_extension() -> None:
    """Where ``nasfast._C`` cannot be imported, the op runs its reference and says so."""
    code = "for sample in t.samples()[:3]:\n    t.check_reference(sample, torch.float64)\n"
    check_without_extension("depthwise_conv2d", code)


@pytest.mark.parametrize("function", [depthwise_conv2d, depthwise_conv2d_reference])
def test_by_hand(function: Any) -> None:
    image = torch.arange(1.0, 5).view(1, 1, 2, 2)
    weight = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]).view(1, 1, 2, 2)
    assert function(image, weight).flatten().tolist() == [4321]
    corners = function(image, weight, 1, 2).flatten().tolist()  # each reads one corner
    assert corners == [4000, 300, 20, 1]


@native
@pytest.mark.parametrize("id", ["plain", "5x5-dilation-6", "wide", "bands"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_thread_count(id: str, dtype: torch.dtype) -> None:
    sample = next(sample for sample in samples() if sample.id == id)
    tensors = sample.tensors(dtype)

    def run() -> list[Tensor]:
        output = depthwise_conv2d(*tensors, *sample.sizes)
        gradients = torch.autograd.grad(output, tensors, torch.ones_like(output).cumsum(-1))
        return [output, *gradients]

    check_same_bits_for_any_thread_count(run)


def test_gradcheck_twice() -> None:
    sample = Sample("", batch=1, channels=2, size=(3, 4), padding=(1, 2), dilation=(1, 2))
    arguments = (*sample.tensors(), *sample.sizes)
    assert torch.autograd.gradcheck(depthwise_conv2d, arguments)
    assert torch.autograd.gradgradcheck(depthwise_conv2d, arguments)


@pytest.mark.parametrize("wanted", [0, 1])
def test_single_gradient(wanted: int) -> None:
    """Each gradient alone, by a cotangent of stride 0, equals the one computed with the other."""
    sample = Sample("")
    tensors = sample.tensors()
    output = depthwise_conv2d(*tensors, *sample.sizes)
    expected = torch.autograd.grad(output, tensors, torch.ones_like(output))[wanted]
    tensors[1 - wanted].requires_grad_(False)
    output = depthwise_conv2d(*tensors, *sample.sizes)
    (gradient,) = torch.autograd.grad(output.sum(), [tensors[wanted]])
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_follows_input(layout: str) -> None:
    input, weight = Sample("", layout=layout).tensors(torch.float32)
    output = depthwise_conv2d(input, weight, 1)
    (gradient,) = torch.autograd.grad(output.sum(), [input])
    for tensor in (output, gradient, depthwise_conv2d_reference(input, weight, 1)):
        last = tensor.is_contiguous(memory_format=torch.channels_last)
        assert last == (layout == "channels_last")


def test_autocast_casts_as_for_a_convolution() -> None:
    input, weight = Sample("").tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = depthwise_conv2d(input, weight, 1)
        doubles = depthwise_conv2d(input.double(), weight.double(), 1)
    assert output.dtype == torch.bfloat16
    assert doubles.dtype == torch.float64
    assert torch.equal(output, depthwise_conv2d(input.bfloat16(), weight.bfloat16(), 1))
    gradients = torch.autograd.grad(output.sum(), [input, weight])
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2


@pytest.mark.parametrize("id", ["plain", "dilation-2-3", "batch-0", "contiguous", "strided"])
def test_opcheck(id: str) -> None:
    sample = next(sample for sample in samples() if sample.id == id)
    tensors = sample.tensors(torch.float32)
    torch.library.opcheck(OP, (*tensors, *sample.sizes))
    grad = torch.randn_like(depthwise_conv2d(*tensors, *sample.sizes))
    for wanted in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(OP_BACKWARD, (grad, *tensors, *sample.sizes, wanted))


def test_compiles() -> None:
    sample = Sample("")
    tensors = sample.tensors(torch.float32)

    def run(function: Any) -> list[Tensor]:
        output = function(*tensors, *sample.sizes)
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(run(compiled), run(depthwise_conv2d), strict=True):
        torch.testing.assert_close(ours, expected)


def test_forward_mode() -> None:
    sample = Sample("")
    tensors = [tensor.detach() for tensor in sample.tensors()]
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    _, ours = torch.func.jvp(lambda x, w: depthwise_conv2d(x, w, 1), tuple(tensors), tangents)
    _, expected = torch.func.jvp(
        lambda x, w: F.conv2d(x, w, padding=1, groups=5), tuple(tensors), tangents
    )
    torch.testing.assert_close(ours, expected)


def test_flops() -> None:
    """Those of a convolution forward, and once more for each gradient."""
    sample = Sample("", padding=(3, 1), dilation=(2, 1))
    tensors = sample.tensors(torch.float32)
    with FlopCounterMode(display=False) as counter:
        output = depthwise_conv2d(*tensors, *sample.sizes)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        F.conv2d(*tensors, None, 1, *sample.sizes, groups=5)
    assert forward == counter.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(output.sum(), tensors)
    assert counter.get_total_flops() == 2 * forward


IMAGE, WEIGHT = torch.ones(2, 3, 5, 6), torch.ones(3, 1, 3, 3)


@pytest.mark.parametrize("function", [depthwise_conv2d, depthwise_conv2d_reference])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (IMAGE.int(), WEIGHT),
            "input must be of a float dtype, got torch.int32; convert it with input.float()",
        ),
        (
            (IMAGE[0], WEIGHT),
            "input must be of 4 dimensions, got shape (3, 5, 6); reshape it (a single image is a "
            "batch of 1)",
        ),
        (
            (IMAGE, WEIGHT.double()),
            "weight must be of the dtype of input, torch.float32, got torch.float64; convert it "
            "with weight.to(input.dtype)",
        ),
        (
            (IMAGE, WEIGHT.to("meta")),
            "weight must be on the device of input, cpu, got meta; move it with "
            "weight.to(input.device)",
        ),
        (
            (IMAGE, torch.ones(6, 1, 3, 3)),
            "weight must be of shape [3, 1, kh, kw], one kernel for each channel of input, got "
            "shape (6, 1, 3, 3); build the layer for the channels of its input",
        ),
        (
            (IMAGE, WEIGHT, 1, 6),
            "input must be as large as the dilated kernel 3x3, got 5x6, which gives an output of "
            "-5x-4; enlarge the image or the padding",
        ),
        (
            (IMAGE[..., :0], WEIGHT),
            "input must be of sizes above 0, got shape (2, 3, 5, 0); pass an image",
        ),
        ((IMAGE, WEIGHT, -1), "padding must be at least 0, got (-1, -1); change it"),
        ((IMAGE, WEIGHT, 0, (1, 0)), "dilation must be at least 1, got (1, 0); change it"),
        (
            (IMAGE, WEIGHT, (1, 2, 3)),
            "padding must be one integer or two (vertical, horizontal), got (1, 2, 3); pass two",
        ),
        (
            (IMAGE, WEIGHT, 1, 1.5),
            "dilation must be one integer or two (vertical, horizontal), got 1.5; pass two",
        ),
    ],
)
def test_errors(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert str(error.value) == f"depthwise_conv2d: {message}"


def test_error_of_backward() -> None:
    with pytest.raises(ValueError) as error:
        OP_BACKWARD(IMAGE, IMAGE, WEIGHT, [0, 0], [1, 1], [True, True])
    assert str(error.value) == (
        "depthwise_conv2d: grad must be of shape (2, 3, 3, 4), got (2, 3, 5, 6); padding and "
        "dilation decide the height and width"
    )


@pytest.mark.cuda
def test_on_cuda_it_is_the_reference() -> None:
    tensors = [t.detach().cuda().requires_grad_() for t in Sample("").tensors(torch.float32)]
    with torch.autocast("cuda", torch.bfloat16):
        output = depthwise_conv2d(*tensors, 1)
    assert output.dtype == torch.bfloat16
    expected = F.conv2d(*(t.bfloat16() for t in tensors), padding=1, groups=5)
    torch.testing.assert_close(output, expected, **TOLERANCE[torch.bfloat16])
    assert [g.dtype for g in torch.autograd.grad(output.sum(), tensors)] == [torch.float32] * 2
