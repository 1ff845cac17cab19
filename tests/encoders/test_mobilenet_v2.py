import re

import pytest
import torch
from torch.nn import functional as F

from nasfast.encoders import FeatureInfo, MobileNetV2
from nasfast.encoders.mobilenet_v2 import InvertedResidual

# (input, output, expansion) of features.1 .. features.17
BLOCKS = (
    [(32, 16, 1), (16, 24, 6), (24, 24, 6), (24, 32, 6), (32, 32, 6), (32, 32, 6), (32, 64, 6)]
    + [(64, 64, 6)] * 3
    + [(64, 96, 6), (96, 96, 6), (96, 96, 6), (96, 160, 6), (160, 160, 6), (160, 160, 6)]
    + [(160, 320, 6)]
)


def torchvision_shapes():
    """Keys and shapes of torchvision's mobilenet_v2 without features.18 and classifier."""
    shapes = {}

    def conv_bn(conv, bn, out_channels, in_channels, kernel):
        shapes[f"{conv}.weight"] = (out_channels, in_channels, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{name}"] = (out_channels,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    conv_bn("features.0.0", "features.0.1", 32, 3, 3)
    for i, (in_channels, out_channels, expansion) in enumerate(BLOCKS, 1):
        block, hidden, first = f"features.{i}.conv", in_channels * expansion, expansion == 1
        if not first:
            conv_bn(f"{block}.0.0", f"{block}.0.1", hidden, in_channels, 1)
        depthwise = 0 if first else 1
        conv_bn(f"{block}.{depthwise}.0", f"{block}.{depthwise}.1", hidden, 1, 3)
        conv_bn(f"{block}.{depthwise + 1}", f"{block}.{depthwise + 2}", out_channels, hidden, 1)
    return shapes


def test_keys_and_shapes_are_torchvisions():
    state = MobileNetV2().state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == torchvision_shapes()


def test_parameters():
    without_expansion_of_first_block = 1_812_800 - (32 * 32 + 2 * 32)
    count = sum(p.numel() for p in MobileNetV2().parameters())
    assert count == without_expansion_of_first_block == 1_811_712


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 50), (31, 127), (32, 1)])
def test_taps(size):
    encoder = MobileNetV2().eval()
    with torch.no_grad():
        taps = encoder(torch.rand(1, 3, *size))
    expected = [
        (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        for channels, stride in ((24, 4), (32, 8), (96, 16), (320, 32))
    ]
    assert [tuple(tap.shape) for tap in taps] == expected


@pytest.mark.parametrize(
    ("width", "channels"), [(1.0, (24, 32, 96, 320)), (0.35, (8, 16, 32, 112))]
)
def test_feature_info_names_the_tapped_modules(width, channels):
    encoder = MobileNetV2(width).eval()
    modules = ("features.3", "features.6", "features.13", "features.17")
    assert encoder.feature_info == tuple(map(FeatureInfo, modules, channels, (4, 8, 16, 32)))
    seen = {}
    for info in encoder.feature_info:
        encoder.get_submodule(info.module).register_forward_hook(
            lambda module, args, out, name=info.module: seen.__setitem__(name, out)
        )
    with torch.no_grad():
        taps = encoder(torch.rand(1, 3, 64, 32))
    for info, tap in zip(encoder.feature_info, taps):
        assert seen[info.module] is tap
        assert tap.shape[1] == info.channels
        assert tap.shape[2] == 64 // info.stride


def test_residual_only_where_shapes_allow():
    residual = [block.residual for block in MobileNetV2().features[1:]]
    strides = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
    assert residual == [s == 1 and i == o for s, (i, o, _) in zip(strides, BLOCKS)]


@pytest.mark.parametrize(("out_channels", "stride", "residual"), [(8, 1, 1), (8, 2, 0), (16, 1, 0)])
@torch.no_grad()
def test_block(out_channels, stride, residual):
    block, x = InvertedResidual(8, out_channels, stride, 6).eval(), torch.randn(1, 8, 6, 6)
    (expand, bn1, _), (depthwise, bn2, _), project, bn3 = block.conv
    y = bn1(F.conv2d(x, expand.weight)).clamp(0, 6)
    y = bn2(F.conv2d(y, depthwise.weight, None, stride, 1, groups=48)).clamp(0, 6)
    y = bn3(F.conv2d(y, project.weight))
    torch.testing.assert_close(block(x), x + y if residual else y)


def altered(change):
    state = MobileNetV2(0.35).state_dict()
    change(state)
    return state


HINT = (
    "Expected torchvision's mobilenet_v2 state dict at width 0.35; "
    "convert the key names or give another file."
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("features.2.conv.3.bias"), "1 key(s) missing: features.2.conv.3.bias"),
        (
            lambda s: s.update(backbone=torch.zeros(1)),
            "1 key(s) unknown: backbone",
        ),
        (
            lambda s: s.update({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}),
            "1 key(s) of another shape: features.0.0.weight: "
            "expected [16, 3, 3, 3], got [32, 3, 3, 3]",
        ),
        (
            lambda s: s.update({f"x{i}": torch.zeros(1) for i in range(7)}),
            "7 key(s) unknown: x0, x1, x2, x3, x4 and 2 more",
        ),
    ],
)
def test_strict_load_names_the_problem(change, problem):
    encoder = MobileNetV2(0.35)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    message = f"mobilenet_v2 weights some.pth: {problem}. {HINT}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        encoder.load_strict(altered(change), "some.pth")
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_load_accepts_the_classification_head_and_half_precision():
    source = MobileNetV2(0.35)
    state = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    state |= {
        "features.18.0.weight": torch.zeros(1280, 112, 1, 1),
        "classifier.1.bias": torch.zeros(1000),
    }
    encoder = MobileNetV2(0.35)
    encoder.load_strict(state, "some.pth")
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype))
        assert value.dtype == source.state_dict()[key].dtype
