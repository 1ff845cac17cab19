"""What every full training of a dense task has beside its epochs."""

import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from search_runs import assert_same_training

from nasfast.commands import train
from nasfast.methods import dense
from nasfast.methods.segmentation.train import TrainConfig
from nasfast.models.io import load_model
from nasfast.runs.checkpoint import save_checkpoint
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError

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


@pytest.mark.parametrize("epochs", [1, 3])
def test_stopped_in_either_phase_it_ends_the_same(epochs, everything, tmp_path, monkeypatch):
    argv, whole = everything

    def stop(path, state):
        save_checkpoint(path, state)
        if len(state["history"]) == epochs:
            raise Stop

    out = tmp_path / "train"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", stop)
        with pytest.raises(Stop):
            train.main([*argv, "--out", str(out)])
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


def test_a_teacher_that_changed_is_refused(everything, tmp_path, capsys):
    _, whole = everything
    out = shutil.copytree(whole, tmp_path / "train")
    path = out / "config.toml"
    other = out / "model.safetensors"
    path.write_text(re.sub('teacher = ".*"', f'teacher = "{other}"', path.read_text()))
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


@pytest.mark.cuda
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_recorded_steps_follow_the_schedule(tiny_training, tmp_path, monkeypatch):
    """On a GPU, also across a stop and with an average, steps are recorded and train as eager
    ones do."""
    more = "--device cuda --epochs 6 --precision float32 --ema 0.9 --freeze-epochs 2 --loaders 2"
    argv = [*tiny_training, *more.split()]
    assert train.main([*argv, "--out", str(tmp_path / "recorded")]) == 0
    shutil.copytree(tmp_path / "recorded", tmp_path / "again")
    assert train.main(["--resume", str(tmp_path / "again")]) == 0
    monkeypatch.setattr(dense, "graphed_step", lambda device: nullcontext())
    assert train.main([*argv, "--out", str(tmp_path / "eager")]) == 0
    recorded, again, eager = (metrics(tmp_path / name) for name in ("recorded", "again", "eager"))
    assert recorded["losses"] == pytest.approx(eager["losses"], rel=1e-2)
    assert again["miou"] == recorded["miou"]
