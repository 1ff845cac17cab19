import copy
import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from nasfast.encoders import MobileNetV2
from nasfast.models.decoders import (
    ContextualCell,
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    FusionBlock,
)
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.training.cost import count_macs, count_parameters

SPACE = FastNASSpace()
ARCH0, ARCH1, ARCH2 = ARCHS = [
    SPACE.from_json(published)
    for published in (
        [[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]],
        [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]],
        [[5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], [[1, 3], [4, 3], [2, 2]]],
    )
]
FINAL = DecoderConfig(agg_size=64, sep_repeats=2, aux_cell=False)
SEARCH = DecoderConfig()
ENCODER_PARAMS = 1_812_800  # as counted for the published totals
ENCODER = MobileNetV2()
SMALL = MobileNetV2(0.35)


def decoder(genotype, classes=21, config=FINAL, encoder=ENCODER):
    return Decoder(genotype, encoder.feature_info, classes, config)


@pytest.mark.parametrize(
    ("config", "classes", "aux", "totals"),
    [
        (FINAL, 21, False, (2_629_909, 2_810_133, 2_853_141)),
        (FINAL, 21, True, (2_666_260, 2_846_484, 2_889_492)),
        (FINAL, 1, False, (2_618_369, 2_798_593, 2_841_601)),
        (dataclasses.replace(FINAL, aux_cell=True), 21, True, (3_034_516, 3_306_900, 3_371_412)),
        (dataclasses.replace(FINAL, aux_cell=True), 21, False, (2_629_909, 2_810_133, 2_853_141)),
        (SEARCH, 21, False, (2_212_517, 2_316_197, 2_407_205)),
        (SEARCH, 21, True, (2_412_884, 2_569_556, 2_706_068)),
    ],
)
def test_published_parameters(config, classes, aux, totals):
    for genotype, total in zip(ARCHS, totals):
        module = decoder(genotype, classes, config)
        everything = sum(p.numel() for p in module.parameters())
        assert (everything if aux else count_parameters(module)) == total - ENCODER_PARAMS


@pytest.mark.parametrize(
    ("genotype", "total", "of_decoder", "size"),
    [(ARCH0, 4.2082, 2.681, 128), (ARCH1, 2.8545, 1.328, 64), (ARCH2, 3.3727, 1.846, 64)],
)
def test_published_macs_and_output_size(genotype, total, of_decoder, size):
    model = EncoderDecoder(ENCODER, decoder(genotype))
    macs = count_macs(model, (512, 512))
    expansion_of_first_block = 32 * 32 * 256 * 256
    assert round((macs + expansion_of_first_block) / 1e9, 4) == total
    # the published decoder figures are differences of rounded ones
    rest = (macs - count_macs(ENCODER, (512, 512))) / 1e9
    assert rest == pytest.approx(of_decoder, abs=1e-3)
    on_meta = copy.deepcopy(model).to("meta").eval()
    logits, _ = on_meta(torch.empty(1, 3, 512, 512, device="meta"))
    assert logits.shape == (1, 21, size, size)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


@pytest.mark.parametrize(
    ("genotype", "expected"),
    [
        (ARCH0, 2 + (3 + 5) + (7 + 11 * 3) + (13 + 17 * 7)),
        (ARCH1, (3 * 2 + 5) + (7 + 11 * 2) + (13 * 3 * 2 + 17)),
        (ARCH2, 2 + (3 + 5) + (7 * 5 + 11 * 3) + (13 * 7 * 5 + 17 * 11 * 3)),
    ],
)
def test_cell_graph(genotype, expected):
    cell = ContextualCell(genotype.cell, 1, 1)
    cell.ops = nn.ModuleList(map(Scale, (2, 3, 5, 7, 11, 13, 17)))
    assert cell(torch.ones(1, 1, 1, 1)).item() == expected


def test_branches_of_a_block_have_their_own_weights():
    block = FusionBlock(ARCH0.cell, 4, 1)
    left, right = (dict(m.named_parameters()) for m in (block.left, block.right))
    assert left.keys() == right.keys()
    assert all(left[k] is not right[k] for k in left)


def test_fusion_resizes_to_the_larger_area():
    block = FusionBlock(ARCH0.cell, 4, 1).eval()
    tall, wide = torch.rand(1, 4, 20, 2), torch.rand(1, 4, 10, 9)
    assert block(tall, wide).shape == block(wide, tall).shape == (1, 4, 10, 9)


@torch.no_grad()
def test_decoder_graph():
    module = decoder(ARCH1, 5, DecoderConfig(8), SMALL).train()
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.momentum = 0.0  # the passes below must see the same network
    taps = [
        torch.randn(2, info.channels, *size)
        for info, size in zip(SMALL.feature_info, ((16, 24), (8, 12), (4, 6), (2, 3)))
    ]
    _, l2, l3, l4 = (adapt(tap) for adapt, tap in zip(module.adapt, taps))

    def block(index, x, y):  # y has the larger area
        left, right = module.blocks[index].left(x), module.blocks[index].right(y)
        return F.interpolate(left, right.shape[2:], mode="bilinear") + right

    first = module.blocks[0]
    b0 = first.left(l3) + F.interpolate(first.right(l4), (4, 6), mode="bilinear")
    b1 = block(1, l4, l2)
    b2 = block(2, b0, b0)
    both = torch.cat([b1, F.interpolate(b2, (8, 12), mode="bilinear")], dim=1)
    logits, aux = module(taps)
    torch.testing.assert_close(logits, module.conv_clf(module.pre_clf(both.relu())))
    for got, head, x in zip(aux, module.aux_heads, (b0, b1, b2), strict=True):
        torch.testing.assert_close(got, head(x))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), aux_cell=st.booleans(), tall=st.booleans())
def test_random_genotypes(seed, aux_cell, tall):
    genotype = SPACE.sample(random.Random(seed))
    torch.manual_seed(seed)
    module = decoder(genotype, 5, DecoderConfig(4, 1, aux_cell), SMALL)
    sizes = [(13, 7), (7, 4), (4, 2), (2, 1)]
    sizes = sizes if tall else [size[::-1] for size in sizes]
    taps = [
        torch.randn(2, info.channels, *size, requires_grad=True)
        for info, size in zip(SMALL.feature_info, sizes)
    ]
    pool = list(sizes)
    for i, j in genotype.connections:
        pool.append(max(pool[i], pool[j], key=lambda size: size[0] * size[1]))
    blocks = pool[4:]
    collected = [blocks[b] for b in genotype.collected_blocks]
    expected = max(collected, key=lambda size: size[0] * size[1])

    logits, aux = module(taps)
    assert logits.shape == (2, 5, *expected)
    assert [x.shape for x in aux] == [(2, 5, *size) for size in blocks]
    (logits.square().mean() + sum(x.square().mean() for x in aux)).backward()
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    assert {"conv_clf.weight", "conv_clf.bias"} <= gradients.keys()
    assert any(name.startswith("aux_heads.2") for name in gradients)
    assert all(g.isfinite().all() for g in gradients.values())

    module.eval()
    with torch.no_grad():
        logits, aux = module([tap[:1] for tap in taps])
    assert logits.shape == (1, 5, *expected)
    assert aux == []


@pytest.mark.parametrize(("field", "most"), [("agg_size", "16,384"), ("sep_repeats", "16")])
def test_empty_layers(field, most):
    message = f"DecoderConfig.{field}: expected a value from 1 to {most}, got 0"
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{field: 0})
