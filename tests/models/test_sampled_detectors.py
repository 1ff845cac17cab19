"""Detectors of sampled genotypes are built, and what has one canonical form is one network."""

import random

import pytest
import torch

from nasfast.encoders import MobileNetV2
from nasfast.models.detector import DetectorConfig, DetectorDecoder
from nasfast.models.points import points
from nasfast.models.pyramids import Concatenation, build_fpn_op
from nasfast.spaces.nas_fcos import FPN_OPS, NASFCOSSpace
from nasfast.training.cost import count_macs_on, count_parameters

INFO = MobileNetV2(0.1).feature_info
SIZE = (96, 160)


def test_every_sampled_genotype_is_a_network():
    rng, shapes = random.Random(0), []
    taps = [
        torch.empty(1, tap.channels, *(side // tap.stride for side in SIZE), device="meta")
        for tap in INFO
    ]
    for index in range(12):
        space = NASFCOSSpace(
            ("joint", "fpn", "head")[index % 3], primitives=("all", "plain")[index % 2]
        )
        genotype = space.sample(rng)
        widened = 64 if index % 4 == 0 and genotype.fpn else None
        config = DetectorConfig(32, widened, cat=("grouped", "full")[index // 6])
        counts = []
        for form in (genotype, genotype.canonical()):
            with torch.device("meta"):
                decoder = DetectorDecoder(form, INFO, 8, config)
            decoder.register_forward_hook(lambda module, args, out: shapes.append(out[0].shape))
            counts.append((count_macs_on(decoder, taps), count_parameters(decoder)))
            assert shapes[-1] == (1, 8, len(points(*SIZE)[0]))
        assert counts[0] == counts[1]


def swapped(tensor, dim=0):
    """With its two halves exchanged."""
    return torch.cat(tensor.chunk(2, dim)[::-1], dim)


def drawn(module):
    """In evaluation mode, with weights and statistics of any value."""
    for value in module.eval().state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.2, 1)
    return module


@pytest.mark.parametrize("name", [name for name in FPN_OPS if name != "skip_connect"])
@torch.no_grad()
def test_operations_absorb_the_order_of_halves(name):
    """So that a concatenation which they alone read may have its halves in either order."""
    torch.manual_seed(0)
    one, other = (drawn(build_fpn_op(FPN_OPS.index(name), 8)) for _ in range(2))
    state = one.state_dict()
    if name == "def_conv_3x3":
        offset = [state.pop(f"0.offset.{key}") - 0.6 for key in ("weight", "bias")]
        for module in (one, other):
            for own, value in zip(module[0].offset.parameters(), offset, strict=True):
                own.copy_(value)
        offset[0] = swapped(offset[0], 1)
        for own, value in zip(other[0].offset.parameters(), offset, strict=True):
            own.copy_(torch.cat([swapped(value[:36]), swapped(value[36:])]))  # offsets, masks
        state["0.deform.weight"] = swapped(state["0.deform.weight"], 1)
    else:
        state["0.weight"] = swapped(state["0.weight"])
        state["1.0.weight"] = swapped(state["1.0.weight"], 1)
    other.load_state_dict(state, strict=False)
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(other(swapped(x, 1)), one(x))
    assert not torch.allclose(one(swapped(x, 1)), one(x))


@torch.no_grad()
def test_halves_of_a_grouped_concatenation():
    one, other = (drawn(Concatenation(8, "grouped")) for _ in range(2))
    other.load_state_dict({k: swapped(v) if v.dim() else v for k, v in one.state_dict().items()})
    x, y = torch.randn(2, 2, 8, 3, 3)
    torch.testing.assert_close(other(y, x), swapped(one(x, y), 1))
