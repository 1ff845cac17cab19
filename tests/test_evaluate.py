"""Measuring a trained network end to end."""

import json
import shutil

from nasfast.commands import evaluate


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
    assert 0 < latency["low"] <= latency["median"] <= latency["high"]
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
