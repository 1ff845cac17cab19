"""Full training of a restoration network end to end: what it measures, sources, recipes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import save_image
from PIL import Image
from search_runs import assert_same_training
from torch import nn

from nasfast.commands import evaluate, train
from nasfast.methods.registry import METHODS, method_of_source
from nasfast.methods.restoration.train import PRESETS, Recipe, TrainingRun, parse_train
from nasfast.models.io import load_model
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.deraining import Deraining
from nasfast.training.loop import Runtime

RESTORATION = METHODS["restoration"]
GENOTYPE = {
    "space": "ir_nas",
    "nodes": [[["conv3x3", 0], ["skip", 1]], [["sep3x3", 1], ["def3x3", 2]]],
    "levels": [0, 1],
}
SMALL = "--device cpu --steps 2 --crop 16 --batch-size 2 --network.width 4 --network.stem 4"


def test_what_a_training_measures(bilevel_run, trained_restorer):
    best = json.loads((bilevel_run / "best.json").read_text())
    metrics = json.loads((trained_restorer / "metrics.json").read_text())
    assert metrics["split"] == "val of edges, 1 images"
    costs = best["evaluation"]["costs"]
    assert set(costs) == {"params", "macs", "memory"}
    assert {name: metrics[name] for name in costs} == costs
    assert (metrics["steps"], metrics["size"], len(metrics["losses"])) == (6, [40, 48], 3)
    model, description = load_model(trained_restorer / "model.safetensors")
    assert model.genotype.to_json() == best["genotype"]
    assert description["task"] == metrics["task"] == {"task": "denoising", "sigma": 30.0}
    assert description["psnr"] == metrics["psnr"] > 0


def test_resume_with_other_data_is_refused(trained_restorer, tiny_images, tmp_path, capsys):
    out = shutil.copytree(trained_restorer, tmp_path / "train")
    data = shutil.copytree(tiny_images, tmp_path / "edges")
    _, config = (out / "config.toml").read_text().split("\n", 1)  # without the checksum
    config = config.replace(str(tiny_images), str(data))
    (out / "config.toml").write_text(config)
    assert train.main(["--resume", str(out)]) == 0
    Image.new("L", (48, 40), 7).save(data / "train" / "01.png")
    assert train.main(["--resume", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {out}: expected the training images that it began with, got other content "
        f"in {data}; restore it or start a new training\n"
    )


# ---- sources


def config_of(argv):
    method, found = method_of_source(argv)
    assert method is RESTORATION
    return parse_train(argv, found, None)


def test_a_run_decides_and_flags_override(bilevel_run, tiny_images):
    config, genotype = train.resolve(RESTORATION, config_of([str(bilevel_run)]))
    best = json.loads((bilevel_run / "best.json").read_text())
    assert genotype.to_json() == best["genotype"]
    assert (config.data, config.out) == (str(tiny_images), bilevel_run / "train-1")
    assert config.network == RestorerConfig(4, 4, 4, 4, residual=True, atrous=False)
    assert config.task == Denoising(30.0)
    assert (config.preset, config.steps) == ("demo", 300)
    flags = ["--task.sigma", "50", "--network.width", "6", "--preset", "paper"]
    config = config_of([*flags, str(bilevel_run)])
    assert config.task == Denoising(50.0)
    assert config.network == RestorerConfig(6, 4, 4, 4, residual=True, atrous=False)
    assert (config.steps, config.optimizer, config.lr) == (600_000, "sgd", 0.05)


def test_names_of_the_zoo():
    config, genotype = train.resolve(RESTORATION, config_of(["irnas-denoise"]))
    assert genotype.to_json()["levels"] == [0, 0, 0, 1]
    assert config.network.width == 20
    assert config.channels == 1
    assert config.out == Path("runs/irnas-denoise/train-1").resolve()
    haze = config_of(["irnas-denoise", "--task", "dehazing"])
    assert (haze.network.reduction, haze.channels, haze.crop) == (8, 3, 48)
    plain = config_of(["irnas-denoise", "--task=dehazing", "--network.reduction", "1"])
    assert plain.network == config.network
    rain = config_of(["irnas-derain", "--seed", "3"])
    assert (rain.task, rain.channels, rain.seed) == (Deraining(), 3, 3)


def test_a_genotype_file_trains_on_colour_and_another_scale(tmp_path):
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(GENOTYPE))
    flags = "--task super-resolution --task.scale 2 --channels 3 --network.head 4 --data synthetic"
    assert train.main([str(path), *SMALL.split(), *flags.split()]) == 0
    model, description = load_model(tmp_path / "train-1" / "model.safetensors")
    assert (model.channels, model.scale) == (3, 2)
    assert description["task"] == {"task": "super-resolution", "scale": 2}
    metrics = json.loads((tmp_path / "train-1" / "metrics.json").read_text())
    assert metrics["size"] == [48, 64]  # of the input
    assert metrics["genotype"] == GENOTYPE


@pytest.mark.parametrize(
    ("flags", "other", "label", "baseline"),
    [
        (
            "--task.sigma 50",
            "noisy",
            "denoising, real noise, as the data has pairs, instead of denoising, sigma 50",
            "sliding DCT",
        ),
        ("--task dehazing", "hazy", "dehazing", "dark channel prior"),
        ("--task dehazing", "depth", "dehazing", "dark channel prior"),
    ],
)
def test_pairs_and_depth_from_training_to_evaluation(
    flags, other, label, baseline, tmp_path, capsys
):
    data, path, out = tmp_path / "data", tmp_path / "genotype.json", tmp_path / "train-1"
    path.write_text(json.dumps(GENOTYPE))
    for i in range(4):
        save_image(data / "clean" / f"{i}.png", i, (20, 24))
        save_image(data / other / f"{i}.png", i + 4, (20, 24))
    if other == "depth":
        for file in (data / other).iterdir():
            file.unlink()
            np.save(file.with_suffix(".npy"), np.linspace(1, 5, 480).reshape(20, 24))
    assert train.main([str(path), *SMALL.split(), *flags.split(), "--data", str(data)]) == 0
    out_text = capsys.readouterr().out
    assert f"task     {label}\n" in out_text
    # blocks of 8x8 pixels, and patches as large as the images are
    assert f"patches  {20 if 'dehazing' in flags else 16} pixels\n" in out_text
    argv = [str(out), "--device", "cpu", "--seconds", "0.01"]
    assert evaluate.main([*argv, "--baselines"]) == 0
    ((found, scores),) = json.loads((out / "evaluation.json").read_text())["scores"].items()
    assert (found, list(scores)[-2]) == (label.partition(", as")[0], baseline)
    if other == "noisy":
        assert load_model(out / "model.safetensors")[1]["task"]["sigma"] == "real"
        assert evaluate.main([*argv, "--data", "synthetic"]) == 2
        assert capsys.readouterr().err.startswith("error: denoising: expected pairs in clean/ + ")


# ---- recipes


def training_of(recipe):
    torch.manual_seed(0)
    genotype = IRNASGenotype.from_json(GENOTYPE)
    model = Restorer(genotype, RestorerConfig(4, 4, 4, 4, residual=True), 1)

    class Patches:
        def __len__(self):
            return 3

        def batch(self, indices, generator):
            clean = torch.full((len(indices), 1, 16, 16), 0.5)
            return clean + 0.1 * torch.randn(clean.shape, generator=generator), clean

    return TrainingRun(model, Patches(), recipe, Runtime(torch.device("cpu")), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_recipes_learn_and_resume(optimizer):
    recipe = Recipe(steps=40, batch_size=2, optimizer=optimizer, lr=0.02, ssim_weight=0.1)
    whole, first, second = (training_of(recipe) for _ in range(3))
    before, after = whole.run(10), (whole.run(20), whole.run(99))[-1]
    assert whole.steps == 40
    assert after < 0.7 * before
    first.run(10)
    second.load_state_dict(first.state_dict())
    second.run(20)
    second.run(10)
    for mine, theirs in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def norms_of(run):
    return [each for each in run.model.modules() if isinstance(each, nn.BatchNorm2d)]


def statistics_of(run):
    return [each.running_var.clone() for each in norms_of(run)]


def test_statistics_are_measured_and_stay_in_the_last_steps():
    run = training_of(Recipe(steps=40, batch_size=2, lr=0.02, frozen_norm=0.25))
    run.run(30)
    moving, weights = statistics_of(run), [each.detach().clone() for each in run.model.parameters()]
    run.run(1)
    measured = statistics_of(run)
    assert any(not torch.equal(old, new) for old, new in zip(moving, measured))
    run.run(99)
    assert run.steps == 40
    assert all(torch.equal(old, new) for old, new in zip(measured, statistics_of(run)))
    assert any(not torch.equal(old, new) for old, new in zip(weights, run.model.parameters()))
    assert {each.momentum for each in norms_of(run)} == {0.1}


@pytest.mark.parametrize("stop", [29, 30, 31])
def test_it_continues_around_the_measurement(stop):
    recipe = Recipe(steps=40, batch_size=2, lr=0.02, frozen_norm=0.25)
    whole, first, second = (training_of(recipe) for _ in range(3))
    whole.run(40)
    first.run(stop)
    second.load_state_dict(first.state_dict())
    second.run(40)
    states = (each.model.state_dict().values() for each in (whole, second))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*states, strict=True))


def test_statistics_move_to_the_end_where_none_of_the_steps_is_frozen():
    run = training_of(Recipe(steps=20, batch_size=2, lr=0.02, frozen_norm=0.0))
    run.run(19)
    before = statistics_of(run)
    run.run(1)
    assert all(not torch.equal(old, new) for old, new in zip(before, statistics_of(run)))
    assert PRESETS["paper"].frozen_norm == 0


def test_the_published_recipe():
    """Biases learn at twice the rate without decay; the rate falls polynomially."""
    run = training_of(Recipe(steps=10, optimizer="sgd", lr=0.05, weight_decay=4e-5, batch_size=2))
    weights, biases = run._optimizer.param_groups
    assert (weights["lr"], biases["lr"]) == (0.05, 0.1)
    assert (weights["weight_decay"], biases["weight_decay"]) == (4e-5, 0.0)
    assert len(biases["params"]) == sum(
        m.bias is not None
        for m in run.model.modules()
        if isinstance(getattr(m, "bias", None), nn.Parameter)
    )
    run.run(4)
    assert weights["lr"] == pytest.approx(0.05 * 0.6**0.9)
    assert biases["lr"] == pytest.approx(0.1 * 0.6**0.9)


# ---- errors


def test_one_that_was_killed_before_it_began_begins_again(
    tiny_restorer, trained_restorer, tmp_path
):
    """Its folder has a configuration, but not yet the architecture."""
    out = tmp_path / "train"
    out.mkdir()
    for name in ("lock", "env.json", "config.toml"):
        shutil.copy(trained_restorer / name, out)
    (out / ".genotype.json.12-ab.tmp").touch()
    assert train.main([*tiny_restorer, "--out", str(out)]) == 0
    assert_same_training(out, trained_restorer)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_a_loss_that_is_not_finite(tiny_restorer, tmp_path, capsys):
    flags = ["--lr", "1e30", "--max-grad-norm", "inf", "--out", str(tmp_path / "out")]
    assert train.main([*tiny_restorer, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: training loss is ")
    assert line.endswith("; lower --lr in a new training")
