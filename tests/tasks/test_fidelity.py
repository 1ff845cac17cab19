"""PSNR and SSIM against scikit-image and values worked out by hand."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.autograd import gradcheck

from nasfast.tasks.restoration.fidelity import psnr, ssim


def pair(*shape, noise=0.1, dtype=torch.float64):
    smooth = torch.nn.functional.interpolate(torch.rand(*shape[:2], 4, 5), shape[2:]).to(dtype)
    return smooth + noise * torch.randn(shape, dtype=dtype), smooth


def by_skimage(x, y):
    return structural_similarity(
        x.numpy(),
        y.numpy(),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=0,
    )


@pytest.mark.parametrize("shape", [(2, 1, 37, 24), (1, 3, 11, 60)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ssim_is_that_of_scikit_image(shape, dtype):
    x, y = pair(*shape, dtype=dtype)
    wanted = [by_skimage(a.double(), b.double()) for a, b in zip(x, y)]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert ssim(x, y).tolist() == pytest.approx(wanted, abs=tolerance)
    # zero padding is windows inside images with a black frame
    x_framed, y_framed = (torch.nn.functional.pad(z, (5, 5, 5, 5)).double() for z in (x, y))
    wanted = [by_skimage(a, b) for a, b in zip(x_framed, y_framed)]
    assert ssim(x, y, padding=True).tolist() == pytest.approx(wanted, abs=tolerance)


def test_psnr_is_that_of_scikit_image():
    x, y = pair(3, 3, 20, 31)
    wanted = [peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1) for a, b in zip(x, y)]
    assert psnr(x, y).tolist() == pytest.approx(wanted)
    # nothing is clamped: an error of 2 is one of -6 dB
    assert psnr(y + 2, y).tolist() == pytest.approx([-20 * math.log10(2)] * 3)


def test_equal_images():
    x = torch.rand(2, 1, 16, 18)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])
    assert psnr(x, x).tolist() == [math.inf, math.inf]


def test_gradient():
    x, y = pair(1, 2, 12, 13)
    x.requires_grad_()
    for padding in (False, True):
        assert gradcheck(lambda z, p=padding: ssim(z, y, padding=p), x)


def test_float32_also_under_autocast():
    x, y = pair(1, 1, 20, 20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(x, y), ssim(x.clone(), y))
        assert ssim(x.bfloat16(), y).dtype == torch.float32
    assert ssim(x, y).item() == pytest.approx(ssim(x.double(), y.double()).item(), abs=1e-5)


@pytest.mark.parametrize("function", [psnr, ssim])
def test_shapes_must_agree(function):
    with pytest.raises(ValueError) as error:
        function(torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 16))
    assert str(error.value) == (
        f"{function.__name__}: expected prediction and target of one shape [N, C, H, W], got "
        "[1, 1, 16, 16] and [1, 3, 16, 16]"
    )


def test_windows_must_fit():
    x = torch.rand(1, 1, 10, 20)
    assert ssim(x, x, padding=True).item() == pytest.approx(1)
    with pytest.raises(ValueError) as error:
        ssim(x, x)
    assert str(error.value) == (
        "ssim: expected images of at least 11x11 pixels, got 10x20; leave smaller images out"
    )
