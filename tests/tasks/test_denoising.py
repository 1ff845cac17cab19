"""Gaussian noise: its deviation, blind drawing, settings."""

import pytest
import torch

from nasfast.tasks.restoration.denoising import Denoising


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sigma", [30.0, 70.0])
def test_noise_is_gaussian_and_not_clipped(sigma):
    noisy = Denoising(sigma).degrade(torch.zeros(1, 200, 300), generator())
    assert 255 * noisy.std().item() == pytest.approx(sigma, rel=0.02)
    assert abs(noisy.mean().item()) < 0.005
    assert noisy.min() < -2 * sigma / 255
    assert noisy.dtype == torch.float32


def test_blind_draws_every_deviation():
    task, chance = Denoising((30.0, 50.0, 70.0)), generator()
    clean = torch.zeros(1, 64, 64)
    drawn = [round(255 * task.degrade(clean, chance).std().item(), -1) for _ in range(60)]
    assert set(drawn) == {30, 50, 70}
    assert min(drawn.count(sigma) for sigma in (30, 50, 70)) > 8
    assert [c.sigma for c in task.conditions()] == [30.0, 50.0, 70.0]
    assert task.label == "denoising, sigma 30/50/70"


def test_the_filters_of_one_deviation():
    assert list(Denoising(50.0).baselines()) == ["identity", "non-local means", "sliding DCT"]
    with pytest.raises(ValueError) as error:
        Denoising((30.0, 50.0)).baselines()
    assert str(error.value) == (
        "denoising: the filters need one sigma, got (30.0, 50.0); compare under each of "
        "conditions()"
    )


@pytest.mark.parametrize("sigma", [0.0, -1.0, 255.5, float("nan"), (), (30.0, 300.0)])
def test_sigma_out_of_range(sigma):
    with pytest.raises(ValueError) as error:
        Denoising(sigma)
    assert str(error.value) == (
        "denoising: expected sigma above 0 and at most 255 (the scale of "
        f"8-bit images), got {sigma}"
    )
