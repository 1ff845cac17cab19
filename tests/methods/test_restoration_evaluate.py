"""Measuring a trained restoration network end to end."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from nasfast.commands import evaluate, train
from nasfast.methods.restoration.strips import strip

FLAGS = ["--device", "cpu", "--seconds", "0.05"]


def measured(model):
    return json.loads((model / "evaluation.json").read_text())


def test_metrics_cost_and_pictures(trained_restorer, tmp_path, capsys):
    model = shutil.copytree(trained_restorer, tmp_path / "net")
    assert evaluate.main([str(model), *FLAGS, "--baselines", "--pictures", "2"]) == 0
    result, metrics = measured(model), json.loads((model / "metrics.json").read_text())
    assert (result["images"], result["split"], result["protocol"]) == (3, "test", "whole")
    assert (result["params"], result["macs"]) == (metrics["params"], metrics["macs"])
    (scores,) = result["scores"].values()
    assert list(scores) == ["identity", "non-local means", "sliding DCT", "net"]
    assert len(scores["net"]["images"]) == 3
    assert scores["sliding DCT"]["psnr"] > scores["identity"]["psnr"] + 5
    printed = capsys.readouterr().out
    for name, score in scores.items():
        assert name in printed
        assert f"{score['psnr']:.3f}" in printed
    pictures = sorted((model / "pictures").iterdir())
    assert [path.name for path in pictures] == [
        "00-denoising-sigma-30.png",
        "02-denoising-sigma-30.png",
    ]
    with Image.open(pictures[0]) as image:
        assert image.mode == "L"
        assert image.width == 4 * 5 * 48 + 3 * 6  # four panels, enlarged five times
        assert image.height == 5 * 40 + 22


def test_the_split_of_the_training_gives_its_metrics(trained_restorer, tmp_path):
    model = shutil.copytree(trained_restorer, tmp_path / "net")
    flags = ["--split", "val", "--pictures", "0"]
    assert evaluate.main([str(model / "model.safetensors"), *FLAGS, *flags]) == 0
    (scores,) = measured(model)["scores"].values()
    metrics = json.loads((model / "metrics.json").read_text())
    for name in ("psnr", "ssim"):
        assert scores["net"][name] == pytest.approx(metrics[name])
    assert not (model / "pictures").exists()


def test_another_noise_and_the_blind_network(tiny_restorer, trained_restorer, tmp_path):
    model = shutil.copytree(trained_restorer, tmp_path / "net")
    flags = ["--task", "denoising", "--task.sigma", "10", "--pictures", "1"]
    assert evaluate.main([str(model), *FLAGS, *flags]) == 0
    assert list(measured(model)["scores"]) == ["denoising, sigma 10"]
    blind = tmp_path / "blind"
    noise = ["--task.sigma", "10", "50", "--steps", "1", "--out", str(blind)]
    assert train.main([*tiny_restorer, *noise]) == 0
    assert evaluate.main([str(blind), *FLAGS, "--baselines", "--pictures", "1"]) == 0
    scores = measured(blind)["scores"]
    assert list(scores) == ["denoising, sigma 10", "denoising, sigma 50"]
    low, high = (table["identity"]["psnr"] for table in scores.values())
    assert low > high + 12
    assert len(list((blind / "pictures").iterdir())) == 2


def test_a_baseline_that_cannot_run_is_left_out(trained_restorer, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(trained_restorer, tmp_path / "net")
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    assert evaluate.main([str(model), *FLAGS, "--baselines", "--pictures", "1"]) == 0
    (scores,) = measured(model)["scores"].values()
    assert list(scores) == ["identity", "sliding DCT", "net"]
    assert "without non-local means: non-local means needs" in capsys.readouterr().out


def test_a_strip_of_colour_and_of_two_sizes():
    """A degraded image of half the size is shown as large as the clean one."""
    clean, small = torch.rand(3, 300, 240), torch.zeros(3, 150, 120)
    image = strip({"clean": clean, "degraded": small})
    assert (image.mode, image.size) == ("RGB", (240 + 6 + 240, 300 + 22))
    assert image.getpixel((240 + 6 + 120, 200)) == (0, 0, 0)
    shown = tuple((255 * clean[:, 100, 50]).round().int().tolist())
    assert image.getpixel((50, 122)) == shown
