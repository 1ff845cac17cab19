"""Bootstrap intervals of AP: each draw of images has the AP that COCO gives to it."""

import pytest
import torch

from nasfast.tasks.detection.intervals import ap_intervals
from nasfast.tasks.detection.scores import ImageBoxes, coco_ap

CLASSES = 3


def image(generator):
    """Objects of the first two classes, found but for some pixels, and wrong detections."""
    boxes = torch.rand(6, 4, generator=generator) * 100
    boxes[:, 2:] += boxes[:, :2] + 20
    noise = 12 * torch.randn(6, 4, generator=generator)
    labels = torch.randint(2, (6,), generator=generator)
    wrong = torch.randint(CLASSES, (6,), generator=generator)
    return ImageBoxes(
        boxes,
        labels,
        torch.zeros(6, dtype=torch.bool),
        (boxes[:, 2:] - boxes[:, :2]).prod(1),
        torch.cat([boxes + noise, boxes.flip(0) + 40]),
        torch.rand(12, generator=generator),
        torch.cat([labels, wrong]),
    )


def test_intervals_are_those_of_coco_on_each_draw():
    generator = torch.Generator().manual_seed(0)
    images = [image(generator) for _ in range(5)]
    found = ap_intervals(images, CLASSES, resamples=20, seed=3)
    drawn = torch.randint(5, (20, 5), generator=torch.Generator().manual_seed(3))
    draws = [coco_ap([images[i] for i in row], CLASSES).figures for row in drawn.tolist()]
    whole = coco_ap(images, CLASSES).figures
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    for name, estimate in found.items():
        values = torch.tensor([each[name] for each in draws], dtype=torch.float64)
        expected = [whole[name], *values.quantile(ends).tolist()]
        assert [estimate.value, estimate.low, estimate.high] == pytest.approx(expected, abs=1e-9)


def test_data_without_objects_have_no_interval():
    nothing = torch.zeros(0)
    empty = ImageBoxes(
        torch.zeros(0, 4), nothing.long(), nothing.bool(), nothing, torch.ones(1, 4),
        torch.ones(1), torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    assert ap_intervals([empty], 1, resamples=3)["ap"].low is None
