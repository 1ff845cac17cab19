import re

import pytest
import torch
from torch.nn import functional as F

from nasfast.encoders import FeatureInfo, MobileNetV2
from nasfast.encoders.mobilenet_v2 import InvertedResidual
from nasfast.utils.errors import UserError

# (input, output, expansion) of features.1 .. features.17
# (output channels, expansion) of features.1 .. features.17
BLOCKS = [(16, 1)] + [(24, 6)] * 2 + [(32, 6)] * 3 + [(64, 6)] * 4 + [(96, 6)] * 3
BLOCKS += [(160, 6)] * 3 + [(320, 6)]


def torchvision_shapes():
    """Keys and shapes of torchvision's mobilenet_v2 without features.18 and classifier."""
    shapes = {}

    def conv_bn(conv, bn, out_channels, in_channels, kernel):
        shapes[f"{conv}.weight"] = (out_channels, in_channels, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{name}"] = (out_channels,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    conv_bn("features.0.0", "features.0.1", 32, 3, 3)
    channels = 32
    for i, (out_channels, expansion) in enumerate(BLOCKS, 1):
        block, hidden, at = f"features.{i}.conv", channels * expansion, int(expansion > 1)
        if expansion > 1:
            conv_bn(f"{block}.0.0", f"{block}.0.1", hidden, channels, 1)
        conv_bn(f"{block}.{at}.0", f"{block}.{at}.1", hidden, 1, 3)
        conv_bn(f"{block}.{at + 1}", f"{block}.{at + 2}", out_channels, hidden, 1)
        channels = out_channels
    return shapes


def test_keys_and_shapes_are_torchvisions():
    encoder = MobileNetV2()
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == torchvision_shapes()
    assert sum(p.numel() for p in encoder.parameters()) == 1_811_712


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 50), (31, 127), (32, 1)])
@pytest.mark.parametrize(
    ("width", "channels"), [(1.0, (24, 32, 96, 320)), (0.35, (8, 16, 32, 112))]
)
def test_taps_are_those_of_feature_info(width, channels, size):
    encoder = MobileNetV2(width).eval()
    modules = ("features.3", "features.6", "features.13", "features.17")
    assert encoder.feature_info == tuple(map(FeatureInfo, modules, channels, (4, 8, 16, 32)))
    seen = []
    for info in encoder.feature_info:
        module = encoder.get_submodule(info.module)
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        taps = encoder(torch.rand(1, 3, *size))
    assert all(tap is out for tap, out in zip(taps, seen, strict=True))
    for info, tap in zip(encoder.feature_info, taps, strict=True):
        assert tap.shape == (1, info.channels, *(-(-side // info.stride) for side in size))


@pytest.mark.parametrize(("out_channels", "stride", "residual"), [(8, 1, 1), (8, 2, 0), (16, 1, 0)])
@torch.no_grad()
def test_block(out_channels, stride, residual):
    block, x = InvertedResidual(8, out_channels, stride, 6).eval(), torch.randn(1, 8, 6, 6)
    (expand, bn1, _), (depthwise, bn2, _), project, bn3 = block.conv
    y = bn1(F.conv2d(x, expand.weight)).clamp(0, 6)
    y = bn2(F.conv2d(y, depthwise.weight, None, stride, 1, groups=48)).clamp(0, 6)
    y = bn3(F.conv2d(y, project.weight))
    torch.testing.assert_close(block(x), x + y if residual else y)


HINT = (
    "Expected torchvision's mobilenet_v2 state dict at width 0.35; "
    "convert the key names or give another file."
)
STEM = "features.0.0.weight"


@pytest.mark.parametrize(
    ("lost", "added", "problem"),
    [
        (["features.2.conv.3.bias"], {}, "1 key(s) missing: features.2.conv.3.bias"),
        ([], {"backbone": 1}, "1 key(s) unknown: backbone"),
        ([], {f"x{i}": 1 for i in range(7)}, "7 key(s) unknown: x0, x1, x2, x3, x4 and 2 more"),
        ([], {STEM: 1}, f"1 key(s) of another shape: {STEM}: expected [16, 3, 3, 3], got [1]"),
    ],
)
def test_strict_load_names_the_problem(lost, added, problem):
    encoder = MobileNetV2(0.35)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    state = MobileNetV2(0.35).state_dict()
    for key in lost:
        del state[key]
    state |= {key: torch.zeros(size) for key, size in added.items()}
    message = f"mobilenet_v2 weights some.pth: {problem}. {HINT}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        encoder.load_strict(state, "some.pth")
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_load_accepts_the_classification_head_and_half_precision():
    own = MobileNetV2(0.35).state_dict()
    state = {k: v.half() if v.is_floating_point() else v for k, v in own.items()}
    head = {"features.18.0.weight": torch.zeros(9, 112, 1, 1), "classifier.1.bias": torch.zeros(9)}
    encoder = MobileNetV2(0.35)
    encoder.load_strict(state | head, "some.pth")
    for key, value in encoder.state_dict().items():
        assert value.dtype == own[key].dtype
        assert torch.equal(value, state[key].to(value.dtype))


@torch.no_grad()
def test_the_first_three_rows():
    whole = MobileNetV2().eval()
    encoder = MobileNetV2(rows=3).eval()
    encoder.load_strict(whole.state_dict(), "some.pth")
    assert encoder.feature_info == whole.feature_info[:2]
    assert sum(p.numel() for p in encoder.parameters()) == 55_488
    faithful = MobileNetV2(rows=3, expand_first=True)
    assert sum(p.numel() for p in faithful.parameters()) == 56_576
    images = torch.rand(2, 3, 33, 64)
    for tap, expected in zip(encoder(images), whole(images)[:2], strict=True):
        assert torch.equal(tap, expected)
    with pytest.raises(UserError, match=r"1 key\(s\) unknown: features.18x"):
        encoder.check(whole.state_dict() | {"features.18x": torch.zeros(1)}, "some.pth")


@torch.no_grad()
def test_the_first_convolution_becomes_the_identity():
    torch.manual_seed(0)
    plain, faithful = MobileNetV2(rows=3).eval(), MobileNetV2(rows=3, expand_first=True).eval()
    stem = plain.features[0][1]
    stem.weight.normal_(0, 3)
    stem.bias.normal_(0, 3)
    stem.weight[0] = 0  # a channel that never changes
    faithful.load_strict(plain.state_dict(), "some.pth")
    x = torch.linspace(0, 6, 25).view(1, 1, 5, 5).expand(1, 32, 5, 5)
    expand = faithful.features[1].conv[0]
    torch.testing.assert_close(expand(x), x, rtol=0, atol=1e-6)
    images = torch.randn(2, 3, 32, 64)
    for tap, expected in zip(faithful(images), plain(images), strict=True):
        torch.testing.assert_close(tap, expected, rtol=1e-5, atol=1e-6)
    # in training BatchNorm takes mean and variance of the batch, which are alike
    x = stem.weight[:, None, None] * torch.randn(64, 32, 9, 9) + stem.bias[:, None, None]
    x = x.clamp(0, 6)
    assert (expand.train()(x) - x).abs().mean() < 0.05
    again = MobileNetV2(rows=3, expand_first=True)
    again.load_strict(faithful.state_dict(), "some.pth")
    assert torch.equal(again.features[1].conv[0][0].weight, expand[0].weight)
