"""Keypoints by all commands, from the search to the skeletons."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import nasfast
from nasfast.commands import check, evaluate, predict, search, train
from nasfast.data.keypoints import SyntheticPeople
from nasfast.methods.registry import METHODS
from nasfast.methods.segmentation.tasks import BINDINGS
from nasfast.methods.segmentation.train import TrainConfig
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError

RUNTIME = Runtime(torch.device("cpu"))
BINDING = BINDINGS["keypoints"]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A folder of COCO keypoints: eight generated scenes of 64x80 to train, three to validate."""
    root = tmp_path_factory.mktemp("keypoints") / "people"
    for part, count in (("train", 8), ("val", 3)):
        data = SyntheticPeople(count, size=(64, 80), stream=part)
        (root / "images").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = Image.fromarray(data.image(i).permute(1, 2, 0).numpy())
            picture.save(root / "images" / f"{part}{i}.png")
        annotations = [
            {
                "id": number,
                "image_id": person.image,
                "category_id": 1,
                "bbox": [*person.box[:2], *(person.box[k + 2] - person.box[k] for k in (0, 1))],
                "area": person.area,
                "keypoints": torch.cat([person.joints - 0.5, person.visible[:, None]], 1)
                .flatten()
                .tolist(),
            }
            for number, person in enumerate(data.people())
        ]
        (root / "annotations").mkdir(exist_ok=True)
        content = {
            "images": [{"id": i, "file_name": f"{part}{i}.png"} for i in range(count)],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "figure", "keypoints": data.skeleton.joints}],
        }
        path = root / "annotations" / f"person_keypoints_{part}.json"
        path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def run(people, tiny_search, tmp_path_factory):
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("keypoint-runs")
    flags = ["--task", "keypoints", "--data", str(people), "--budget", "2", "--runs", str(runs)]
    assert search.main([*tiny_search, *flags]) == 0
    (path,) = runs.iterdir()
    return path


@pytest.fixture(scope="module")
def trained(run):
    flags = "--device cpu --epochs 1 --batch-size 4 --crop 32 --decoder.agg-size 8 --val-every 1"
    assert train.main([str(run), *flags.split()]) == 0
    return run / "train-1"


def test_a_search_is_rewarded_by_similarity(run):
    lines = (run / "records.jsonl").read_text().splitlines()
    for line in lines:
        evaluation = json.loads(line)["evaluation"]
        assert evaluation["failure"] is None
        for stage, metrics in evaluation["metrics"].items():
            assert next(iter(metrics)) == "ap"
            assert metrics["oks"] == metrics["score"] == evaluation["rewards"][stage]
    page = (run / "report.html").read_text()
    assert "Mean object keypoint similarity" in page
    assert "mean OKS" in page
    assert "mIoU" not in page
    assert list((run / "predictions").rglob("*.png"))


def test_a_training_takes_the_task_from_its_run(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (metrics["size"], metrics["joints_by"]) == ([32, 32], "OKS")
    assert len(metrics["joints"]) == 13
    assert metrics["split"].endswith(" people")
    assert "pckh@0.5" not in metrics  # COCO has no heads
    model = nasfast.load(trained)
    assert model.task == "keypoints"
    assert model.classes == SyntheticPeople(1).skeleton.joints
    assert model.description["outputs"] == 13
    assert list((trained / "predictions").glob("image-*.png"))


def test_an_evaluation_with_the_flip_test(trained, people, capsys):
    flags = ["--device", "cpu", "--seconds", "0.01"]
    assert evaluate.main([str(trained), *flags]) == 0
    before = json.loads((trained / "evaluation.json").read_text())
    metrics = json.loads((trained / "metrics.json").read_text())
    assert before["oks"] == pytest.approx(metrics["oks"], abs=0.02)
    assert before["people"] == len(SyntheticPeople(3, size=(64, 80), stream="val"))
    assert "AR at OKS 0.5" in capsys.readouterr().out
    assert evaluate.main([str(trained), *flags, "--flip"]) == 0
    after = json.loads((trained / "evaluation.json").read_text())
    assert after["views"] == "heatmaps averaged over scales 1 and mirror images"
    assert after["oks"] != before["oks"]
    for more, text in (
        (["--scales", "1,2"], "scales: expected 1 for keypoints, whose crops have one size"),
        (["--mask-values", "0,1"], "mask-values: expected none with a network for keypoints"),
        (["--data", "synthetic", "--split", "test"], "split test: expected data with that part"),
    ):
        assert evaluate.main([str(trained), *flags, *more]) == 2
        assert text in capsys.readouterr().err


def test_data_of_other_joints(trained, people, tmp_path):
    text = (people / "annotations/person_keypoints_val.json").read_text()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").symlink_to(people / "images")
    for part in ("train", "val"):
        other = tmp_path / f"annotations/person_keypoints_{part}.json"
        other.write_text(text.replace('"nose"', '"left_ear"'))
    method, model = METHODS["segmentation"], nasfast.load(trained, "cpu")
    with pytest.raises(UserError, match=r"expected data of the network's joints nose, .* got left"):
        method.score(model, str(tmp_path), "val", RUNTIME)
    assert next(iter(method.score(model, str(people), "val", RUNTIME))) == "AP"


def test_people_are_found(trained, people, tmp_path):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{"image": "val0.png", "bbox": [5, 5, 40, 50]}]))
    words = [str(people / "images" / "val0.png"), "--out", str(tmp_path / "out")]
    assert predict.main([str(trained), *words, "--boxes", str(boxes)]) == 0
    (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert entry["files"] == ["val0.json", "val0-poses.png"]
    assert len(entry["people"][0]["keypoints"]) == 39
    method, model = METHODS["segmentation"], nasfast.load(trained, "cpu")
    crops = method.inputs(model, str(people), "val", 2)  # that nasfast export compares on
    assert [tuple(crop.shape) for crop in crops] == [(1, 3, 32, 32)] * 2


def test_the_data_is_checked(people, tmp_path, capsys):
    flags = ["--task", "keypoints", "--data", str(people), "--out", str(tmp_path / "a.png")]
    assert check.main(["segmentation", *flags]) in (0, 1)
    printed = capsys.readouterr().out
    assert "left_shoulder" in printed
    assert (tmp_path / "a.png").is_file()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"task": "keypoints", "omit": [0]}, "omit: expected none with --task keypoints"),
        ({"task": "keypoints", "resize_longer": 64}, "resize-longer: expected none with --task"),
        ({"task": "keypoints", "depth": {"cap": 3.0}}, "depth: expected none with --task keypoint"),
    ],
)
def test_settings_of_other_tasks(settings, text):
    with pytest.raises(UserError, match=text):
        METHODS["segmentation"].search_with(settings)


def test_turning_is_for_people(tmp_path):
    with pytest.raises(UserError, match="turn: expected none with --task depth"):
        BINDINGS["depth"].refuse_foreign(
            TrainConfig(tmp_path, turn=10), "--task depth", "leave it out"
        )


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ({}, (96, 64)),  # figures of at most 64 pixels, 1.25 times as large: 80
        ({"crop": 250}, (256, 192)),
        ({"crop": 384}, (384, 288)),
        ({"crop": 100, "crop_width": 100}, (96, 96)),
    ],
)
def test_crops_of_a_training(flags, size):
    data = SyntheticPeople(8, size=(64, 80))
    settings = TrainConfig(Path("run"), **flags, turn=0, scales=(1, 1))
    fitted, learned, judged = BINDING.own_crops(settings, data)
    assert (fitted.crop, fitted.crop_width) == learned.crop == judged.crop == size
    assert (learned.turn, learned.scale_range) == (0, (1, 1))
