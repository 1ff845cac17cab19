"""Filters without training: what they remove, what they keep, and their errors."""

import sys

import pytest
import torch

from nasfast.data.restoration import open_images
from nasfast.tasks.restoration.baselines import (
    bicubic,
    dark_channel,
    dark_channel_prior,
    dct_filter,
    diffuse,
    guided_filter,
    noise_deviation,
    non_local_means,
)
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.fidelity import psnr
from nasfast.tasks.restoration.scoring import evaluate


def dct_by_hand(image, sigma, threshold):
    """One window after the other, from the definition of the DCT."""
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(torch.pi * (2 * n[None] + 1) * n[:, None] / 16) / 2
    basis[0] /= 2**0.5
    padded = torch.nn.functional.pad(image[None, None], (7,) * 4, mode="reflect")[0, 0]
    total, weights = torch.zeros_like(padded), torch.zeros_like(padded)
    for top in range(padded.shape[0] - 7):
        for left in range(padded.shape[1] - 7):
            window = (slice(top, top + 8), slice(left, left + 8))
            coefficients = basis @ padded[window] @ basis.T
            kept = coefficients.where(coefficients.abs() >= threshold * sigma, 0)
            kept[0, 0] = coefficients[0, 0]
            weight = 1 / (kept != 0).sum()
            total[window] += weight * (basis.T @ kept @ basis)
            weights[window] += weight
    return (total / weights)[7:-7, 7:-7]


def test_dct_filter_from_the_definition():
    images = torch.rand(2, 2, 41, 12, dtype=torch.float64)  # rows for several strips
    half = 2**-0.5
    across = torch.tensor([[half, half], [half, -half]], dtype=torch.float64)  # DCT of 2 channels
    for image, restored in zip(images, dct_filter(images, 0.1), strict=True):
        planes = [dct_by_hand(plane, 0.1, 2.7) for plane in torch.einsum("dc,chw", across, image)]
        wanted = torch.einsum("dc,dhw->chw", across, torch.stack(planes))
        torch.testing.assert_close(restored, wanted)
    torch.testing.assert_close(dct_filter(images, 0.0), images)
    # above every coefficient only the means of the windows are left
    assert dct_filter(images, 100.0).std() < 0.2 * images.std()


def test_dct_filter_needs_a_window():
    with pytest.raises(ValueError) as error:
        dct_filter(torch.zeros(1, 1, 7, 20), 0.1)
    assert str(error.value) == (
        "dct_filter: expected images of at least 8x8 pixels, got 7x20; leave smaller images out"
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_non_local_means_denoises(channels):
    clean = torch.zeros(2, channels, 40, 30)
    clean[..., 15:] = 0.7
    noisy = clean + 0.1 * torch.randn_like(clean)
    restored = non_local_means(noisy, 0.1)
    assert restored.dtype == torch.float32
    assert (psnr(restored, clean) > psnr(noisy, clean) + 8).all()


def test_non_local_means_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    with pytest.raises(ImportError) as error:
        non_local_means(torch.zeros(1, 1, 16, 16), 0.1)
    assert str(error.value) == (
        "non-local means needs scikit-image, which is not installed: "
        "pip install 'nasfast[restoration]'"
    )


def test_deviation_of_noise_over_a_ramp():
    ramp = torch.linspace(0, 1, 201).expand(1, 3, 151, 201)
    noise = torch.randn(ramp.shape, generator=torch.Generator().manual_seed(0))
    assert noise_deviation(ramp) == pytest.approx(0, abs=1e-6)
    assert noise_deviation(ramp + 0.1 * noise) == pytest.approx(0.1, rel=0.03)


def test_bicubic_keeps_a_ramp():
    ramp = torch.linspace(0, 1, 20).expand(1, 3, 16, 20)
    large = bicubic(ramp, 3)
    assert large.shape == (1, 3, 48, 60)
    steps = large.diff(dim=3)[..., 6:-6]
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 57), rtol=0, atol=1e-4)


def test_diffusion_fills_a_ramp_and_keeps_what_is_known():
    y, x = torch.linspace(0.1, 0.5, 24)[:, None], torch.linspace(0.1, 0.4, 30)
    ramp = (y + x).expand(2, 3, -1, -1)
    hole = torch.zeros(24, 30, dtype=torch.bool)
    hole[8:14, 10:17] = True
    degraded = ramp.masked_fill(hole, 0)
    filled = diffuse(degraded)
    assert torch.equal(filled[..., ~hole], ramp[..., ~hole])
    torch.testing.assert_close(filled, ramp, rtol=0, atol=1e-4)  # linear functions are harmonic
    assert not diffuse(torch.zeros(1, 1, 4, 4)).any()


def test_dark_channel_by_hand():
    image = torch.tensor([[[5.0, 1, 9, 8]], [[4, 2, 7, 9]]])[None]  # the least: 4 1 7 8
    assert dark_channel(image, 3).flatten().tolist() == [1, 1, 1, 7]


def test_guided_filter_by_hand():
    """Windows of a row of three pixels, radius 1: (0, 1), (0, 1, 1), (1, 1)."""
    guide, image = torch.tensor([[[[0.0, 1, 1]]]]), torch.tensor([[[[0.0, 2, 5]]]])
    # slopes: covariance over variance + 1/36; offsets: mean image - slope * mean guide
    first, second = 0.5 / (1 / 4 + 1 / 36), (7 / 3 - 14 / 9) / (2 / 9 + 1 / 36)
    slopes = (first, second, 0.0)
    offsets = (1 - first / 2, 7 / 3 - second * 2 / 3, 3.5)
    wanted = [
        (offsets[0] + offsets[1]) / 2,
        (sum(slopes) + sum(offsets)) / 3,
        (sum(slopes[1:]) + sum(offsets[1:])) / 2,
    ]
    found = guided_filter(guide, image, 1, 1 / 36).flatten().tolist()
    assert found == pytest.approx(wanted, abs=1e-5)


def test_dark_channel_prior_by_hand():
    """Stripes of black and of one colour, all at one depth, under a sky: t is found where no window
    reaches the sky, but for the 5 % of the haze that stay."""
    airlight, light = torch.tensor([0.9, 0.8, 1.0])[:, None, None], 0.5
    clean = torch.tensor([0.0, 0.6]).repeat(40).expand(3, 100, 80)
    hazy = torch.lerp(airlight, clean, light)
    hazy[:, :20] = airlight
    hazy[:, 30, 0] = 1.0  # brighter, but not in the dark channel
    found = dark_channel_prior(hazy[None])[0, :, 75:]
    transmission = 1 - 0.95 * (1 - light)
    wanted = (hazy[:, 75:] - airlight) / transmission + airlight
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_sliding_dct_on_bsds500(data_root):
    """24.89 dB is an independent computation on every tenth test image (its noise differs)."""
    if not (data_root / "bsds500").is_dir():
        pytest.skip(f"no BSDS500 at {data_root / 'bsds500'}")
    task = Denoising(50.0)
    test = open_images(data_root / "bsds500", 1).test[::10]
    scores = evaluate(task.baselines()["sliding DCT"], task, test)
    assert scores.psnr == pytest.approx(24.89, abs=0.02)
