"""Missing pixels: how many, where, and the settings."""

import pytest
import torch
from torch.nn import functional as F

from nasfast.tasks.restoration.inpainting import Inpainting


def missing(task, shape=(3, 120, 160), seed=0):
    degraded = task.degrade(torch.ones(shape), torch.Generator().manual_seed(seed))
    assert set(degraded.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(degraded[0], degraded[-1])
    return degraded[0] == 0


def test_share_of_the_pixels():
    assert missing(Inpainting(0.3)).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert not torch.equal(missing(Inpainting(0.3)), missing(Inpainting(0.3), seed=1))


def test_boxes():
    mask = missing(Inpainting(0.0, boxes=0.2, box=10))
    assert 0.1 < mask.float().mean().item() <= 0.2
    corners = F.max_pool2d((~mask)[None, None].float(), 10, 1) == 0  # where a box would fit
    grown = F.max_pool2d(F.pad(corners.float(), (9,) * 4), 10, 1)[0, 0] > 0
    assert torch.equal(grown, mask)  # nothing but whole boxes is missing
    assert missing(Inpainting(0.0, boxes=0.01, box=64), (1, 30, 20)).sum() == 20 * 20


def test_labels():
    assert Inpainting().label == "inpainting, 50 % of the pixels"
    both = Inpainting(0.25, boxes=0.1).label
    assert both == "inpainting, 25 % of the pixels and 10 % in boxes of 16"


def test_diffusion_beats_the_identity():
    task = Inpainting(0.5)
    clean = torch.linspace(0.2, 0.8, 40).expand(1, 32, 40)
    degraded = task.degrade(clean, torch.Generator().manual_seed(0))
    methods = task.baselines()
    errors = [(method(degraded[None])[0] - clean).abs().max() for method in methods.values()]
    assert list(methods) == ["identity", "diffusion"]
    assert errors[1] < 0.1 < errors[0]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"missing": 1.0}, "inpainting: expected missing from 0 to below 1, got 1.0"),
        ({"boxes": -0.1}, "inpainting: expected boxes from 0 to below 1, got -0.1"),
        ({"missing": 0.0}, "inpainting: expected missing or boxes above 0, got 0 for both"),
        ({"box": 0}, "inpainting: expected box of at least 1 pixel, got 0"),
    ],
)
def test_settings(settings, text):
    with pytest.raises(ValueError) as error:
        Inpainting(**settings)
    assert str(error.value) == text
