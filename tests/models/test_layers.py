import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from nasfast.models import layers
from nasfast.models.layers import (
    OPS,
    Conv2d,
    GlobalAveragePool,
    SepConv,
    Zero,
    build_op,
    concatenate,
    global_mean,
    largest,
    norm_relu,
    normalized,
    resize,
)
from nasfast.ops import sep_conv
from nasfast.spaces.fast_nas import PRIMITIVES

# kernel, dilation, separable
CONVS = {
    "conv1x1": (1, 1, False),
    "conv3x3": (3, 1, False),
    "sep3x3": (3, 1, True),
    "sep5x5": (5, 1, True),
    "conv3x3_d3": (3, 3, False),
    "conv3x3_d12": (3, 12, False),
    "sep3x3_d3": (3, 3, True),
    "sep5x5_d6": (5, 6, True),
}


def op(name, channels=6, repeats=1):
    """An op in evaluation mode whose BatchNorm is no identity."""
    module = build_op(PRIMITIVES.index(name), channels, repeats).eval()
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return module


def batch_norm_relu(x, bn):
    scale = bn.weight / (bn.running_var + 1e-5).sqrt()
    shift = bn.bias - bn.running_mean * scale
    return (x * scale[:, None, None] + shift[:, None, None]).relu()


def test_every_primitive_has_an_op():
    assert tuple(OPS) == PRIMITIVES


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9), (13, 2)])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_shape(name, size, training):
    x = torch.rand(2, 6, *size)
    assert op(name, repeats=2).train(training)(x).shape == x.shape


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("name", CONVS)
@torch.no_grad()
def test_convolutions_against_formula(name, repeats):
    kernel, dilation, separable = CONVS[name]
    module, x = op(name, repeats=repeats), torch.randn(2, 6, 9, 7)
    convs = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    padding = dilation * (kernel - 1) // 2
    expected = x
    if separable:
        assert len(convs) == 2 * len(norms) == 2 * repeats
        for depthwise, pointwise, bn in zip(convs[::2], convs[1::2], norms):
            expected = F.conv2d(expected, depthwise, None, 1, padding, dilation, groups=6)
            expected = torch.einsum("oi,nihw->nohw", pointwise[:, :, 0, 0], expected)
            expected = batch_norm_relu(expected, bn)
    else:
        assert len(convs) == len(norms) == 1
        expected = F.conv2d(expected, convs[0], None, 1, padding, dilation)
        expected = batch_norm_relu(expected, norms[0])
    assert convs[0].shape[-2:] == (kernel, kernel)
    torch.testing.assert_close(module(x), expected)


@torch.no_grad()
def test_gap_against_formula():
    module, x = op("gap"), torch.randn(2, 6, 9, 7)
    mean = torch.einsum("oi,nihw->no", module.conv.weight[:, :, 0, 0], x) / 63
    expected = batch_norm_relu(mean[:, :, None, None], module.bn)
    torch.testing.assert_close(module(x), expected.expand_as(x))


def test_gap_trains_on_a_batch_of_one():
    module = op("gap").train()
    x = torch.randn(1, 6, 5, 4, requires_grad=True)
    y = module(x)
    torch.testing.assert_close(y, module.eval()(x))
    y.sum().backward()
    assert module.conv.weight.grad.isfinite().all()
    assert x.grad.isfinite().all()


def test_gap_normalises_larger_batches_over_the_batch():
    module = GlobalAveragePool(6).train()
    before = module.bn.running_mean.clone()
    module(torch.randn(4, 6, 5, 4))
    assert not torch.equal(module.bn.running_mean, before)


def test_skip_and_none():
    x = torch.full((1, 6, 2, 3), float("nan"))
    assert op("skip")(x) is x
    assert torch.equal(Zero()(x), torch.zeros(1, 6, 2, 3))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_ops_leave_their_input_alone(name):
    x = torch.randn(2, 6, 5, 4)
    before = x.clone()
    op(name).train()(x)
    assert torch.equal(x, before)


def test_resize():
    x = torch.rand(1, 2, 3, 5)
    assert resize(x, (3, 5)) is x
    line = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert resize(line, (1, 4)).flatten().tolist() == [0.0, 0.25, 0.75, 1.0]


def test_largest_compares_areas():
    tall, wide, same = (torch.rand(1, 1, *size) for size in ((20, 2), (10, 9), (9, 10)))
    assert largest([tall, wide]) == largest([wide, tall]) == (10, 9)
    assert largest([same, wide]) == (9, 10)


def dirty_heap():
    """Leave NaN in freed memory, for an op that reads what nothing wrote."""
    for _ in range(12):
        torch.full((random.randrange(1, 1_000_000),), float("nan"))


@pytest.mark.parametrize("size", [(40, 40), (36, 44)])
@pytest.mark.parametrize("channels", [24, 32])
@pytest.mark.parametrize("name", [*CONVS, "gap"])
def test_gradients_under_bfloat16(name, channels, size):
    """oneDNN of torch 2.13 gets those of dilated convolutions wrong, or different in each run."""
    module = build_op(PRIMITIVES.index(name), channels, 1).to(memory_format=torch.channels_last)
    images = torch.randn(4, channels, *size).contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    inputs = [images, *module.parameters()]

    def gradients(enabled):
        dirty_heap()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = module(images)
        weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
        return torch.autograd.grad((weight * y.float()).sum(), inputs)

    expected = gradients(False)
    first, *others = (gradients(True) for _ in range(4))
    for got, reference in zip(first, expected):
        assert got.isfinite().all()
        assert (got - reference).norm() < 0.1 * reference.norm()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first))


def test_concatenate_is_cat_with_gradients_that_are_maps() -> None:
    maps = [torch.randn(2, c, 5, 7, requires_grad=True) for c in (3, 1, 4)]
    output = concatenate(*maps)
    torch.testing.assert_close(output, torch.cat(maps, 1), rtol=0, atol=0)
    grad = torch.randn_like(output).contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(output, maps, grad)
    for gradient, part in zip(gradients, grad.split([3, 1, 4], 1), strict=True):
        torch.testing.assert_close(gradient, part, rtol=0, atol=0)
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [3, 0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.3},
        {"momentum": None},
        {"affine": False},
        {"bias": False},
        {"eps": 0.3},
        {"track_running_stats": False},
        {"track_running_stats": False, "momentum": None},
    ],
    ids=str,
)
def test_norm_relu_is_the_modules(settings, batch, training) -> None:
    norm, other = (nn.BatchNorm2d(6, **settings).train(training) for _ in range(2))
    for count in (3, batch, 3):
        x = torch.randn(count, 6, 5, 4)
        torch.testing.assert_close(norm_relu(x, norm), F.relu(other(x)))
    torch.testing.assert_close(dict(norm.named_buffers()), dict(other.named_buffers()))


@pytest.mark.parametrize(
    "changes",
    [{"track_running_stats": False}, {"num_batches_tracked": None}, {"training": False}],
    ids=str,
)
def test_norm_relu_of_a_module_that_was_changed(changes) -> None:
    norm, other = (nn.BatchNorm2d(6) for _ in range(2))
    for _ in range(2):
        x = torch.randn(3, 6, 5, 4)
        torch.testing.assert_close(norm_relu(x, norm), F.relu(other(x)))
        for module in (norm, other):
            for name, value in changes.items():
                setattr(module, name, value)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(other.named_buffers()))


def test_norm_relu_lets_hooks_keep_what_they_saw() -> None:
    norm = nn.BatchNorm2d(3)
    kept, gradients = [], []
    norm.register_forward_hook(lambda module, args, output: kept.append(output))
    norm.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs[0]))
    x = torch.randn(2, 3, 4, 5)
    y = norm_relu(x.requires_grad_(), norm)
    y.sum().backward()
    torch.testing.assert_close(y, F.relu(kept[0]))
    assert (kept[0] < 0).any()
    torch.testing.assert_close(gradients[0], (kept[0] > 0).float())


def test_norm_relu_calls_hooks() -> None:
    """As pruning needs: the mask is laid on when the module is called."""
    norm, x = nn.BatchNorm2d(6), torch.randn(3, 6, 5, 4)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    prune.l1_unstructured(norm, "weight", 2)
    with torch.no_grad():
        norm.weight_orig += 1
    y = norm_relu(x, norm)
    assert (y.amax((0, 2, 3)) == 0).sum() == 2
    torch.testing.assert_close(y, F.relu(norm(x)))
    y.sum().backward()
    norm_relu(x, norm).sum().backward()  # no graph of the step before


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_norm_relu_refuses_an_eps_as_the_module_does(eps) -> None:
    norm, x = nn.BatchNorm2d(6, eps=eps), torch.randn(3, 6, 5, 4)
    for call in (lambda: norm_relu(x, norm), lambda: norm(x)):
        with pytest.raises(
            ValueError, match=f"eps must be positive during training, but got {eps}"
        ):
            call()


def test_one_value_a_channel_without_running_statistics() -> None:
    norm, x = nn.BatchNorm2d(6, track_running_stats=False), torch.randn(1, 6, 1, 1)
    for call in (normalized, norm_relu):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            call(x, norm)


def test_one_value_a_channel_of_a_module_that_sees_more() -> None:
    """Other classes than PyTorch's read the batches of all processes, which wait for each other."""

    class Shared(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 7

    x = torch.ones(1, 6, 1, 1)
    for call in (normalized, norm_relu):
        assert torch.equal(call(x, Shared(6)), x + 7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wide", [False, True])
def test_norm_relu_of_a_module_in_another_precision(dtype, training, wide) -> None:
    """``wide``: its parameters stay in float32."""
    norms = [nn.BatchNorm2d(6).to(dtype).train(training) for _ in range(2)]
    if wide and dtype != torch.float64:
        norms = [norm.float() for norm in norms]
    x = torch.randn(3, 6, 5, 4).to(dtype)
    results = []
    for norm, call in zip(norms, (norm_relu, lambda x, norm: F.relu(norm(x)))):
        leaf = x.clone().requires_grad_()
        y = call(leaf, norm)
        inputs = [leaf, norm.weight, norm.bias]
        results.append([y, *torch.autograd.grad((y.float() ** 2).sum(), inputs), *norm.buffers()])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_global_mean() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(global_mean(x), x.mean((2, 3), keepdim=True))
    assert torch.autograd.gradcheck(global_mean, [x])
    (gradient,) = torch.autograd.grad(global_mean(x).sum(), [x])
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_exports_hold_operators_of_pytorch() -> None:
    module = build_op(PRIMITIVES.index("sep5x5_d6"), 6, 1).eval()
    x = torch.randn(2, 6, 5, 4)
    program = torch.export.export(module, (x,))
    assert not any("nasfast" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_of_pairs(dtype):
    """Those with a group for each two channels are products on a CPU, as PyTorch computes them."""
    conv, x = Conv2d(12, 6, 1, groups=6), torch.randn(2, 12, 5, 7)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    direction = torch.randn(2, 6, 5, 7)
    results = []
    for form in (conv, nn.Conv2d.forward.__get__(conv)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = form(x)
        results.append([y, *torch.autograd.grad((y * direction).sum(), (x, conv.weight))])
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    for got, want in zip(*results):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, **tolerance)
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("precision", ["module", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dilated_convolutions_of_ragged_channels_run_in_float32(dtype, precision):
    """Also where the network is in half precision; they give the dtype of any convolution."""
    conv, reference = Conv2d(24, 24, 3, 3), nn.Conv2d(24, 24, 3, 1, 3, 3, bias=False)
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(4, 24, 40, 40).contiguous(memory_format=torch.channels_last)
    if precision == "module":
        conv, reference, x = conv.to(dtype), reference.to(dtype), x.to(dtype)
    conv = conv.to(memory_format=torch.channels_last)
    wide = conv.weight.detach().float().requires_grad_()
    z = F.conv2d(x.float(), wide, None, 1, 3, 3)
    direction = torch.linspace(-1, 1, z.numel()).view(z.shape)
    (want,) = torch.autograd.grad((z * direction).sum(), [wide])
    for _ in range(4):
        dirty_heap()
        with torch.autocast("cpu", dtype, enabled=precision == "autocast"):
            y, expected = conv(x), reference(x)
        assert y.dtype == expected.dtype == dtype
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
        (got,) = torch.autograd.grad((y.float() * direction).sum(), [conv.weight])
        assert got.dtype == conv.weight.dtype
        assert (got.float() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel", [(3, 1), (5, 2)], ids=str)
def test_sep_conv_is_the_modules(dtype, autocast, kernel) -> None:
    """Output, gradients, running statistics and their count; ``autocast`` to bfloat16."""
    separable = SepConv(20, *kernel, strides=(1, 1), out_channels=12)
    separable.to(dtype)  # all in half precision goes the way of the modules
    twin, exact = copy.deepcopy(separable), copy.deepcopy(separable).double()
    x = torch.randn(3, 20, 9, 11).to(dtype).contiguous(memory_format=torch.channels_last)
    results = []
    for module in (separable, twin, exact):
        leaf = x.clone().to(next(module.parameters()).dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(leaf) if module is separable else nn.Sequential.forward(module, leaf)
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)
        gradients = torch.autograd.grad((y.double() * weights).sum(), [leaf, *module.parameters()])
        results.append([y, *gradients, *module.buffers()])
    ours = theirs = 0.0
    for got, want, truth in zip(*results, strict=True):
        assert got.dtype == want.dtype
        norm = truth.double().norm()
        ours += float((got.double() - truth).norm() / norm)
        theirs += float((want.double() - truth).norm() / norm)
    assert ours < 1.3 * theirs + 1e-4


def fused(monkeypatch) -> list[int]:
    """Grows by a call of sep_conv."""
    calls = []

    def counting(*arguments):
        calls.append(1)
        return sep_conv(*arguments)

    monkeypatch.setattr(layers, "sep_conv", counting)
    return calls


def test_sep_conv_runs_fused(monkeypatch) -> None:
    calls, x = fused(monkeypatch), torch.randn(2, 6, 5, 4)
    SepConv(6, 3, strides=(1, 1))(x)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.eval(),
        lambda module: module[1][1].eval(),
        lambda module: module[0].register_forward_hook(lambda *_: None),
        lambda module: module[1].register_forward_pre_hook(lambda *_: None),
        lambda module: module[1][0].register_forward_hook(lambda *_: None),
        lambda module: module[1][1].register_forward_hook(lambda *_: None),
        lambda module: module[1][2].register_forward_hook(lambda *_: None),
        lambda module: prune.l1_unstructured(module[0], "weight", 2),
        lambda module: module[1].__setitem__(1, nn.BatchNorm2d(6, affine=False)),
        lambda module: module[1].__setitem__(2, nn.ReLU6()),
        lambda module: module.__setitem__(1, nn.Identity()),
    ],
)
def test_sep_conv_of_a_module_that_was_changed(change, monkeypatch) -> None:
    """Frozen norms, hooks and other modules go the way of the modules."""
    calls, x = fused(monkeypatch), torch.randn(2, 6, 5, 4)
    module = SepConv(6, 3)
    twin = copy.deepcopy(module)
    change(module), change(twin)
    torch.testing.assert_close(module(x), nn.Sequential.forward(twin, x))
    torch.testing.assert_close(dict(module.named_buffers()), dict(twin.named_buffers()))
    assert not calls


@pytest.mark.parametrize("shape", [(0, 6, 5, 4), (1, 6, 1, 1)], ids=str)
def test_sep_conv_without_a_variance(shape, monkeypatch) -> None:
    """No image, or one value a channel."""
    calls, module = fused(monkeypatch), SepConv(6, 3)
    assert module(torch.randn(shape)).shape == shape
    assert not calls
