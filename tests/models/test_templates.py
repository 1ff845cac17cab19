import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nasfast.encoders import FeatureInfo, MobileNetV2
from nasfast.models.build import build_templates
from nasfast.models.layers import Conv2d, resize
from nasfast.models.templates import (
    IMAGE_STRIDE,
    Application,
    Map,
    TemplateConfig,
    TemplateDecoder,
    build_operation,
)
from nasfast.spaces.template_nas import (
    AGGREGATIONS,
    OPERATIONS,
    Layer,
    Template,
    TemplateNASGenotype,
    TemplateNASSpace,
)
from nasfast.tasks.processor import STRIDE
from nasfast.training.cost import count_macs_on, count_parameters
from nasfast.utils.errors import UserError

SPACE = TemplateNASSpace()
TAPS = (FeatureInfo("", 4, 4), FeatureInfo("", 6, 8))
SEP3, SKIP = OPERATIONS.index("sep3x3"), OPERATIONS.index("skip")


def decoder(genotype, faithful=False, repeats=1, aux=False):
    return TemplateDecoder(genotype, TAPS, 3, TemplateConfig(8, repeats, faithful, aux))


def taps(height, width, batch=2, device="cpu"):
    return [
        torch.rand(batch, tap.channels, -(-height // tap.stride), -(-width // tap.stride)).to(
            device
        )
        for tap in TAPS
    ]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_operations_against_formula(name, stride):
    op, own = build_operation(OPERATIONS.index(name), 3, 6, [stride])
    x = torch.rand(2, 3, 9, 14)
    got = op.eval()(x)
    weights = [m.weight for m in op.modules() if isinstance(m, nn.Conv2d)]
    scale = (1 + 1e-5) ** -0.5  # of BatchNorm as it begins
    if name == "skip":
        expected = torch.cat([x, x], 1)
    elif name == "gap":
        expected = F.conv2d(x.mean((2, 3), keepdim=True), weights[0]).relu() * scale
    elif name == "maxpool3x3":
        expected = F.max_pool2d(F.conv2d(x, weights[0]) * scale, 3, stride, 1)
    else:
        depthwise, pointwise = weights
        kernel, dilation = depthwise.shape[-1], 6 if name.endswith("d6") else 1
        expected = F.conv2d(x, depthwise, None, stride, dilation * (kernel // 2), dilation, 3)
        expected = F.conv2d(expected, pointwise).relu() * scale
    assert own == (1 if name in ("skip", "gap") else stride)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("kernel", "dilation", "stride"), [(5, 6, 2), (5, 6, 3), (3, 1, 2)])
@pytest.mark.parametrize("size", [(9, 14), (1, 6), (12, 12)])
def test_strided_depthwise_convolutions(kernel, dilation, stride, size):
    conv = Conv2d(4, 4, kernel, dilation, 4, stride)
    x = torch.rand(2, 4, *size, requires_grad=True)
    padding = dilation * (kernel // 2)
    expected = F.conv2d(x, conv.weight, None, stride, padding, dilation, 4)
    for got, wanted in zip(
        (conv(x), *torch.autograd.grad(conv(x).square().sum(), (x, conv.weight))),
        (expected, *torch.autograd.grad(expected.square().sum(), (x, conv.weight))),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("downsampling", [True, False])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "ops", [("skip", "skip"), ("gap", "skip"), ("skip", "gap"), ("gap", "gap")]
)
@torch.no_grad()
def test_aggregation_against_formula(ops, aggregation, downsampling):
    template = Template(*map(OPERATIONS.index, ops), AGGREGATIONS.index(aggregation))
    x, y = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)
    module = Application(template, [Map(4, 4), Map(6, 8)], 1, [1], downsampling).eval()
    for parameter in module.join.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    size = (4, 4) if downsampling else (8, 8)
    assert module.out == Map(6, 8 if downsampling else 4)
    maps = [op(map).expand(-1, -1, *map.shape[-2:]) for op, map in zip(module.ops, (x, y))]
    maps = [resize(adapt(map), size) for adapt, map in zip(module.adapt, maps)]
    if aggregation == "psum":
        a, b = module.join.weight
        expected = a * maps[0] + b * maps[1]
    else:
        expected = module.join.conv(module.join.bn(torch.cat(maps, 1)).relu())
    torch.testing.assert_close(module(x, y), expected)


def chain(*layers, templates=((SEP3, SEP3, 0),)):
    return TemplateNASGenotype(
        tuple(map(Template._make, templates)), tuple(map(Layer._make, layers))
    )


@pytest.mark.parametrize(("faithful", "side"), [(False, 4), (True, 1)])
def test_stride_of_repeats(faithful, side):
    """The paper's convention: in the first convolution of the first application alone. That of its
    code: in each of both, of both applications."""
    genotype = chain((1, 1, 0, 1, 1), (0, 0, 0, 0, 0))
    first, second = decoder(genotype, faithful, repeats=2).layers[0]
    x = torch.rand(2, 6, 8, 8)
    between = first(x, x)
    assert between.shape[1] == 12
    assert second(x, between).shape == (2, 12, side, side)
    convolutions = [m.weight.shape[:2] for m in first.ops[0].modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [(6, 1), (12, 6), (12, 1), (12, 12)]


def test_a_repeat_reads_the_second_input_and_the_output():
    genotype = chain((0, 1, 0, 2, 0), (0, 0, 0, 0, 0), templates=[(SKIP, SKIP, 0)])
    module, seen = decoder(genotype).eval(), []
    for application in module.layers[0]:
        application.register_forward_hook(lambda module, maps, out: seen.append((*maps, out)))
    x, y = inputs = taps(32, 32)
    module(inputs)
    first, second, _ = (out for *_, out in seen)
    read = [tuple(map(id, maps)) for *maps, _ in seen]
    assert read == [tuple(map(id, pair)) for pair in ((x, y), (y, first), (first, second))]


GENOTYPES = st.integers(0, 10**6).map(lambda seed: SPACE.sample(random.Random(seed)))


@settings(max_examples=12)
@given(GENOTYPES, st.booleans(), st.sampled_from([1, 2]))
def test_canonical_forms_build_networks_of_one_size(genotype, faithful, repeats):
    sizes = set()
    for each in (genotype, genotype.canonical()):
        module = decoder(each, faithful, repeats)
        macs = count_macs_on(module, taps(64, 96, device="meta"))
        strides = sorted(module.strides)
        sizes.add((count_parameters(module), macs, str(strides), str(module.padded)))
    assert len(sizes) == 1


@settings(max_examples=12)
@given(GENOTYPES, st.booleans(), st.sampled_from([(32, 32), (37, 96)]))
def test_every_genotype_trains_on_one_image(genotype, faithful, size):
    module = decoder(genotype, faithful, aux=True).train()
    output, aux = module(taps(*size, batch=1))
    assert len(aux) == len(genotype.collected_layers)
    (output.sum() + sum(x.sum() for x in aux)).backward()
    unused = [name for name, p in module.named_parameters() if p.grad is None]
    assert not unused
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert module.eval()(taps(*size))[1] == []
    assert count_parameters(module) == count_parameters(decoder(genotype, faithful))


ALL_STRIDED = (1, 1, 0, 0, 1), (2, 2, 0, 0, 1), (3, 3, 0, 0, 1)


@torch.no_grad()
def test_maps_of_stride_64_lie_where_they_are_resized_to():
    """Everything made of a ramp from left to right is that ramp, 352 pixels wide: 5.5 cells."""
    assert IMAGE_STRIDE == STRIDE
    side, genotype = 352, chain(*ALL_STRIDED, (4, 1, 0, 0, 0), (4, 4, 0, 0, 0), (5, 5, 0, 0, 0))
    module = decoder(genotype, aux=True).train()
    assert module.padded == 64
    for k, (application,) in enumerate(module.layers):
        application.ops = nn.ModuleList(2 * [nn.AvgPool2d(2 if k < 3 else 1)])
        application.adapt = nn.ModuleList(2 * [nn.Identity()])
        application.join.weight = nn.Parameter(torch.full((2, 1, 1, 1), 0.5))
    module.pre_clf, module.conv_clf = nn.Identity(), nn.Identity()
    module.aux_heads = nn.ModuleList(nn.Identity() for _ in module.aux_heads)
    ramps = [torch.arange(s / 2, side, s).expand(1, 1, side // s, -1) for s in (4, 8)]
    output, heads = module(ramps)
    assert [x.shape[-1] for x in (output, *heads)] == [44, 11, 44]
    for got in (output, *heads):
        stride = side // got.shape[-1]
        inner = slice(64 // stride, 256 // stride)  # resized maps are flat at the sides
        expected = ramps[0].new_tensor([stride * (i + 0.5) for i in range(side // stride)])
        expected = expected.expand(got.shape)[..., inner]
        torch.testing.assert_close(got[..., inner], expected)


@pytest.mark.parametrize(("faithful", "coarsest"), [(False, (3, 5)), (True, (2, 3))])
def test_outputs_end_where_the_image_does(faithful, coarsest):
    coarse = chain(*ALL_STRIDED, *((k, k, 0, 0, 0) for k in (4, 5, 6, 7)))
    fine = chain(*ALL_STRIDED, (4, 1, 0, 0, 0), *((k, k, 0, 0, 0) for k in (5, 6, 7)))
    for genotype, size in ((coarse, coarsest), (fine, (12, 20))):
        module = decoder(genotype, faithful)
        assert module.padded == (None if faithful else 64)
        assert module(taps(96, 160))[0].shape == (2, 3, *size)


def test_network():
    genotype = SPACE.sample(random.Random(0))
    model = build_templates(MobileNetV2(0.35, rows=3), genotype, 5, TemplateConfig(8))
    assert model(torch.rand(2, 3, 64, 32))[0].shape[:2] == (2, 5)


@pytest.mark.parametrize(("field", "most"), [("agg_size", "16,384"), ("sep_repeats", "16")])
def test_config_without_layers(field, most):
    message = f"TemplateConfig.{field}: expected a value from 1 to {most}, got 0"
    with pytest.raises(UserError, match=message):
        TemplateConfig(**{field: 0})
