"""Losses and scores of depth by hand and against another implementation; the task around them."""

import math

import numpy as np
import pytest
import torch

from nasfast.data import TrainTransform, ValTransform
from nasfast.data.depth import DepthSample, StreetDepths, load_depth_splits
from nasfast.encoders import load_encoder
from nasfast.models.build import build_segmenter
from nasfast.models.decoders import DecoderConfig
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.tasks.depth import DepthMap, DepthSettings, DepthTask
from nasfast.tasks.depth.losses import LOSSES
from nasfast.tasks.depth.scores import DepthErrors, mean_depth_scores
from nasfast.training.loop import NonFiniteLossError, Runtime

CPU = torch.device("cpu")
GENOTYPE = FastNASSpace().from_json(
    [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]]
)


def scores(depth, truth, cap=None):
    errors = DepthErrors(CPU, cap)
    errors.update(torch.tensor(depth), torch.tensor(truth))
    return errors.compute()


def test_scores_by_hand():
    """Ratios 1, 1.2, 1.5 and 2 (of which 1.25^2 and 1.25^3 hold 1.5 and, 1.953, not 2)."""
    got = scores([[2.0, 4.8, 3.0, 1.0, 7.0]], [[2.0, 4.0, 2.0, 2.0, 0.0]])
    assert got.delta1 == 0.5
    assert got.delta2 == got.delta3 == 0.75
    assert got.rmse == pytest.approx(math.sqrt((0 + 0.64 + 1 + 1) / 4), abs=1e-6)
    logs = sum(math.log(ratio) ** 2 for ratio in (1.2, 1.5, 2)) / 4
    assert got.rmse_log == pytest.approx(math.sqrt(logs), abs=1e-6)
    assert got.abs_rel == pytest.approx((0 + 0.2 + 0.5 + 0.5) / 4, abs=1e-6)
    assert got.sqr_rel == pytest.approx((0 + 0.16 + 0.5 + 0.5) / 4, abs=1e-6)
    assert got.deviation == pytest.approx(math.sqrt(0.75), abs=1e-6)
    assert got.reward == pytest.approx(math.sqrt(0.5 / (1 + got.rmse / got.deviation)))
    assert list(got.as_dict())[:4] == ["delta1", "delta2", "delta3", "rmse"]


def test_predictions_are_cut_to_the_cap():
    assert scores([[50.0]], [[8.0]], cap=10).rmse == pytest.approx(2)
    assert scores([[-3.0]], [[1.0]]).rmse_log == pytest.approx(math.log(1000))


def test_the_mean_depth_has_half_the_second_factor():
    truth = [[1.0, 3.0, 5.0]]
    got = scores([[3.0, 3.0, 3.0]], truth)
    assert got.rmse == pytest.approx(got.deviation)
    assert scores([[1.0]], [[1.0]]).reward == 1
    assert scores([[1.0]], [[0.0]]).as_dict() == dict.fromkeys(got.as_dict(), 0.0)


def test_scores_against_numpy():
    """Pixel by pixel over two batches, in another order of sums."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.5, 10, (5, 12, 16)) * (rng.random((5, 12, 16)) < 0.7)
    depth = np.exp(np.log(np.maximum(truth, 1)) + rng.normal(0, 0.4, truth.shape))
    errors = DepthErrors(CPU)
    for part in (slice(0, 2), slice(2, 5)):
        errors.update(torch.from_numpy(depth[part]), torch.from_numpy(truth[part]))
    d, t = depth[truth > 0], truth[truth > 0]
    worse = np.where(d > t, d / t, t / d)
    expected = {
        **{f"delta{k}": np.mean(worse < 1.25**k) for k in (1, 2, 3)},
        "rmse": np.linalg.norm(d - t) / np.sqrt(len(t)),
        "rmse_log": np.sqrt(np.mean(np.log(d / t) ** 2)),
        "abs_rel": np.mean(np.abs(d / t - 1)),
        "sqr_rel": np.mean((d - t) ** 2 / t),
    }
    got = errors.compute()
    assert got.as_dict() == pytest.approx(expected, abs=1e-6)
    assert got.deviation == pytest.approx(t.std(), abs=1e-6)


def test_the_mean_of_each_pixel_by_hand():
    """Means 2 and 5 of what is known; the last pixel, known nowhere, gets the mean of all."""

    class Depths(StreetDepths):
        def __init__(self, *depths):
            super().__init__(len(depths), (1, 3), stream="val")
            self.depths = depths

        def __getitem__(self, index):
            return DepthSample(torch.zeros(3, 1, 3), torch.tensor([self.depths[index]]))

    train = Depths([1.0, 5.0, 0.0], [3.0, 0.0, 0.0])
    got = mean_depth_scores(train, Depths([2.0, 4.0, 3.0], [0.0, 0.0, 6.0]))
    assert got.abs_rel == pytest.approx((0 + 1 / 4 + 0 + 3 / 6) / 4)
    assert mean_depth_scores(train, StreetDepths(1, (1, 4), stream="val")) is None


def loss(name, predicted, truth):
    logs, depth = torch.tensor(predicted).log(), torch.tensor(truth)
    return LOSSES[name](logs, depth, depth > 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # errors 0.5, 1 and 5, so c = 1
        ("berhu", (0.5 + 1 + (25 + 1) / 2) / 3),
        ("l1-log", (math.log(2.5 / 2) + math.log(2) + math.log(2)) / 3),
        # of two images; the last has no pixel
        (
            "scale-invariant",
            (
                (math.log(1.25) ** 2 + math.log(2) ** 2) / 2
                - 0.5 * ((math.log(1.25) + math.log(2)) / 2) ** 2
                + 0.5 * math.log(2) ** 2
            )
            / 2,
        ),
    ],
)
def test_losses_by_hand(name, expected):
    predicted = [[[2.5, 2.0]], [[10.0, 3.0]], [[1.0, 9.0]]]
    truth = [[[2.0, 1.0]], [[5.0, 0.0]], [[0.0, 0.0]]]
    assert loss(name, predicted, truth).item() == pytest.approx(expected, abs=1e-5)
    nothing = loss(name, predicted, np.zeros((3, 1, 2)).tolist())
    assert nothing.item() == 0
    exact = torch.tensor(truth).clamp(min=1).log().requires_grad_()
    LOSSES[name](exact, torch.tensor(truth), torch.tensor(truth) > 0).backward()
    assert exact.grad.isfinite().all()


@pytest.mark.parametrize("name", ["l1-log", "scale-invariant"])
def test_parts_of_a_batch_weigh_as_the_whole(name, task):
    task = DepthTask(task.splits, DepthSettings(loss=name))
    depth = torch.rand(4, 6, 8).clamp(min=0.3) * (torch.rand(4, 6, 8) < 0.6)
    depth[1] = 0
    output, targets = torch.randn(4, 1, 6, 8), {"depth": depth}
    parts = [slice(0, 2), slice(2, 4)]
    weights = [task.weight({"depth": depth[part]}) for part in parts]
    losses = [task.criterion(output[part], {"depth": depth[part]}) for part in parts]
    mean = sum(w * each for w, each in zip(weights, losses, strict=True)) / sum(weights)
    assert mean.item() == pytest.approx(task.criterion(output, targets).item(), abs=1e-5)


@pytest.fixture(scope="module")
def task():
    return DepthTask(load_depth_splits("synthetic"))


def test_what_is_enlarged_is_nearer():
    sample = DepthSample(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((4, 4), 6.0))
    twice = TrainTransform(8, 8, (2.0, 2.0))(sample, torch.Generator().manual_seed(0))
    assert twice.mask.shape == (8, 8)
    assert twice.mask.unique().tolist() == [3.0]


def test_targets_keep_what_is_not_known(task):
    depth = torch.tensor([[[0.0, 2.0], [3.0, 0.0]]])
    small = task.resize_targets({"depth": depth}, (4, 4))["depth"]
    assert sorted(small.unique().tolist()) == [0, 2, 3]
    padded = task.pad_targets({"depth": depth}, (3, 4))["depth"]
    assert padded.shape == (1, 3, 4)
    assert padded.sum() == 5


def test_networks_begin_at_the_typical_depth(task):
    network = build_segmenter(load_encoder(), GENOTYPE, 1, DecoderConfig(8))
    before, after = [], []
    for found in (before, after):
        score = task.score_images(
            network, task.search_val.subset([0, 1]), ValTransform(None), Runtime(CPU)
        )
        found += [score.rmse_log]
        task.begin(network)
    assert after[0] < 0.5 * before[0]
    with torch.no_grad():
        network.decoder.conv_clf.bias.fill_(200)
    with pytest.raises(NonFiniteLossError, match="depths are not finite"):
        task.score_images(network, task.search_val.subset([0]), ValTransform(None), Runtime(CPU))


def test_a_prediction_is_saved_as_the_files_of_the_training(tmp_path):
    from PIL import Image

    depth = torch.tensor([[0.5, 2.0], [300.0, 0.0001]])
    found = DepthMap(torch.zeros(3, 2, 2, dtype=torch.uint8), depth, 256, 2.0)
    files = found.save(tmp_path, "a")
    assert [file.name for file in files] == ["a.png", "a-color.png"]
    with Image.open(files[0]) as image:
        assert np.array(image).tolist() == [[128, 512], [65534, 1]]
    assert found.to_json()["values_a_metre"] == 256
    colors = found.draw().sum(0, dtype=torch.int32)
    assert colors[0, 0] > colors[0, 1] > colors[1, 0]  # bright is near
