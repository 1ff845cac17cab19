"""A search for segmentation networks end to end: what it leaves, where it is resumed."""

import dataclasses
import json
import random
import re
import shutil
import statistics
import tomllib

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from search_runs import outcome

from nasfast.commands import search, train
from nasfast.data import load_splits
from nasfast.encoders import MobileNetV2
from nasfast.methods.segmentation.settings import SearchConfig, parse
from nasfast.methods.segmentation.tasks import segmentation
from nasfast.searches.sampling import SamplingSearch
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.utils.config import from_mapping
from nasfast.utils.seals import read_sealed

SPACE = FastNASSpace()
WIDTH = '{"width": 0.35}'


def alter_identity(run, kind, **values):
    environment = read_sealed(run / "env.json")
    environment["identity"][kind] |= values
    (run / "env.json").write_text(json.dumps(environment))


@pytest.mark.parametrize("changed", ["training data, validation data", "encoder", "teacher"])
def test_resume_with_other_content_is_refused(own_run, tiny_run, changed, capsys):
    if changed == "encoder":
        torch.manual_seed(1)
        weights = MobileNetV2(0.35).state_dict()
        save_file(weights, own_run.parent / "encoder.safetensors", {"nasfast.encoder": WIDTH})
    elif changed == "teacher":
        alter_identity(own_run, "inputs", teacher="another")
    else:
        for path in own_run.parent.glob("data/*/masks/*.png"):
            mask = Image.new("L", (48, 32), 1)
            mask.paste(0, (0, 0, 48, 9))
            mask.save(path)
    assert search.main(["--resume", str(own_run), "--budget", "7"]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {own_run}: expected the {changed} that the run began with, got other "
        "content in the same place; restore it or start a new run\n"
    )
    assert outcome(own_run) == outcome(tiny_run)


def test_resume_elsewhere(own_run, tiny_run, capsys):
    """The same content in other files is no change; another machine is noted."""
    assert search.main(["--resume", str(own_run)]) == 0
    assert outcome(own_run) == outcome(tiny_run)
    assert "note:" not in capsys.readouterr().out
    environment = read_sealed(own_run / "env.json")
    del environment["identity"]["inputs"]["padding of the images"]  # of version 0.1.0 and before
    (own_run / "env.json").write_text(json.dumps(environment))
    assert search.main(["--resume", str(own_run)]) == 0
    assert "the run began without padding of the images, which this" in capsys.readouterr().out
    alter_identity(own_run, "computation", torch="1.0", device="cuda:7")
    assert search.main(["--resume", str(own_run)]) == 0
    out = capsys.readouterr().out
    assert out.count("note: ") == 3
    assert (
        f"note: the run began with torch 1.0, this is {torch.__version__}; rewards will not be "
        "bit-identical to an uninterrupted run\n" in out
    )
    assert "note: the run began with device cuda:7, this is cpu; " in out


def test_resume_takes_the_run_s_threads(own_run, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(SamplingSearch, "run", lambda *a: seen.append(torch.get_num_threads()))
    for threads in (2, 1):
        alter_identity(own_run, "computation", threads=str(threads))
        assert search.main(["--resume", str(own_run)]) == 0
    assert seen == [2, 1]
    assert "note:" not in capsys.readouterr().out


def test_resume_with_data_that_moved(own_run, tiny_run, capsys):
    """Equal content is the same data wherever it is; the run remembers the place."""
    (data,) = own_run.parent.glob("data/*")
    moved = data.rename(own_run.parent / "moved")
    assert search.main(["--resume", str(own_run)]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {own_run}: expected its data in {data}, got no such folder; give --data "
        "DIR where it has moved\n"
    )
    assert search.main(["--resume", str(own_run), "--data", str(moved)]) == 0
    assert outcome(own_run) == outcome(tiny_run)
    assert tomllib.loads((own_run / "config.toml").read_text())["data"] == str(moved)
    assert search.main(["--resume", str(own_run)]) == 0
    for path in shutil.copytree(moved, data).glob("images/*.png"):
        Image.new("RGB", (48, 32), "red").save(path)
    capsys.readouterr()
    assert search.main(["--resume", str(own_run), "--data", str(data)]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {own_run}: expected the training data, validation data that the run began "
        f"with, got other content in {data}; restore it or start a new run\n"
    )
    assert tomllib.loads((own_run / "config.toml").read_text())["data"] == str(moved)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--name", "a/b"], "name: expected letters, digits and ._+- (it becomes part of a "),
        (
            ["--name", "a" * 250],
            "PLACE: expected a directory that can be made and written to, got ",
        ),
        (["--runs", __file__], "PLACE: expected a directory that can be made and written to, got "),
        (["--runs", "/proc/runs"], "PLACE: expected a directory that can be made and written to, "),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_data_is_read(
    flags, text, tiny_search, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(segmentation, "load_splits", lambda *a, **k: pytest.fail("read"))
    assert search.main([*tiny_search, "--runs", str(tmp_path / "runs"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    place = r"\S*/\d{8}-\d{6}-segmentation-[\w .]+"
    assert re.match("error: " + re.escape(text).replace("PLACE", place), line)
    if "PLACE" in text:
        assert line.endswith("; give another --runs or --name")
    assert list(tmp_path.iterdir()) == []


def test_candidates_that_all_fail(tiny_search, tmp_path, capsys):
    flags = ["--stage0.lr", "1e30", "--budget", "2", "--runs", str(tmp_path)]
    assert search.main([*tiny_search, *flags]) == 1
    (run,) = tmp_path.iterdir()
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"error: search: all of the 2 candidates failed \((2|1) x stage0: .*\); make "
        r"--stage0.batch-size, .*, or lower the learning rates, in a new run\n",
        err,
    )
    assert "nasfast train" not in out
    assert (run / "report.html").is_file()
    assert search.main(["--resume", str(run)]) == 1
    assert "all of the 2 candidates failed" in capsys.readouterr().err
    assert train.main([str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: train: expected a run that found an architecture, got {run}, where 2 candidates "
        "failed; look into its report, and search again\n"
    )


def test_fitted_crops_are_the_run_s_settings(tiny_search, tiny_run, tmp_path, capsys):
    large = ["--stage0.crop", "40", "--stage0.shorter-side", "50", "--stage1.shorter-side", "99"]
    assert search.main([*tiny_search, *large, "--runs", str(tmp_path), "--budget", "1"]) == 0
    assert (
        "crops are at most 32 pixels, the shorter side of the images\n" in capsys.readouterr().out
    )
    (run,) = tmp_path.iterdir()
    settings, wanted = (
        tomllib.loads((path / "config.toml").read_text()) for path in (run, tiny_run)
    )
    assert (settings["stage0"], settings["stage1"]) == (wanted["stage0"], wanted["stage1"])
    assert outcome(run) == outcome(tiny_run)[:1]


def test_images_of_mixed_sizes_need_a_crop(tiny_search, tiny_data, tmp_path, capsys):
    data = tmp_path / "mixed"
    shutil.copytree(tiny_data, data)
    for i, path in enumerate(sorted(data.glob("*/*.png"))):
        with Image.open(path) as image:
            image.resize((48, 32 + i % 12)).save(path)
    places = ["--runs", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    argv = [*tiny_search, "--data", str(data), *places, "--budget", "1"]
    # the twelve images leave one to score on: a second one is needed to differ
    frames = load_splits(data).train
    both = dataclasses.replace(load_splits(data), search_val=frames.subset([0, 1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "load_splits", lambda *a, **k: both)
        assert search.main(argv) == 2
        assert re.fullmatch(
            r"error: search: expected images of one size to score candidates on, got 2 sizes from "
            r"\(\d+, 48\) to \(\d+, 48\); give --val-crop SIDE to score centre crops\n",
            capsys.readouterr().err,
        )
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "cache").exists()
        assert search.main([*argv, "--val-crop", "32"]) == 0


def test_omitted_classes_do_not_count(tiny_search, tiny_run, tmp_path):
    flags = ["--omit", "0", "2", "--budget", "1", "--runs", str(tmp_path)]
    assert search.main([*tiny_search, *flags]) == 0
    (run,) = tmp_path.iterdir()
    assert tomllib.loads((run / "config.toml").read_text())["omit"] == [0, 2]
    (got,), (plain, *_) = outcome(run), outcome(tiny_run)
    assert got["genotype"] == plain["genotype"]
    metrics = got["evaluation"]["metrics"]["stage0"]
    assert metrics["miou"] == pytest.approx(metrics["fw_iou"])  # of the one class left
    assert metrics != plain["evaluation"]["metrics"]["stage0"]
    assert search.main(["--resume", str(run), "--budget", "2"]) == 0


def test_what_a_run_leaves(tiny_search, tiny_run):
    assert re.fullmatch(r"\d{8}-\d{6}-segmentation-three_bands", tiny_run.name)
    written = tomllib.loads((tiny_run / "config.toml").read_text())
    del written["checksum"]
    config = from_mapping(SearchConfig, written, "config.toml")
    assert config == parse([*tiny_search, "--runs", str(tiny_run.parent)])
    assert config.preset == "quick"
    assert written["stage1"].keys() == dataclasses.asdict(config.stage1).keys()
    environment = json.loads((tiny_run / "env.json").read_text())
    assert environment["command"][:2] == ["nasfast", "search"]
    assert environment["command"][2:-2] == tiny_search
    assert environment["workers"]["workers"] == 1
    inputs, computation = (environment["identity"][kind] for kind in ("inputs", "computation"))
    names = ("encoder", "training data", "validation data", "teacher", "padding of the images")
    assert set(inputs) == set(names)
    assert computation["threads"] == "1"
    assert computation["torch"] == torch.__version__
    records = outcome(tiny_run)
    fresh = [record for record in records if record["duplicate_of"] is None]
    assert len(fresh) == 6
    assert json.loads((tiny_run / "best.json").read_text())["index"] in range(len(records))
    rewards = {record["index"]: record["evaluation"]["rewards"]["stage0"] for record in fresh}
    for record in fresh:
        evaluation, batch = record["evaluation"], record["index"] // 2
        assert evaluation["failure"] is None
        assert evaluation["feedback"] == evaluation["stages"][0] == "stage0"
        before = [reward for index, reward in rewards.items() if index // 2 < batch]
        assert evaluation["gate"] == (statistics.fmean(before) if before else None)
        passed = evaluation["gate"] is None or evaluation["rewards"]["stage0"] > evaluation["gate"]
        assert ("stage1" in evaluation["rewards"]) == passed
        assert evaluation["metrics"].keys() == evaluation["rewards"].keys()
    assert len(set(rewards.values())) > 1


def test_random_search_is_one_flag_away(tiny_search, tiny_run, tmp_path):
    flags = ["--strategy", "random", "--budget", "2", "--name", "base"]
    assert search.main([*tiny_search, "--runs", str(tmp_path), *flags]) == 0
    (run,) = tmp_path.iterdir()
    assert run.name.endswith("-segmentation-base")
    assert {path.name for path in run.iterdir()} == {path.name for path in tiny_run.iterdir()}
    rng = random.Random(0)
    wanted = [SPACE.sample(rng).to_json() for _ in range(2)]
    assert [record["genotype"] for record in outcome(run)] == wanted


def test_a_teacher(tiny_search, tiny_run, tiny_model, tmp_path, monkeypatch):
    """Its logits enter the loss of stage 0, and of stage 0 only."""
    taught = []
    loss = SegmentationTask.loss

    def spy(*arguments, teacher=None, **options):
        taught.append(teacher is not None and bool(teacher.abs().sum() > 0))
        return loss(*arguments, teacher=teacher, **options)

    monkeypatch.setattr(SegmentationTask, "loss", spy)
    flags = ["--teacher", str(tiny_model / "model.safetensors"), "--budget", "1"]
    assert search.main([*tiny_search, *flags, "--runs", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    assert outcome(run)[0]["genotype"] == outcome(tiny_run)[0]["genotype"]
    assert taught[0]
    assert not taught[-1]
    assert taught == sorted(taught, reverse=True)


def test_resume_with_another_cache(own_run, tmp_path, capsys):
    """Where the one before may no longer be used."""
    flags = ["--cache-dir", str(tmp_path / "cache"), "--placement", "file"]
    assert search.main(["--resume", str(own_run), "--budget", "7", *flags]) == 0
    assert list((tmp_path / "cache").glob("*.features"))
    assert capsys.readouterr().err == ""
