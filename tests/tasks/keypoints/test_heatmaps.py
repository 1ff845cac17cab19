"""Targets, decoding, flip test and loss of keypoints."""

import dataclasses
import math

import pytest
import torch

from nasfast.data.keypoints import (
    KeypointParts,
    PersonTrainTransform,
    PersonValTransform,
    SyntheticPeople,
    divide,
)
from nasfast.tasks.keypoints import KeypointTask
from nasfast.tasks.keypoints.heatmaps import decode, flip_tested, heatmaps, sigma_of
from nasfast.tasks.keypoints.scores import KeypointScores
from nasfast.training.loop import NonFiniteLossError, Runtime

RUNTIME = Runtime(torch.device("cpu"))
CROP = PersonValTransform((96, 64))


@pytest.fixture(scope="module")
def task():
    train, val = (SyntheticPeople(12, stream=stream) for stream in ("train", "val"))
    return KeypointTask(divide(KeypointParts(train, val), seed=0, fraction=0.5))


def test_a_gaussian_about_each_joint():
    assert [sigma_of(rows) for rows in (24, 64, 96)] == [1, 2, 3]
    joints = torch.tensor([[[10.0, 22.0], [40.0, 40.0]]])
    maps = heatmaps(joints, 4, (24, 16))
    assert maps.shape == (1, 2, 24, 16)
    assert maps[0, 0, 5, 2].item() == 1  # the cell whose centre is (10, 22)
    assert maps[0, 0, 6, 3].item() == pytest.approx(math.exp(-1))  # a cell across and one down
    assert maps[0, 1, 9, 9].item() == pytest.approx(math.exp(-0.25))  # half a cell each


def test_decoding_finds_the_centre_between_cells():
    """Wherever it lies, at strides 4 and 8; at the border the nearest cell is the answer."""
    generator = torch.Generator().manual_seed(0)
    joints = 12 + torch.rand(5, 7, 2, generator=generator) * torch.tensor([40.0, 72.0])
    for stride, size in ((4, (24, 16)), (8, (12, 8))):
        points, peaks = decode(heatmaps(joints, stride, size), (96, 64))
        assert (points - joints).abs().max() < 1e-3
        assert peaks.min() > 0.7
    points, _ = decode(heatmaps(torch.tensor([[[1.0, 30.0]]]), 4, (24, 16)), (96, 64))
    assert points[0, 0].tolist() == pytest.approx([2, 30], abs=1e-3)
    points, peaks = decode(torch.zeros(1, 1, 24, 16), (96, 64))
    assert (points.tolist(), peaks.item()) == ([[[2, 2]]], 0)


def test_flip_test_exchanges_left_and_right(task):
    """A network that paints joint k at the place of colour k sees the mirrored one exchanged."""
    mirrored = task.splits.train.skeleton.mirrored
    maps = torch.rand(2, len(mirrored), 24, 16)

    def network(images):
        return maps if images[0, 0, 0, 0] == 0 else maps.flip(-1)[:, list(mirrored)]

    images = torch.zeros(2, 3, 96, 64)
    images[..., -1] = 1
    assert torch.equal(flip_tested(network, mirrored)(images), maps)
    # one that does not know left from right is averaged
    both = flip_tested(lambda images: maps, mirrored)(images)
    assert torch.allclose(both, (maps + maps.flip(-1)[:, list(mirrored)]) / 2)


def test_the_truth_has_no_loss_and_full_scores(task):
    frames = task.search_val
    _, targets = task.load_padded(frames, range(8), CROP)
    perfect = heatmaps(targets["joints"], 4, (24, 16))
    assert task.criterion(perfect, targets).item() == 0
    zeros = task.criterion(torch.zeros_like(perfect), targets).item()
    assert 0.8 < zeros < 1.1  # some Gaussians are cut by the border of the crop
    half = task.criterion(torch.zeros(8, 13, 12, 8), targets).item()
    assert half == pytest.approx(zeros)
    scores = task.score([(None, targets)], lambda _: perfect, RUNTIME)
    assert isinstance(scores, KeypointScores)
    assert scores.figures["oks"] > 0.98 < scores.figures["ap"]
    assert scores.figures["pckh@0.5"] > 0.98
    assert [each.metric for each in task.class_scores(scores)] == ["OKS"] * 13
    with pytest.raises(NonFiniteLossError, match="the network's maps are not finite"):
        task.score([(None, targets)], lambda _: perfect * math.nan, RUNTIME)


def test_what_is_not_labelled_is_not_learned(task):
    _, targets = task.load_padded(task.search_val, [0], CROP)
    maps = torch.rand(1, 13, 24, 16)
    targets["visible"][:, 3] = 0
    targets["joints"][:, 4] = torch.tensor([70.0, 50.0])  # to the right of the crop
    before, weight = task.criterion(maps, targets), task.weight(targets)
    maps[:, 3:5] += 5
    assert task.criterion(maps, targets) == before
    targets["visible"][:, 3] = 2
    assert task.weight(targets) == weight + 1
    targets["visible"][:] = 0
    assert (task.criterion(maps, targets).item(), task.weight(targets).item()) == (0, 0)


def test_padding_is_not_learned(task):
    """Crops of 72 x 48 are padded to 96 x 64."""
    images, targets = task.load_padded(task.search_val, [0, 1], PersonValTransform((72, 48)))
    assert images.shape == (2, 3, 96, 64)
    assert targets["inside"].sum((1, 2)).tolist() == [18 * 12] * 2
    maps = torch.rand(2, 13, 24, 16)
    before = task.criterion(maps, targets)
    scores = task.score([(None, targets)], lambda _: maps, RUNTIME)
    maps[:, :, 18:] += 5
    maps[:, :, :, 12:] += 5
    assert task.criterion(maps, targets) == before
    assert task.score([(None, targets)], lambda _: maps, RUNTIME) == scores


def test_stage_targets_and_pictures(task):
    transform = PersonTrainTransform((96, 64))
    generator = torch.Generator().manual_seed(0)
    images, targets = task.load_padded(task.search_train, [3], transform, generator)
    assert dataclasses.astuple(transform)[0] == tuple(images.shape[-2:])
    small = task.resize_targets(targets, (24, 16))
    assert set(small) == {"joints", "visible", "inside"}
    maps = torch.rand(1, 13, 24, 16)
    assert task.criterion(maps, small) == task.criterion(maps, targets)
    poses = task.truth({name: target[0] for name, target in targets.items()}, images[0])
    assert poses.draw().shape == (3, 288, 192)  # enlarged
    assert not torch.equal(poses.draw()[:, ::3, ::3], images[0])
