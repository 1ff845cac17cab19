"""Networks of every family that are in half precision or in float64 themselves train on a CPU."""

import copy
from collections.abc import Callable

import pytest
import torch
from test_io import NETWORKS as FILED
from torch import Tensor, nn

from nasfast.models.build import DETECTOR, RESTORER, SEGMENTER, TEMPLATES
from nasfast.models.layers import Conv2d, ConvBNReLU, DepthwiseSeparable, SepConv
from nasfast.models.mixed_op import MixedOp, PlainMixedOp
from nasfast.models.pyramids import DeformBNReLU
from nasfast.models.supernet import Supernet, SupernetConfig


class Mixed(nn.Module):
    """A mixed operation with its weights."""

    def __init__(self, op: PlainMixedOp) -> None:
        super().__init__()
        self.op, self.alphas = op, nn.Parameter(torch.linspace(0.5, 1.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.alphas)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "decoder": FILED[SEGMENTER],
    "templates": FILED[TEMPLATES],
    "detector": FILED[DETECTOR],
    "restorer": FILED[RESTORER],
    "supernet": lambda: Supernet(SupernetConfig(1, 2, 4), 3),
    "supernet, saved": lambda: Supernet(SupernetConfig(1, 2, 4, memory="save"), 3),
    "supernet, plain": lambda: Supernet(SupernetConfig(1, 2, 4, memory="save", fused=False), 3),
    "supernet, free": lambda: Supernet(SupernetConfig(2, 1, 4, True, "free"), 3),
}
LAYERS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "mixed, saved": (10, lambda: Mixed(MixedOp(10, affine=True))),
    "mixed, recomputed": (10, lambda: Mixed(MixedOp(10, memory="recompute"))),
    "mixed, not normalised": (10, lambda: Mixed(MixedOp(10, norm="none"))),
    "mixed, plain": (10, lambda: Mixed(PlainMixedOp(10))),
    "deformable": (16, lambda: DeformBNReLU(16)),
    "dilated": (6, lambda: ConvBNReLU(6, 10, 3, 3)),
    "depthwise": (10, lambda: Conv2d(10, 10, 3, 4, 10, 2)),
    "pairs": (12, lambda: Conv2d(12, 6, 1, groups=6)),
    "separable": (10, lambda: SepConv(10, 5, 2, (1, 1))),
    "separable, atrous": (10, lambda: DepthwiseSeparable(10, 6, 2)),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float64)


def tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    assert isinstance(output, list | tuple)
    return [tensor for part in output for tensor in tensors(part)]


def train(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Forward and backward; the outputs."""
    outputs = tensors(network(images))
    loss = sum(output.double().square().log1p().mean() for output in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    return [output.detach() for output in outputs]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def assert_gradients(network: nn.Module, like: nn.Module, dtype: torch.dtype) -> None:
    """Of the parameters that have one in float32, in the dtype of the parameters, finite."""
    for parameter, other in zip(network.parameters(), like.parameters(), strict=True):
        assert parameter.dtype == dtype
        assert (parameter.grad is None) == (other.grad is None)
        if parameter.grad is not None:
            assert parameter.grad.dtype == dtype
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, dtype: torch.dtype) -> None:
    """A step of training, and evaluation after it. A network of many norms and few channels
    multiplies rounding, so only values in float64 are compared."""
    wide, images = NETWORKS[name](), torch.rand(2, 3, 32, 48)
    network = copy.deepcopy(wide).to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    expected = train(wide, images)
    got = train(network, images.to(dtype))
    assert_gradients(network, wide, dtype)
    for ours, reference in zip(got, expected, strict=True):
        assert ours.shape == reference.shape
        assert ours.isfinite().all()
        assert dtype != torch.float64 or error(ours, reference) < 0.01
    before = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    optimizer.step()
    after = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    with torch.no_grad():
        outputs = tensors(network.eval()(images.to(dtype)))
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Outputs, gradients and statistics are those in float32, up to rounding."""
    channels, make = LAYERS[name]
    network = make().to(dtype=dtype, memory_format=layout)
    wide = copy.deepcopy(network).float()
    images = torch.randn(2, channels, 9, 7).to(dtype).contiguous(memory_format=layout)
    expected, got = train(wide, images.float()), train(network, images)
    # some gradients are 0 but for rounding: those of biases before a norm
    limit = {torch.float16: 0.01, torch.bfloat16: 0.08, torch.float64: 1e-4}[dtype]
    for ours, reference in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert error(ours, reference) < limit
    assert_gradients(network, wide, dtype)
    gradients = [
        torch.cat([p.grad.double().flatten() for p in each.parameters() if p.grad is not None])
        for each in (network, wide)
    ]
    assert error(*gradients) < limit
    for key, value in network.named_buffers():
        if "running" in key:
            assert value.dtype == dtype
            assert error(value, wide.get_buffer(key)) < limit, key
    with torch.no_grad():
        assert error(network.eval()(images), wide.eval()(images.float())) < limit
