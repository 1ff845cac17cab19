"""Measuring a trained network end to end."""

import json
import shutil

import pytest
import torch

from nasfast.commands import evaluate
from nasfast.methods.segmentation.evaluate import EvaluateConfig
from nasfast.methods.segmentation.evaluate import evaluate as measure
from nasfast.methods.segmentation.tasks import BINDINGS
from nasfast.methods.segmentation.tasks.base import summed
from nasfast.utils.errors import UserError


def test_it_reproduces_the_training_s_metrics(tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    flags = ["--device", "cpu", "--seconds", "0.1", "--batch", "2"]
    assert evaluate.main([str(model), *flags]) == 0
    printed = capsys.readouterr().out
    result = json.loads((model / "evaluation.json").read_text())
    metrics = json.loads((model / "metrics.json").read_text())
    for name in ("miou", "mean_accuracy", "fw_iou", "class_iou", "params", "macs"):
        assert result[name] == metrics[name]
    assert result["images"] == 2
    latency = result["latency_ms"]
    assert 0 < latency["median"] <= latency["p95"]
    assert latency["backend"] == f"torch {torch.__version__}"
    assert latency["runs"] >= 5
    assert (latency["batch"], latency["size"], latency["device"]) == (2, [32, 48], "cpu")
    assert latency["threads"] == 1
    assert latency["dtype"] in ("float32", "bfloat16")
    assert f"{metrics['miou']:.4f}" in printed
    assert "IoU [post]" in printed


def test_other_data_of_the_same_classes(tiny_model, tiny_data, tmp_path):
    shutil.copy(tiny_model / "model.safetensors", tmp_path / "net.safetensors")
    other = shutil.copytree(tiny_data, tmp_path / "other")
    stems = sorted(path.stem for path in (other / "images").iterdir())
    (other / "train.txt").write_text("\n".join(stems[5:]))
    (other / "val.txt").write_text("\n".join(stems[:5]))
    flags = ["--data", str(other), "--device", "cpu", "--seconds", "0.1"]
    assert evaluate.main([str(tmp_path / "net.safetensors"), *flags]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (result["images"], result["data"]) == (5, str(other))


def test_every_part_of_the_data_or_one_line(tiny_model, tiny_data, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    flags = ["--device", "cpu", "--seconds", "0.1"]
    assert evaluate.main([str(model), *flags, "--split", "train"]) == 0
    result = json.loads((model / "evaluation.json").read_text())
    assert (result["split"], result["images"]) == ("train", 10)
    capsys.readouterr()
    assert evaluate.main([str(model), *flags, "--split", "test"]) == 2
    assert capsys.readouterr().err == (
        f"error: split test: expected data with that part, got {tiny_data} without it; use "
        "another, or --data\n"
    )


def test_a_run_that_was_not_trained_yet(tiny_run, capsys):
    assert evaluate.main([str(tiny_run)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tiny_run}: expected a model.safetensors, a training or a run with one, got "
        f"none; `nasfast train {tiny_run}` makes it\n"
    )


def test_several_views_are_named_in_the_result(tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "train")
    flags = ["--device", "cpu", "--seconds", "0.01", "--scales", "0.75,1,1.25", "--flip"]
    assert evaluate.main([str(model), *flags]) == 0
    views = "softmax summed over scales 0.75, 1, 1.25 and mirror images"
    assert json.loads((model / "evaluation.json").read_text())["views"] == views
    printed = " ".join(capsys.readouterr().out.split())
    assert f"2 val images of three bands; {views}" in printed
    message = "scales: expected factors from 0.05 to 20, such as 0.75,1,1.25, got '1,none'; correct"
    with pytest.raises(UserError, match=message):
        EvaluateConfig(model, scales="1,none")


def test_an_export_has_one_view(tmp_path):
    path = tmp_path / "net.onnx"
    path.touch()
    with pytest.raises(UserError) as error:
        measure(EvaluateConfig(path, flip=True))
    assert str(error.value) == (
        "evaluate: expected a model.safetensors beside --scales and --flip, got the export "
        f"{path}, which is measured as it runs; leave them out"
    )


def test_probabilities_are_summed_where_they_belong():
    """Of a network without context, mirror images add the same, and scale 1 is the network's."""

    def network(images):
        return torch.cat([images, -images[:, :1]], 1)

    view, images = BINDINGS["segmentation"].view, torch.rand(2, 3, 6, 8)
    once = network(images).softmax(1)
    torch.testing.assert_close(summed(network, view, (1,), False, images), once)
    torch.testing.assert_close(summed(network, view, (1, 1), True, images), 4 * once)
    constant = images.mean((2, 3), keepdim=True).expand_as(images)
    torch.testing.assert_close(
        summed(network, view, (0.5, 2), True, constant), 4 * network(constant).softmax(1)
    )
