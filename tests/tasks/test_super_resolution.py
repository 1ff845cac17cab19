"""Bicubic reduction against PIL's, cutting to the scale, settings."""

import numpy as np
import pytest
import torch
from PIL import Image

from nasfast.data.restoration import ImagePair
from nasfast.tasks.restoration.super_resolution import SuperResolution


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_reduction_is_that_of_pil(scale):
    task, chance = SuperResolution(scale), torch.Generator()
    clean = torch.randint(64, 192, (3, 38, 51), dtype=torch.uint8)  # PIL clips between the passes
    small, target = task.pair(ImagePair("", clean), chance)
    height, width = 38 // scale, 51 // scale
    assert small.shape == (3, height, width)
    assert target.shape == (3, scale * height, scale * width)
    cut = clean[:, : scale * height, : scale * width]
    assert torch.equal(target, cut.float() / 255)
    pixels = Image.fromarray(cut.permute(1, 2, 0).numpy())
    wanted = np.asarray(pixels.resize((width, height), Image.Resampling.BICUBIC))
    difference = 255 * small.permute(1, 2, 0).numpy() - wanted.astype(np.float32)
    assert np.abs(difference).max() < 1.01  # PIL also rounds between the passes


def test_baseline_has_the_size_of_the_target():
    (method,) = SuperResolution(4).baselines().values()
    assert method(torch.rand(2, 1, 9, 7)).shape == (2, 1, 36, 28)
    assert SuperResolution(4).label == "super-resolution x4"


def test_scales():
    with pytest.raises(ValueError) as error:
        SuperResolution(5)
    assert str(error.value) == "super-resolution: expected scale 2, 3 or 4, got 5"
