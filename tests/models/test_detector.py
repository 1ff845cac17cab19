"""Detectors: published counts, graphs of pyramids against plain ones, heads, outputs."""

import random

import pytest
import torch
from torch.nn import functional as F

from nasfast.encoders import MobileNetV2, encoder_of
from nasfast.models.build import build_detector
from nasfast.models.detector import (
    EXTRA,
    Detector,
    DetectorConfig,
    DetectorDecoder,
    FrozenPyramid,
    HeadOnPyramid,
)
from nasfast.models.heads import FARTHEST, FCOSHead, GroupNorm
from nasfast.models.points import STRIDES, level_sizes, points
from nasfast.models.zoo import ZOO
from nasfast.spaces.nas_fcos import (
    AGGREGATORS,
    FOUND,
    FPN_OPS,
    STOCK,
    HeadGenotype,
    NASFCOSGenotype,
    NASFCOSSpace,
)
from nasfast.training.cost import count_macs, count_parameters
from nasfast.utils.errors import UserError

SIZE = (64, 96)
INFO = MobileNetV2(0.1).feature_info


def taps(size=SIZE, batch=2, info=INFO):
    return [torch.randn(batch, i.channels, size[0] // i.stride, size[1] // i.stride) for i in info]


@pytest.mark.parametrize(
    ("name", "gmacs", "mparams"),
    [
        ("fpn_fcos_mnv2_256", 104.93, 9.796),
        ("fpn_fcos_r50_256", 169.82, 32.022),
        ("fpn_fcos_r101_256", 234.22, 50.962),
        ("fpn_fcos_x101_64x4d_256", 371.09, 89.595),
        ("nas_fcos_mnv2_128", 38.82, 5.960),
        ("nas_fcos_r50_128", 103.90, 27.814),
        ("nas_fcos_mnv2_256", 121.19, 16.073),
        ("nas_fcos_r50_256", 189.32, 38.358),
        ("nas_fcos_r101_256", 253.71, 57.298),
        ("nas_fcos_mnv2_128_256", 95.15, 9.947),
        ("nas_fcos_r50_128_256", 160.23, 31.801),
        ("nas_fcos_x101_64x4d_128_256", 361.49, 89.374),
        # not published
        ("fpn_fcos_mnv2_128", 30.82, 3.886),
        ("fpn_fcos_r50_128", 94.29, 25.710),
    ],
)
def test_published_counts(name, gmacs, mparams):
    """At 1088x800 with 80 classes; trainable parameters, in a full training of a detector."""
    entry = ZOO[name]
    config = DetectorConfig(entry.network.width, entry.network.head_width, faithful=True)
    with torch.device("meta"):
        model = build_detector(encoder_of(entry.encoder), entry.genotype, 80 + EXTRA, config)
        macs = count_macs(model, entry.size)
    frozen = sum(count_parameters(layer) for layer in model.encoder.first())
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.005)
    assert (count_parameters(model) - frozen) / 1e6 == pytest.approx(mparams, abs=5e-4)
    published = entry.published.get("multiply-adds", macs)
    assert macs == pytest.approx(published, rel=0.0125)


def test_what_nothing_reads_is_not_computed():
    counts = [
        count_parameters(DetectorDecoder(FOUND, INFO, 8, DetectorConfig(32, faithful=faithful)))
        for faithful in (False, True)
    ]
    assert counts[1] - counts[0] == INFO[0].channels * 32 + 64  # the adapter of C2
    assert FOUND.taps == (1, 2, 3)


def plain_pyramid(fpn, genotype, inputs):
    """P3 to P5 by the words of the paper and its code, with the layers of a SearchedFPN."""
    pool = {i: fpn.adapt[str(i)](x) for i, x in enumerate(inputs) if str(i) in fpn.adapt}
    for t, (a, b, _, _, aggregator) in enumerate(genotype.fpn):
        layer = fpn.blocks[t]
        x, y = layer.ops[0](pool[a]), layer.ops[1](pool[b])
        size = max(tuple(x.shape[-2:]), tuple(y.shape[-2:]))
        x, y = (F.interpolate(z, size, mode="bilinear", align_corners=False) for z in (x, y))
        if AGGREGATORS[aggregator] == "psum":
            pool[4 + t] = layer.aggregate.a * x + layer.aggregate.b * y
        else:
            z = F.relu(layer.aggregate.norm(torch.cat([x, y], 1)))
            weight = layer.aggregate.conv.weight.flatten(1)  # [C, 2]
            pool[4 + t] = torch.stack(
                [
                    (weight[g, :, None, None] * z[:, 2 * g : 2 * g + 2]).sum(1)
                    for g in range(len(weight))
                ],
                1,
            )
    *extra, p5, p4, p3 = [t for t in range(7) if all(4 + t not in b[:2] for b in genotype.fpn)]
    levels = []
    for t, tap in ((p3, inputs[1]), (p4, inputs[2]), (p5, inputs[3])):
        x = pool[4 + t]
        for e in extra:
            x = x + F.interpolate(pool[4 + e], x.shape[-2:], mode="bilinear", align_corners=False)
        levels.append(F.interpolate(x, tap.shape[-2:], mode="bilinear", align_corners=False))
    return levels


@pytest.mark.parametrize("seed", range(6))
def test_pyramids_against_plain_ones(seed):
    torch.manual_seed(seed)
    genotype = NASFCOSSpace("fpn").sample(random.Random(seed))
    decoder = DetectorDecoder(genotype, INFO, 7, DetectorConfig(32)).double().eval()
    for norm in decoder.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 2)
    inputs = [x.double() for x in taps()]
    with torch.no_grad():
        levels, expected = decoder.fpn(inputs), plain_pyramid(decoder.fpn, genotype, inputs)
    for got, want in zip(levels, expected):
        torch.testing.assert_close(got, want)
    assert [tuple(x.shape[-2:]) for x in levels] == level_sizes(*SIZE)


def test_every_weight_learns():
    rng = random.Random(1)
    for _ in range(3):
        genotype = NASFCOSSpace().sample(rng)
        decoder = DetectorDecoder(genotype, INFO, 8, DetectorConfig(32))
        for predictor in (decoder.head.classify, decoder.head.reach, decoder.head.center):
            torch.nn.init.normal_(predictor.weight)
        output, aux = decoder(taps())
        assert aux == []
        (output * torch.randn_like(output)).mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_published_concatenation_never_mixes():
    """The first half of its channels depends on the first input alone (section 9 of the facts of
    the released code); the full form mixes."""
    for cat, first in (("grouped", 16), ("full", 0)):
        decoder = DetectorDecoder(FOUND, INFO, 7, DetectorConfig(32, cat=cat)).eval()
        aggregate = decoder.fpn.blocks[0].aggregate
        x, y = torch.rand(2, 1, 32, 4, 4)
        changed = (aggregate(x, y) - aggregate(x, y + 1)).abs().amax((0, 2, 3)) > 0
        assert not changed[:first].any()
        assert changed[16:].any()


def test_group_norm_of_bfloat16_maps():
    """As in float64, from maps that are channels last to maps and gradients that are."""
    norm = GroupNorm(64)
    torch.nn.init.normal_(norm.weight)
    x, grad = torch.randn(2, 2, 64, 5, 6).bfloat16().unbind()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = norm(x)
    got = [y, *torch.autograd.grad(y, [x, *norm.parameters()], grad)]
    norm.double()
    exact = x.detach().double().requires_grad_()
    y = norm(exact)
    want = [y, *torch.autograd.grad(y, [exact, *norm.parameters()], grad.double())]
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("share", [0, 2, 6])
def test_layers_before_the_share_index_have_copies(share):
    """One a level: equal at first, and they learn apart."""
    head = FCOSHead(HeadGenotype(share, (1, 0, 4, 2, 3, 5)), 32, 2)
    shared = FCOSHead(HeadGenotype(0, (1, 0, 4, 2, 3, 5)), 32, 2)
    tower = head.towers["cls"]
    assert len(tower.own) == (5 if share else 0)
    layers = [count_parameters(layer) for layer in shared.towers["cls"].shared]
    extra = count_parameters(head) - count_parameters(shared)
    assert extra == 2 * 4 * sum(layers[:share])
    for copy in tower.own:
        assert all(map(torch.equal, copy.state_dict().values(), tower.own[0].state_dict().values()))


@pytest.mark.parametrize(
    "config", [DetectorConfig(32), DetectorConfig(32, normalized=True, centerness="reg")]
)
def test_outputs(config):
    """Rows and points are where the description says, and nothing is infinite."""
    decoder = DetectorDecoder(STOCK, INFO, 3 + EXTRA, config).eval()
    head, inputs = decoder.head, taps(batch=1)
    with torch.no_grad():
        output = decoder(inputs)[0]
        places, strides = points(*SIZE)
        assert output.shape == (1, 8, len(places))
        unit = strides if config.normalized else torch.ones_like(strides)
        assert (output[0, 3:7] / unit).log().abs().max() < 1  # at first about 1
        assert ((output[0, :3].sigmoid() - 0.01).abs() < 0.009).all()
        level = 1  # the centre-ness of P4 comes from its tower, and from where it says
        maps = decoder.fpn(inputs)
        tower = head.towers[config.centerness]
        expected = head.center(tower(maps[level])).flatten()
        start = (SIZE[0] // 8) * (SIZE[1] // 8)
        torch.testing.assert_close(output[0, 7, start : start + len(expected)], expected)
        head.scales.fill_(1e30)
        head.reach.bias.copy_(torch.tensor([1.0, -1, 1, -1]))
        extreme = decoder(inputs)[0]
    assert extreme.isfinite().all()
    assert extreme[:, 3:7].max() == pytest.approx(FARTHEST)


def test_bfloat16_gives_float32_outputs():
    decoder = DetectorDecoder(FOUND, INFO, 7, DetectorConfig(32))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = decoder(taps())
    assert output.dtype == torch.float32
    assert output.isfinite().all()


def test_widened_pyramids_have_no_more_weights_before_p6():
    narrow, wide = (
        DetectorDecoder(FOUND, INFO, 7, DetectorConfig(32, head)).fpn for head in (None, 64)
    )
    counts = [count_parameters(fpn) - count_parameters(fpn.top) for fpn in (narrow, wide)]
    assert counts[0] == counts[1]
    assert [x.shape[1] for x in wide(taps())] == [64] * len(STRIDES)


def test_heads_on_frozen_pyramids_are_those_of_detectors():
    """A pyramid and a head apart give what they give together."""
    encoder = MobileNetV2(0.1)
    whole = build_detector(encoder, FOUND, 7, DetectorConfig(32)).eval()
    pyramid = FrozenPyramid(encoder, whole.decoder.fpn).eval()
    assert [tap.stride for tap in pyramid.feature_info] == list(STRIDES)
    decoder = HeadOnPyramid(FOUND, 7, DetectorConfig(32))
    decoder.head.load_state_dict(whole.decoder.head.state_dict())
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(
            Detector(pyramid, decoder).eval()(images)[0], whole(images)[0], rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DetectorConfig(48),
            "width: expected a multiple of 32, the groups of the head's GroupNorm, got 48; change "
            "it",
        ),
        (
            lambda: DetectorConfig(64, 96),
            "head_width: expected the width 64 or twice that, got 96; change it",
        ),
        (
            lambda: DetectorDecoder(STOCK, INFO, 7, DetectorConfig(32, 64)),
            "head_width: expected the width 32 for the stock pyramid, which cannot be widened, got "
            "64; leave it out",
        ),
        (
            lambda: DetectorDecoder(FOUND, INFO[:2], 7, DetectorConfig(32)),
            "pyramid: expected an encoder with 4 taps and 3 blocks that none reads, got 2 and 4",
        ),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


def test_operations_are_all_built():
    """Each operation of both lists, alone in a network, without the others."""
    for op, _ in enumerate(FPN_OPS):
        blocks = tuple(block._replace(op0=op, op1=op, aggregator=0) for block in FOUND.fpn)
        decoder = DetectorDecoder(NASFCOSGenotype(blocks), INFO, 7, DetectorConfig(32))
        assert decoder(taps())[0].isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 3)])
def test_bfloat16_gradients_of_small_maps(size):
    """Of P6 and P7 on P5 of images up to 96 pixels: maps of one pixel, and one wide."""
    top = DetectorDecoder(STOCK, INFO, 7, DetectorConfig(32)).fpn.top
    p5, found = torch.randn(2, 32, *size), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            levels = top(p5)
        junk = torch.full((10**6,), torch.nan)
        del junk  # what is read without having been written is NaN then
        loss = sum(level.float().sum() for level in levels)
        found.append(torch.autograd.grad(loss, list(top.parameters())))
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.1 * exact.norm()
