"""Rain: where streaks fall, how they lie, and the ranges of the settings."""

import math

import pytest
import torch

from nasfast.data.restoration import open_folder
from nasfast.tasks.restoration.deraining import Deraining
from nasfast.tasks.restoration.scoring import evaluate


def rain(seed=0, shape=(3, 90, 120), **settings):
    clean = torch.full(shape, 0.3)
    return Deraining(**settings).degrade(clean, torch.Generator().manual_seed(seed)) - clean


def test_streaks_brighten_all_channels_alike():
    streaks = rain()
    assert streaks.min() >= -1e-6
    assert 0.01 < (streaks[0] > 0.05).float().mean() < 0.6
    torch.testing.assert_close(streaks[0], streaks[2])
    assert not torch.equal(streaks, rain(seed=1))
    bright = Deraining().degrade(torch.ones(1, 40, 40), torch.Generator().manual_seed(0))
    assert torch.equal(bright, torch.ones_like(bright))


@pytest.mark.parametrize("angle", [-30.0, 0.0, 45.0])
def test_streaks_lie_along_the_angle(angle):
    """The least gradient is along the streaks: structure tensor of the picture."""
    streaks = rain(angle=(angle, angle), length=(25.0, 25.0), shape=(1, 200, 200))[0]
    y = (streaks[2:, 1:-1] - streaks[:-2, 1:-1]).flatten()
    x = (streaks[1:-1, 2:] - streaks[1:-1, :-2]).flatten()
    tensor = torch.stack([x, y]) @ torch.stack([x, y]).T
    direction = torch.linalg.eigh(tensor)[1][:, 0]  # of the smallest eigenvalue: (x, y down)
    found = math.degrees(math.atan2(direction[0], -direction[1]))
    assert (found - angle + 90) % 180 - 90 == pytest.approx(0, abs=5)


def test_density_counts_streaks():
    few, many = (rain(shape=(1, 300, 300), density=(d, d)).mean() for d in (0.001, 0.004))
    assert 3 < many / few < 5
    assert not rain(density=(0.0, 0.0)).any()


def test_real_pairs_are_not_degraded_again(data_root):
    folder = data_root / "rain-sample" / "synthetic"
    if not folder.is_dir():
        pytest.skip(f"no rainy images at {folder}")
    scores = evaluate(lambda images: images, Deraining(), open_folder(folder, 3))
    assert [image.psnr for image in scores.images] == pytest.approx([25.3, 19.5, 19.5], abs=0.05)


@pytest.mark.parametrize(
    ("field", "value", "limits"),
    [
        ("density", (-0.1, 0.1), "0..1"),
        ("length", (8.0, 256.0), "1..255"),
        ("angle", (10.0, -10.0), "-90..90"),
        ("width", (0.0, 1.0), "0.1..10"),
        ("brightness", (0.5,), "0..1"),
    ],
)
def test_ranges(field, value, limits):
    with pytest.raises(ValueError) as error:
        Deraining(**{field: value})
    assert str(error.value) == (
        f"deraining: expected {field} as a range (low, high) within {limits}, got {value}"
    )
