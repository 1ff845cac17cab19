"""What every full training of a dense task has beside its epochs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from search_runs import assert_same_training
from torch.nn import functional as F

from nasfast.commands import train
from nasfast.methods import dense
from nasfast.methods.segmentation.train import TrainConfig
from nasfast.models.io import load_model
from nasfast.runs.checkpoint import save_checkpoint
from nasfast.training import processes
from nasfast.training.graphs import CudaGraph
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError
from nasfast.utils.locks import locked

EVERYTHING = [
    *("--schedule", "poly", "--warmup", "0.2", "--freeze-epochs", "1", "--ema", "0.9"),
    *("--accumulate", "2", "--precision", "float32", "--scales", "0.8", "1.6", "--jitter", "0.3"),
    *("--crop-width", "48", "--val-every", "1", "--keep", "best"),
]


class Stop(Exception):
    """The process ends here."""


def metrics(out):
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def everything(tiny_training, tiny_model, tmp_path_factory):
    """Command line of a training with all settings at once, and its directory."""
    torch.set_num_threads(1)
    argv = [*tiny_training, *EVERYTHING, "--teacher", str(tiny_model / "model.safetensors")]
    out = tmp_path_factory.mktemp("everything") / "train"
    assert train.main([*argv, "--out", str(out)]) == 0
    return argv, out


def test_stopped_in_both_phases_it_ends_the_same(everything, tmp_path, monkeypatch):
    argv, whole = everything
    out = tmp_path / "train"
    for epochs, words in ((1, [*argv, "--out", str(out)]), (3, ["--resume", str(out)])):

        def stop(path, state, epochs=epochs):
            save_checkpoint(path, state)
            if len(state["history"]) == epochs:
                raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(train, "save_checkpoint", stop)
            with pytest.raises(Stop):
                train.main(words)
    assert train.main(["--resume", str(out)]) == 0
    assert_same_training(out, whole)


def test_the_best_epoch_is_kept_and_said(everything):
    _, out = everything
    found = metrics(out)
    curve = {entry["epoch"]: entry["miou"] for entry in found["validation"]}
    assert list(curve) == [1, 2, 3, 4]
    assert found["miou"] == pytest.approx(curve[found["kept_epoch"]], abs=1e-6)
    chosen = f"val of three bands, 2 images, which epoch {found['kept_epoch']} of 4 was chosen on"
    assert found["split"] == chosen


def test_the_last_epoch_is_kept_by_default(tiny_model):
    found = metrics(tiny_model)
    assert [entry["epoch"] for entry in found["validation"]] == [found["kept_epoch"]] == [4]
    assert len(found["losses"]) == 4


def test_threads_change_nothing(tiny_training, tiny_model, tmp_path):
    assert train.main([*tiny_training, "--loaders", "2", "--out", str(tmp_path / "t")]) == 0
    assert_same_training(tmp_path / "t", tiny_model)


def test_a_frozen_encoder_keeps_weights_and_statistics(tiny_training, tiny_weights, tmp_path):
    out = tmp_path / "t"
    frozen = ["--epochs", "1", "--freeze-epochs", "1", "--out", str(out)]
    assert train.main([*tiny_training, *frozen]) == 0
    model, _ = load_model(out / "model.safetensors")
    torch.testing.assert_close(
        model.get_submodule("encoder").state_dict(), load_file(tiny_weights), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"scales": (2.0, 0.5)}, "scales: expected LOW <= HIGH, got 2.0 0.5; exchange them"),
        (
            {"freeze_epochs": 31},
            "freeze_epochs: expected at most the 30 epochs of the training, got 31; lower it",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, text, tmp_path):
    with pytest.raises(UserError, match=re.escape(text)):
        TrainConfig(tmp_path, **settings)


def test_more_parts_than_crops(tiny_training, tmp_path, capsys):
    assert train.main([*tiny_training, "--accumulate", "5", "--out", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err == (
        "error: batch_size: expected at least 5 crops, one for each of 1 processes x 5 parts "
        "(accumulate), got 4; raise it, or lower those\n"
    )
    assert not (tmp_path / "t").exists()


def test_crops_that_are_too_wide(tiny_training, tmp_path, capsys):
    assert train.main([*tiny_training, "--crop-width", "97", "--out", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err == (
        "error: --crop-width: expected at most 96, twice the width of the largest of the 10 images,"
        " got 97; lower it\n"
    )


def test_parts_of_processes_are_equal(tiny_training, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 0)
    monkeypatch.setattr(processes, "barrier", lambda: None)
    monkeypatch.setattr(processes, "agreed", lambda decide: decide())
    assert train.main([*tiny_training, "--batch-size", "3", "--out", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err == (
        "error: batch_size: expected a multiple of the 2 processes, which get equal parts, got 3; "
        "change it\n"
    )


def test_a_teacher_that_changed_is_refused(everything, tmp_path, capsys):
    _, whole = everything
    out = shutil.copytree(whole, tmp_path / "train")
    path = out / "config.toml"
    other = out / "model.safetensors"
    _, settings = path.read_text().split("\n", 1)  # without the checksum
    path.write_text(re.sub('teacher = ".*"', f'teacher = "{other}"', settings))
    assert train.main(["--resume", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {out}: expected the teacher that it began with, got other weights in "
        f"{other}; restore them or start a new training\n"
    )


@pytest.mark.parametrize("choice", ["float32", "bfloat16"])
def test_precision_can_be_chosen(choice):
    runtime = Runtime(torch.device("cpu"), choice=choice)
    with runtime.autocast():
        assert torch.nn.Linear(2, 2)(torch.rand(1, 2)).dtype == getattr(torch, choice)
    assert runtime.precision == choice


def processes_of(argv, count=2):
    """What torchrun starts: status, and what each printed on stdout and stderr."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "nasfast.train", *argv],
            env=os.environ | common | {"OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in map(str, range(count))
    ]
    printed = [process.communicate(timeout=120) for process in started]
    return [process.returncode for process in started], printed


class WideBatchNorm(torch.nn.BatchNorm2d):
    """In float64: on the nearly constant maps of tiny images, float32 differs by 2e-4."""

    def forward(self, x):
        tensors = self.running_mean, self.running_var, self.weight, self.bias
        mean, variance, weight, bias = (tensor.double() for tensor in tensors)
        y = F.batch_norm(x.double(), mean, variance, weight, bias, self.training, 0.1, self.eps)
        if self.training:
            self.running_mean.copy_(mean)
            self.running_var.copy_(variance)
            self.num_batches_tracked.add_(1)
        return y.to(x.dtype)


def widen(model, device):
    for module in model.modules():
        if type(module) is torch.nn.BatchNorm2d:
            module.__class__ = WideBatchNorm


def test_two_processes_train_as_one(everything, tmp_path, monkeypatch):
    """BatchNorm, weighted losses, distillation, and average are those of whole batches."""
    argv, _ = everything
    argv = [*argv, "--accumulate", "1", "--epochs", "1", "--freeze-epochs", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    with monkeypatch.context() as patch:
        patch.setattr(processes, "synchronize", widen)
        assert train.main([*argv, "--out", str(one)]) == 0
    codes, ((first, _), (second, _)) = processes_of([*argv, "--out", str(two)])
    assert codes == [0, 0]
    assert "epoch 1/1" in first
    assert second == ""
    assert metrics(two)["losses"] == pytest.approx(metrics(one)["losses"], rel=1e-5)
    ours, theirs = (load_file(out / "model.safetensors") for out in (two, one))
    off = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in theirs])
    # biases that a BatchNorm takes away have gradients of rounding alone, which Adam enlarges, and
    # small gradients of the encoder's first layers too
    assert (off < 1e-5).double().mean() > 0.95
    assert (off < 1e-4).double().mean() > 0.99


def test_processes_without_torchrun_do_not_write_the_same_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["fast_nas_arch0", "--out", str(tmp_path / "t")]) == 2
    assert capsys.readouterr().err == (
        "error: train: expected torchrun to set RANK, LOCAL_RANK, MASTER_ADDR beside WORLD_SIZE=2, "
        "got none: each process would write the same folder; start them by torchrun, or unset "
        "WORLD_SIZE\n"
    )


def test_two_trainings_do_not_write_the_same_folder(tiny_model, tmp_path, capsys):
    out = shutil.copytree(tiny_model, tmp_path / "train")
    with locked(out):
        assert train.main(["--resume", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: {out} is being written by process {os.getpid()}; wait for it or stop it first\n"
    )


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (
            lambda: processes.device("cuda:0"),
            "device: expected auto, cuda or cpu for 2 processes, each of which takes a GPU of its "
            "own, got cuda:0; leave it out",
        ),
        (
            lambda: processes.require_one("restoration"),
            "train: expected one process for restoration, whose trainings are not divided, got 2; "
            "start it without torchrun",
        ),
    ],
)
def test_what_several_processes_cannot(action, text, monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 2)
    with pytest.raises(UserError) as error:
        action()
    assert str(error.value) == text


@pytest.mark.cuda
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_recorded_steps_follow_the_schedule(tiny_training, tmp_path, monkeypatch):
    """On a GPU, also across a stop and with an average, steps are recorded and train as eager
    ones do."""
    more = "--device cuda --epochs 6 --precision float32 --ema 0.9 --freeze-epochs 2 --loaders 2"
    argv = [*tiny_training, *more.split()]
    with mock.patch.object(CudaGraph, "repeat", autospec=True, side_effect=CudaGraph.repeat) as spy:
        assert train.main([*argv, "--out", str(tmp_path / "recorded")]) == 0
    assert spy.call_count == (4 - 3) + (8 - 3)  # steps of the phases, without their warm-up
    shutil.copytree(tmp_path / "recorded", tmp_path / "again")
    assert train.main(["--resume", str(tmp_path / "again")]) == 0
    monkeypatch.setattr(dense, "graphed_step", lambda device: nullcontext())
    assert train.main([*argv, "--out", str(tmp_path / "eager")]) == 0
    recorded, again, eager = (metrics(tmp_path / name) for name in ("recorded", "again", "eager"))
    assert recorded["losses"] == pytest.approx(eager["losses"], rel=1e-2)
    assert again["miou"] == recorded["miou"]
