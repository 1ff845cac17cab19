"""The search for restoration networks end to end: contract, strategies, command line, errors."""

import dataclasses
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import time
import tomllib

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from search_runs import drawn_moments, killed_and_resumed, outcome, wait_for_records

from nasfast import search
from nasfast.methods.restoration import sampled
from nasfast.methods.restoration.sampled import ShortTraining, SizeClass, evaluator_on
from nasfast.methods.restoration.settings import PRESETS, SearchConfig, parse, parse_range
from nasfast.methods.restoration.train import TrainingRun
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.runs.study import Study
from nasfast.searches.bilevel import WeightsConfig, most_probable
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.super_resolution import SuperResolution
from nasfast.training.cost import count_parameters
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError


def checkpoint(run):
    state = Study.open(run, read_only=True).load_checkpoint()
    assert state is not None
    return state


def assert_same(run, whole):
    """Both searches decided, measured and learned exactly the same."""
    assert outcome(run) == outcome(whole)
    ours, theirs = checkpoint(run), checkpoint(whole)
    for name in ("alphas", "betas"):
        assert torch.equal(ours[name], theirs[name])
    for name, tensor in theirs["model"].items():
        assert torch.equal(ours["model"][name], tensor), name


# ---- the run contract


def test_what_a_search_leaves(bilevel_run):
    names = {path.name for path in bilevel_run.iterdir()}
    assert names >= {"config.toml", "env.json", "records.jsonl", "best.json", "report.html"}
    assert json.loads((bilevel_run / "study.json").read_text())["ranking"] == "last"
    environment = json.loads((bilevel_run / "env.json").read_text())
    assert set(environment["identity"]["inputs"]) == {
        "images of the weights",
        "images of the architecture",
        "validation images",
    }
    settings = tomllib.loads((bilevel_run / "config.toml").read_text())
    config = from_mapping(SearchConfig, settings, "config.toml")
    assert settings["task"] == {"task": "denoising", "sigma": 30.0}
    assert config.task == Denoising(30.0)
    assert config.bilevel.architecture.lr == 0.2
    records = outcome(bilevel_run)
    assert [record["index"] for record in records] == list(range(5))
    for record in records:
        metrics = record["evaluation"]["metrics"]["supernet"]
        assert ("architecture_loss" in metrics) == (record["index"] >= 1)
        assert record["evaluation"]["rewards"]["supernet"] == pytest.approx(
            metrics["ssim"] + metrics["psnr"] / 100
        )
        genotype = IRNASGenotype.from_json(record["genotype"])
        network = Restorer(genotype, config.network, channels=1)
        assert record["evaluation"]["costs"]["params"] == count_parameters(network)
        assert record["evaluation"]["feedback"] == "supernet"
        earlier = [r["index"] for r in records[: record["index"]]]
        same = [i for i in earlier if records[i]["canonical"] == record["canonical"]]
        assert record["duplicate_of"] == (same[0] if same else None)
    # the uniform softmax of the warm-up, then a search that went somewhere
    state = checkpoint(bilevel_run)
    assert state["alphas"].shape == (5, 5, 6)
    assert state["betas"].shape == (5, 3, 3)
    assert torch.allclose(state["alphas"][0], torch.full((5, 6), 1 / 6))
    assert state["alphas"][-1].max() > 0.25
    entropies = [r["evaluation"]["metrics"]["supernet"]["alpha_entropy"] for r in records]
    assert entropies[0] == pytest.approx(np.log(6))
    assert entropies[-1] < entropies[1] < entropies[0]
    assert json.loads((bilevel_run / "best.json").read_text())["index"] == 4


def test_killed_twice_a_search_resumes_exactly(tiny_bilevel, bilevel_run, tmp_path):
    rng = drawn_moments()

    def somewhere_after(epochs, process):
        wait_for_records(process, tmp_path, epochs)
        time.sleep(rng.uniform(0, 0.5))  # in the next epoch, or while it is written

    waits = [functools.partial(somewhere_after, n) for n in sorted(rng.sample(range(5), 2))]
    run = killed_and_resumed([*tiny_bilevel, "--runs", str(tmp_path)], tmp_path, waits)
    assert_same(run, bilevel_run)


class Crash(BaseException):
    """Stands for the end of the process."""


def crashed(argv, runs, index, monkeypatch, *, written):
    """The run of a search that ended at a record, just before or after it was written."""
    append = Study.append

    def crash(study, record):
        if record.index == index and not written:
            raise Crash
        append(study, record)
        if record.index == index:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Study, "append", crash)
        with pytest.raises(Crash):
            search.main([*argv, "--runs", str(runs)])
    (run,) = runs.iterdir()
    assert len(outcome(run)) == index + written
    return run


def test_crash_between_checkpoint_and_record(tiny_bilevel, bilevel_run, tmp_path, monkeypatch):
    run = crashed(tiny_bilevel, tmp_path, 2, monkeypatch, written=False)
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, bilevel_run)


def test_ctrl_c_tells_how_to_continue(tiny_bilevel, bilevel_run, tmp_path, monkeypatch, capsys):
    append = Study.append

    def interrupted(study, record):
        append(study, record)
        if record.index == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Study, "append", interrupted)
        assert search.main([*tiny_bilevel, "--runs", str(tmp_path)]) == 130
    (run,) = tmp_path.iterdir()
    assert (
        "stopped; everything is saved. Continue with\n"
        f"  python -m nasfast.search --resume {run}\n" in capsys.readouterr().out
    )
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, bilevel_run)


@pytest.mark.parametrize("strategy", ["proxyless", "gumbel"])
def test_single_paths_resume_exactly(strategy, tiny_bilevel, tmp_path, monkeypatch):
    flags = ["--strategy", strategy, "--bilevel.epochs", "3"]
    assert search.main([*tiny_bilevel, *flags, "--runs", str(tmp_path / "whole")]) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    argv = [*tiny_bilevel, *flags]
    run = crashed(argv, tmp_path / "stopped", 1, monkeypatch, written=True)
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)
    assert checkpoint(run)["relaxation"]["strategy"] == strategy


def test_it_stops_when_the_architecture_stays(tiny_bilevel, tmp_path, capsys):
    flags = ["--bilevel.architecture.lr", "1e-9", "--bilevel.patience", "2"]
    argv = [*tiny_bilevel, *flags, "--bilevel.epochs", "40", "--runs", str(tmp_path)]
    assert search.main(argv) == 0
    (run,) = tmp_path.iterdir()
    records = outcome(run)
    assert len(records) < 10
    assert records[-1]["canonical"] == records[-2]["canonical"] == records[-3]["canonical"]
    assert "stopped early: the architecture has been the same for 2 epochs\n" in (
        capsys.readouterr().out
    )
    assert search.main(["--resume", str(run)]) == 0  # nothing is left to do
    assert outcome(run) == records


def test_edited_records_are_noticed(bilevel_run, tmp_path, capsys):
    run = shutil.copytree(bilevel_run, tmp_path / "run")
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[:2]))
    assert search.main(["--resume", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: {run}: expected records of 5 epochs, which the checkpoint has seen, got 2; the "
        "records or the checkpoint were edited, start a new run\n"
    )


def test_resume_with_other_data_is_refused(bilevel_run, tiny_images, tmp_path, capsys):
    run = shutil.copytree(bilevel_run, tmp_path / "run")
    data = shutil.copytree(tiny_images, tmp_path / "edges")
    settings = tomllib.loads((run / "config.toml").read_text())
    (run / "config.toml").write_text(tomli_w.dumps(settings | {"data": str(data)}))
    assert search.main(["--resume", str(run)]) == 0
    Image.new("L", (48, 40), 7).save(data / "train" / "06.png")
    assert search.main(["--resume", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {run}: expected the images of the architecture that the run began with, "
        "got other content in the same place; restore it or start a new run\n"
    )


# ---- sampled candidates


@pytest.fixture(scope="session")
def tiny_sampled(tiny_bilevel):
    """Command line of a search that samples; the caller adds --runs."""
    flags = "--strategy random --recipe.steps 3 --recipe.crop 16 --recipe.batch-size 2 --workers 1"
    return [*tiny_bilevel, *flags.split()]


def test_random_search_of_a_size_class(tiny_sampled, tmp_path):
    flags = ["--budget", "2", "--params", "2600:6000", "--runs", str(tmp_path)]
    assert search.main([*tiny_sampled, *flags]) == 0
    (run,) = tmp_path.iterdir()
    records = outcome(run)
    assert len({str(record["canonical"]) for record in records}) == 2
    for record in records:
        evaluation = record["evaluation"]
        assert 2600 <= evaluation["costs"]["params"] <= 6000
        (metrics,) = evaluation["metrics"].values()
        assert set(metrics) == {"psnr", "ssim"}
        assert evaluation["rewards"] == {"stage0": metrics["ssim"] + metrics["psnr"] / 100}
        assert evaluation["feedback"] == "stage0"
    assert search.main(["--resume", str(run), "--budget", "3"]) == 0
    assert outcome(run)[:2] == records


def test_a_candidate_that_diverges_is_recorded(tiny_sampled, tmp_path):
    flags = "--budget 1 --recipe.lr 1e30 --recipe.max-grad-norm inf --runs"
    assert search.main([*tiny_sampled, *flags.split(), str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    (record,) = outcome(run)
    assert record["evaluation"]["failure"].startswith("stage0: training loss is ")


@pytest.mark.parametrize(
    ("place", "name", "step"),
    [
        (ShortTraining, "build", "build"),
        (TrainingRun, "run", "stage0"),
        (sampled, "evaluate", "stage0"),
    ],
)
def test_a_candidate_that_runs_out_of_memory_is_recorded(
    place, name, step, tiny_sampled, tmp_path, monkeypatch
):
    argv = [*tiny_sampled, "--budget", "3", "--runs"]
    assert search.main([*argv, str(tmp_path / "enough")]) == 0
    function, calls = getattr(place, name), itertools.count()

    def exhausted(*args, **kwargs):
        if next(calls) == 1:
            torch.empty(1 << 50, dtype=torch.uint8)  # more than any address space
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, exhausted)
    assert search.main([*argv, str(tmp_path / "short")]) == 0
    enough, short = (outcome(next((tmp_path / name).iterdir())) for name in ("enough", "short"))
    failure = short[1]["evaluation"]["failure"]
    assert failure.startswith(f"{step}: out of memory (")
    assert "allocate memory" in failure
    assert short[1]["evaluation"]["rewards"] == {}
    assert short[0::2] == enough[0::2]


def test_sampled_networks_do_not_depend_on_the_number_of_workers(tiny_sampled, tmp_path):
    argv = [*tiny_sampled, "--budget", "3", "--threads", "1"]
    for workers in ("1", "2"):
        flags = ["--workers", workers, "--runs", str(tmp_path / workers)]
        assert search.main([*argv, *flags]) == 0
    one, two = (outcome(next((tmp_path / workers).iterdir())) for workers in ("1", "2"))
    assert one == two


@pytest.mark.parametrize("given", [{"workers": 2}, {"devices": "cpu"}, {"engine": "ray"}])
def test_a_search_by_gradient_has_no_workers(given):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(PRESETS["demo"], **given)
    assert str(caught.value) == (
        "workers, devices, engine: expected --strategy random, which samples, got darts; a search "
        "by gradient trains one supernet"
    )
    dataclasses.replace(PRESETS["demo"], strategy="random", **given)


def test_an_evaluation_draws_from_its_own_generators(tiny_sampled):
    evaluator = evaluator_on(parse(tiny_sampled), "cpu")
    genotype = IRNASSpace(2, 2).sample(random.Random(0))
    before = torch.get_rng_state()
    first = evaluator(genotype, 3, None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert evaluator(genotype, 3, None).rewards == first.rewards
    assert evaluator(genotype, 4, None).rewards != first.rewards
    assert evaluator.costs(genotype) == first.costs


def test_an_empty_size_class(tiny_sampled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampled, "MAX_DRAWS", 20)
    flags = ["--params", "1000000:2000000", "--runs", str(tmp_path)]
    assert search.main([*tiny_sampled, *flags]) == 2
    pattern = (
        r"error: params: none of 20 architectures has 1,000,000 to 2,000,000 parameters; they have "
        r"\d,\d{3} to \d\d,\d{3}\n"
    )
    assert re.fullmatch(pattern, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["100", "a:b", "5:4", ":", "1:2:3", "-1:3"])
def test_ranges_that_are_none(text):
    with pytest.raises(ValueError, match=r"params: expected LOW:HIGH, such as .*, got "):
        parse_range(text)


def test_ranges():
    assert parse_range("60_000:80000") == (60_000, 80_000)
    assert parse_range(None)[0] == 0


# ---- schedules and mixes


def test_the_published_learning_rate():
    """Section 2: .001 + .024 (1 + cos(pi e / 10)) / 2 (1 - e / 100)^.9."""
    weights = WeightsConfig()
    for epoch in (1, 7, 10, 20, 33, 99, 100):
        wanted = 0.001 + 0.024 * (1 + np.cos(np.pi * epoch / 10)) / 2 * (1 - epoch / 100) ** 0.9
        assert weights.lr_at(epoch, 100) == pytest.approx(wanted)
    assert weights.lr_at(100, 100) == pytest.approx(0.001)
    assert weights.lr_at(20, 100) > weights.lr_at(10, 100)  # it rises again


def test_the_most_probable_path():
    alphas = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 3.0]])
    mix = most_probable(alphas)
    assert mix.active == ((1,), (0,))
    assert torch.equal(mix.weights, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))


# ---- the command line


def test_presets(tmp_path):
    assert parse(["restoration"]).preset == "demo"
    assert parse(["restoration", "--data", str(tmp_path)]).preset == "quick"
    paper = parse(["restoration", "--preset", "paper", "--data", str(tmp_path)])
    assert paper.bilevel == PRESETS["paper"].bilevel
    bilevel, supernet = paper.bilevel, paper.supernet
    assert (bilevel.epochs, bilevel.warmup, bilevel.batch_size, bilevel.crop) == (100, 20, 12, 64)
    assert (bilevel.ssim_weight, bilevel.architecture.lr) == (0.6, 1e-3)
    assert (supernet.layers, supernet.nodes, supernet.width) == (4, 5, 10)
    assert paper.network == RestorerConfig()


def test_tasks_and_their_settings():
    assert parse(["restoration"]).task == Denoising(30.0)
    assert parse(["restoration", "--task.sigma", "50"]).task == Denoising(50.0)
    blind = parse(["restoration", "--task", "denoising", "--task.sigma", "30", "50", "70"])
    assert blind.task == Denoising((30.0, 50.0, 70.0))
    config = parse(["restoration", "--task=super-resolution", "--task.scale", "3", "--seed", "4"])
    assert config.task == SuperResolution(3)
    assert config.seed == 4
    assert type(config) is SearchConfig


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--preset", "fast"], "fast"),
        (["--strategy", "ppo"], "ppo"),
        (["--channels", "2"], "2"),
        (["--budget", "0"], "SearchConfig.budget: expected a value above"),
        (["--task.sigma", "300"], "denoising: expected sigma above 0 and at"),
        (["--task.rain", "1"], "--task.rain"),
        (["--bilevel.ssim-weight", "-1"], "RestorationLoss: expected ssim_weight"),
        (["--bilevel.warmup", "99"], "warmup: expected fewer epochs than"),
        (["--bilevel.weights.lr", "0"], "WeightsConfig.lr: expected a value above"),
        (["--params", "1:2"], "params: expected --strategy random, which"),
        (["--supernet.width", "3"], "SupernetConfig.width: expected an even"),
    ],
)
def test_usage_errors(flags, shown, capsys):
    with pytest.raises(SystemExit) as caught:
        search.main(["restoration", *flags])
    assert caught.value.code == 2
    assert shown in capsys.readouterr().err


def _image(folder, size):
    Image.new("L", size[::-1], 90).save(folder / "train" / "03.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "/no/where"], "data: expected 'synthetic' or a folder, got '/no/where'"),
        (["--task", "dehazing"], "task: expected one of denoising, "),
        (["--channels", "3"], "image DATA/train/00.png is grey: expected a colour image for 3"),
        (
            ["--bilevel.crop", "41"],
            ("ImagePatches: expected images of at least 41x41 pixels, the si"),
        ),
        (["--device", "cuda:99"], "resolve_device: expected "),
        (["--task", "inpainting", "--name", "a/b"], "name: expected letters, digits and ._+- (it"),
    ],
)
def test_errors_are_one_line_and_leave_no_run(
    flags, message, tiny_bilevel, tiny_images, tmp_path, capsys
):
    assert search.main([*tiny_bilevel, "--runs", str(tmp_path / "runs"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    wanted = "error: " + message.replace("DATA", str(tiny_images))
    assert line.startswith(wanted)
    assert not (tmp_path / "runs").exists()


def test_an_unreadable_image(tiny_bilevel, tiny_images, tmp_path, capsys):
    data = shutil.copytree(tiny_images, tmp_path / "edges")
    (data / "train" / "02.png").write_bytes(b"not an image")
    argv = [*tiny_bilevel, "--data", str(data), "--runs", str(tmp_path / "runs")]
    assert search.main(argv) == 2
    assert capsys.readouterr().err.startswith(
        f"error: image {data / 'train' / '02.png'} cannot be read: "
    )
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite(tiny_bilevel, tmp_path, capsys):
    flags = ["--bilevel.weights.lr", "1e30", "--runs", str(tmp_path)]
    assert search.main([*tiny_bilevel, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: search: the loss is nan in epoch 1; lower --bilevel.weights.lr")


def test_a_budget_for_a_search_by_gradient(bilevel_run, capsys):
    assert search.main(["--resume", str(bilevel_run), "--budget", "9"]) == 2
    assert capsys.readouterr().err == (
        "error: resume: expected no --budget, as the learning rate of a search by gradient follows "
        "its number of epochs, got 9; start a new run with another --bilevel.epochs\n"
    )


def test_space_of_the_samples_is_the_space():
    sizes, space = SizeClass(3, 2), IRNASSpace(3, 2)
    genotype = sizes.sample(random.Random(3))
    assert genotype == space.sample(random.Random(3))
    assert sizes.from_json(genotype.to_json()) == genotype
