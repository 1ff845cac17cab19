"""A full training end to end: its sources, its files, stop and resume."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nasfast import train
from nasfast.data import SyntheticStreets, split_for_search
from nasfast.methods.segmentation import Segmentation
from nasfast.methods.segmentation import train as segmentation
from nasfast.methods.segmentation.train import SegmentationTraining, TrainConfig
from nasfast.models.decoders import DecoderConfig
from nasfast.runs.checkpoint import save_checkpoint
from nasfast.runs.study import Study
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.training.loop import Runtime

PUBLISHED = [[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]]


def test_what_a_training_leaves(tiny_run, tiny_model):
    wanted = {"checkpoint.pt", "config.toml", "env.json", "genotype.json"}
    assert {p.name for p in tiny_model.iterdir()} >= wanted | {"metrics.json", "model.safetensors"}
    best = json.loads((tiny_run / "best.json").read_text())
    metrics = json.loads((tiny_model / "metrics.json").read_text())
    assert metrics["genotype"] == best["genotype"]
    assert json.loads((tiny_model / "genotype.json").read_text()) == best["genotype"]
    assert metrics["split"] == "val of three bands, 2 images"
    assert list(metrics["class_iou"]) == ["sky", "road", "[post]"]
    known = [iou for iou in metrics["class_iou"].values() if iou is not None]
    assert metrics["miou"] == pytest.approx(sum(known) / len(known))
    assert 0 < metrics["miou"] <= 1
    assert (metrics["size"], metrics["epochs"]) == ([32, 48], 4)
    for name in ("mean_accuracy", "fw_iou", "params", "macs", "seconds"):
        assert metrics[name] > 0
    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        description = json.loads(file.metadata()["nasfast.segmenter"])
        parameters = [k for k in file.keys() if not k.endswith(("running_mean", "running_var"))]  # noqa: SIM118
        count = sum(
            file.get_tensor(k).numel()
            for k in parameters
            if "num_batches" not in k and "aux_heads" not in k
        )
    assert count == metrics["params"]
    assert description["classes"] == ["sky", "road", "[post]"]
    assert description["decoder"] == {"agg_size": 8, "sep_repeats": 2, "aux_cell": False}


def test_killed_and_resumed_gives_the_same_network(tiny_training, tiny_model, tmp_path):
    out = tmp_path / "train"
    root = str(Path(train.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "nasfast.train", *tiny_training, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        },
    )
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr
    done = len(torch.load(out / "checkpoint.pt", weights_only=True)["history"])
    assert 1 <= done < 4
    assert train.main(["--resume", str(out)]) == 0
    for name in ("model.safetensors", "genotype.json"):
        assert (out / name).read_bytes() == (tiny_model / name).read_bytes()
    ours, theirs = (
        json.loads((path / "metrics.json").read_text()) | {"seconds": 0}
        for path in (out, tiny_model)
    )
    assert ours == theirs


def test_ctrl_c_tells_how_to_continue(tiny_training, tiny_model, tmp_path, monkeypatch, capsys):
    def interrupt_after(path, state):
        save_checkpoint(path, state)
        os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "a folder"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", interrupt_after)
        assert train.main([*tiny_training, "--out", str(out)]) == 130
    printed = capsys.readouterr().out
    assert f"Continue with\n  python -m nasfast.train --resume '{out}'\n" in printed
    assert len(torch.load(out / "checkpoint.pt", weights_only=True)["history"]) == 1
    assert train.main([f"--resume={out}"]) == 0
    assert "[post]" in capsys.readouterr().out
    model = (tiny_model / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("form", ["list", "dict", "best.json"])
def test_genotype_files(form, tiny_run, tiny_training, tmp_path):
    path = tmp_path / "genotype.json"
    best = json.loads((tiny_run / "best.json").read_text())
    content = {"list": PUBLISHED, "dict": best["genotype"], "best.json": best}[form]
    path.write_text(json.dumps(content))
    config, genotype = train.resolve(Segmentation(), TrainConfig(path))
    if form == "list":
        assert genotype.to_json()["cell"] == PUBLISHED[0]
    else:
        assert genotype.to_json() == best["genotype"]
    assert (config.data, config.encoder_weights) == ("synthetic", None)
    assert config.out == tmp_path.resolve() / "train-1"


def test_a_genotype_file_trains(tiny_training, tiny_data, tiny_weights, tmp_path):
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(PUBLISHED))
    flags = ["--data", str(tiny_data), "--encoder-weights", str(tiny_weights), "--epochs", "1"]
    assert train.main([str(path), *tiny_training[1:], *flags]) == 0
    metrics = json.loads((tmp_path / "train-1" / "metrics.json").read_text())
    assert metrics["genotype"]["connections"] == PUBLISHED[1]


def few(monkeypatch, **options):
    """Generated scenes, but few of them."""
    data = [SyntheticStreets(n, stream=s, **options) for n, s in ((8, "train"), (2, "val"))]
    monkeypatch.setattr(
        segmentation, "load_splits", lambda *a, **k: split_for_search(*data, seed=0)
    )


def test_ten_steps_on_crops_that_fit_the_data(tiny_weights, tmp_path, monkeypatch):
    few(monkeypatch)
    path, out = tmp_path / "genotype.json", tmp_path / "out"
    path.write_text(json.dumps(PUBLISHED))
    flags = "--device cpu --epochs 5 --batch-size 4 --decoder.agg-size 8 --encoder-weights"
    argv = [str(path), *flags.split(), str(tiny_weights), "--out", str(out)]
    assert train.main(argv) == 0
    assert tomllib.loads((out / "config.toml").read_text())["crop"] == 96  # of 96x128
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert [schedule["last_epoch"] for schedule in state["schedules"]] == [10, 10]
    assert all(optimizer["param_groups"][0]["lr"] < 1e-9 for optimizer in state["optimizers"])
    assert train.main([*argv, "--out", f"{out}-2", "--crop", "64", "--epochs", "1"]) == 0
    assert tomllib.loads((tmp_path / "out-2" / "config.toml").read_text())["crop"] == 64


def test_default_crop_of_large_images(tiny_weights, tmp_path, monkeypatch):
    few(monkeypatch, size=(300, 320))
    config = TrainConfig(
        tmp_path, data="synthetic", encoder_weights=tiny_weights, decoder=DecoderConfig(8)
    )
    runtime = Runtime(torch.device("cpu"))
    genotype = FastNASSpace().from_json(PUBLISHED)
    assert SegmentationTraining(config, genotype, tmp_path / "out", runtime).settings.crop == 288


def test_source_run_decides_and_flags_override(tiny_run, tiny_data):
    ranking = Study.open(tiny_run, read_only=True).ranking()
    config, genotype = train.resolve(Segmentation(), TrainConfig(tiny_run, rank=2))
    assert genotype.to_json() == ranking[1].genotype
    assert (config.data, config.out) == (str(tiny_data), tiny_run / "train-1")
    assert config.encoder_weights is not None
    assert config.encoder_weights.name == "tiny.safetensors"
    assert (
        train.resolve(Segmentation(), TrainConfig(tiny_run, data="synthetic"))[0].data
        == "synthetic"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["RUN", "--rank", "99"], "train: expected a rank from 1 to "),
        (["RUN", "--rank", "0"], "train: expected a rank from 1 to "),
        (
            ["/no/run"],
            "train: no run directory and no genotype file at /no/run, nor a name of the zoo (",
        ),
        (
            ["RUN/config.toml"],
            ("train: expected a run directory or a JSON file with a genotype, got "),
        ),
        (["RUN/checkpoint"], "RUN/checkpoint is not a run directory: it has no config.toml"),
        (
            ["RUN/env.json"],
            'genotype: expected an object whose "space" is one of fast_nas, ir_nas, ',
        ),
        (["RUN", "--data", "/no/data"], "data: expected 'synthetic' or a folder, got '/no/data'"),
        (["RUN", "--encoder-weights", "/no/w.pt"], "weights: no file /no/w.pt"),
        (["RUN", "--device", "cuda:99"], "resolve_device: expected "),
        (["--resume", "RUN/checkpoint"], "train: RUN/checkpoint is not the directory of a train"),
        (["--resume", "RUN"], "train: RUN is not the directory of a training: it has no config."),
    ],
)
def test_errors_are_one_line_and_leave_nothing(flags, message, tiny_run, tmp_path, capsys):
    argv = [flag.replace("RUN", str(tiny_run)) for flag in flags]
    out = [] if "--resume" in flags else ["--out", str(tmp_path / "out")]
    assert train.main([*argv, *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: " + message.replace("RUN", str(tiny_run)))
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused(tiny_training, tmp_path, capsys):
    assert train.main([*tiny_training, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: train: {tmp_path} exists and is never overwritten; give another --out, or "
        f"continue it with --resume {tmp_path}\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--epochs", "0"], "TrainConfig.epochs: expected a value above 0, got 0"),
        (["--batch-size", "-1"], "TrainConfig.batch_size: expected a value above"),
        (["--momentum", "1"], "--momentum"),
    ],
)
def test_usage_errors(flags, shown, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([str(tmp_path), *flags])
    assert caught.value.code == 2
    assert shown in capsys.readouterr().err
