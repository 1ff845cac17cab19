"""Settings of the search for segmentation networks."""

import dataclasses
import io
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nasfast.data import Sample, SegmentationDataset, Splits
from nasfast.evaluation.stages import Stage1Config
from nasfast.methods.segmentation import search as segmentation
from nasfast.methods.segmentation.settings import PRESETS, SearchConfig, continued, parse
from nasfast.strategies import settled
from nasfast.utils.errors import UserError


def splits(*sizes, val=(60, 80)):
    """Search frames of these sizes, height and width, scored on one of ``val``."""
    frames = Sizes(sizes), Sizes([val])
    return Splits(*frames, *frames)


class Sizes(SegmentationDataset):
    def __init__(self, sizes):
        self._sizes = sizes

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, index):
        mask = torch.zeros(self._sizes[index], dtype=torch.uint8)
        return Sample(mask.expand(3, *mask.shape), mask)

    def fingerprint(self):
        return ""


def sides(config):
    stages = (config.stage0, config.stage1)
    return tuple(side for s in stages for side in (s.crop, s.shorter_side))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("data", "crops", "fitted"),
    [
        (splits((70, 90)), (40, 50, 55, 60), (40, 50, 55, 60)),
        (splits((70, 90)), (40, 50, 70, 80), (40, 50, 60, 60)),
        (splits((70, 90), (90, 50)), (64, 65, 40, 45), (50, 50, 40, 45)),
        (splits((20, 90), val=(200, 200)), (64, 32, 16, 18), (20, 20, 16, 18)),
        (splits((90, 90), val=(90, 90)), (100, 80, 16, 18), (90, 80, 16, 18)),
    ],
)
def test_crops_fit_the_data(data, crops, fitted):
    config = SearchConfig()
    stage0, stage1 = (
        dataclasses.replace(stage, crop=crop, shorter_side=side)
        for stage, crop, side in ((config.stage0, *crops[:2]), (config.stage1, *crops[2:]))
    )
    config = dataclasses.replace(config, stage0=stage0, stage1=stage1)
    console = Console(file=io.StringIO())
    got = segmentation.fit_to_data(config, data, console)
    assert sides(got) == fitted
    same = dataclasses.replace(
        got,
        stage0=dataclasses.replace(got.stage0, crop=crops[0], shorter_side=crops[1]),
        stage1=dataclasses.replace(got.stage1, crop=crops[2], shorter_side=crops[3]),
    )
    assert same == config
    assert ("crops are at most" in console.file.getvalue()) == (fitted != crops)  # type: ignore[attr-defined]
    assert segmentation.fit_to_data(got, data, console) == got
    cropped = dataclasses.replace(got, val_crop=32)
    assert segmentation.fit_to_data(cropped, data, console) == cropped


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"val_crop": 50}, ""),
        (
            {"val_crop": 90},
            "crops    1 of 2 images are enlarged, by up to 1.50, as --val-crop 90 is more than "
            "their shorter side\n",
        ),
    ],
)
def test_enlarged_images_are_mentioned(given, said):
    """They are as the published search has them."""
    data = dataclasses.replace(splits((900, 900)), search_val=Sizes([(60, 80), (90, 120)]))
    console = Console(file=io.StringIO(), width=200)
    config = SearchConfig(**given)
    assert segmentation.fit_to_data(config, data, console) == config
    assert console.file.getvalue() == said  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "flag", "most"),
    [({"val_crop": 181}, "val-crop", 180), ({"stage1": "crop"}, "stage1.crop", 1800)],
)
def test_crops_far_larger_than_images(changed, flag, most):
    data = dataclasses.replace(splits((900, 900)), search_val=Sizes([(60, 80), (90, 120)]))
    if "stage1" in changed:
        changed = {"stage1": Stage1Config(crop=1801), "val_crop": 60}
    with pytest.raises(UserError) as caught:
        segmentation.fit_to_data(SearchConfig(**changed), data, Console(quiet=True))
    count = 2 if flag == "val-crop" else 1
    assert str(caught.value) == (
        f"--{flag}: expected at most {most}, twice the shorter side of the largest of the {count} "
        f"images, got {most + 1}; lower it"
    )


def test_workers_without_work_are_mentioned(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    said = []
    config = SearchConfig(device="cpu", workers=1000, batch=4)
    assert config.worker_config(note=said.append).workers == 1
    assert said == [
        "workers  1 instead of 1000: no more have work, in batches of 4 candidates and on 1 cores"
    ]


def test_presets():
    demo = PRESETS["demo"]
    assert demo.strategy == "auto"
    chosen = settled("auto", demo.budget)
    wanted = dataclasses.replace(demo, strategy=chosen, runs=Path("runs").resolve())
    assert parse(["--preset", "paper"]).strategy == "ppo"
    assert parse(["--threads", "3"]) == dataclasses.replace(wanted, threads=3)
    assert [preset.batch for preset in PRESETS.values()] == [4, 4, 8]
    assert parse(["--data", "synthetic"]).preset == "demo"
    assert parse(["segmentation", "--data", "somewhere"]).preset == "quick"
    assert parse(["--data=somewhere"]).stage0 == PRESETS["quick"].stage0
    assert parse(["--data", "somewhere", "--preset", "paper"]).val_crop == 400
    assert parse(["--preset=quick"]).data == "synthetic"
    assert parse(["--preset=quick"]).decoder == PRESETS["quick"].decoder


def test_flags_override_the_preset():
    config = parse(["--budget", "3", "--stage1.encoder-lr", "0.5", "--ppo.embed-decisions"])
    assert (config.budget, config.stage1.encoder_lr, config.ppo.embed_decisions) == (3, 0.5, True)
    demo = PRESETS["demo"]
    assert config.stage1 == dataclasses.replace(demo.stage1, encoder_lr=0.5)
    assert config.stage0 == demo.stage0


@pytest.mark.parametrize(
    ("cores", "batch", "threads"), [(2, 4, 1), (16, 4, 4), (10, 4, 2), (3, 1, 3)]
)
def test_threads_follow_cores_and_batch(monkeypatch, cores, batch, threads):
    """Not the number of workers, which must not change a result."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    for workers in ("1", "2"):
        assert parse(["--batch", str(batch), "--workers", workers]).threads == threads


def test_paths_are_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = parse(["--data", "d", "--encoder-weights", "e.pth", "--cache-dir", "~/c"])
    assert (config.data, config.encoder_weights) == (str(tmp_path / "d"), tmp_path / "e.pth")
    assert (config.cache_dir, config.runs) == (Path("/home/someone/c"), tmp_path / "runs")
    assert config.teacher is None


def test_device_beside_devices():
    with pytest.raises(ValueError) as caught:
        SearchConfig(device="cuda:1", devices="cuda:0,cuda:1")
    assert str(caught.value) == (
        "devices: expected --device or --devices, got both, cuda:1 and cuda:0,cuda:1; leave one out"
    )
    assert SearchConfig(devices="cpu,cpu").worker_config().devices == ("cpu", "cpu")


@pytest.mark.parametrize(("budget", "wanted"), [(None, 2), (5, 5)])
def test_the_last_budget_holds(budget, wanted):
    assert continued(SearchConfig(budget=8), {"budget": 2}, budget).budget == wanted
    assert continued(SearchConfig(budget=8), {}, None).budget == 8
