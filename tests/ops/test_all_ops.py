"""Every check that holds for all ops, over the samples that the tests of each op register."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from op_harness import (
    LEVELS,
    REPRODUCIBLE,
    TOLERANCE,
    Op,
    Sample,
    convert,
    native,
    require_grad,
    run_python,
)
from test_batch_norm_relu import BATCH_NORM_RELU
from test_deform_conv2d import DEFORM_CONV2D
from test_depthwise_conv2d import DEPTHWISE_CONV2D
from test_feature_gather import FEATURE_GATHER
from test_mixed_op import MIXED_OP
from test_sep_conv import SEP_CONV
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from nasfast.ops import _native, _register

OPS = {
    op.name: op
    for op in (
        BATCH_NORM_RELU,
        DEFORM_CONV2D,
        DEPTHWISE_CONV2D,
        FEATURE_GATHER,
        MIXED_OP,
        SEP_CONV,
    )
}
DIFFERENTIABLE = [op for op in OPS.values() if op.differentiable]
ON_CUDA = [DEFORM_CONV2D, MIXED_OP]


def of_name(value: Any) -> str:
    """The id of a parameter."""
    if isinstance(value, Sample):
        return f"{value.op}-{value.id}"
    return value.name if isinstance(value, Op) else str(value).replace("torch.", "")


def every(*names: str, values: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(",".join(names), values, ids=of_name)


def few(count: int | None = None) -> pytest.MarkDecorator:
    return every("sample", values=[s for op in DIFFERENTIABLE for s in op.find(*op.few[:count])])


every_op = every("op", values=DIFFERENTIABLE)
autocast = pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])


def skip_repetition(sample: Sample, nightly: bool) -> None:
    """Without --nightly a combination that is tried on the first sample of an op is left out on
    the others."""
    if not nightly and sample is not OPS[sample.op].first:
        pytest.skip("the first sample is enough: --nightly")


def registered(sample: Sample, suffix: str = "") -> Any:
    return getattr(torch.ops.nasfast, sample.op + suffix).default


@every(
    "sample", "dtype", values=[(s, d) for op in OPS.values() for s in op.samples for d in s.dtypes]
)
@pytest.mark.usefixtures("poison_empty")
def test_equals_reference(sample: Any, dtype: Any) -> None:
    sample.check(dtype)


@every("op", values=[*OPS.values()])
def test_equals_reference_for_drawn_sizes(op: Op, nightly: bool) -> None:
    """And drawn settings and memory layouts; without --nightly the first of the many examples."""
    examples = op.examples if nightly else min(op.examples, max(40, op.examples // 5))

    @settings(REPRODUCIBLE, max_examples=examples)
    @given(op.drawn)
    def check(drawn: tuple[Any, Any]) -> None:
        torch.manual_seed(0)
        sample, dtype = drawn
        sample.check(dtype)

    check()


@native
@pytest.mark.parametrize("level", LEVELS)
def test_instruction_sets(level: str) -> None:
    """The kernels of each, of all ops, in one process that is told to use them."""
    best = _native.isa_level()
    if best not in LEVELS or LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip(f"the other tests run on {best}")
    code = (
        f"assert _native.isa_level() == '{level}'\n"
        "torch.use_deterministic_algorithms(True)\n"  # which poisons memory
        "for op in t.OPS.values():\n"
        "    for sample in op.samples:\n"
        "        for dtype in sample.dtypes:\n"
        "            sample.check(dtype)\n"
    )
    run_python(code, NASFAST_ISA=level)


def test_without_the_extension() -> None:
    """Where ``nasfast._C`` cannot be imported, every op runs its reference and says so."""
    code = (
        "assert _native.isa_level() == 'none'\n"
        "for op in t.OPS.values():\n"
        "    for sample in op.samples[:4]:\n"
        "        sample.check(sample.dtypes[0])\n"
        "    print(_native.BACKENDS[op.name]['cpu'])\n"
        "for op in t.DIFFERENTIABLE:\n"
        "    t.test_autocast_leaves_float64_alone(op)\n"
        "t.test_autocast_brings_tensors_to_one_dtype(t.DEFORM_CONV2D)\n"
        "t.test_autocast_brings_tensors_to_one_dtype(t.MIXED_OP)\n"
    )
    backends = run_python(code, "sys.modules['nasfast._C'] = None\n").splitlines()
    assert len(backends) == len(OPS)
    for backend in backends:
        assert backend.startswith("reference: nasfast._C cannot be imported: ")


@native
@every("sample", values=[s for op in DIFFERENTIABLE for s in op.find(*op.parallel)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=of_name)
def test_same_bits_for_any_thread_count(sample: Any, dtype: torch.dtype) -> None:
    tensors, results = sample.tensors(dtype), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(sample.forward_backward(tensors))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@every("sample", values=[sample for op in DIFFERENTIABLE for sample in op.gradcheck])
def test_gradcheck(sample: Any) -> None:
    tensors = sample.tensors()
    require_grad(tensors)
    assert torch.autograd.gradcheck(lambda *t: sample.call(t)[0], tensors)


@every("sample", values=[sample for op in DIFFERENTIABLE for sample in op.gradgradcheck])
def test_gradgradcheck(sample: Any) -> None:
    tensors = sample.tensors()
    require_grad(tensors)
    fast = len(tensors) > 5  # gradients projected on one direction
    assert torch.autograd.gradgradcheck(lambda *t: sample.call(t)[0], tensors, fast_mode=fast)


@every_op
@pytest.mark.parametrize("create_graph", [False, True])
def test_second_derivatives_inside_a_graph(op: Op, create_graph: bool) -> None:
    """All tensors depend on what is differentiated, as in a gradient penalty."""
    sample = replace(op.first, size=(3, 4))
    tensors = sample.tensors()

    def penalty(reference: bool) -> list[Tensor]:
        leaves = require_grad([tensors[0], tensors[sample.weight]])
        factor = 1 + sum(leaf.sum() for leaf in leaves) / 1000
        output, *_ = sample.call([t if t is None else t * factor for t in tensors], reference)
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(loss, leaves, create_graph=create_graph)]

    for ours, reference in zip(penalty(False), penalty(True), strict=True):
        sample.assert_close(ours, reference, torch.float64)


@few()
def test_expanded_gradient(sample: Any) -> None:
    """``output.sum().backward()`` hands over a gradient with stride 0."""
    tensors = sample.tensors()
    leaves = require_grad(tensors)
    output, *_ = sample.call(tensors)
    expanded = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@few()
@pytest.mark.usefixtures("poison_empty")
def test_single_gradient(sample: Any) -> None:
    """Each gradient alone equals the one computed with the others."""
    tensors = sample.tensors()
    present = [i for i, tensor in enumerate(tensors) if tensor is not None]
    expected = sample.forward_backward(tensors)[-len(present) :]
    for i, gradient in zip(present, expected, strict=True):
        detached = convert(tensors)
        detached[i].requires_grad_()
        output, *_ = sample.call(detached)
        cotangent = torch.ones_like(output).cumsum(-1).sin()
        (alone,) = torch.autograd.grad(output, detached[i], cotangent)
        if sample.alone_is_equal:
            assert torch.equal(alone, gradient), sample.names[i]
        else:
            sample.assert_close(alone, gradient, torch.float64, sample.names[i])


@every_op
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=of_name)
def test_layout_follows_input(op: Op, layout: str, dtype: torch.dtype) -> None:
    """But that of mixed_op, which is channels last."""
    sample = replace(op.first, layout=layout)
    tensors = sample.tensors(dtype)
    leaves = require_grad(tensors)
    output, *_ = sample.call(tensors)
    found = [output, torch.autograd.grad(output.sum(), leaves)[0]]
    if op is not MIXED_OP:
        found += sample.call(tensors, reference=True)[:1]
    for tensor in found:
        last = tensor.is_contiguous(memory_format=torch.channels_last)
        assert last == (layout == "channels_last" or op is MIXED_OP)


@every_op
def test_autocast_leaves_float64_alone(op: Op) -> None:
    tensors = op.first.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, *_ = op.first.call(tensors)
    assert torch.equal(output, op.first.call(tensors)[0])


@every("op", values=[op for op in DIFFERENTIABLE if op is not BATCH_NORM_RELU])
def test_autocast_brings_tensors_to_one_dtype(op: Op) -> None:
    """As for a convolution, but what gives positions, factors and biases of them stays exact."""
    tensors = op.first.tensors(torch.float32)
    tensors[0] = tensors[0].half()
    leaves = require_grad(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, *_ = op.first.call(tensors)
    assert output.dtype == torch.bfloat16
    cast = [
        t if t is None or name in op.first.exact else t.bfloat16()
        for name, t in zip(op.first.names, tensors, strict=True)
    ]
    assert torch.equal(output, op.first.call(cast)[0])
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in leaves]


def test_casts_together_are_casts() -> None:
    """To the bit, with their gradients and those of these; on CUDA they share a launch."""
    tensors = [torch.randn(2, 3), torch.randn(4), torch.randn(5)]
    leaves = require_grad(tensors)

    def results(cast: Any) -> list[Tensor]:
        one, two, _ = cast(leaves)
        loss = (one.float().square().sum() * two.float().sum()).sin()
        first = torch.autograd.grad(loss, leaves[:2], create_graph=True)
        plain = torch.autograd.grad(loss, leaves[:2], retain_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves[:2])
        return [one, two, *first, *plain, *second]

    together = results(lambda tensors: _register._Together.apply(torch.bfloat16, *tensors))
    apart = results(lambda tensors: [tensor.bfloat16() for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


@every("op", values=[op for op in DIFFERENTIABLE if op is not BATCH_NORM_RELU])
@every("dtype", values=[torch.int64, torch.float64])
def test_autocast_hides_no_wrong_dtype(op: Op, dtype: torch.dtype) -> None:
    names, index = op.first.names, 0 if dtype == torch.int64 else op.first.weight
    tensors = op.first.tensors(torch.float32)
    message = "expected input of a float dtype"
    if index:
        message = rf"{names[index]} of (the dtype of|torch.float32 beside an) input"
    with torch.autocast("cpu"), pytest.raises(ValueError, match=message):
        op.first.call_changed({names[index]: tensors[index].to(dtype)}, False)


@few()
@every("dtype", values=[torch.float32, torch.float64])
def test_opcheck(sample: Any, dtype: torch.dtype, nightly: bool) -> None:
    if dtype == torch.float64:
        skip_repetition(sample, nightly)
    tensors = sample.tensors(dtype)
    require_grad(tensors)
    torch.library.opcheck(registered(sample), sample.arguments(tensors))


@every(
    "sample",
    "wanted",
    "differentiate",
    values=[
        (sample, wanted, differentiate and sample is op.first)
        for op in DIFFERENTIABLE
        for sample in op.find(*op.few[:4])
        for wanted, differentiate in op.wanted
    ],
)
def test_opcheck_backward(sample: Any, wanted: list[bool], differentiate: bool) -> None:
    tensors = sample.tensors(torch.float32)
    if differentiate:
        require_grad(tensors)
    arguments = sample.backward_arguments(tensors, wanted)
    options = {} if differentiate else {"test_utils": ("test_schema", "test_faketensor")}
    output, *_ = sample.call(tensors)
    grad = torch.randn_like(output)
    torch.library.opcheck(registered(sample, "_backward"), (grad, *arguments), **options)


@few(3)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@autocast
def test_compile_fullgraph(sample: Any, dynamic: bool, autocast: bool, nightly: bool) -> None:
    if not (dynamic and autocast):
        skip_repetition(sample, nightly)
    torch.compiler.reset()

    def function(*tensors: Any) -> Any:
        return sample.call(tensors)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((5, 7), (6, 9)):
        tensors = replace(sample, size=size).tensors(torch.float32)
        leaves = require_grad(tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            pair = compiled(*tensors), function(*tensors)
        for got, expected in zip(*pair, strict=True):
            assert torch.equal(got, expected)
        first, second = (torch.autograd.grad(y[0].sin().sum(), leaves) for y in pair)
        for got, expected in zip(first, second, strict=True):
            torch.testing.assert_close(got, expected)


@every_op
def test_export(op: Op) -> None:
    class Block(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return op.first.call([*tensors])[0]

    small, large = (
        tuple(replace(op.first, batch=n, size=size).tensors(torch.float32))
        for n, size in ((2, (5, 7)), (3, (11, 7)))
    )
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(
        {0: dynamic, 2: dynamic} if name in ("input", "offset", "mask") else None
        for name in op.first.names
    )
    program = torch.export.export(Block(), small, dynamic_shapes=(shapes,))
    assert f"nasfast.{op.name}" in program.graph_module.code
    torch.testing.assert_close(program.module()(*large), op.first.call([*large])[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@few(2)
@pytest.mark.parametrize("transform", ["grad", "jvp", "forward_ad", "grad of vmap", "vmap of grad"])
def test_transforms_differentiate_the_reference(sample: Any, transform: str) -> None:
    """What registered ops cannot do in PyTorch is done, and not taken for zero."""
    sample = replace(sample, size=(3, 4), layout="contiguous")
    tensors, at = sample.tensors(), sample.weight
    point = tensors[at]
    tangents = torch.randn(2, *point.shape, dtype=torch.float64)

    def results(reference: bool) -> Any:
        def of(weight: Tensor) -> Tensor:
            output: Tensor = sample.call([*tensors[:at], weight, *tensors[at + 1 :]], reference)[0]
            return output

        def loss(weight: Tensor) -> Tensor:
            return of(weight).square().sum()

        if transform == "grad":
            return torch.func.grad(loss)(point)
        if transform == "jvp":
            return torch.func.jvp(of, (point,), (tangents[0],))[1]
        if transform == "grad of vmap":
            return torch.func.grad(lambda w: torch.vmap(of)(w).square().sum())(tangents)
        if transform == "vmap of grad":
            return torch.vmap(torch.func.grad(loss))(tangents)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(of(forward_ad.make_dual(point, tangents[0]))).tangent

    torch.testing.assert_close(results(False), results(True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_op
def test_vmap_and_batched_gradients(op: Op) -> None:
    """One call for each element."""
    sample = replace(op.first, size=(3, 4))
    tensors = sample.tensors()
    images = torch.randn(3, *tensors[0].shape, dtype=torch.float64)
    outputs = torch.vmap(lambda x: sample.call([x, *tensors[1:]])[0])(images)
    for image, output in zip(images, outputs, strict=True):
        sample.assert_close(output, sample.call([image, *tensors[1:]])[0], torch.float64)
    leaves = require_grad(tensors)
    output, *_ = sample.call(tensors)
    cotangents = torch.randn(3, *output.shape, dtype=torch.float64)
    batched = torch.autograd.grad(output, leaves, cotangents, True, is_grads_batched=True)
    for i, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        torch.testing.assert_close([g[i] for g in batched], list(expected))


@every("sample", values=[s for op in DIFFERENTIABLE if op.convolutions for s in op.find(*op.few)])
def test_flops_are_those_of_convolutions(sample: Any) -> None:
    """Forward, and once more for each gradient."""
    tensors = sample.tensors(torch.float32)
    leaves = require_grad(tensors)
    with FlopCounterMode(display=False) as ours:
        output, *_ = sample.call(tensors)
    with FlopCounterMode(display=False) as convolutions:
        OPS[sample.op].convolutions(sample, tensors)
    assert ours.get_total_flops() == convolutions.get_total_flops()
    assert (ours.get_total_flops() > 0) == (sample.batch > 0)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(output.sum(), leaves)
    assert backward.get_total_flops() == 2 * ours.get_total_flops()


@every_op
def test_modes_get_the_same_numbers(op: Op) -> None:
    """By the registered op or by its kernel."""
    tensors = op.first.tensors(torch.float32)
    expected = op.first.call(tensors)[0]
    with FlopCounterMode(display=False):
        assert torch.equal(op.first.call(tensors)[0], expected)
    with torch.inference_mode():
        assert torch.equal(op.first.call(tensors)[0], expected)


@pytest.mark.parametrize("reference", [False, True], ids=["op", "reference"])
@every("op", "case", values=[(op, case) for op in OPS.values() for case in op.errors])
def test_usage_errors(op: Op, case: str, reference: bool) -> None:
    changes, message = op.errors[case]
    with pytest.raises(ValueError) as error:
        op.first.call_changed(changes, reference)
    assert str(error.value) == f"{op.name}: expected {message}"


@every_op
def test_error_of_a_bad_gradient(op: Op) -> None:
    tensors = op.first.tensors(torch.float32)
    output, *_ = op.first.call(tensors)
    arguments = op.first.backward_arguments(tensors, op.wanted[0][0])
    with pytest.raises(ValueError) as error:
        registered(op.first, "_backward")(output[..., :-1], *arguments)
    assert str(error.value) == f"{op.name}: expected grad {op.bad_gradient}"


PRECISIONS = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
}
"""Dtype, and the one whose tolerance holds."""
WAYS = ("forward", "backward")


def check_on_cuda(sample: Any, precision: str, cuda_kernels: list[str]) -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    sample.check_on("cuda", *PRECISIONS[precision])
    assert_ran(sample, cuda_kernels)


def assert_ran(sample: Any, cuda_kernels: list[str]) -> None:
    if sample.batch:
        pairs = [{f"{sample.op}{of}_{way}" for way in WAYS} for of in ("", "_columns")]
        assert any(pair <= {*cuda_kernels} for pair in pairs)


@pytest.mark.cuda
@every("sample", values=[sample for op in ON_CUDA for sample in op.samples])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("precision", [*PRECISIONS])
def test_cuda_equals_reference(
    sample: Any, precision: str, deterministic: bool, cuda_kernels: list[str]
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    check_on_cuda(sample, precision, cuda_kernels)


@pytest.mark.cuda
@every("sample", values=[sample for op in ON_CUDA for sample in op.large])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_cuda_large_tiles(sample: Any, precision: str, cuda_kernels: list[str]) -> None:
    check_on_cuda(sample, precision, cuda_kernels)


@pytest.mark.cuda
@every("op", values=ON_CUDA)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=of_name)
def test_cuda_same_bits_in_every_run(op: Op, dtype: torch.dtype, cuda_kernels: list[str]) -> None:
    sample = replace(op.large[0], batch=2, size=(40, 60))
    tensors = convert(sample.tensors(dtype), "cuda")
    torch.use_deterministic_algorithms(True)
    first, *others = (sample.forward_backward(tensors) for _ in range(5))
    assert all(torch.equal(a, b) for run in others for a, b in zip(first, run, strict=True))
    assert_ran(sample, cuda_kernels)


@pytest.mark.cuda
@every("sample", values=[sample for op in ON_CUDA for sample in op.large[:2]])
def test_cuda_graph(sample: Any, cuda_kernels: list[str]) -> None:
    """Captured on a stream of its own, without a synchronisation; replayed with other values."""
    sample = replace(sample, batch=2, size=(20, 30))
    tensors = convert(sample.tensors(torch.float32), "cuda")
    sample.forward_backward(tensors)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = sample.forward_backward(tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tensors[0].data.copy_(torch.randn_like(tensors[0]))
    graph.replay()
    for value, expected in zip(captured, sample.forward_backward(tensors), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-3)
    assert_ran(sample, cuda_kernels)


@pytest.mark.cuda
@every("op", values=ON_CUDA)
def test_cuda_compile_and_autocast(op: Op, cuda_kernels: list[str]) -> None:
    def function(*tensors: Any) -> Any:
        return op.first.call(tensors)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tensors = convert(op.first.tensors(torch.float32), "cuda")
    leaves = require_grad(tensors)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output, eager = compiled(*tensors), function(*tensors)
    assert output.dtype == torch.bfloat16
    op.first.assert_close(output, eager, torch.bfloat16)
    op.first.assert_close(output, function(*tensors), torch.bfloat16)
    torch.autograd.grad(output.sum(), leaves)
    assert_ran(op.first, cuda_kernels)
