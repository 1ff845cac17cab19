import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nasfast.encoders import FeatureInfo, MobileNetV2, ResNet, encoder_of, load_encoder
from nasfast.encoders.resnet import FORMS, Bottleneck, Form, FrozenBatchNorm2d
from nasfast.utils.errors import UserError

# with torchvision's classification head: its documentation of each weight file
PARAMETERS = {
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnext101_64x4d": 83_455_272,
    "resnext101_32x8d": 88_791_336,
}
HEAD = {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def torchvision_shapes(blocks, width):
    """Keys and shapes of a torchvision ResNet, with its head; width: (channels, groups) of the 3x3
    convolutions of layer1."""
    shapes = dict(HEAD)

    def conv_bn(conv, bn, out_channels, in_channels, kernel):
        shapes[f"{conv}.weight"] = (out_channels, in_channels, kernel, kernel)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{name}"] = (out_channels,)
        shapes[f"{bn}.num_batches_tracked"] = ()

    conv_bn("conv1", "bn1", 64, 3, 7)
    channels, (inner, groups) = 64, width
    for layer, count in enumerate(blocks, 1):
        for i in range(count):
            block, out = f"layer{layer}.{i}", 128 << layer
            conv_bn(f"{block}.conv1", f"{block}.bn1", inner, channels, 1)
            conv_bn(f"{block}.conv2", f"{block}.bn2", inner, inner // groups, 3)
            conv_bn(f"{block}.conv3", f"{block}.bn3", out, inner, 1)
            if i == 0:
                conv_bn(f"{block}.downsample.0", f"{block}.downsample.1", out, channels, 1)
            channels = out
        inner *= 2
    return shapes


WIDTHS = {
    "resnet50": ((3, 4, 6, 3), (64, 1)),
    "resnet101": ((3, 4, 23, 3), (64, 1)),
    "resnext101_64x4d": ((3, 4, 23, 3), (256, 64)),
    "resnext101_32x8d": ((3, 4, 23, 3), (256, 32)),
}


@pytest.mark.parametrize("name", FORMS)
def test_keys_shapes_and_counts_are_torchvisions(name):
    shapes = torchvision_shapes(*WIDTHS[name])
    with torch.device("meta"):
        encoder = ResNet(name)
    counted = [shape for key, shape in shapes.items() if not re.search(r"\.(running|num)_", key)]
    assert sum(map(math.prod, counted)) == PARAMETERS[name]
    expected = {k: v for k, v in shapes.items() if not k.startswith("fc.") and v}
    own = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    assert {key: shape for key, shape in own.items() if shape} == expected
    if name == "resnet50":  # detectors train all but head, stem, layer1 and BatchNorm
        kept = {p for module in encoder.first() for p in module.parameters()}
        trained = sum(p.numel() for p in encoder.parameters() if p not in kept)
        assert trained == PARAMETERS[name] - 2_049_000 - 275_520
    modules = [f"layer{i}" for i in range(1, 5)]
    assert encoder.feature_info == tuple(
        map(FeatureInfo, modules, (256, 512, 1024, 2048), (4, 8, 16, 32))
    )


def randomised(module):
    """With BatchNorm of other constants than those that it starts from."""
    for key, buffer in module.named_buffers():
        if buffer.dim():
            torch.nn.init.uniform_(buffer, *((-0.5, 0.5) if "bias" in key else (0.5, 1.5)))
    return module


def plain_block(state, prefix, x, stride, groups, in_1x1):
    def conv_bn(conv, bn, x, stride=1, padding=0, groups=1):
        y = F.conv2d(x, state[f"{prefix}{conv}.weight"], None, stride, padding, 1, groups)
        weight, bias, mean, var = (
            state[f"{prefix}{bn}.{name}"][:, None, None]
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    y = conv_bn("conv1", "bn1", x, stride if in_1x1 else 1).clamp(min=0)
    y = conv_bn("conv2", "bn2", y, 1 if in_1x1 else stride, 1, groups).clamp(min=0)
    y = conv_bn("conv3", "bn3", y)
    if f"{prefix}downsample.0.weight" in state:
        x = conv_bn("downsample.0", "downsample.1", x, stride)
    return (x + y).clamp(min=0)


@pytest.mark.parametrize(
    ("size", "in_1x1", "training"),
    [((64, 33), False, True), ((64, 33), True, False), ((31, 1), True, True)],
)
@torch.no_grad()
def test_forward(size, in_1x1, training):
    encoder = randomised(ResNet(stride_in_1x1=in_1x1)).train(training)
    state, images = encoder.state_dict(), torch.randn(2, 3, *size)
    scale = state["bn1.weight"] / (state["bn1.running_var"] + 1e-5).sqrt()
    x = F.conv2d(images, state["conv1.weight"], None, 2, 3)
    x = (x - state["bn1.running_mean"][:, None, None]) * scale[:, None, None]
    x = F.max_pool2d((x + state["bn1.bias"][:, None, None]).clamp(min=0), 3, 2, 1)
    taps = encoder(images)
    for layer, (count, info) in enumerate(zip((3, 4, 6, 3), encoder.feature_info, strict=True), 1):
        for block in range(count):
            stride = 2 if layer > 1 and block == 0 else 1
            x = plain_block(state, f"layer{layer}.{block}.", x, stride, 1, in_1x1)
        assert x.shape == (2, info.channels, *(-(-side // info.stride) for side in size))
        torch.testing.assert_close(taps[layer - 1], x, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize(("in_channels", "stride"), [(16, 1), (16, 2), (8, 1)])
@torch.no_grad()
def test_block_in_groups(in_channels, stride):
    form = Form((1, 1, 1, 1), groups=4, base=32)  # 8 channels at 4 planes
    block = randomised(Bottleneck(in_channels, 4, stride, form, False, FrozenBatchNorm2d))
    x = torch.randn(1, in_channels, 7, 6)
    torch.testing.assert_close(block(x), plain_block(block.state_dict(), "", x, stride, 4, False))


@pytest.fixture
def stored(monkeypatch):
    """Sets what is read from any file: tensors and metadata."""

    def store(state, metadata=()):
        monkeypatch.setattr("nasfast.encoders.read_weights", lambda path: (state, dict(metadata)))

    return store


def test_load(stored):
    source = randomised(ResNet())
    state = {k: v for k, v in source.state_dict().items() if v.dim()}
    state |= {key: torch.zeros(1) for key in HEAD}
    described = json.dumps({"name": "resnet", "stride_in_1x1": True})
    described = {"nasfast.encoder": described}
    for metadata, option, in_1x1 in (({}, None, False), (described, None, True), ({}, True, True)):
        stored(state, metadata)
        encoder = load_encoder(Path("w.pth"), stride_in_1x1=option)
        assert (encoder.stride_in_1x1, encoder.training) == (in_1x1, False)
        own = encoder.state_dict().items()
        assert all(torch.equal(value, state[key]) for key, value in own if value.dim())
        with torch.device("meta"):
            assert encoder_of(encoder.describe()).stride_in_1x1 == in_1x1
    with pytest.raises(UserError) as error:
        load_encoder(Path("w.pth"), rows=3)
    assert str(error.value) == (
        "weights w.pth: expected a MobileNet-v2, whose first 3 rows the networks have, got "
        "resnet50; give weights of MobileNet-v2"
    )


KNOWN = "mobilenet_v2, resnet50, resnet101, resnext101_32x8d, resnext101_64x4d"
HINT = "Expected torchvision's resnet50 state dict; convert the key names or give another file."


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (
            {"layer1.0.conv1.weight": (64, 64, 3, 3), "layer1.0.conv2.weight": (64, 64, 3, 3)},
            f"weights w.pth: expected those of {KNOWN}, got a ResNet of 1, 0, 0, 0 basic blocks; "
            "give another file",
        ),
        (
            torchvision_shapes((3, 4, 6, 3), (128, 32)),
            f"weights w.pth: expected those of {KNOWN}, got a ResNet of 3, 4, 6, 3 blocks with 32 "
            "groups of 4 channels; give another file",
        ),
        (
            torchvision_shapes((3, 4, 6, 3), (64, 1)) | {"layer2.1.bn3.weight": (8,)},
            "resnet50 weights w.pth: 1 key(s) of another shape: layer2.1.bn3.weight: expected "
            f"[512], got [8]. {HINT}",
        ),
        (
            torchvision_shapes((3, 4, 6, 3), (64, 1)) | {"layer5.0.conv1.weight": (8,)},
            f"resnet50 weights w.pth: 1 key(s) unknown: layer5.0.conv1.weight. {HINT}",
        ),
    ],
)
def test_other_networks(stored, shapes, text):
    stored({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()})
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        load_encoder(Path("w.pth"))


def test_unknown_names():
    with pytest.raises(ValueError, match=r"^encoder: expected mobilenet_v2 or resnet, got 'vgg'$"):
        encoder_of({"name": "vgg"})
    with pytest.raises(UserError, match=r"^encoder: expected one of resnet50, .*, got 'resnet18'$"):
        ResNet("resnet18")


def test_what_detectors_keep_of_mobilenet():
    encoder = MobileNetV2()
    assert encoder.first() == [encoder.features[0], encoder.features[1]]
    assert encoder.label == "mobilenet_v2 x1"
