"""batch_norm_relu: one list of samples feeds forward, gradients, opcheck and compilation."""

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
from torch import Tensor, nn

from nasfast.ops import _native, batch_norm_relu, batch_norm_relu_reference

OP = torch.ops.nasfast.batch_norm_relu.default
OP_BACKWARD = torch.ops.nasfast.batch_norm_relu_backward.default


@dataclass(frozen=True)
class Sample:
    """Sizes of one call; ``tensors`` draws the arguments."""

    id: str
    batch: int = 2
    channels: int = 5
    size: tuple[int, int] = (6, 9)
    mean: float = 1.0
    layout: str = "channels_last"

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """input, weight, bias."""
        input = torch.randn(self.batch, self.channels, *self.size) * 2 + self.mean
        input = arrange(input, self.layout)
        sums = _native.accumulate(dtype)
        weight, bias = torch.randn(2, self.channels, dtype=sums)
        return [t.requires_grad_() for t in (input.to(dtype), weight.clone(), bias.clone())]


def samples() -> list[Sample]:
    return [
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


every_sample = pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.id)


def check_reference(sample: Sample, dtype: torch.dtype) -> None:
    """Output, statistics and every gradient, against autograd of the reference in float64."""
    tensors = sample.tensors(dtype)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output, statistics = batch_norm_relu(*tensors)
    expected, wanted = batch_norm_relu_reference(*doubles)
    assert output.dtype == dtype
    assert statistics.dtype == _native.accumulate(dtype)
    cotangent = torch.randn_like(output)
    # where rounding decides which side of the ReLU an element is on, it takes no part
    cotangent = cotangent.masked_fill(((output > 0) != (expected > 0)), 0)
    gradients = torch.autograd.grad(output, tensors, cotangent)
    references = torch.autograd.grad(expected, doubles, cotangent.double())
    for value, reference in zip(
        [output, statistics, *gradients], [expected, wanted, *references], strict=True
    ):
        assert not value.isnan().any()
        tolerance = dict(TOLERANCE[dtype])
        tolerance["atol"] *= max(1, reference.abs().max().item())
        torch.testing.assert_close(value.double(), reference, **tolerance)


@every_sample
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.usefixtures("poison_empty")
def test_equals_reference(sample: Sample, dtype: torch.dtype) -> None:
    check_reference(sample, dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.builds(
        Sample,
        st.just("drawn"),
        st.integers(2, 5),
        st.integers(1, 70),
        st.tuples(st.integers(1, 20), st.integers(1, 20)),
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
    check_level(level, "batch_norm_relu", code)


def test_runs_without_the_extension() -> None:
    """Where ``nasfast._C`` cannot be imported, the op runs its reference and says so."""
    code = "for sample in t.samples()[:3]:\n    t.check_reference(sample, torch.float64)\n"
    check_without_extension("batch_norm_relu", code)


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


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_thread_count(dtype: torch.dtype) -> None:
    tensors = Sample("", channels=48, size=(40, 50)).tensors(dtype)

    def run() -> list[Tensor]:
        output, statistics = batch_norm_relu(*tensors)
        gradients = torch.autograd.grad(output, tensors, torch.ones_like(output).cumsum(-1))
        return [output, statistics, *gradients]

    check_same_bits_for_any_thread_count(run)


def test_gradcheck_twice() -> None:
    tensors = Sample("", channels=2, size=(3, 2)).tensors()

    def output(*arguments: Tensor) -> Tensor:
        return batch_norm_relu(*arguments)[0]

    assert torch.autograd.gradcheck(output, tensors)
    assert torch.autograd.gradgradcheck(output, tensors)


def test_expanded_gradient() -> None:
    """``output.sum().backward()`` hands over a gradient with stride 0."""
    tensors = Sample("").tensors()
    output, statistics = batch_norm_relu(*tensors)
    assert not statistics.requires_grad
    expanded = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    dense = torch.autograd.grad(output, tensors, torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_follows_input(layout: str) -> None:
    tensors = Sample("", layout=layout).tensors(torch.float32)
    output, _ = batch_norm_relu(*tensors)
    reference, _ = batch_norm_relu_reference(*tensors)
    (gradient,) = torch.autograd.grad(output.sum(), tensors[:1])
    for tensor in (output, gradient, reference):
        last = tensor.is_contiguous(memory_format=torch.channels_last)
        assert last == (layout == "channels_last")


def test_autocast_leaves_it_alone() -> None:
    """As it leaves batch normalisation alone: the input's dtype decides."""
    tensors = Sample("").tensors(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = batch_norm_relu(*tensors)
        floats, _ = batch_norm_relu(tensors[0].float(), *tensors[1:])
    assert torch.equal(output, batch_norm_relu(*tensors)[0])
    assert floats.dtype == torch.float32


@pytest.mark.parametrize("id", ["plain", "contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(id: str, dtype: torch.dtype) -> None:
    sample = next(sample for sample in samples() if sample.id == id)
    tensors = sample.tensors(dtype)
    torch.library.opcheck(OP, (*tensors, 1e-5))
    output, statistics = OP(*tensors, 1e-5)
    arguments = (torch.randn_like(output), *tensors, statistics, 1e-5)
    torch.library.opcheck(OP_BACKWARD, arguments)


def test_compiles() -> None:
    tensors = Sample("").tensors(torch.float32)

    def run(function: Any) -> list[Tensor]:
        output, statistics = function(*tensors)
        gradients = torch.autograd.grad(output.square().sum(), tensors)
        return [output, statistics, *gradients]

    compiled = torch.compile(batch_norm_relu, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(run(compiled), run(batch_norm_relu), strict=True):
        torch.testing.assert_close(ours, expected)


def test_forward_mode() -> None:
    tensors = tuple(tensor.detach() for tensor in Sample("").tensors())
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    _, ours = torch.func.jvp(lambda *t: batch_norm_relu(*t)[0], tensors, tangents)
    step = 1e-6
    moved = (t + step * tangent for t, tangent in zip(tensors, tangents, strict=True))
    difference = (batch_norm_relu(*moved)[0] - batch_norm_relu(*tensors)[0]) / step
    torch.testing.assert_close(ours, difference, rtol=1e-4, atol=1e-4)


IMAGE, VECTOR = torch.ones(2, 3, 5, 6), torch.ones(3)


@pytest.mark.parametrize("function", [batch_norm_relu, batch_norm_relu_reference])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (IMAGE.int(), VECTOR, VECTOR),
            "input must be of a float dtype, got torch.int32; convert it with input.float()",
        ),
        (
            (IMAGE[0], VECTOR, VECTOR),
            "input must be of 4 dimensions, got shape (3, 5, 6); reshape it (a single image is a "
            "batch of 1)",
        ),
        (
            (IMAGE[:1, :, :1, :1], VECTOR, VECTOR),
            "input must be of at least 2 pixels a channel, got shape (1, 3, 1, 1); a single one "
            "has no variance: normalise it with running statistics",
        ),
        (
            (IMAGE, VECTOR[:2], VECTOR),
            "weight must be of shape (3,), got (2,); it has one value per channel of input",
        ),
        (
            (IMAGE.bfloat16(), VECTOR, VECTOR.bfloat16()),
            "bias must be torch.float32 beside an input of torch.bfloat16, got torch.bfloat16; "
            "convert it with bias.to(torch.float32)",
        ),
        (
            (IMAGE, VECTOR.to("meta"), VECTOR),
            "weight must be on the device of input, cpu, got meta; move it with "
            "weight.to(input.device)",
        ),
        ((IMAGE, VECTOR, VECTOR, -1.0), "eps must be at least 0, got -1.0; change it"),
    ],
)
def test_errors(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    assert str(error.value) == f"batch_norm_relu: {message}"


def test_error_of_backward() -> None:
    with pytest.raises(ValueError) as error:
        OP_BACKWARD(IMAGE[:1], IMAGE, VECTOR, VECTOR, torch.ones(2, 3), 1e-5)
    assert str(error.value) == (
        "batch_norm_relu: grad must be like input, torch.float32 of shape (2, 3, 5, 6), got "
        "torch.float32 of shape (1, 3, 5, 6); convert it"
    )


@pytest.mark.cuda
def test_on_cuda_it_is_the_reference() -> None:
    tensors = [t.detach().cuda().requires_grad_() for t in Sample("").tensors(torch.float32)]
    output, statistics = batch_norm_relu(*tensors)
    expected, wanted = batch_norm_relu_reference(*(t.detach().cpu().double() for t in tensors))
    torch.testing.assert_close(output.cpu().double(), expected, **TOLERANCE[torch.float32])
    torch.testing.assert_close(statistics.cpu().double(), wanted, **TOLERANCE[torch.float32])
    torch.autograd.grad(output.sum(), tensors)
