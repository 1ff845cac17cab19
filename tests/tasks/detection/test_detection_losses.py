"""Losses against their formulas, with all gradients; finite where there is little to learn."""

import math

import pytest
import torch
from torch.nn import functional as F

from nasfast.tasks.detection.losses import (
    DetectionLoss,
    centerness,
    loss_sums,
    normalized,
    normalizers,
)
from nasfast.utils.errors import UserError

IOU, GIOU = DetectionLoss(), DetectionLoss(box="giou", count_images=False)


def case(images=3, classes=4, points=50):
    names = torch.randint(-2, classes, (images, points))
    distances = torch.where((names >= 0)[..., None], 0.5 + 60 * torch.rand(images, points, 4), 1.0)
    output = 3 * torch.randn(images, classes + 5, points)
    output[:, classes : classes + 4] = 60 * torch.rand(images, 4, points)
    return output, names, distances


def plain(output, names, distances, kind):
    """Over the points that count, taken out one by one."""
    classes = output.shape[1] - 5
    rows = output.transpose(1, 2)
    counted, positive = names > -2, names >= 0
    wanted = F.one_hot(names[counted].clamp(min=0), classes) * (names[counted] >= 0)[:, None]
    p = rows[counted][:, :classes].sigmoid()
    focal = -torch.where(
        wanted == 1, 0.25 * (1 - p) ** 2 * p.log(), 0.75 * p**2 * (1 - p).log()
    ).sum()
    a, b = rows[positive][:, classes : classes + 4], distances[positive]
    target = centerness(b)
    inner, outer = torch.minimum(a, b), torch.maximum(a, b)
    areas = [(x[:, 0] + x[:, 2]) * (x[:, 1] + x[:, 3]) for x in (a, b, inner, outer)]
    union = areas[0] + areas[1] - areas[2]
    boxes = -((areas[2] + 1) / (union + 1)).log()
    if kind == "giou":
        boxes = 1 - (areas[2] / union - (areas[3] - union) / areas[3])
    ness = F.binary_cross_entropy(rows[positive][:, -1].sigmoid(), target, reduction="sum")
    return torch.stack([focal, (boxes * target).sum(), ness])


@pytest.mark.parametrize("settings", [IOU, GIOU])
def test_formulas_and_gradients(settings):
    output, names, distances = case()
    got, expected = output.clone().requires_grad_(), output.double().requires_grad_()
    sums = loss_sums(got, names, distances, settings)
    reference = plain(expected, names, distances.double(), settings.box)
    torch.testing.assert_close(sums, reference.float(), rtol=1e-5, atol=1e-5)
    factors = torch.tensor([0.3, 2.0, 5.0])
    (sums * factors).sum().backward()
    (reference * factors).sum().backward()
    torch.testing.assert_close(got.grad, expected.grad.float(), rtol=1e-4, atol=1e-5)


def test_by_hand():
    """One point of a box of 8 x 8, at (2, 4); the network says 6 x 8: IoU 48 / 64."""
    distances = torch.tensor([[[2.0, 4.0, 6.0, 4.0]]])
    output = torch.tensor([[[0.0], [2.0], [4.0], [4.0], [4.0], [0.0]]])
    names = torch.zeros(1, 1, dtype=torch.int64)
    target = math.sqrt(2 / 6)
    sums = loss_sums(output, names, distances, IOU).tolist()
    expected = [0.25 * 0.25 * math.log(2), target * math.log(65 / 49), math.log(2)]
    assert sums == pytest.approx(expected)
    assert loss_sums(output, names, distances, GIOU)[1].item() == pytest.approx(target * 0.25)
    assert normalizers(names, distances, IOU).tolist() == pytest.approx([2, target, 1])
    assert normalizers(names, distances, GIOU).tolist() == pytest.approx([1, target, 1])


@pytest.mark.parametrize("settings", [IOU, GIOU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", [-2, -1, 0])
def test_everything_stays_finite(settings, dtype, label):
    """No object, none that counts, and outputs at the ends of what there is."""
    names = torch.full((2, 6), label)
    output = torch.zeros(2, 7, 6)
    output[:, :2], output[:, -1] = torch.tensor([-3e4, -90, -1, 1, 90, 3e4]), -3e4
    output[:, 2:6] = torch.tensor([-5, 0.0, 1e-3, 1, 1e3, 6e4])
    if dtype != torch.float16:
        output[0, :, -1], output[1, :2, 0] = 1e30, -1e30
    output = output.to(dtype).requires_grad_()
    distances = torch.ones(2, 6, 4)
    sums = loss_sums(output, names, distances, settings)
    losses = normalized(sums, normalizers(names, distances, settings))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert output.grad.isfinite().all()
    assert output.grad.dtype == dtype
    assert bool(output.grad.any()) == (label != -2)


def test_half_precision_is_computed_in_float32():
    output, names, distances = case()
    half = output.bfloat16()
    own, same = (loss_sums(x, names, distances, IOU) for x in (half, half.float()))
    assert torch.equal(own, same)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"center_sampling": -1.0},
            "DetectionLoss.center_sampling: expected a value of at least 0, got -1.0",
        ),
        ({"size_scale": 0.0}, "DetectionLoss.size_scale: expected a value above 0, got 0.0"),
    ],
)
def test_settings_say_what_they_take(settings, message):
    with pytest.raises(UserError) as error:
        DetectionLoss(**settings)
    assert str(error.value) == message
