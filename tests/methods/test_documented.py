"""Every documented combination of method, task, preset and strategy begins; scale 3 to the end."""

import dataclasses
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nasfast.commands import search, train
from nasfast.methods.registry import DEFAULT, METHODS, method_named, method_of_source
from nasfast.methods.restoration import search as restoration
from nasfast.methods.restoration.settings import PRESETS, SearchConfig, parse
from nasfast.methods.restoration.train import RestorationTraining, parse_train
from nasfast.methods.segmentation.settings import PRESETS as SEGMENTATION_PRESETS
from nasfast.models.io import load_model
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.tasks.restoration import task_from_json
from nasfast.training.loop import Runtime
from nasfast.utils.interrupt import Interrupt

RUN = Path(__file__).parents[1] / "fixtures" / "version1" / "segmentation"
README = (Path(__file__).parents[2] / "README.md").read_text()
COMMANDS = [
    command.replace("[", "").replace("]", "").strip()
    for command in re.findall(r"nasfast (?:search|train)\b[^`\n#]*", README)
]
TASKS = {
    "denoising": [{}, {"sigma": 50}, {"sigma": [30, 50, 70]}],
    "deraining": [{}],
    "super-resolution": [{}, {"scale": 3}, {"scale": 4}],
    "inpainting": [{}],
    "dehazing": [{}],
}
STRATEGIES = ["darts", "sigmoid", "proxyless", "gumbel", "random"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--help" not in c])
def test_commands_of_the_readme_are_understood(command, tmp_path):
    places = {"DIR": str(tmp_path), "RUN": str(RUN)}
    _, name, *argv = [places.get(word, word) for word in shlex.split(command)]
    if name == "train":
        method, found = method_of_source(argv)
        assert isinstance(method.parse_train(argv, found, None), method.train_settings)
    elif "--resume" in argv:
        assert search.parse_resume(argv).resume == RUN
    else:
        method = method_named(argv[0] if argv and argv[0] in METHODS else DEFAULT)
        assert isinstance(method.parse_search(argv), method.search_settings)


def test_the_readme_has_commands():
    assert any("--resume" in command for command in COMMANDS)
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("preset", SEGMENTATION_PRESETS)
@pytest.mark.parametrize("strategy", ["ppo", "random"])
def test_presets_of_segmentation(preset, strategy):
    config = METHODS["segmentation"].parse_search(["--preset", preset, "--strategy", strategy])
    assert (config.preset, config.strategy) == (preset, strategy)


def flags_of(task, settings):
    words = ["--task", task]
    for name, value in settings.items():
        words += [f"--task.{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("task", "settings"), [(t, s) for t, all_ in TASKS.items() for s in all_])
def test_every_preset_has_patches_for_every_task(preset, task, settings):
    """By all strategies, up to the first batch of the search and of the training after it."""
    argv = ["restoration", "--preset", preset, "--device", "cpu", *flags_of(task, settings)]
    generator = torch.Generator().manual_seed(0)
    for strategy in STRATEGIES:
        workers = ["--workers", "1"] if strategy == "random" else []
        config = parse([*argv, "--strategy", strategy, *workers])
        console = Console(file=io.StringIO())
        with Interrupt() as interrupt:
            built, fitted = restoration.build(config, interrupt, console)
            built.close()
        assert isinstance(fitted, SearchConfig)
        given, side = (
            c.recipe.crop if strategy == "random" else c.bilevel.crop for c in (config, fitted)
        )
        assert side == given - given % config.task.scale
        assert ("patches  " in console.file.getvalue()) == (side != given)
        if strategy != "random":
            (half, _) = built.halves
            inputs, targets = half.batch([0], generator)
            side = max(side, min(config.network.reduction * side, 96))  # of the drawn images
            assert targets.shape[-1] == config.task.scale * inputs.shape[-1] == side


@pytest.mark.parametrize("preset", PRESETS)
def test_every_recipe_has_patches_for_scale_3(preset, tmp_path):
    argv = ["RUN", "--device", "cpu", "--preset", preset, "--network.width", "4"]
    config = parse_train([*argv, *flags_of("super-resolution", {"scale": 3})], {}, None)
    config = dataclasses.replace(config, data="synthetic")
    genotype = IRNASGenotype.from_json(
        {"space": "ir_nas", "nodes": [[["skip", 0], ["skip", 1]]], "levels": [0]}
    )
    training = RestorationTraining(config, genotype, tmp_path, Runtime(torch.device("cpu")))
    assert training.settings.crop == config.crop - config.crop % 3
    assert f"patches  {training.settings.crop} pixels\n" in training.summary


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_super_resolution_by_three(strategy, tiny_bilevel, tmp_path, capsys):
    """The README's ``--task.scale 3``, from the search to the network; 16 is no multiple of it."""
    flags = f"""
        --task super-resolution --task.scale 3 --strategy {strategy} --bilevel.epochs 2 --budget 1
        --recipe.steps 1 --recipe.crop 16 --recipe.batch-size 2
    """
    flags += "--workers 1 --threads 1" if strategy == "random" else ""
    assert search.main([*tiny_bilevel, *flags.split(), "--runs", str(tmp_path)]) == 0
    assert "patches  15 pixels instead of 16: a multiple of 3\n" in capsys.readouterr().out
    (run,) = tmp_path.iterdir()
    if strategy == "darts":
        recipe = ["--device", "cpu", "--steps", "1", "--crop", "16", "--batch-size", "2"]
        assert train.main([str(run), *recipe]) == 0
        model, description = load_model(run / "train-1" / "model.safetensors")
        assert model.scale == 3
        assert task_from_json(description["task"]).scale == 3
        assert json.loads((run / "train-1" / "metrics.json").read_text())["steps"] == 1
