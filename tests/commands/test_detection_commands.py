"""``nasfast predict`` and ``nasfast export`` of detectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nasfast.commands import export, predict
from nasfast.encoders import MobileNetV2
from nasfast.inference.model import Model, load
from nasfast.models.detector import DetectorConfig, build_detector
from nasfast.models.io import save_model
from nasfast.spaces.nas_fcos import NASFCOSGenotype

SEGMENTER = str(Path(__file__).parents[1] / "fixtures" / "version1" / "segmentation_training")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a detector that sees objects everywhere."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("detector")
    network = build_detector(
        MobileNetV2(0.35), NASFCOSGenotype(), 7, DetectorConfig(width=64)
    ).eval()
    head = network.decoder.head
    for conv in (head.classify, head.center):
        nn.init.normal_(conv.weight, std=0.3)
    nn.init.zeros_(head.classify.bias)
    nn.init.constant_(head.reach.bias, 3.0)
    description = {"classes": ["cat", "dog"], "category_ids": [17, 18], "method": "detection"}
    save_model(folder / "model.safetensors", network, description)
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for name in ("000000000139.png", "b.png", "trip/b.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(root / name)
    return root


def run(model, *words):
    return predict.main([model, *map(str, words), "--device", "cpu"])


def test_objects_of_all_images(trained, photos, tmp_path):
    out = tmp_path / "out"
    assert run(trained, photos, "--out", out) == 0
    index = json.loads((out / "predictions.json").read_text())
    assert [each["files"] for each in index["images"]] == [
        [f"{stem}.json", f"{stem}-boxes.png"] for stem in ("000000000139", "b", "trip/b")
    ]
    results = json.loads((out / "coco-results.json").read_text())
    assert list(dict.fromkeys(entry["image_id"] for entry in results)) == [139, "b", "trip/b"]
    assert {entry["category_id"] for entry in results} == {17, 18}
    for entry in results:
        left, top, width, height = entry["bbox"]
        assert left >= 0
        assert top >= 0
        assert left + width <= 80.001
        assert top + height <= 60.001
    own = json.loads((out / "trip/b.json").read_text())
    of_image = [entry for entry in results if entry.pop("image_id") == "trip/b"]
    assert own == of_image
    assert len(own) == len(index["images"][2]["objects"]) > 20

    low, high = sorted({entry["score"] for entry in results})[100:102]
    threshold = (low + high) / 2
    words = photos, "--out", out, "--threshold", threshold
    assert run(trained, *words, "--overwrite") == 0
    some = json.loads((out / "coco-results.json").read_text())
    assert [entry["score"] for entry in some] == [
        entry["score"] for entry in results if entry["score"] >= threshold
    ]


def test_names_that_are_one_number(trained, photos, tmp_path):
    (photos / "b.png").rename(photos / "139.png")
    out = tmp_path / "out"
    assert run(trained, photos, "--out", out) == 0
    results = json.loads((out / "coco-results.json").read_text())
    ids = dict.fromkeys(entry["image_id"] for entry in results)
    assert list(ids) == ["000000000139", "139", "trip/b"]


@pytest.mark.parametrize(
    ("model", "threshold", "text"),
    [
        (None, "1.5", "threshold: expected 0 to 1, got 1.5; change it"),
        (None, "nan", "threshold: expected 0 to 1, got nan; change it"),
        (
            SEGMENTER,
            "0.5",
            "threshold: expected none for segmentation, which gives no objects, got 0.5; leave it "
            "out",
        ),
    ],
)
def test_thresholds_that_are_refused(model, threshold, text, trained, photos, tmp_path, capsys):
    words = photos, "--out", tmp_path / "out", "--threshold", threshold
    assert run(model or trained, *words) == 2
    assert capsys.readouterr().err == f"error: {text}\n"
    assert not (tmp_path / "out").exists()


def test_coco_results_are_not_overwritten(trained, photos, tmp_path, capsys):
    (tmp_path / "coco-results.json").write_text("mine")
    assert run(trained, photos / "b.png", "--out", tmp_path) == 2
    assert "expected no earlier results" in capsys.readouterr().err
    assert (tmp_path / "coco-results.json").read_text() == "mine"


class Half(nn.Module):
    """A network that finds objects in a picture at once, for exports that take long."""

    def forward(self, x):
        maps = [
            nn.functional.avg_pool2d(x, stride, ceil_mode=True).flatten(2)
            for stride in (8, 16, 32, 64, 128)
        ]
        x = torch.cat(maps, 2)
        return torch.cat([x[:, :2], x.exp() * 9, x[:, :2]], 1), []


@pytest.fixture
def quick(monkeypatch):
    """Exports are of a small network."""

    def loaded(path, device):
        model = load(path, device)
        if path.suffix != ".safetensors":
            return model
        return Model(Half(), model.processor, model.description)

    monkeypatch.setattr(export, "load", loaded)


def test_an_export_with_the_suppression_inside(trained, quick, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "inside.onnx"
    words = [trained, "--nms", "inside", "--size", "96x128", "--out", str(out)]
    assert export.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("equal objects 100.000%") == 2
    assert f"; `nasfast predict {out} IMAGES` uses it" in printed
    assert load(out, "cpu").network.suppresses


def test_integers_are_refused(trained, capsys):
    assert export.main([trained, "--int8"]) == 2
    assert capsys.readouterr().err == (
        "error: int8: expected a network of maps, got one for detection, whose logits and "
        "distances do not fit one range of 8 bits; leave it out\n"
    )
