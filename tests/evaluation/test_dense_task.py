"""A second task, a regression, goes through the evaluation as it is."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from nasfast.cache import CacheConfig
from nasfast.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SyntheticStreets,
    TrainTransform,
    ValTransform,
    batch,
)
from nasfast.encoders import load_encoder
from nasfast.evaluation.candidate import CandidateEvaluator
from nasfast.evaluation.frozen_encoder import FrozenEncoder
from nasfast.evaluation.stages import DecoderOnFeatures, EndToEnd, Stage0Config, Stage1Config
from nasfast.methods.dense import DenseTrainConfig, DenseTraining
from nasfast.models.build import build_segmenter
from nasfast.models.decoders import DecoderConfig
from nasfast.models.io import load_model
from nasfast.models.layers import resize
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.tasks.base import DenseTask
from nasfast.tasks.processor import Prediction, Preprocessing, Processor
from nasfast.training.loop import NonFiniteLossError, Runtime

GENOTYPE = FastNASSpace().from_json(
    [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]]
)
RUNTIME = Runtime(torch.device("cpu"))


@dataclass(frozen=True)
class Error:
    """How far a prediction is off."""

    rmse: float

    @property
    def reward(self):
        return 1 / (1 + self.rmse)

    def as_dict(self):
        return {"rmse": self.rmse}


@dataclass(frozen=True, eq=False)
class BrightnessMap(Prediction):
    """The brightness of each pixel."""

    image: torch.Tensor
    values: torch.Tensor

    def draw(self):
        return (64 * self.values).clamp(0, 255).byte().expand(3, -1, -1)

    def to_json(self):
        return {}

    def save(self, folder, stem):
        return []


class BrightnessProcessor(Processor):
    task = "brightness"
    preprocessing = Preprocessing(IMAGENET_MEAN, IMAGENET_STD)

    def result(self, reduced, image):
        return BrightnessMap(image, reduced[0])


class Brightness(DenseTask[Error]):
    """The brightness of each pixel after blurring, in [0, 4]; of the sky nothing is asked."""

    name = "brightness"

    def __init__(self):
        self._train = SyntheticStreets(12, size=(48, 64), cache_in_memory=True)
        self._val = SyntheticStreets(3, size=(48, 64), stream="val", cache_in_memory=True)

    @property
    def outputs(self):
        return 1

    @property
    def search_train(self):
        return self._train

    @property
    def search_val(self):
        return self._val

    def load_batch(self, frames, indices, transform, generator=None):
        assert isinstance(frames, SyntheticStreets)
        images, masks = batch(frames, indices, transform, generator)
        return images, {"brightness": images.float().mean(1) / 64, "valid": (masks != 0).byte()}

    def resize_targets(self, targets, size):
        brightness, valid = (resize(t[:, None].float(), size)[:, 0] for t in targets.values())
        return {"brightness": brightness, "valid": (valid > 0.5).byte()}

    def pad_targets(self, targets, size):
        height, width = targets["valid"].shape[-2:]
        room = (0, size[1] - width, 0, size[0] - height)
        return {name: F.pad(target, room) for name, target in targets.items()}

    def criterion(self, output, targets):
        expected, valid = targets["brightness"], targets["valid"]
        error = resize(output.float(), (expected.shape[-2], expected.shape[-1]))[:, 0] - expected
        return (error.square() * valid).sum() / valid.sum().clamp(min=1)

    @torch.inference_mode()
    def score(self, batches, predict, runtime):
        losses = []
        for inputs, targets in batches:
            with runtime.autocast():
                losses.append(self.criterion(predict(inputs), targets))
        loss = torch.stack(losses).mean()
        if not loss.isfinite():
            raise NonFiniteLossError("the network's output is not finite")
        return Error(loss.sqrt().item())

    @property
    def processor(self):
        return BrightnessProcessor()

    def truth(self, targets, image):
        return BrightnessMap(image, targets["brightness"])


TASK = Brightness()


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return features_in(tmp_path_factory.mktemp("features"))


def features_in(folder, teacher=None):
    return FrozenEncoder(
        TASK,
        load_encoder(),
        STAGE0.samples,
        (TrainTransform(STAGE0.crop, STAGE0.shorter_side), ValTransform(None)),
        RUNTIME,
        seed=0,
        cache=CacheConfig(folder),
        teacher=teacher,
    )


STAGE0 = Stage0Config(samples=24, crop=48, shorter_side=48, epochs=8, batch_size=4, lr=0.01)
STAGE1 = Stage1Config(crop=48, shorter_side=48, batch_size=4, epochs=2, polyak_decay=0.5)


def build(genotype):
    encoder = load_encoder()
    return build_segmenter(encoder, genotype, 1, DecoderConfig(8))


def evaluator(features):
    return CandidateEvaluator(
        build,
        features.costs,
        [
            DecoderOnFeatures(STAGE0, features, aux_weight=STAGE0.aux_weight),
            EndToEnd(
                STAGE1,
                TASK,
                (TrainTransform(STAGE1.crop, STAGE1.shorter_side), features.val_transform),
                RUNTIME,
            ),
        ],
        RUNTIME,
        image=(3, *features.val_size),
        processor=lambda genotype: TASK.processor,
        seed=0,
        inputs=features.inputs,
        remedy="",
        seconds=features.seconds,
    )


def test_it_learns_in_both_stages(features):
    evaluation = evaluator(features)(GENOTYPE, 0, {})
    assert evaluation.failure is None
    assert list(evaluation.rewards) == ["stage0", "stage1"]
    untrained = TASK.score_images(build(GENOTYPE), TASK.search_val, features.val_transform, RUNTIME)
    assert evaluation.metrics["stage0"]["rmse"] < 0.75 * untrained.rmse
    assert evaluation.rewards["stage0"] == 1 / (1 + evaluation.metrics["stage0"]["rmse"])
    assert evaluation.params > 0 < evaluation.macs
    assert list(evaluation.files) == ["image-0000.png", "image-0001.png", "image-0002.png"]
    with Image.open(io.BytesIO(evaluation.files["image-0001.png"])) as picture:
        assert picture.size == (
            3 * 4 * 64 + 2 * 6,
            4 * 48 + 22,
        )  # three panels, four times as large
        _, truth, _ = panels(picture.convert("L"))
    images, targets = TASK.load_batch(TASK.search_val, [1], features.val_transform)
    expected = TASK.truth({name: target[0] for name, target in targets.items()}, images[0]).draw()
    assert abs(truth - expected[0].float().mean().item()) < 3


def test_a_map_of_cells_is_shown_where_it_lies(features, monkeypatch):
    shapes = []

    class Cells(BrightnessProcessor):
        full_size = False

        def reduce(self, output):
            shapes.append(tuple(output.shape))
            return output

    monkeypatch.setattr(Brightness, "processor", Cells())
    model = build(GENOTYPE).eval()
    TASK.show(model, Error(0.0), TASK.search_val, features.val_transform, RUNTIME)
    assert shapes == [(1, 6, 8)] * 3  # of 48x64; padded to 64x64 it has 8x8


def panels(picture):
    """Mean values of the three images of a strip, without their captions."""
    width = (picture.width - 2 * 6) // 3
    lefts = (left * (width + 6) for left in range(3))
    return [np.asarray(picture)[22:, left : left + width].mean() for left in lefts]


def test_targets_keep_their_names_and_sizes(features):
    assert features.val_size == (48, 64)
    batch = features.split(next(features.train_batches([torch.tensor([1, 4, 2])])))
    assert [tuple(tap.shape[-2:]) for tap in batch.taps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert {name: tuple(t.shape) for name, t in batch.targets.items()} == {
        "brightness": (3, 16, 16),
        "valid": (3, 16, 16),
    }
    assert not batch.targets["valid"][:, 12:].any()  # crops of 48, padded to 64
    assert batch.teacher is None
    taps, targets = next(features.val_batches())
    assert len(taps) == 4
    assert targets["brightness"].shape == (3, 64, 64)
    assert targets["brightness"].dtype == torch.float32  # features alone are rounded


def test_it_learns_from_a_teacher(tmp_path):
    teacher = build(GENOTYPE)
    features = features_in(tmp_path, teacher)
    batch = features.split(next(features.train_batches([torch.tensor([0])])))
    assert batch.teacher is not None
    assert batch.teacher.shape[1] == 1
    assert evaluator(features)(GENOTYPE, 0, {}).failure is None


class BrightnessTraining(DenseTraining):
    """All that the full training of a new task needs of its own."""

    def network(self):
        return build(GENOTYPE)

    def inputs(self, search):
        return {}

    def measured(self, scores):
        return {"genotype": GENOTYPE.to_json()}

    def described(self, scores):
        return {"task": self.task.name}


def test_it_is_trained_in_full(tmp_path):
    settings = DenseTrainConfig(
        tmp_path, epochs=3, batch_size=4, freeze_epochs=1, ema=0.5, val_every=1, jitter=0.2
    )
    transforms = TrainTransform(32, 32, jitter=0.2), ValTransform(None)
    parts = TASK.search_train, TASK.search_val
    training = BrightnessTraining(settings, TASK, *parts, transforms, tmp_path, RUNTIME)
    lines = [training.round() for _ in range(training.rounds)]
    assert lines[-1].startswith("epoch 3/3  loss ")
    assert training.finish().startswith("rmse ")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    errors = [entry["rmse"] for entry in metrics["validation"]]
    assert metrics["rmse"] == pytest.approx(errors[-1], rel=1e-3)
    assert errors[-1] < errors[0]
    _, description = load_model(tmp_path / "model.safetensors")
    assert (description["task"], description["outputs"]) == ("brightness", 1)
