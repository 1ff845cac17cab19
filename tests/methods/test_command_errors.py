"""What the commands say where they cannot go on: in one line, and nothing is left behind."""

import importlib
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version1"
PRETRAIN = "pretrain --device cpu --width 0.1 --frames 24 --epochs 1 --batch-size 8 --crop 48"


def main_of(command):
    return importlib.import_module(f"nasfast.commands.{command}").main


def rows(tables):
    return [(first, flags, text) for first, table in tables.items() for flags, text in table]


# ---- usage: a command line that means nothing

USAGE = {
    "search": [
        ("--preset fast", "fast"),
        ("--strategy genetic", "genetic"),
        ("--budget many", "many"),
        ("--budget 0", "SearchConfig.budget: expected a value from 1 to"),
        ("--workers 0", "SearchConfig.workers: expected a value from 1"),
        ("--threads 0", "SearchConfig.threads: expected a value from 1"),
        ("--threads 100000", "SearchConfig.threads: expected a value from 1"),
        ("--batch 0", "SearchConfig.batch: expected a value from 1"),
        ("--seed -1", "SearchConfig.seed: expected a value from 0 to 9,"),
        ("--stage0.polyak-decay 2", "Stage0Config.polyak_decay: expected a"),
        ("--stage0.lr -1", "Stage0Config.lr: expected a value above 0, got"),
        ("--stage0.lr nan", "Stage0Config.lr: expected a value above 0, got"),
        ("--stage0.lr inf", "Stage0Config.lr: expected a value above 0, got"),
        ("--val-crop 99999", "SearchConfig.val_crop: expected a value from 2"),
        ("--engine slurm", "slurm"),
        ("--engine ray --devices cuda:0,cuda:1", "devices: expected --engine process, as Ray"),
        ("--device cpu --devices cpu,cpu", "devices: expected --device or --devices"),
        ("--memory 8", "expected a size such as 8GB"),
        ("--stage2.lr 1", "--stage2.lr"),
        ("--stage0.samples 0", "Stage0Config.samples: expected a value from 1"),
        ("--stage1.batch-size 0", "Stage1Config.batch_size: expected a value from 1"),
    ],
    "search restoration": [
        ("--strategy sgd", "sgd"),
        ("--channels 2", "2"),
        ("--budget 0", "SearchConfig.budget: expected a value from 1"),
        ("--task.sigma 300", "denoising: expected sigma above 0 and at"),
        ("--task.rain 1", "--task.rain"),
        ("--bilevel.ssim-weight -1", "BilevelConfig.ssim_weight: expected a"),
        ("--bilevel.architecture.max-skips -1", "ArchitectureConfig.max_skips: expected a"),
        ("--bilevel.architecture.auxiliary-skip -1", "ArchitectureConfig.auxiliary_skip:"),
        ("--supernet.widths wide", "wide"),
        (
            "--supernet.layers 1 --supernet.searched-depth",
            "SupernetConfig.searched_depth: expected at least",
        ),
        ("--bilevel.warmup 99", "warmup: expected fewer epochs than"),
        ("--bilevel.weights.lr 0", "WeightsConfig.lr: expected a value above"),
        ("--strategy darts --params 9K", "params: expected a --strategy that"),
        ("--params 2:1", "params: expected a number of parameters, such"),
        ("--strategy darts --max-params 1k", "max_params, max_macs, constraint: expected"),
        ("--strategy darts --objective score macs", "objective: expected a --strategy that"),
        ("--supernet.width 3", "SupernetConfig.width: expected an even"),
    ],
    "train OLD/segmentation": [
        ("--epochs 0", "TrainConfig.epochs: expected a value from 1 to"),
        ("--batch-size -1", "TrainConfig.batch_size: expected a value from 1"),
        ("--crop 99999", "TrainConfig.crop: expected a value from 2 to"),
        ("--rank 0", "TrainConfig.rank: expected a value from 1"),
        ("--momentum 1", "--momentum"),
    ],
    "train OLD/restoration": [
        ("--steps 0", "TrainConfig.steps: expected a value from 1 to"),
        ("--round-steps 0", "TrainConfig.round_steps: expected a"),
        ("--ssim-weight -0.5", "TrainConfig.ssim_weight: expected a value of"),
        ("--task.sigma 0", "denoising: expected sigma above 0 and at"),
        ("--params 1:2", "params: expected a number of parameters, such"),
        ("--momentum 1", "--momentum"),
    ],
    "evaluate OLD/segmentation_training": [("--epochs 1", "--epochs")],
    "evaluate OLD/restoration_training": [
        ("--batch 0", "EvaluateConfig.batch: expected a value from 1"),
        ("--seconds nan", "EvaluateConfig.seconds: expected a value above 0"),
        ("--pictures -1", "EvaluateConfig.pictures: expected a value from 0"),
        ("--split all", "--split"),
    ],
    PRETRAIN: [
        ("--epochs 0", "PretrainConfig.epochs: expected a value from 1"),
        ("--frames 0", "PretrainConfig.frames: expected a"),
        ("--epoch 1", "--epoch"),
        ("--width 99", "PretrainConfig.width: expected a"),
        ("--batch-size 1", "PretrainConfig.batch_size: expected a"),
        ("--crop 9999", "PretrainConfig.crop: expected a"),
        ("--lr nan", "PretrainConfig.lr: expected a value above 0"),
        ("--seed -1", "PretrainConfig.seed: expected a value from 0"),
    ],
}


@pytest.mark.parametrize(("command", "flags", "shown"), rows(USAGE))
def test_usage_errors(command, flags, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *argv = f"{command} {flags}".replace("OLD", str(FIXTURES)).split()
    with pytest.raises(SystemExit) as caught:
        main_of(name)(argv)
    assert caught.value.code == 2
    assert shown in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- errors: a file, a setting or a device that the work needs

NO_DATA = ("--data /no/data", "data: expected 'synthetic' or a folder, got '/no/data'")
NO_DEVICE = ("--device cuda:99", "resolve_device: expected ")
BAD_NAME = ("--name a/b", "name: expected letters, digits and ._+- (it becomes part of a")
BAD_TASK = ("--task deblurring", "task: expected one of denoising, ")
DEVICES = "resolve_device: expected device 'auto', 'cpu', 'cuda' or"
DIRECTORY = "weights: expected a .safetensors, .pth or .pt file, got the directory"
FILE_TYPE = "weights: expected a .safetensors, .pth or .pt file, got"
STREETS = "sky, building, road, pavement, tree, car, person, pole"

ERRORS = {
    "search": [
        NO_DATA,
        NO_DEVICE,
        BAD_NAME,
        ("--encoder-weights /no/w.pth", "weights: no file /no/w.pth; give a"),
        ("--encoder-weights RUN/config.toml", FILE_TYPE),
        ("--encoder-weights EMPTY", f"{DIRECTORY} EMPTY; give a file in it"),
        ("--teacher EMPTY", f"{DIRECTORY} EMPTY; give a file in it"),
        ("--device auto --devices cpu,gpu", DEVICES),
        ("--device auto --devices cpu,", DEVICES),
        (
            "--placement device",
            "placement: expected auto, file or ram on a CPU, got device; leave "
            "--placement out, or give --device cuda",
        ),
        ("--teacher ENCODER", "/"),
        (
            "--teacher MODEL/model.safetensors --data synthetic",
            f"teacher MODEL/model.safetensors: expected a network for {STREETS}, got one for sky, "
            "road, [post]; train one on this data first",
        ),
        ("--omit 3", "omit: expected classes from 0 to 2, got 3"),
    ],
    "search depth": [
        (
            "--budget 1",
            "method: expected one of segmentation, templates, detection, restoration, got 'depth'; "
            "a later version of nasfast may know it",
        ),
    ],
    "search --resume": [
        (
            "EMPTY",
            "EMPTY is not a run directory: it has no config.toml, env.json, records.jsonl; give a "
            "directory that a search wrote, such as runs/<date>-<method>-<name>",
        ),
        (
            "RUN --seed 3",
            "resume: expected some of --resume, --budget, --device, --workers, --devices, "
            "--engine, --data, --cache-dir, --placement, got --seed; a run keeps its settings: "
            "start a new one with others",
        ),
        ("RUN --budget 0", "SearchConfig.budget: expected a value from 1 to 1,000,000,000, got 0"),
        (
            "BILEVEL --budget 9",
            "resume: expected no --budget, as the learning rate of a search by gradient follows "
            "its number of epochs, got 9; start a new run with another --bilevel.epochs",
        ),
    ],
    "search restoration --resume": [
        (
            "RUN",
            "resume RUN: expected a run of restoration, got one of segmentation; leave the name "
            "out",
        ),
    ],
    "search restoration": [
        NO_DATA,
        NO_DEVICE,
        BAD_NAME,
        BAD_TASK,
        ("--channels 3", "image IMAGES/train/00.png is grey: expected a colour image for 3"),
        ("--task dehazing", "image IMAGES/train/00.png is grey: expected a colour image for 3"),
        (
            "--task dehazing --channels 1",
            "dehazing: expected colour images, got edges with 1 channel (grey); open it with 3",
        ),
        (
            "--task.sigma real",
            "denoising: expected pairs in clean/ + noisy/ or degraded/, as the noise is real, got ",
        ),
        (
            "--task super-resolution --network.reduction 2",
            "network.reduction: expected 1 with super-resolution, which enlarges images, got 2; l",
        ),
        ("--bilevel.crop 41", "crop: expected images of at least 41x41 pixels, the si"),
    ],
    "train": [
        ("RUN --rank 99", "train: expected a rank from 1 to "),
        (
            "/no/run",
            "train: no run directory and no genotype file at /no/run, nor a name of the zoo "
            "(fast_nas_arch0, fast_nas_arch1, fast_nas_arch2, template_nas_arch0, ",
        ),
        (
            "RUN/config.toml",
            "train: expected a run directory or a JSON file with a genotype, got ",
        ),
        ("RUN/checkpoint", "RUN/checkpoint is not a run directory: it has no config.toml"),
        (
            "RUN/env.json",
            'genotype: expected an object whose "space" is one of fast_nas, template_nas, '
            "nas_fcos, ir_nas, ",
        ),
        (f"RUN {NO_DATA[0]}", NO_DATA[1]),
        (f"RUN {NO_DEVICE[0]}", NO_DEVICE[1]),
        ("RUN --encoder-weights /no/w.pt", "weights: no file /no/w.pt"),
        (
            "RUN --out RUN/env.json/train",
            "RUN/env.json/train: expected a directory that can be made and written to, got not a "
            "directory; give another --out",
        ),
        (
            "RUN --out RUN/checkpoint",
            "train: RUN/checkpoint exists and is never overwritten; give another --out, or "
            "continue it with --resume RUN/checkpoint",
        ),
    ],
    "train --resume": [
        (
            "MODEL --epochs 60",
            "resume: expected some of --resume, --device, --data, got --epochs; a training keeps "
            "its settings, which its learning rates follow: start a new one",
        ),
        ("RESTORER --steps=60", "resume: expected some of --resume, --device, --data, got --steps"),
        ("RUN/checkpoint", "train: RUN/checkpoint is not the directory of a training: it has no "),
        ("RUN", "train: RUN is not the directory of a training: it has no config.toml and genot"),
    ],
    "train BILEVEL --device cpu --batch-size 2": [
        NO_DATA,
        BAD_TASK,
        ("--channels 3", "image IMAGES/"),
        (
            "--task super-resolution --network.reduction 2",
            "network.reduction: expected 1 with super-resolution, which enlarges images, got 2; l",
        ),
        ("--crop 48", "crop: expected images of at least 48x48 pixels, the size of a "),
    ],
    "evaluate": [
        (
            "MODEL --data synthetic",
            "evaluate: expected data of the network's classes sky, road, [post], got "
            f"{STREETS} in synthetic; give the data it was trained for by --data",
        ),
        ("/no/model", "/no/model: expected a model.safetensors, a training or a run, got no such"),
        ("MODEL/metrics.json", f"{FILE_TYPE} metrics"),
        (
            "ENCODER",
            "ENCODER: expected a model.safetensors that nasfast train wrote, with "
            "'nasfast.segmenter' or 'nasfast.templates' or 'nasfast.restorer' or "
            "'nasfast.detector' in its metadata, got "
            "'nasfast.encoder'; "
            "give another file",
        ),
        (f"MODEL {NO_DATA[0]}", NO_DATA[1]),
        ("MODEL --device tpu", DEVICES),
        (f"RESTORER {NO_DATA[0]}", NO_DATA[1]),
        (f"RESTORER {BAD_TASK[0]}", BAD_TASK[1]),
        (
            "RESTORER --task super-resolution",
            "evaluate RESTORER/model.safetensors: expected a task of scal",
        ),
        (
            "RESTORER --protocol overlap",
            "evaluate: the protocol 'overlap' needs images of at least ",
        ),
        ("RESTORER --device tpu", DEVICES),
    ],
}


@pytest.fixture(scope="session")
def places(request, tmp_path_factory):
    """Paths by the words that stand for them."""
    fixtures = {
        "RUN": "tiny_run",
        "MODEL": "tiny_model",
        "ENCODER": "tiny_weights",
        "IMAGES": "tiny_images",
        "BILEVEL": "bilevel_run",
        "RESTORER": "trained_restorer",
    }
    paths = {word: request.getfixturevalue(name) for word, name in fixtures.items()}
    return paths | {"EMPTY": tmp_path_factory.mktemp("empty")}


@pytest.mark.parametrize(("command", "flags", "message"), rows(ERRORS))
def test_errors_are_one_line_and_leave_nothing(
    command, flags, message, places, tiny_search, tiny_bilevel, tmp_path, capsys
):
    def placed(text):
        for word, path in places.items():
            text = text.replace(word, str(path))
        return text

    name, *argv = command.split()
    argv = {"search": tiny_search, "search restoration": tiny_bilevel}.get(command, argv)
    if command != "evaluate" and "--resume" not in argv:
        out = "--runs" if name == "search" else "--out"
        argv = [*argv, out, str(tmp_path / "out")]
    assert main_of(name)([placed(word) for word in [*argv, *flags.split()]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {placed(message)}")
    assert not (tmp_path / "out").exists()
    assert not list(places["EMPTY"].iterdir())
    for model in ("MODEL", "RESTORER"):
        assert not (places[model] / "evaluation.json").exists()
