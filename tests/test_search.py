"""A search end to end: the run contract, the loop's rules, the command line, its errors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import time
import tomllib

import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import save_file
from search_runs import outcome, start, wait_for_records

from nasfast import search
from nasfast.data import load_splits
from nasfast.encoders import MobileNetV2
from nasfast.methods.registry import METHODS
from nasfast.methods.segmentation import search as segmentation
from nasfast.methods.segmentation.settings import SearchConfig, parse
from nasfast.runs.study import Study
from nasfast.searches.sampling import SamplingSearch
from nasfast.spaces.fast_nas import FastNASSpace
from nasfast.tasks.segmentation import SegmentationTask
from nasfast.utils.config import from_mapping

SPACE = FastNASSpace()
WIDTH = '{"width": 0.35}'


# ---- the run contract


def test_killed_anywhere_a_search_repeats_nothing_and_changes_nothing(tiny_search, tmp_path):
    seed = int(os.environ.get("NASFAST_TEST_SEED", random.SystemRandom().getrandbits(32)))
    print(f"moments drawn with seed {seed}; NASFAST_TEST_SEED={seed} repeats them")
    rng = random.Random(seed)
    begin = time.monotonic()
    process = start([*tiny_search, "--runs", str(tmp_path / "whole")], threads=2)
    whole = wait_for_records(process, tmp_path / "whole", 0)
    made = time.monotonic() - begin
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    lasted = time.monotonic() - begin

    runs = tmp_path / "killed"
    command = [*tiny_search, "--runs", str(runs)]
    for _ in range(3):
        process = start(command, threads=2)
        time.sleep(rng.uniform(0.9 * made, lasted))  # from before the run exists to its end
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), stderr
        # a run of which not even the empty records.jsonl was written has not begun
        for path in runs.glob("*/records.jsonl"):
            command = ["--resume", str(path.parent)]
    process = start(command, threads=2)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    (run,) = (path.parent for path in runs.glob("*/records.jsonl"))
    assert outcome(run) == outcome(whole)
    assert (run / "report.html").is_file()


def _torn(run):
    return not ((run / "records.jsonl").read_bytes() or b"\n").endswith(b"\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_tells_how_to_continue(tiny_search, tiny_run, tmp_path, number):
    process = start([*tiny_search, "--runs", str(tmp_path)])
    run = wait_for_records(process, tmp_path, 1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == ""
    assert (
        "stopped; everything is saved. Continue with\n"
        f"  python -m nasfast.search --resume {run}\n" in stdout
    )
    assert 1 <= len(outcome(run)) < 6
    assert (run / "report.html").is_file()
    assert search.main(["--resume", str(run)]) == 0
    assert outcome(run) == outcome(tiny_run)


def test_a_signal_before_the_first_candidate(tiny_search, tmp_path, monkeypatch, capsys):
    load = segmentation.load_encoder
    monkeypatch.setattr(
        segmentation,
        "load_encoder",
        lambda path: (os.kill(os.getpid(), signal.SIGTERM), load(path))[1],
    )
    fresh = ["--cache-dir", str(tmp_path / "cache"), "--runs", str(tmp_path / "runs")]
    assert search.main([*tiny_search, *fresh]) == 130
    assert (
        "stopped; nothing was begun. Continue with\n  python -m nasfast.search --device cpu"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "runs").exists()


class Crash(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("when", ["before the checkpoint", "in the middle of a record"])
def test_crash_around_a_record(tiny_search, tiny_run, tmp_path, monkeypatch, when):
    save, append = Study.save_checkpoint, Study.append

    def save_checkpoint(study, state):
        if state["told"] == 4:
            raise Crash
        save(study, state)

    def torn_append(study, record):
        if record.index == 3:
            with (study.path / "records.jsonl").open("a") as file:
                file.write(json.dumps(record.to_json())[:100])
            raise Crash
        append(study, record)

    with monkeypatch.context() as patch:
        if when == "before the checkpoint":
            patch.setattr(Study, "save_checkpoint", save_checkpoint)
        else:
            patch.setattr(Study, "append", torn_append)
        with pytest.raises(Crash):
            search.main([*tiny_search, "--runs", str(tmp_path)])
    (run,) = tmp_path.iterdir()
    with (
        pytest.warns(UserWarning, match="line 4 was torn")
        if _torn(run)
        else contextlib.nullcontext()
    ):
        assert search.main(["--resume", str(run)]) == 0
    assert outcome(run) == outcome(tiny_run)


@pytest.mark.parametrize("budget", [2, 3])  # the end of a batch, and its middle
def test_a_larger_budget_continues(budget, tiny_search, tiny_run, tmp_path, capsys):
    argv = [*tiny_search, "--runs", str(tmp_path), "--budget", str(budget)]
    assert search.main(argv) == 0
    (run,) = tmp_path.iterdir()
    first = outcome(run)
    assert len(first) == budget
    assert f"search --resume {run} --budget {2 * budget}\n" in capsys.readouterr().out
    assert search.main(["--resume", str(run), "--budget", "6"]) == 0
    assert outcome(run) == outcome(tiny_run)
    assert first == outcome(run)[:budget]


@pytest.fixture
def own_run(tiny_run, tiny_data, tiny_weights, tmp_path):
    """A copy of the run with data and encoder of its own, in data/ and encoder.safetensors."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_data, tmp_path / "data" / tiny_data.name)
    shutil.copy(tiny_weights, tmp_path / "encoder.safetensors")
    settings = tomllib.loads((run / "config.toml").read_text())
    settings["data"] = str(tmp_path / "data" / tiny_data.name)
    settings["encoder_weights"] = str(tmp_path / "encoder.safetensors")
    (run / "config.toml").write_text(tomli_w.dumps(settings))
    return run


def alter_identity(run, kind, **values):
    environment = json.loads((run / "env.json").read_text())
    environment["identity"][kind] |= values
    (run / "env.json").write_text(json.dumps(environment))


def test_resume_with_the_same_content_elsewhere(own_run, tiny_run, capsys):
    assert search.main(["--resume", str(own_run)]) == 0
    assert outcome(own_run) == outcome(tiny_run)
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["training data, validation data", "encoder"])
def test_resume_with_other_content_is_refused(own_run, tiny_run, changed, capsys):
    if changed == "encoder":
        torch.manual_seed(1)
        weights = MobileNetV2(0.35).state_dict()
        save_file(weights, own_run.parent / "encoder.safetensors", {"nasfast.encoder": WIDTH})
    else:
        for path in own_run.parent.glob("data/*/masks/*.png"):
            Image.new("L", (48, 32), 1).save(path)
    assert search.main(["--resume", str(own_run), "--budget", "7"]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {own_run}: expected the {changed} that the run began with, got other "
        "content in the same place; restore it or start a new run\n"
    )
    assert outcome(own_run) == outcome(tiny_run)


def test_resume_with_another_teacher_is_refused(own_run, capsys):
    alter_identity(own_run, "inputs", teacher="another")
    assert search.main(["--resume", str(own_run)]) == 2
    assert "expected the teacher that the run began with" in capsys.readouterr().err


def test_resume_elsewhere_is_noted(own_run, capsys):
    alter_identity(own_run, "computation", torch="1.0", device="cuda:7")
    assert search.main(["--resume", str(own_run)]) == 0
    out = capsys.readouterr().out
    assert out.count("note: ") == 2
    assert (
        f"note: the run began with torch 1.0, this is {torch.__version__}; rewards will not be "
        "bit-identical to an uninterrupted run\n" in out
    )
    assert "note: the run began with device cuda:7, this is cpu; " in out


def test_resume_takes_the_run_s_threads(own_run, monkeypatch, capsys):
    seen: list[int] = []
    monkeypatch.setattr(SamplingSearch, "run", lambda *a: seen.append(torch.get_num_threads()))
    for threads in (2, 1):
        alter_identity(own_run, "computation", threads=str(threads))
        assert search.main(["--resume", str(own_run)]) == 0
    assert seen == [2, 1]
    assert "note:" not in capsys.readouterr().out


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
    config = from_mapping(SearchConfig, written, "config.toml")
    assert config == parse([*tiny_search, "--runs", str(tiny_run.parent)])
    assert config.preset == "quick"
    assert written["stage1"].keys() == dataclasses.asdict(config.stage1).keys()
    environment = json.loads((tiny_run / "env.json").read_text())
    assert environment["command"][:3] == ["python", "-m", "nasfast.search"]
    assert environment["command"][3:-2] == tiny_search
    assert environment["workers"]["workers"] == 1
    inputs, computation = (environment["identity"][kind] for kind in ("inputs", "computation"))
    assert set(inputs) == {"encoder", "training data", "validation data", "teacher"}
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
    taught: list[bool] = []
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


# ---- the command line


def test_a_method_that_is_none(capsys):
    assert search.main(["detection", "--budget", "1"]) == 2
    wanted = f"error: method: expected one of {', '.join(METHODS)}, got 'detection'; a later "
    wanted += "version of nasfast may know it\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--preset", "fast"], "fast"),
        (["--strategy", "genetic"], "genetic"),
        (["--budget", "many"], "many"),
        (["--budget", "0"], "expected a budget of at least 1 candidate"),
        (["--workers", "0"], "SearchConfig.workers: expected a value above"),
        (["--threads", "0"], "SearchConfig.threads: expected a value above"),
        (["--batch", "0"], "SearchConfig.batch: expected a value above"),
        (["--engine", "slurm"], "slurm"),
        (
            ["--engine", "ray", "--devices", "cuda:0,cuda:1"],
            "devices: expected --engine process, as Ray",
        ),
        (["--device", "cpu", "--devices", "cpu,cpu"], "devices: expected --device or --devices"),
        (["--memory", "8"], "expected a size such as 8GB"),
        (["--stage2.lr", "1"], "--stage2.lr"),
        (["--stage0.samples", "0"], "Stage0Config.samples: expected a value above 0"),
        (["--stage1.batch-size", "0"], "Stage1Config.batch_size: expected a value above"),
        (["--resume", "there", "--seed", "3"], "--seed"),
    ],
)
def test_usage_errors(flags, shown, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        search.main([*flags, *([] if "--resume" in flags else ["--runs", str(tmp_path / "runs")])])
    assert caught.value.code == 2
    assert shown in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/no/where"], "data: expected 'synthetic' or a folder, got '/no/where'"),
        (["--encoder-weights", "/no/w.pth"], "weights: no file /no/w.pth; give a"),
        (["--encoder-weights", "TOML"], "weights: expected a .safetensors, .pth or .pt file, got"),
        (["--device", "cuda:99"], "resolve_device: expected "),
        (
            ["--device", "auto", "--devices", "cpu,gpu"],
            "resolve_device: expected device 'auto', 'cpu', 'cuda' or",
        ),
        (
            ["--device", "auto", "--devices", "cpu,"],
            "resolve_device: expected device 'auto', 'cpu', 'cuda' or",
        ),
        (["--placement", "device"], "placement: expected auto, file or ram on a CPU, got device"),
        (["--teacher", "ENCODER"], "/"),
        (["--omit", "3"], "omit: expected classes from 0 to 2, got 3"),
        (["--name", "a/b"], "name: expected letters, digits and ._+- (it becomes part of a"),
    ],
)
def test_errors_are_one_line_and_leave_no_run(
    flags, message, tiny_search, tiny_run, tiny_weights, tmp_path, capsys
):
    files = {"TOML": tiny_run / "config.toml", "ENCODER": tiny_weights}
    argv = [str(files.get(flag, flag)) for flag in flags]
    assert search.main([*tiny_search, "--runs", str(tmp_path / "runs"), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_other_classes_is_refused(tiny_search, tiny_model, tmp_path, capsys):
    path = tiny_model / "model.safetensors"
    flags = ["--teacher", str(path), "--data", "synthetic", "--runs", str(tmp_path / "runs")]
    assert search.main([*tiny_search, *flags]) == 2
    assert capsys.readouterr().err == (
        f"error: teacher {path}: expected a network for sky, building, road, pavement, tree, car, "
        "person, pole, got one for sky, road, [post]; train one on this data first\n"
    )
    assert not (tmp_path / "runs").exists()


def test_resume_of_something_else(tmp_path, capsys):
    assert search.main(["--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is not a run directory: it has no config.toml, env.json, "
        "records.jsonl; give a directory that a search wrote, such as runs/<date>-<method>-<name>\n"
    )


def test_resume_with_a_bad_budget(tiny_run, capsys):
    assert search.main(["--resume", str(tiny_run), "--budget", "0"]) == 2
    assert (
        "error: search: expected a budget of at least 1 candidate, got 0" in capsys.readouterr().err
    )


def test_errors_of_the_module_itself(tmp_path):
    process = start(["--data", "/no/where", "--runs", str(tmp_path / "runs")])
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert stderr == "error: data: expected 'synthetic' or a folder, got '/no/where'\n"
    assert stdout == ""


def test_a_search_that_only_fails(tiny_search, tmp_path, capsys):
    flags = ["--stage0.lr", "1e30", "--runs", str(tmp_path)]
    assert search.main([*tiny_search, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the last 5 candidates failed, the last one: stage0: training")
    (run,) = tmp_path.iterdir()
    assert [bool(record["evaluation"]["failure"]) for record in outcome(run)] == [True] * 5
    assert (run / "report.html").is_file()
