"""A search end to end: the run contract, the loop's rules, the command line, its errors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from nasfast import search
from nasfast.config import from_mapping
from nasfast.data import Sample, SegmentationDataset, Splits, load_splits
from nasfast.encoders import MobileNetV2
from nasfast.methods import METHODS, sampling
from nasfast.methods.segmentation import search as segmentation
from nasfast.methods.segmentation.search import PRESETS, SearchConfig, parse
from nasfast.records import Evaluation, Record
from nasfast.spaces.fast_nas import Cell, FastNASGenotype, FastNASSpace
from nasfast.study import Study
from nasfast.tasks.segmentation import SegmentationTask

SPACE = FastNASSpace()
WIDTH = '{"width": 0.35}'


def outcome(run: Path) -> list[dict[str, Any]]:
    """What a search decided and measured, without what the clock decided."""
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for record in records:
        del record["time"], record["evaluation"]["seconds"]
    return records


def start(command: list[str], threads: int = 1) -> subprocess.Popen[str]:
    """`python -m nasfast.search` in a process of its own."""
    root = str(Path(search.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "nasfast.search", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path},
    )


def wait_for_records(process: subprocess.Popen[str], runs: Path, count: int) -> Path:
    """The run directory, as soon as it holds `count` records."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for path in runs.glob("*/records.jsonl"):
            if path.read_bytes().count(b"\n") >= count:
                return path.parent
        time.sleep(0.001)
    process.kill()
    raise AssertionError(f"{count} records did not appear: {process.communicate()}")


# ---- the run contract


def test_killed_anywhere_a_search_repeats_nothing_and_changes_nothing(
    tiny_search: list[str], tmp_path: Path
) -> None:
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


def _torn(run: Path) -> bool:
    return not ((run / "records.jsonl").read_bytes() or b"\n").endswith(b"\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_tells_how_to_continue(
    tiny_search: list[str], tiny_run: Path, tmp_path: Path, number: signal.Signals
) -> None:
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


def test_a_signal_before_the_first_candidate(
    tiny_search: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
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
def test_crash_around_a_record(
    tiny_search: list[str],
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    save, append = Study.save_checkpoint, Study.append

    def save_checkpoint(study: Study, state: dict[str, Any]) -> None:
        if state["told"] == 4:
            raise Crash
        save(study, state)

    def torn_append(study: Study, record: Record) -> None:
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


def test_a_larger_budget_continues(
    tiny_search: list[str], tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*tiny_search, "--runs", str(tmp_path), "--budget", "2"]
    assert search.main(argv) == 0
    (run,) = tmp_path.iterdir()
    first = outcome(run)
    assert len(first) == 2
    assert f"python -m nasfast.search --resume {run} --budget 4\n" in capsys.readouterr().out
    assert search.main(["--resume", str(run), "--budget", "6"]) == 0
    assert outcome(run) == outcome(tiny_run)
    assert first == outcome(run)[:2]


@pytest.mark.parametrize(("flags", "budget"), [([], 2), (["--budget", "5"], 5)])
def test_the_last_budget_holds(tmp_path: Path, flags: list[str], budget: int) -> None:
    play(tmp_path, distinct(), lambda i: success(0.4), budget=2)  # config.toml: the default, 8
    (run,) = tmp_path.iterdir()
    study, _, config = search._open_run(["--resume", str(run), *flags])
    study.close()
    assert isinstance(config, SearchConfig)
    assert config.budget == budget


@pytest.fixture
def own_run(tiny_run: Path, tiny_data: Path, tiny_weights: Path, tmp_path: Path) -> Path:
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


def alter_identity(run: Path, kind: str, **values: str) -> None:
    environment = json.loads((run / "env.json").read_text())
    environment["identity"][kind] |= values
    (run / "env.json").write_text(json.dumps(environment))


def test_resume_with_the_same_content_elsewhere(
    own_run: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main(["--resume", str(own_run)]) == 0
    assert outcome(own_run) == outcome(tiny_run)
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["training data, validation data", "encoder"])
def test_resume_with_other_content_is_refused(
    own_run: Path, tiny_run: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if changed == "encoder":
        torch.manual_seed(1)
        weights = MobileNetV2(0.35).state_dict()
        save_file(weights, own_run.parent / "encoder.safetensors", {"nasfast.encoder": WIDTH})
    else:
        for path in own_run.parent.glob("data/*/masks/*.png"):
            Image.new("L", (48, 32), 1).save(path)
    assert search.main(["--resume", str(own_run), "--budget", "7"]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {own_run}: wanted the {changed} that the run began with, got other "
        "content in the same place; restore it or start a new run\n"
    )
    assert outcome(own_run) == outcome(tiny_run)


def test_resume_with_another_teacher_is_refused(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alter_identity(own_run, "inputs", teacher="another")
    assert search.main(["--resume", str(own_run)]) == 2
    assert "wanted the teacher that the run began with" in capsys.readouterr().err


def test_resume_elsewhere_is_noted(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alter_identity(own_run, "computation", torch="1.0", device="cuda:7")
    assert search.main(["--resume", str(own_run)]) == 0
    out = capsys.readouterr().out
    assert out.count("note: ") == 2
    assert (
        f"note: the run began with torch 1.0, this is {torch.__version__}; rewards will not be "
        "bit-identical to an uninterrupted run\n" in out
    )
    assert "note: the run began with device cuda:7, this is cpu; " in out


def test_resume_takes_the_run_s_threads(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(segmentation, "run", lambda *a: seen.append(torch.get_num_threads()))
    for threads in (2, 1):
        alter_identity(own_run, "computation", threads=str(threads))
        assert search.main(["--resume", str(own_run)]) == 0
    assert seen == [2, 1]
    assert "note:" not in capsys.readouterr().out


# ---- settings that fit the data


def splits(*sizes: tuple[int, int], val: tuple[int, int] = (60, 80)) -> Splits:
    """Search frames of these sizes, height and width, scored on one of ``val``."""
    frames = Sizes(sizes), Sizes([val])
    return Splits(*frames, *frames)


class Sizes(SegmentationDataset):
    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        mask = torch.zeros(self.sizes[index], dtype=torch.uint8)
        return Sample(mask.expand(3, *mask.shape), mask)

    def fingerprint(self) -> str:
        return ""


def sides(config: SearchConfig) -> tuple[int, int, int, int]:
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
def test_crops_fit_the_data(data: Splits, crops: tuple[int, ...], fitted: tuple[int, ...]) -> None:
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
    cropped = dataclasses.replace(config, val_crop=32)
    assert segmentation.fit_to_data(cropped, data, console) == cropped


def test_fitted_crops_are_the_run_s_settings(
    tiny_search: list[str], tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_images_of_mixed_sizes_need_a_crop(
    tiny_search: list[str], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
            r"error: search: wanted images of one size to score candidates on, got 2 sizes from "
            r"\(\d+, 48\) to \(\d+, 48\); give --val-crop SIDE to score centre crops\n",
            capsys.readouterr().err,
        )
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "cache").exists()
        assert search.main([*argv, "--val-crop", "32"]) == 0


def test_omitted_classes_do_not_count(
    tiny_search: list[str], tiny_run: Path, tmp_path: Path
) -> None:
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


def test_what_a_run_leaves(tiny_search: list[str], tiny_run: Path) -> None:
    assert re.fullmatch(r"\d{8}-\d{6}-segmentation-three_bands", tiny_run.name)
    written = tomllib.loads((tiny_run / "config.toml").read_text())
    config = from_mapping(SearchConfig, written, "config.toml")
    assert config == parse([*tiny_search, "--runs", str(tiny_run.parent)])
    assert config.preset == "quick"
    assert written["stage1"].keys() == dataclasses.asdict(config.stage1).keys()
    environment = json.loads((tiny_run / "env.json").read_text())
    assert environment["command"][:3] == ["python", "-m", "nasfast.search"]
    assert environment["command"][3:-2] == tiny_search
    assert environment["feedback"] == sampling.FEEDBACK == "stage0"
    inputs, computation = (environment["identity"][kind] for kind in ("inputs", "computation"))
    assert set(inputs) == {"encoder", "training data", "validation data", "teacher"}
    assert computation["threads"] == "1"
    assert computation["torch"] == torch.__version__
    records = outcome(tiny_run)
    fresh = [r["evaluation"] for r in records if r["duplicate_of"] is None]
    assert len(fresh) == 6
    assert json.loads((tiny_run / "best.json").read_text())["index"] in range(len(records))
    rewards: list[float] = []
    for evaluation in fresh:
        assert evaluation["failure"] is None
        assert evaluation["gate"] == (statistics.fmean(rewards) if rewards else None)
        passed = evaluation["gate"] is None or evaluation["rewards"]["stage0"] > evaluation["gate"]
        assert ("stage1" in evaluation["rewards"]) == passed
        assert evaluation["metrics"].keys() == evaluation["rewards"].keys()
        rewards.append(evaluation["rewards"]["stage0"])
    assert len(set(rewards)) > 1


def test_random_search_is_one_flag_away(
    tiny_search: list[str], tiny_run: Path, tmp_path: Path
) -> None:
    flags = ["--strategy", "random", "--budget", "2", "--name", "base"]
    assert search.main([*tiny_search, "--runs", str(tmp_path), *flags]) == 0
    (run,) = tmp_path.iterdir()
    assert run.name.endswith("-segmentation-base")
    assert {path.name for path in run.iterdir()} == {path.name for path in tiny_run.iterdir()}
    rng = random.Random(0)
    wanted = [SPACE.sample(rng).to_json() for _ in range(2)]
    assert [record["genotype"] for record in outcome(run)] == wanted


def test_a_teacher(
    tiny_search: list[str],
    tiny_run: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its logits enter the loss of stage 0, and of stage 0 only."""
    taught: list[bool] = []
    loss = SegmentationTask.loss

    def spy(*arguments: Any, teacher: Tensor | None = None, **options: Any) -> Tensor:
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


# ---- the loop


def success(stage0: float, stage1: float | None = None) -> Evaluation:
    rewards = {"stage0": stage0} | ({} if stage1 is None else {"stage1": stage1})
    return Evaluation(rewards, {stage: {} for stage in rewards}, None, 1, 1, {})


HALF = Evaluation({"stage0": 0.8}, {"stage0": {}}, None, 1, 1, {}, "stage1: out of memory (fake)")
FAILURE = Evaluation({}, {}, None, 0, 0, {}, "stage0: out of memory (fake)")


class Script:
    """Strategy that asks for given genotypes, and evaluator that returns given evaluations."""

    seed = 5
    remedy = "lower the learning rates"

    @property
    def seconds(self) -> dict[str, float]:
        return {"encode": 1.5}

    def __init__(
        self, genotypes: Iterator[FastNASGenotype], evaluate: Callable[[int], Evaluation]
    ) -> None:
        self.genotypes, self.evaluate = genotypes, evaluate
        self.told: list[float | None] = []
        self.evaluated: list[int] = []
        self.gates: list[float | None] = []

    def ask(self) -> FastNASGenotype:
        return next(self.genotypes)

    def tell(self, genotype: FastNASGenotype, reward: float | None) -> None:
        self.told.append(reward)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: object) -> None: ...

    def __call__(self, genotype: FastNASGenotype, index: int, gate: float | None) -> Evaluation:
        self.evaluated.append(index)
        self.gates.append(gate)
        return self.evaluate(index)


def play(
    root: Path,
    genotypes: Iterator[FastNASGenotype],
    evaluate: Callable[[int], Evaluation],
    budget: int,
) -> tuple[Script, Sequence[Record]]:
    script = Script(genotypes, evaluate)
    with Study.create(root, "segmentation", "script", {}, {}) as study:
        console = Console(quiet=True)
        sampling.run(study, SPACE, script, script, budget, console)
        return script, study.records


def distinct() -> Iterator[FastNASGenotype]:
    rng = random.Random(0)
    while True:
        yield SPACE.sample(rng)


def renamed(genotype: FastNASGenotype) -> FastNASGenotype:
    """The same network with the two branches of the first layer swapped."""
    (p1, p2, o1, o2), *others = genotype.cell.layers
    swap = {2: 3, 3: 2}
    rest = ((swap.get(a, a), swap.get(b, b), c, d) for a, b, c, d in others)
    cell = Cell(genotype.cell.op0, ((p2, p1, o2, o1), *rest))
    return dataclasses.replace(genotype, cell=cell)


def test_duplicates_are_not_trained_again(tmp_path: Path) -> None:
    first, second, third = (genotype for genotype, _ in zip(distinct(), range(3)))
    assert renamed(first) != first
    asked = [first, second, first, renamed(first), third]
    script, records = play(tmp_path, iter(asked), lambda i: success(0.1 * (i + 1), 0.9), budget=3)
    assert script.evaluated == [0, 1, 4]
    assert [r.duplicate_of for r in records] == [None, None, 0, 0, None]
    assert [r.genotype for r in records] == [g.to_json() for g in asked]
    assert records[2].evaluation == records[3].evaluation == records[0].evaluation
    # stage 0 is what the strategy learns from, also where stage 1 was reached
    assert script.told == [0.1, 0.2, 0.1, 0.1, 0.5]
    assert script.gates == [None, 0.1, statistics.fmean([0.1, 0.2])]


def test_a_failure_is_recorded_counts_and_is_told_as_none(tmp_path: Path) -> None:
    a, b, c = (g for g, _ in zip(distinct(), range(3)))
    script, records = play(
        tmp_path, iter([a, b, b, c]), lambda i: FAILURE if i == 1 else success(0.4), budget=3
    )
    assert script.evaluated == [0, 1, 3]
    assert script.told == [0.4, None, None, 0.4]
    assert [r.evaluation.failure for r in records] == [None, *[FAILURE.failure] * 2, None]
    assert script.gates == [None, 0.4, 0.4]


def test_a_failure_in_stage1_is_told_by_its_stage0(tmp_path: Path) -> None:
    evaluations = [success(0.4), HALF, success(0.3, 0.2)]
    script, records = play(tmp_path, distinct(), evaluations.__getitem__, budget=3)
    assert script.told == [0.4, 0.8, 0.3]
    assert script.gates == [None, 0.4, statistics.fmean([0.4, 0.8])]
    (run,) = tmp_path.iterdir()
    ranking = Study.open(run, read_only=True).ranking()
    assert [record.index for record in ranking] == [2, 0]
    assert [record.score is None for record in records] == [False, True, False]


def test_seconds_add_up_over_resumes(tmp_path: Path) -> None:
    play(tmp_path, distinct(), lambda i: success(0.4), budget=1)
    (run,) = tmp_path.iterdir()
    for budget in (2, 3):
        genotypes = itertools.islice(distinct(), budget - 1, None)
        script = Script(genotypes, lambda i: success(0.4))
        with Study.open(run) as study:
            sampling.run(study, SPACE, script, script, budget, Console(quiet=True))
            checkpoint = study.load_checkpoint()
            assert checkpoint is not None
            assert checkpoint["seconds"]["encode"] == 1.5 * budget
            assert checkpoint["budget"] == budget


def test_five_failures_in_a_row_stop(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        play(tmp_path, distinct(), lambda i: FAILURE if i else success(0.4), budget=99)
    assert str(caught.value) == (
        "the last 5 candidates failed, the last one: stage0: out of memory (fake); lower "
        "the learning rates"
    )
    (run,) = tmp_path.iterdir()
    assert len(outcome(run)) == 6


def test_a_hundred_duplicates_in_a_row_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    same = next(distinct())
    with pytest.raises(RuntimeError) as caught:
        play(tmp_path, iter([same] * 200), lambda i: success(0.4), budget=2)
    assert str(caught.value) == (
        "the last 100 architectures repeat earlier ones: the strategy has converged; take the best "
        "one found, or let it explore more (--ppo.ent-coef)"
    )
    (run,) = tmp_path.iterdir()
    assert len(outcome(run)) == 101


def test_edited_records_are_noticed(tmp_path: Path) -> None:
    play(tmp_path, distinct(), lambda i: success(0.4), budget=2)
    (run,) = tmp_path.iterdir()
    (run / "checkpoint" / "state.pt").unlink()
    script = Script(iter([next(distinct())] * 2), lambda i: success(0.4))
    with (
        Study.open(run) as study,
        pytest.raises(RuntimeError, match="record 1 is not what the strategy asked for"),
    ):
        sampling.run(study, SPACE, script, script, 2, Console(quiet=True))


# ---- the command line


def test_presets() -> None:
    assert parse([]) == dataclasses.replace(PRESETS["demo"], runs=Path("runs").resolve())
    assert parse(["--data", "synthetic"]).preset == "demo"
    assert parse(["segmentation", "--data", "somewhere"]).preset == "quick"
    assert parse(["--data=somewhere"]).stage0 == PRESETS["quick"].stage0
    assert parse(["--data", "somewhere", "--preset", "paper"]).val_crop == 400
    assert parse(["--preset=quick"]).data == "synthetic"
    assert parse(["--preset=quick"]).decoder == PRESETS["quick"].decoder


def test_flags_override_the_preset() -> None:
    config = parse(["--budget", "3", "--stage1.encoder-lr", "0.5", "--ppo.embed-decisions"])
    assert (config.budget, config.stage1.encoder_lr, config.ppo.embed_decisions) == (3, 0.5, True)
    demo = PRESETS["demo"]
    assert config.stage1 == dataclasses.replace(demo.stage1, encoder_lr=0.5)
    assert config.stage0 == demo.stage0


def test_a_method_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["detection", "--budget", "1"]) == 2
    wanted = f"error: search: wanted one of {', '.join(METHODS)}, got 'detection'\n"
    assert capsys.readouterr().err == wanted


def test_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    config = parse(["--data", "d", "--encoder-weights", "e.pth", "--cache-dir", "~/c"])
    assert (config.data, config.encoder_weights) == (str(tmp_path / "d"), tmp_path / "e.pth")
    assert (config.cache_dir, config.runs) == (Path("/home/someone/c"), tmp_path / "runs")
    assert config.teacher is None


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--preset", "fast"], "fast"),
        (["--strategy", "genetic"], "genetic"),
        (["--budget", "many"], "many"),
        (["--budget", "0"], "wanted a budget of at least 1 candidate"),
        (["--stage2.lr", "1"], "--stage2.lr"),
        (["--stage0.samples", "0"], "Stage0Config.samples: wanted a value above 0"),
        (["--stage1.batch-size", "0"], "Stage1Config.batch_size: wanted a value above"),
        (["--resume", "there", "--seed", "3"], "--seed"),
    ],
)
def test_usage_errors(
    flags: list[str], shown: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        search.main([*flags, *([] if "--resume" in flags else ["--runs", str(tmp_path / "runs")])])
    assert caught.value.code == 2
    assert shown in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/no/where"], "data: wanted 'synthetic' or a folder, got '/no/where'"),
        (["--encoder-weights", "/no/w.pth"], "weights: no file /no/w.pth; give a"),
        (["--encoder-weights", "TOML"], "weights: wanted a .safetensors, .pth or .pt file, got"),
        (["--device", "cuda:99"], "resolve_device: device "),
        (["--teacher", "ENCODER"], "segmenter "),
        (["--omit", "3"], "omit: wanted classes from 0 to 2, got 3"),
        (["--name", "a/b"], "name: wanted letters, digits and ._+- (it becomes part of a"),
    ],
)
def test_errors_are_one_line_and_leave_no_run(
    flags: list[str],
    message: str,
    tiny_search: list[str],
    tiny_run: Path,
    tiny_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"TOML": tiny_run / "config.toml", "ENCODER": tiny_weights}
    argv = [str(files.get(flag, flag)) for flag in flags]
    assert search.main([*tiny_search, "--runs", str(tmp_path / "runs"), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_of_other_classes_is_refused(
    tiny_search: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_model / "model.safetensors"
    flags = ["--teacher", str(path), "--data", "synthetic", "--runs", str(tmp_path / "runs")]
    assert search.main([*tiny_search, *flags]) == 2
    assert capsys.readouterr().err == (
        f"error: teacher {path}: wanted a network for sky, building, road, pavement, tree, car, "
        "person, pole, got one for sky, road, [post]; train one on this data first\n"
    )
    assert not (tmp_path / "runs").exists()


def test_resume_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} is not a run directory: it has no config.toml, env.json, "
        "records.jsonl; give a directory that a search wrote, such as runs/<date>-<method>-<name>\n"
    )


def test_resume_with_a_bad_budget(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--resume", str(tiny_run), "--budget", "0"]) == 2
    assert (
        "error: search: wanted a budget of at least 1 candidate, got 0" in capsys.readouterr().err
    )


def test_errors_of_the_module_itself(tmp_path: Path) -> None:
    process = start(["--data", "/no/where", "--runs", str(tmp_path / "runs")])
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert stderr == "error: data: wanted 'synthetic' or a folder, got '/no/where'\n"
    assert stdout == ""


def test_a_search_that_only_fails(
    tiny_search: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--stage0.lr", "1e30", "--runs", str(tmp_path)]
    assert search.main([*tiny_search, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the last 5 candidates failed, the last one: stage0: training")
    (run,) = tmp_path.iterdir()
    assert [bool(record["evaluation"]["failure"]) for record in outcome(run)] == [True] * 5
    assert (run / "report.html").is_file()
