"""Tiles give what the whole image gives, and the network sees none that is larger."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nasfast.data import SyntheticStreets, normalize
from nasfast.encoders import load_encoder
from nasfast.inference.model import Model
from nasfast.inference.tiles import Axis, output_bands, resized_bands
from nasfast.models.build import build_restorer, build_segmenter
from nasfast.models.decoders import DecoderConfig
from nasfast.models.layers import resize
from nasfast.models.restorer import RestorerConfig, reach
from nasfast.models.zoo import ZOO
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.tasks.processor import Tiling
from nasfast.tasks.restoration.dehazing import Dehazing
from nasfast.tasks.restoration.processor import RestorationProcessor
from nasfast.tasks.segmentation import SegmentationProcessor

SMALL = RestorerConfig(width=4, stem=4, head=8, low_level=4)
ENLARGING = RestorerConfig(width=4, stem=4, head=8, low_level=4, residual=True)
PLAIN = IRNASGenotype(
    nodes=((("conv3x3", 0), ("dil3x3", 1)), (("skip", 0), ("sep3x3", 2))), levels=(0, 1)
)


def tiled(network, images, tiling, scale=1):
    """Output at the image's size, and the sizes that the network saw."""
    seen = []

    def spied(piece):
        seen.append(tuple(piece.shape[-2:]))
        return network(piece)

    height, width = images.shape[-2:]
    bands = output_bands(spied, images, Axis(height, tiling), Axis(width, tiling))
    return torch.cat(list(resized_bands(bands, (1, 1), (scale * height, scale * width))), -2), seen


def with_statistics(network, channels):
    """The network in evaluation mode, its BatchNorm layers with statistics of random images."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()(torch.rand(4, channels, 32, 32))
    return network.eval()


@pytest.mark.parametrize(
    ("halo", "blend", "multiple"), [(0, 0, 1), (3, 0, 1), (4, 8, 8), (0, 5, 4)]
)
@pytest.mark.parametrize("fixed", [None, 30])
def test_tiles_cover_a_side(halo, blend, multiple, fixed):
    for side in (1, 29, 31, 32, 33, 64, 65, 200, 333):
        axis = Axis(side, Tiling(32, halo, blend, multiple), fixed)
        assert axis.tile <= 32
        assert axis.padded >= side
        assert axis.padded == side or fixed or axis.padded - side < multiple
        assert all(start % multiple == 0 for start in axis.starts)
        total = torch.zeros(axis.padded)
        for start, weights in zip(axis.starts, axis.weights(axis.tile)):
            total[start : start + axis.tile] += weights
            if start > 0:
                assert not weights[:halo].any()
            if start < axis.starts[-1]:
                assert not weights[axis.tile - halo :].any()
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(
    ("fixed", "text"),
    [
        (
            None,
            r"tile: expected at least 24 pixels \(tiles of this network overlap by 16\), got 20$",
        ),
        (16, "got 16; export the network with a larger --size$"),
    ],
)
def test_tiles_that_cannot_overlap(fixed, text):
    with pytest.raises(ValueError, match=text):
        Axis(100, Tiling(20, halo=4, blend=8, multiple=8), fixed).starts  # noqa: B018


@pytest.mark.parametrize(("config", "scale"), [(SMALL, 1), (ENLARGING, 3)])
@torch.no_grad()
def test_a_restored_image_has_no_seams(config, scale):
    network = with_statistics(build_restorer(PLAIN, config, 1, scale), 1)
    images, halo = torch.rand(2, 1, 75, 90), reach(PLAIN)
    whole = network(images)
    restored, seen = tiled(network, images, Tiling(2 * halo + 9, halo), scale)
    assert max(map(max, seen)) == 2 * halo + 9
    assert len(seen) > 12
    assert (restored - whole).abs().max() < 1e-5
    half, _ = tiled(network, images, Tiling(2 * halo + 9, halo // 2), scale)
    assert (half - whole).abs().max() > 1e-4  # it is the halo that does it


@torch.no_grad()
def test_blocks_of_pixels_have_no_seams():
    config = dataclasses.replace(ENLARGING, reduction=4)
    network = with_statistics(build_restorer(PLAIN, config, 1), 1)
    processor = RestorationProcessor.of(Dehazing(), 1, PLAIN, 4)
    halo, images = processor.reach, torch.rand(1, 1, 400, 331)
    assert processor.tiling == Tiling(2048, halo, multiple=4)
    side = 2 * halo + 32

    def padded(piece):
        rest = (0, side - piece.shape[-1], 0, side - piece.shape[-2])
        return network(F.pad(piece, rest, mode="replicate"))

    restored, seen = tiled(padded, images, Tiling(side, halo, multiple=4))
    assert len(seen) > 4
    assert (restored - network(images)).abs().max() < 1e-5


@torch.no_grad()
def test_deformable_convolutions_rarely_reach_further():
    genotype = ZOO["irnas-derain"].genotype
    network = with_statistics(build_restorer(genotype, SMALL, 3), 3).double()
    images, halo = torch.rand(1, 3, 80, 100).double(), reach(genotype)
    restored, seen = tiled(network, images, Tiling(2 * halo + 9, halo))
    assert len(seen) > 4
    assert (restored - network(images)).abs().max() < 1e-4


@pytest.mark.parametrize("side", [160, 150])
@torch.no_grad()
def test_blended_tiles_of_a_strided_network(side):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3)
    )
    network[-1].padding = (1, 1)
    images, tiling = torch.rand(2, 3, side, 128), Tiling(64, halo=12, blend=8, multiple=8)
    rows, columns = Axis(side, tiling), Axis(128, tiling)

    def padded(piece):
        return network(F.pad(piece, (0, 0, 0, 64 - piece.shape[-2])))

    blended = torch.cat(list(output_bands(padded, images, rows, columns)), -2)
    whole = network(F.pad(images, (0, 0, 0, rows.padded - side)))
    torch.testing.assert_close(blended, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("map_size", "size"),
    [((9, 7), (36, 28)), ((9, 7), (35, 50)), ((20, 30), (7, 11)), ((1, 1), (3, 5))],
)
@pytest.mark.parametrize("strip", [1, 1 << 22])
def test_resizing_in_bands(map_size, size, strip, monkeypatch):
    monkeypatch.setattr("nasfast.inference.tiles.STRIP", strip)
    whole = torch.randn(2, 3, *map_size)
    steps = map_size[0] / size[0], map_size[1] / size[1]
    strips = list(resized_bands(iter(whole.split(2, -2)), steps, size))
    expected = F.interpolate(whole, size, mode="bilinear")
    torch.testing.assert_close(torch.cat(strips, -2), expected, atol=1e-5, rtol=0)
    assert strip > 1 or len(strips) == size[0]


def test_tiles_of_a_segmentation_network_agree():
    genotype = FastNASSpace().from_json(
        [[0, [0, 1, 2, 0], [0, 1, 2, 9], [2, 0, 1, 0]], [[2, 3], [3, 1], [4, 4]]]
    )
    streets = SyntheticStreets(8, size=(64, 96))
    network = build_segmenter(
        load_encoder(), genotype, len(streets.classes), DecoderConfig(8, 1, False)
    )
    network.decoder.with_aux = False
    decoder, labels = network.decoder.train(), torch.stack([s.mask for s in streets]).long()
    with torch.no_grad():
        taps = network.encoder(normalize(torch.stack([s.image for s in streets])))
    optimizer = torch.optim.Adam(decoder.parameters(), 0.02)
    for _ in range(20):
        loss = F.cross_entropy(resize(decoder(taps)[0], (64, 96)), labels, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = Model(
        network, SegmentationProcessor(streets.classes, streets.colors), {"genotype": None}
    )
    image = SyntheticStreets(1, size=(96, 640))[0].image
    whole, cut = model.predict(image), model.predict(image, tile=416)
    assert len(whole.shares) > 3
    assert (cut.mask == whole.mask).float().mean() >= 0.99
    assert not torch.equal(cut.confidence, whole.confidence)
