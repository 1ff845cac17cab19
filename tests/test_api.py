"""The namespace of the package, and commands as functions."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

import nasfast
from nasfast import api
from nasfast.commands import search as search_command
from nasfast.commands import train as train_command
from nasfast.inference.model import Model
from nasfast.methods.registry import METHODS
from nasfast.models.decoders import DecoderConfig
from nasfast.runs.study import Study
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.utils.errors import UserError
from nasfast.utils.interrupt import StopRequested

SMALL = {
    "device": "cpu",
    "budget": 2,
    "decoder": DecoderConfig(agg_size=8),
    "stage0": {"samples": 8, "crop": 32, "shorter_side": 32, "batch_size": 4, "epochs": 1},
    "stage1.epochs": 0,
    "batch": 2,
    "threads": 1,
    "workers": 1,
}


# ---- the namespace


def test_import_is_lazy_and_names_are_there():
    script = """
import sys, nasfast
heavy = {"nasfast.models", "nasfast.ops", "nasfast.api", "nasfast.commands", "tyro", "rich"}
print(sorted(heavy & set(sys.modules)))
print(callable(nasfast.search), nasfast.search.__module__, nasfast.train.__module__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\nTrue nasfast.api nasfast.api\n"


def test_every_public_name():
    assert set(nasfast.__all__) <= set(dir(nasfast))
    for name in nasfast.__all__:
        assert getattr(nasfast, name) is not None
    with pytest.raises(AttributeError, match="module 'nasfast' has no attribute 'serch'"):
        _ = nasfast.serch


@pytest.mark.parametrize("name", ["search", "train"])
def test_the_function_stays_when_the_module_is_imported(name, monkeypatch):
    function = getattr(nasfast, name)
    monkeypatch.setattr(api, name, lambda *args, **kwargs: (args, kwargs))
    module = importlib.import_module(f"nasfast.{name}")
    try:
        assert getattr(nasfast, name)("x", data="y") == (("x",), {"data": "y"})
        assert module.main.__module__ == f"nasfast.commands.{name}"
    finally:
        sys.modules.pop(f"nasfast.{name}")
        setattr(nasfast, name, function)


# ---- settings by name


def test_settings_are_those_of_the_command_line():
    segmentation, restoration = METHODS["segmentation"], METHODS["restoration"]
    flags = "--budget 3 --stage0.epochs 2 --preset quick"
    settings = {"budget": 3, "stage0": {"epochs": 2}, "preset": "quick"}
    assert segmentation.search_with(settings) == segmentation.parse_search(flags.split())
    flags = "--task super-resolution --task.scale 4 --preset paper"
    same = (
        {"task": "super-resolution", "task.scale": 4},
        {"task": {"task": "super-resolution", "scale": 4}},
    )
    for settings in same:
        found = restoration.search_with({"preset": "paper", **settings})
        assert found == restoration.parse_search(["restoration", *flags.split()])
    assert restoration.search_with({"task": Denoising(50)}).task == Denoising(50)
    assert restoration.search_with({"task.sigma": 50}).task == Denoising(50)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"budgt": 3}, "search: unknown setting 'budgt'; expected some of batch, budget, "),
        ({"preset": "fast"}, "search, preset: expected one of 'demo', 'quick', 'paper', got 'f"),
        ({"stage0": {"epoch": 1}}, "search, stage0: unknown setting 'epoch'; expected some of "),
        ({"stage0.epochs": 1.5}, "search, stage0, epochs: expected an integer, got 1.5; "),
        ({"stage0": 3}, "search, stage0: expected a table, got 3; correct the value"),
        ({"budget.x": 1}, "search, budget: expected an integer, got {'x': 1}; "),
        (
            {"method": "depth"},
            "method: expected one of segmentation, templates, detection, restoration, got ",
        ),
        ({"method": "restoration", "task": "x"}, "task: expected one of denoising, deraining, "),
        ({"resume": "no", "seed": 1}, "search: unknown setting 'seed'; expected some of budget, "),
    ],
)
def test_a_setting_that_is_none(settings, text):
    with pytest.raises(UserError) as error:
        nasfast.search(**settings, quiet=True)
    assert str(error.value).startswith(text)


# ---- searches and trainings


@pytest.fixture(scope="module")
def found(tiny_data, tiny_weights, tmp_path_factory):
    """A search of two candidates, by function."""
    folder = tmp_path_factory.mktemp("api")
    paths = {"runs": folder / "runs", "cache_dir": folder / "cache"}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    study = nasfast.search(
        data=tiny_data, encoder_weights=tiny_weights, quiet=True, **paths, **SMALL
    )
    assert torch.get_num_threads() == 2, "left as it was"
    torch.set_num_threads(threads)
    return study


def test_a_search_gives_its_run(found, tiny_data, capsys):
    assert isinstance(found, Study)
    assert len(found.ranking()) == 2
    assert found.best == found.ranking()[0]
    assert (found.path / "report.html").is_file()
    assert found.config["data"] == str(tiny_data)
    (command,) = json.loads((found.path / "env.json").read_text())["command"]
    assert command.startswith(f"nasfast.search('segmentation', data={str(tiny_data)!r}, ")
    model = nasfast.create_model(found.best.genotype, num_classes=3)
    assert model.decoder.conv_clf.out_channels == 3
    assert capsys.readouterr().out == ""


def test_a_search_goes_on(found, capsys):
    assert len(nasfast.search(resume=found.path, budget=3).ranking()) == 3
    assert f"run      {found.path}" in capsys.readouterr().out


def test_workers_leave_the_callers_script_alone(monkeypatch):
    seen = []

    def begin(session, method, config, command):
        seen.append(sys.modules["__main__"])
        raise StopRequested

    monkeypatch.setattr(search_command.Session, "begin", begin)
    main = sys.modules["__main__"]
    with pytest.raises(KeyboardInterrupt, match="nothing was begun"):
        nasfast.search(quiet=True)
    assert not hasattr(seen[0], "__file__")
    assert sys.modules["__main__"] is main


TRAINING = {"device": "cpu", "epochs": 1, "crop": 32, "decoder.agg_size": 8, "quiet": True}


def test_training_gives_a_model(found, tiny_data, tmp_path):
    model = nasfast.train(found, batch_size=6, **TRAINING)
    assert isinstance(model, Model)
    assert model.classes == ("sky", "road", "[post]")
    assert model.genotype == Study.open(found.path).best.genotype  # after another test went on
    assert model.path == found.path / "train-1" / "model.safetensors"
    image = tmp_path / "image.png"
    Image.new("RGB", (48, 32)).save(image)
    assert model.predict(image).mask.shape == (32, 48)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for call in (lambda: nasfast.train("~/none"), lambda: nasfast.search(resume="~/none")):
        with pytest.raises(UserError) as error:
            call()
        assert str(tmp_path / "none") in str(error.value)
        assert "~" not in str(error.value)


def test_a_name_almost_right():
    with pytest.raises(UserError) as error:
        nasfast.train("fast_nas_arc1")
    assert str(error.value) == (
        "train: no run directory and no genotype file at fast_nas_arc1, nor a name of the zoo "
        f"({', '.join(nasfast.list_models())}); nasfast search makes a run; did you mean "
        "fast_nas_arch1?"
    )


@pytest.mark.parametrize("source", ["fast_nas_arch1", api.ZOO["fast_nas_arch1"].genotype])
def test_training_an_architecture_by_name_or_genotype(source, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sessions = []

    def stop(session, console):
        sessions.append(session)
        raise StopRequested

    monkeypatch.setattr(train_command.Session, "run", stop)
    with pytest.raises(KeyboardInterrupt) as error:
        nasfast.train(source, data=tiny_data, **TRAINING)
    (session,) = sessions
    assert session.genotype == api.ZOO["fast_nas_arch1"].genotype
    assert session.config.data == str(tiny_data)
    out = tmp_path / "runs" / (source if isinstance(source, str) else "segmentation") / "train-1"
    assert session.out == out
    assert str(error.value) == (
        f"finished epochs are saved; nasfast.train(resume={str(out)!r}) continues"
    )


def test_a_decoder_of_the_zoo_trains_by_name(tiny_data, tiny_weights, tmp_path):
    flags = f"--epochs 1 --crop 32 --device cpu --decoder.agg-size 8 --out {tmp_path / 'out'}"
    command = ["fast_nas_arch1", "--encoder-weights", str(tiny_weights), *flags.split()]
    assert train_command.main([*command, "--data", str(tiny_data)]) == 0
    genotype = api.ZOO["fast_nas_arch1"].genotype.to_json()
    assert nasfast.load(tmp_path / "out").genotype == genotype


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "train: expected a run, a genotype or the name of an architecture, got none"),
        ({"source": "irnas-derain", "epochs": 1}, "train: unknown setting 'epochs'; expected "),
        (
            {"resume": "/no/training"},
            "train: /no/training is not the directory of a training: it has no config.toml and "
            "genotype.json; give the directory that nasfast train printed",
        ),
    ],
)
def test_training_refuses(arguments, text):
    with pytest.raises(UserError) as error:
        nasfast.train(**arguments)
    assert str(error.value).startswith(text)


# ---- the zoo


def test_model_info_is_typed_and_reads_well():
    info = nasfast.model_info("fast_nas_arch1")
    assert (info.parameters, info.size, info.method) == (2_810_133, (512, 512), "segmentation")
    assert info.figures[0] == api.Figure("parameters", 2.8e6, 2_810_133)
    lines = str(info).splitlines()
    assert lines[:2] == ["fast_nas_arch1, segmentation", api.ZOO["fast_nas_arch1"].source]
    assert json.loads(lines[2]) == info.genotype
    depth, pose = lines[8], next(line for line in lines if line.startswith("keypoints, "))
    assert depth.split() == ["depth,", "NYU", "Depth", "v2:", "RMSE,", "m", "0.526", "-"]
    assert pose.split()[-1] == "-", "figures of other tasks stand beside those of segmentation"
    assert " ".join(str(info).split("\n\n")[-1].splitlines()) == info.note
    assert "fewer by 5.9 %, 3.2 % and 2.8 %" in info.note
    assert nasfast.model_info("irnas-derain").note == ""
    assert [line.split() for line in lines[4:8]] == [
        ["published", "ours"],
        ["parameters", "2.8", "M", "2,810,133"],
        ["multiply-adds,", "512x512", "2.95", "G", "2.854", "G"],
        ["mIoU,", "PASCAL", "VOC", "val", "0.771", "-"],
    ]
    assert inspect.signature(nasfast.model_info).return_annotation == "ModelInfo"
    with pytest.raises(UserError) as error:
        nasfast.model_info("irnas-denoi")
    assert str(error.value).endswith("got 'irnas-denoi'; did you mean irnas-denoise?")
