"""Full trainings of detectors, and what is measured of them."""

import dataclasses
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from folders import voc_object, write_boxes
from safetensors.torch import load_file
from search_runs import assert_same_training

from nasfast.commands import evaluate, train
from nasfast.inference.model import load
from nasfast.methods.detection.evaluate import inputs, score
from nasfast.methods.detection.train import (
    DetectionTraining,
    TrainConfig,
    defaults,
    published,
    resolve,
)
from nasfast.models.detector import DetectorConfig
from nasfast.models.io import load_model
from nasfast.runs.checkpoint import save_checkpoint
from nasfast.spaces.nas_fcos import NASFCOSGenotype
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError

EVERYTHING = """
    --device cpu --epochs 2 --batch-size 2 --shorter-side 64 --crop 64 --crop-width 96
    --detector.width 32 --improvements --ema 0.9 --accumulate 2 --jitter 0.3 --keep best
    --val-every 1 --optimizer sgd --schedule steps --warmup 0.5 --warmup-from 0.3 --freeze-norm
    --precision float32
"""
CELL, PLATE = voc_object("cell", 11, 6, 30, 25), voc_object("plate", 20, 10, 55, 39)


class Stop(Exception):
    """The process ends here."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of cells and plates, one without either."""
    parts = {"train": "abcd", "val": "ef", "test": "gh"}
    objects = {"abcdefgh"[i]: CELL if i % 2 else PLATE for i in range(8)} | {"b": ""}
    return write_boxes(tmp_path_factory.mktemp("boxes"), parts, objects)


@pytest.fixture(scope="module")
def words(data, tiny_weights, tmp_path_factory):
    """Command line of a training that takes seconds; the caller adds --out."""
    torch.set_num_threads(1)
    genotype = tmp_path_factory.mktemp("genotype") / "stock.json"
    genotype.write_text(json.dumps(NASFCOSGenotype().to_json()))
    places = ["--data", str(data), "--encoder-weights", str(tiny_weights)]
    return [str(genotype), *EVERYTHING.split(), *places]


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    """Directory of that training."""
    out = tmp_path_factory.mktemp("detector") / "train"
    assert train.main([*words, "--out", str(out)]) == 0
    return out


@pytest.fixture
def settings(data, tiny_weights, tmp_path):
    return TrainConfig(
        tmp_path,
        data=str(data),
        encoder_weights=tiny_weights,
        batch_size=4,
        shorter_side=64,
        precision="float32",
        detector=DetectorConfig(width=32),
    )


def training(settings, **changes):
    settings = dataclasses.replace(settings, **changes)
    runtime = Runtime(torch.device("cpu"))
    return DetectionTraining(settings, NASFCOSGenotype(), settings.source / "out", runtime)


def test_stopped_it_ends_the_same(words, trained, tmp_path, monkeypatch):
    out = tmp_path / "train"

    def stop(path, state):
        save_checkpoint(path, state)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", stop)
        with pytest.raises(Stop):
            train.main([*words, "--out", str(out)])
    assert train.main(["--resume", str(out)]) == 0
    assert_same_training(out, trained)


def test_what_a_training_leaves(trained, tiny_weights):
    found = json.loads((trained / "metrics.json").read_text())
    assert set(found["class_ap50"]) == {"cell", "plate"}
    assert {"ap50", "ap", "macs", "params", "losses"} < set(found)
    model, description = load_model(trained / "model.safetensors")
    assert description["classes"] == ["cell", "plate"]
    assert description["category_ids"] == [1, 2]
    assert description["shorter_side"] == 64
    assert description["decoder"]["centerness"] == "reg"  # of --improvements
    before, after = load_file(tiny_weights), model.get_submodule("encoder").state_dict()
    kept = {name for name, value in before.items() if torch.equal(after[name], value)}
    assert {name for name in before if re.match(r"features\.[01]\.", name)} <= kept
    assert {name for name in before if "running" in name} <= kept  # --freeze-norm
    assert "features.4.conv.0.0.weight" not in kept


def test_whole_images_of_any_size_are_a_batch(settings):
    one = training(settings, view="whole", scales=(0.5, 1.5), longer_side=120, loaders=0)
    (batch,) = one._batches()
    height, width = batch["images"].shape[-2:]
    assert height % 32 == width % 32 == 0
    assert width <= 128
    assert batch["classes"].shape == (4, one.model(batch["images"])[0].shape[-1])
    again = next(training(settings, view="whole", scales=(0.5, 1.5), longer_side=120)._batches())
    torch.testing.assert_close(batch, again, rtol=0, atol=0)


@pytest.mark.parametrize("improvements", [False, True])
def test_parts_of_a_batch_have_the_loss_of_the_whole(settings, improvements):
    found = []
    for parts in (1, 4):
        one = training(settings, accumulate=parts, improvements=improvements, crop=64)
        one.model.eval()  # BatchNorm sees a part at a time
        (batch,) = one._batches()
        assert (batch["classes"] >= 0).any(1).tolist().count(False) > 0  # one without a positive
        losses = list(one._losses(batch))
        assert len(losses) == parts
        weights = list(one.model.decoder.parameters())
        each = [torch.autograd.grad(loss, weights) for loss in losses]  # of all in every part
        found.append((sum(losses), [sum(grads) for grads in zip(*each, strict=True)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_biases_learn_twice_as_fast_without_decay(settings):
    one = training(settings, optimizer="sgd", decoder_lr=0.01, warmup=0.0, schedule="poly")
    weights, others = one._groups[0].optimizer.param_groups
    assert [weights["lr"], others["lr"]] == [0.01, 0.02]
    assert [weights["weight_decay"], others["weight_decay"]] == [1e-4, 0]
    assert all(p.dim() == 4 for p in weights["params"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"teacher": "x"},
            "teacher: expected none for detection, whose outputs are not imitated, got x; leave it "
            "out",
        ),
        (
            {"view": "whole", "crop": 64},
            "crop: expected none beside --view whole, got 64; leave out either",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, changes, text):
    with pytest.raises(UserError, match=re.escape(text)):
        training(settings, **changes)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nas_fcos_mnv2_128", None),
        (
            "nas_fcos_r50_256",
            "encoder_weights: expected those of resnet50, which nas_fcos_r50_256 has, got none: "
            "the packaged ones are of mobilenet_v2 x0.35; give --encoder-weights FILE",
        ),
    ],
)
def test_published_detectors_have_their_size_and_encoder(name, text):
    architecture = published()[name]
    settings = defaults(Path(name), architecture.search)
    assert settings.detector.width == int(name[-3:])
    with pytest.raises(UserError, match=re.escape(text)) if text else nullcontext():
        assert resolve(settings, architecture).data == "synthetic"


# ---- measuring


def test_measures(trained, capsys):
    flags = "--split test --voc --resamples 5 --seconds 0.01 --post.limit 7"
    assert evaluate.main([str(trained), "--device", "cpu", *flags.split()]) == 0
    found = json.loads((trained / "evaluation.json").read_text())
    assert (found["split"], found["images"], found["shorter_side"]) == ("test", 2, 64)
    assert found["post"]["limit"] == 7
    assert set(found["classes"]["plate"]) == {"ap50", "ap", "voc_ap50"}
    assert found["intervals"]["ap50"]["value"] == pytest.approx(found["ap50"], abs=1e-6)
    for name in ("latency_ms", "latency_ms_with_post_processing"):
        assert found[name]["size"] == [64, 96]
    text = capsys.readouterr().out
    assert "AP50" in text
    assert "with post-processing" in text


def test_inputs_and_scores_for_exports(trained, data):
    model, runtime = load(trained, "cpu"), Runtime(torch.device("cpu"))
    (first, *_) = inputs(model, str(data), "train", 3)
    assert first.shape == (1, 3, 64, 96)
    assert list(score(model, str(data), "val", runtime)) == ["AP50", "AP"]


def test_data_of_other_classes(trained, tmp_path, capsys):
    other = write_boxes(tmp_path / "x", {"train": "ab", "val": "c"}, dict.fromkeys("abc", CELL))
    assert evaluate.main([str(trained), "--data", str(other)]) == 2
    text = f"expected data of the network's classes cell, plate, got cell in {other}"
    assert text in capsys.readouterr().err.replace("\n", " ")
