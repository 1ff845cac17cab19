"""Depth by all commands, from the search to the picture; settings that belong to other tasks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nasfast
from nasfast.commands import check, evaluate, predict, search, train
from nasfast.data.depth import DepthReading, load_depth_splits
from nasfast.methods.base import Architecture
from nasfast.methods.registry import METHODS
from nasfast.methods.segmentation.tasks import BINDINGS, Reading, binding_of
from nasfast.methods.segmentation.train import TrainConfig, resolve
from nasfast.models.io import load_teacher
from nasfast.tasks.depth import DepthSettings
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError

RUNTIME = Runtime(torch.device("cpu"))
DEPTH = ["--task", "depth", "--depth.scale", "500"]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Ten images of 32x48: the redder a wall, the nearer; each has a column without a depth."""
    root = tmp_path_factory.mktemp("depth") / "rooms"
    rng = np.random.default_rng(0)
    for folder in ("images", "depths"):
        (root / folder).mkdir(parents=True)
    for i in range(10):
        depth = np.repeat(rng.uniform(1, 4, (1, 3)), 32, 0).repeat(16, 1)
        image = np.stack([255 / depth, 60 * depth, np.full_like(depth, 99)], -1)
        values = (500 * depth).astype(np.uint16)
        values[:, 7] = 0
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(values).save(root / "depths" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(rooms, tiny_search, tmp_path_factory):
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("depth-runs")
    flags = [*DEPTH, "--data", str(rooms), "--budget", "2", "--depth.loss", "l1-log"]
    assert search.main([*tiny_search, *flags, "--depth.cap", "3.5", "--runs", str(runs)]) == 0
    (path,) = runs.iterdir()
    return path


@pytest.fixture(scope="module")
def trained(run):
    flags = "--device cpu --epochs 2 --batch-size 4 --crop 32 --decoder.agg-size 8 --val-every 1"
    assert train.main([str(run), *flags.split()]) == 0
    return run / "train-1"


def test_a_search_is_rewarded_by_delta_and_rmse(run):
    lines = (run / "records.jsonl").read_text().splitlines()
    evaluation = json.loads(lines[0])["evaluation"]
    assert evaluation["failure"] is None
    assert list(evaluation["metrics"]["stage0"])[:4] == ["delta1", "delta2", "delta3", "rmse"]
    assert 0 < evaluation["rewards"]["stage0"] < 1
    page = (run / "report.html").read_text()
    assert "delta &lt; 1.25" in page
    assert "Share of the pixels whose predicted and true depth" in page
    assert "mIoU" not in page


def test_a_training_takes_the_task_from_its_run(trained, rooms):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (metrics["crop"], metrics["cap"]) == ("none", 3.5)
    assert metrics["split"] == "val of rooms (depths up to 3.5 m), 2 images"
    assert 0 < metrics["mean_depth_of_each_pixel"]["delta1"] < 1
    assert [list(entry)[:2] for entry in metrics["validation"]] == [["epoch", "delta1"]] * 2
    description = nasfast.load(trained).description
    assert description["output"] == "natural logarithm of the depth in metres"
    settings = {"scale": 500, "crop": None, "cap": 3.5, "loss": "l1-log"}
    assert (description["depth"], description["outputs"]) == (settings, 1)
    assert len(list((trained / "predictions").glob("image-*.png"))) == 2


def test_an_evaluation_names_crop_and_cap(trained, rooms, capsys):
    flags = ["--device", "cpu", "--seconds", "0.01"]
    assert evaluate.main([str(trained), *flags]) == 0
    before = json.loads((trained / "evaluation.json").read_text())
    metrics = json.loads((trained / "metrics.json").read_text())
    assert before["rmse"] == pytest.approx(metrics["rmse"], rel=1e-3)
    assert "absolute relative error" in capsys.readouterr().out
    own = ["--depth.crop", "eigen", "--depth.cap", "9", "--scales", "1,1.5", "--flip"]
    assert evaluate.main([str(trained), *flags, *own]) == 0
    after = json.loads((trained / "evaluation.json").read_text())
    assert (after["crop"], after["cap"]) == ("eigen", 9)
    assert after["views"] == "logarithms averaged over scales 1, 1.5 and mirror images"
    assert "rooms (Eigen crop, depths up to 9 m)" in " ".join(capsys.readouterr().out.split())
    assert evaluate.main([str(trained), *flags, "--mask-values", "0,1"]) == 2
    assert "mask-values: expected none with a network for depth" in capsys.readouterr().err


def test_views_of_a_network_that_is_right_agree():
    """What is enlarged by 2 seems half as far."""
    binding, logs = BINDINGS["depth"], torch.full((1, 1, 2, 2), 3.0).log()
    seen = [binding.view(logs - np.log(factor), factor, 2) for factor in (1.0, 2.0)]
    assert sum(seen).exp().unique().tolist() == pytest.approx([3.0])


def test_predictions_are_files_as_those_of_the_training(trained, rooms, tmp_path):
    assert (
        predict.main([str(trained), str(rooms / "images" / "0.png"), "--out", str(tmp_path)]) == 0
    )
    (entry,) = json.loads((tmp_path / "predictions.json").read_text())["images"]
    assert (entry["files"], entry["values_a_metre"]) == (["0.png", "0-color.png"], 500)
    with Image.open(tmp_path / "0.png") as image:
        assert np.array(image).max() / 500 == pytest.approx(entry["depth"]["farthest"], abs=2e-3)
    model = nasfast.load(trained, "cpu")
    assert model.task == "depth"
    found = model.predict(rooms / "images" / "0.png")
    assert found.depth.shape == (32, 48)


def test_exports_check_and_calibrate_on_the_data_of_the_training(trained, rooms):
    method, model = METHODS["segmentation"], nasfast.load(trained, "cpu")
    assert len(method.inputs(model, str(rooms), "train", 3)) == 3
    scores = method.score(model, str(rooms), "val", RUNTIME)
    assert list(scores) == ["delta < 1.25", "delta < 1.25^2", "delta < 1.25^3"]


def test_other_data_needs_a_scale_of_its_own(trained, rooms, tmp_path):
    model = nasfast.load(trained, "cpu")
    for data, scale in ((rooms, 500), (tmp_path, None)):
        reading = BINDINGS["depth"].of_model(model, Reading(str(data)))
        assert (reading.depth.scale, reading.depth.cap) == (scale, 3.5)


def test_the_data_is_checked(rooms, tmp_path, capsys):
    assert check.main(["--data", str(rooms), *DEPTH, "--out", str(tmp_path / "a.png")]) == 1
    printed = capsys.readouterr().out
    assert "97.92%" in printed
    assert "typical" in printed
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"depth": {"cap": 3.0}},
            "depth: expected none with --task segmentation, which has no use for it, got cap 3.0; "
            "leave it out, or give another --task",
        ),
        ({"task": "depth", "mask_values": "0,1"}, "mask-values: expected none with --task depth"),
        ({"task": "depth", "omit": [0]}, "omit: expected none with --task depth, which has no use"),
        ({"task": "poses"}, "task: expected one of 'segmentation', 'depth', 'keypoints', got"),
    ],
)
def test_settings_of_other_tasks(settings, text):
    with pytest.raises(UserError) as caught:
        METHODS["segmentation"].search_with(settings)
    assert text in str(caught.value)


def test_a_training_on_other_files_takes_no_scale_from_the_run(tmp_path):
    search_settings = {"data": "/a", "task": "depth", "depth": {"scale": 500, "cap": 10}}
    found = Architecture([], tmp_path, search_settings)
    for config, scale in (
        (TrainConfig(Path("run")), 500),
        (TrainConfig(Path("run"), data="/b"), None),
        (TrainConfig(Path("run"), data="/b", depth=DepthSettings(scale=256)), 256),
    ):
        assert resolve(config, found).depth == DepthSettings(scale=scale, cap=10)
        assert resolve(config, found).task == "depth"


@pytest.mark.parametrize("task", BINDINGS)
def test_a_training_for_another_task_has_nothing_of_the_search_that_it_has_no_use_for(
    task, tmp_path
):
    """The networks of one task are trained for the others."""
    searches = {
        "segmentation": {"mask_values": "0,1", "resize_longer": 1024},
        "depth": {"depth": {"scale": 500, "cap": 10, "loss": "berhu"}, "resize_longer": 640},
        "keypoints": {},
    }
    for name, settings in searches.items():
        found = Architecture([], tmp_path, {"data": "/a", "task": name, **settings})
        config = resolve(TrainConfig(Path("run"), data="/b", task=task), found)
        assert binding_of(config) is BINDINGS[task]
        kept = config.resize_longer == settings.get("resize_longer")
        assert kept == (task != "keypoints" or "resize_longer" not in settings)


def test_a_teacher_for_another_task(trained):
    with pytest.raises(
        UserError, match="expected a network for segmentation, got one for depth; train"
    ):
        load_teacher(trained / "model.safetensors", ("a", "b"))
    assert load_teacher(trained / "model.safetensors", (), "depth")


def test_the_mean_depth_is_the_baseline_of_the_reward(rooms):
    """A network that knows nothing but the mean has a second factor of 1/2."""
    task = BINDINGS["depth"].open(Reading(str(rooms), depth=DepthSettings(scale=500))).task
    splits = load_depth_splits(rooms, DepthReading(500))
    depth = torch.stack([splits.val[i].mask for i in range(2)])
    mean = depth[depth > 0].mean().log()
    scores = task.score(
        [(depth, {"depth": depth})],
        lambda d: mean.expand(len(d), 1, *d.shape[1:]),
        RUNTIME,
    )
    assert scores.reward == pytest.approx((scores.delta1 / 2) ** 0.5)


@pytest.mark.parametrize("name", ["segmentation", "templates"])
def test_reports_speak_of_the_task_of_their_run(name):
    method = METHODS[name]
    settings = method.search_with({"task": "depth", "depth.cap": 10})
    assert (settings.task, settings.depth.cap) == ("depth", 10)
    report = method.report_of({"task": "depth"})
    assert report.metric == ("delta1", "delta < 1.25")
    assert {"stage0", "stage1", "gate", "rmse"} <= report.terms.keys()
    assert method.report_of({}).metric == method.report.metric == ("miou", "mIoU")
