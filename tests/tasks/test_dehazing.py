"""Haze: the scattering model, random and given depth, the ranges of the settings."""

import math

import pytest
import torch

from nasfast.data.restoration import ImagePair
from nasfast.tasks.restoration.dehazing import SPACING, Dehazing, random_depth


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_given_depth_by_hand():
    """hazy = clean * t + airlight * (1 - t), t = exp(-beta * depth)."""
    clean = torch.tensor([0, 51, 255]).byte()[:, None, None].expand(3, 1, 2)
    depth = torch.tensor([[[0.5, 1.0]]])
    task = Dehazing(beta=(math.log(4),) * 2, airlight=(0.8, 0.8))
    hazy, target = task.pair(ImagePair("a", clean, depth=depth), generator())
    torch.testing.assert_close(target[:, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    torch.testing.assert_close(hazy[:, 0], torch.tensor([[0.4, 0.6], [0.5, 0.65], [0.9, 0.85]]))
    real, _ = task.pair(ImagePair("a", clean, 255 - clean, depth), generator())
    torch.testing.assert_close(real, 1 - target)


def test_every_image_has_its_own_haze():
    """Over black the haze is airlight * (1 - t): of one depth in all channels."""
    black = torch.zeros(3, 40, 50)
    hazy, again, other = (Dehazing().degrade(black, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(hazy, again)
    assert not torch.equal(hazy, other)
    ratio = hazy[1:] / hazy[:1]  # of the airlights
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    assert 0.7 < ratio.min() < ratio.max() < 1 / 0.7
    assert ratio.std(0).max() > 0.01
    assert 0 <= hazy.min() < hazy.max() < 1 - math.exp(-1.8)


def test_random_depth_is_smooth_and_covers_its_range():
    depth = random_depth(900, 1000, generator())
    assert depth.shape == (1, 900, 1000)
    assert 0 <= depth.min() < 0.1
    assert 0.9 < depth.max() <= 1
    steps = max(depth.diff(dim=axis).abs().max() for axis in (1, 2))
    assert 0 < steps < math.pi / 2 / SPACING[0] + 1e-6  # of half a wave from 0 to 1
    assert random_depth(16, 16, generator(3)).std() < 0.15  # a part of it, not the whole


@pytest.mark.parametrize(
    ("field", "value", "limits"),
    [("beta", (-1.0, 1.0), "0..10"), ("beta", (2.0, 1.0), "0..10"), ("airlight", (0.5,), "0..1")],
)
def test_ranges(field, value, limits):
    with pytest.raises(ValueError) as error:
        Dehazing(**{field: value})
    assert str(error.value) == (
        f"dehazing: expected {field} as a range (low, high) within {limits}, got {value}"
    )
