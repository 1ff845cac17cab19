"""The search for restoration networks end to end: contract, strategies, command line, errors."""

import contextlib
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import tomllib
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console
from search_runs import (
    assert_equal,
    assert_same,
    before_a_checkpoint,
    checkpoint,
    crashed,
    outcome,
)

from nasfast.commands import search, train
from nasfast.data.restoration import open_images
from nasfast.methods.restoration import sampled
from nasfast.methods.restoration.sampled import SizeClass, evaluator_on
from nasfast.methods.restoration.search import build
from nasfast.methods.restoration.settings import PRESETS, SearchConfig, parse, search_with
from nasfast.methods.restoration.train import TrainingRun
from nasfast.models.io import load_model
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.runs.study import Study
from nasfast.searches import bilevel
from nasfast.searches.bilevel import ArchitectureConfig, WeightsConfig, most_probable
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace, derive_nodes
from nasfast.strategies.gradient import Mix
from nasfast.tasks.restoration.dehazing import Dehazing
from nasfast.tasks.restoration.denoising import Denoising
from nasfast.tasks.restoration.super_resolution import SuperResolution
from nasfast.training.cost import count_parameters
from nasfast.training.graphs import CudaGraph, GraphedStep
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError
from nasfast.utils.interrupt import Interrupt

# ---- the run contract


def test_what_a_search_leaves(bilevel_run, tiny_images):
    names = {path.name for path in bilevel_run.iterdir()}
    assert names >= {"config.toml", "env.json", "records.jsonl", "best.json", "report.html"}
    assert json.loads((bilevel_run / "study.json").read_text())["ranking"] == "last"
    environment = json.loads((bilevel_run / "env.json").read_text())
    data = open_images(tiny_images, 1)
    assert environment["identity"]["inputs"] == {
        "images of the weights": data.halves()[0].fingerprint(),
        "images of the architecture": data.halves()[1].fingerprint(),
        "validation images": data.val.fingerprint(),
    }
    settings = tomllib.loads((bilevel_run / "config.toml").read_text())
    del settings["checksum"]
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


@pytest.mark.parametrize(
    ("strategy", "space"),
    [("proxyless", ""), ("gumbel", "--supernet.searched-depth --supernet.widths free")],
)
def test_single_paths_resume_exactly(strategy, space, tiny_bilevel, tmp_path):
    flags = ["--strategy", strategy, "--bilevel.epochs", "3", *space.split()]
    argv = [*tiny_bilevel, *flags, "--runs"]
    assert search.main([*argv, str(tmp_path / "whole")]) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    run = crashed([*argv, str(tmp_path / "run")], tmp_path / "run", before_a_checkpoint)
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)
    state, (*_, last) = checkpoint(run), outcome(run)
    assert state["relaxation"]["strategy"] == strategy
    assert last["genotype"].get("widths") == ("free" if space else None)
    if space:
        depths = state["depths"]
        assert depths.shape == (3, 2)
        assert not torch.equal(depths[0], depths[2])
        entropy = torch.special.entr(depths[2]).sum().item()
        metrics = last["evaluation"]["metrics"]["supernet"]
        assert metrics["depth_entropy"] == pytest.approx(entropy)


@pytest.fixture
def perturbed(tiny_bilevel):
    """Command line of a search that then makes six choices; the caller adds --runs."""
    flags = "--strategy sigmoid --bilevel.epochs 2 --bilevel.architecture.selection perturbation"
    return [*tiny_bilevel, *flags.split(), "--supernet.layers", "1"]


def test_operations_chosen_by_perturbation(perturbed, tmp_path):
    """Killed before the first choice is saved, it resumes exactly."""
    argv = [*perturbed, "--bilevel.architecture.auxiliary-skip", "1", "--runs"]
    assert search.main([*argv, str(tmp_path / "whole")]) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    run = crashed([*argv, str(tmp_path / "run")], tmp_path / "run", before_a_checkpoint)
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)

    records, state = outcome(run), checkpoint(run)
    assert len(records) == 2 + 5 + 1  # epochs, edges, the node that has more than two
    assert "architecture_loss" not in records[2]["evaluation"]["metrics"]["supernet"]
    entropies = [r["evaluation"]["metrics"]["supernet"]["alpha_entropy"] for r in records[1:7]]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] == 0
    table = state["alphas"][-1]
    assert table.sum(1).tolist() == table.max(1).values.tolist() == [1] * 5
    assert (table.argmax(1) == 5).sum() == 1
    nodes = derive_nodes(table.tolist(), 2)
    assert json.loads((run / "best.json").read_text())["genotype"]["nodes"] == [
        [list(edge) for edge in node] for node in nodes
    ]
    assert torch.equal(state["betas"][1], state["betas"][-1])


@pytest.mark.parametrize(("strategy", "memory"), [("sigmoid", "save"), ("gumbel", "recompute")])
def test_what_a_choice_measures(strategy, memory, perturbed):
    """The loss of a mix leaves no trace; every choice has its own patches."""
    flags = ["--strategy", strategy, "--supernet.memory", memory]
    with contextlib.closing(training_of([*perturbed, *flags])) as training:
        training.choose()
        before = {name: value.clone() for name, value in training.model.state_dict().items()}
        loss, mix = training._held_out_loss(), training.choices.mix(training.operations())
        first = loss(mix)
        assert first == loss(mix)
        assert first != loss(Mix(mix.weights * 0.5, mix.active))
        assert_equal(training.model.state_dict(), before)
        training.choices.choose(training.operations(), lambda mix: 0.0)
        assert training._held_out_loss()(mix) != first  # other patches for the next choice
        with torch.no_grad():
            training.model.tail.conv.bias.fill_(math.nan)
        with pytest.raises(UserError, match="the loss without an operation is nan in epoch 0"):
            training._held_out_loss()(mix)


@pytest.mark.parametrize("strategy", ["darts", "gumbel"])
def test_the_auxiliary_skip_fades(strategy, tiny_bilevel, monkeypatch):
    flags = "--bilevel.epochs 4 --bilevel.warmup 3 --bilevel.architecture.auxiliary-skip 0.8"
    with contextlib.closing(
        training_of([*tiny_bilevel, *flags.split(), "--strategy", strategy])
    ) as training:
        seen = []
        monkeypatch.setattr(
            training, "_train", lambda batch, mix, *_: seen.append(mix) or torch.zeros(())
        )
        for epoch in (1, 2, 3, 4):
            seen.clear()
            training.train_epoch()
            assert seen
            for mix in seen:
                extra = 0.8 * (1 - epoch / 4)
                assert mix.weights.sum(1).tolist() == pytest.approx([1 + extra] * 5)
                assert mix.weights[:, 4].min() >= extra - 1e-6
                assert mix.active is None or all(4 in row for row in mix.active)


def training_of(argv):
    """The supernet of a search and its training, before the first epoch."""
    found, _ = build(parse(argv), Interrupt(), Console(quiet=True))
    return bilevel.SupernetTraining(found)


def test_deterministic(tiny_bilevel, bilevel_run, tiny_restorer, tmp_path, monkeypatch):
    """All steps are taken in PyTorch's mode, in which a CPU gives the same values."""
    modes, step = [], torch.optim.Optimizer.zero_grad

    def spied(optimizer, *arguments, **named):
        modes.append(torch.are_deterministic_algorithms_enabled())
        step(optimizer, *arguments, **named)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", spied)
    assert search.main([*tiny_bilevel, "--runs", str(tmp_path), "--deterministic"]) == 0
    (run,) = tmp_path.iterdir()
    assert outcome(run) == outcome(bilevel_run)
    found = len(modes)
    assert train.main([*tiny_restorer, "--out", str(tmp_path / "out"), "--deterministic"]) == 0
    assert len(modes) > found
    assert all(modes)
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_stops_when_the_architecture_stays(tiny_bilevel, tmp_path, capsys):
    flags = ["--bilevel.architecture.lr", "1e-9", "--bilevel.patience", "2"]
    argv = [*tiny_bilevel, *flags, "--bilevel.epochs", "40", "--runs", str(tmp_path)]
    assert search.main(argv) == 0
    (run,) = tmp_path.iterdir()
    records = outcome(run)
    assert len(records) < 10
    assert records[-1]["canonical"] == records[-2]["canonical"] == records[-3]["canonical"]
    assert re.search(
        r"stopped early: the architecture has been the same for 2 epochs\n"
        r"warning: the search may have collapsed: the entropy .* from 1\.79 to 1\.79 only: .*\n",
        capsys.readouterr().out,
    )
    assert search.main(["--resume", str(run)]) == 0  # nothing is left to do
    assert outcome(run) == records


def test_edited_records_are_noticed(bilevel_run, tmp_path, capsys):
    run = shutil.copytree(bilevel_run, tmp_path / "run")
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[:2]))
    assert search.main(["--resume", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: {run}/records.jsonl: expected the 5 records that the checkpoint has seen, got 2; "
        "restore it from a copy, or start a new run\n"
    )


@pytest.mark.parametrize("strategy", ["darts", "random"])
@pytest.mark.parametrize("name", ["00.png", "07.png"])  # trains, validates
def test_damaged_images_leave_no_run(strategy, name, tiny_bilevel, tiny_images, tmp_path, capsys):
    data = shutil.copytree(tiny_images, tmp_path / "edges")
    path = data / "train" / name
    path.write_bytes(path.read_bytes()[:-40])
    flags = ["--data", str(data), "--strategy", strategy, "--runs", str(tmp_path / "runs")]
    assert search.main([*tiny_bilevel, *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: image {path} cannot be read: ")
    assert not (tmp_path / "runs").exists()


# ---- sampled candidates


@pytest.fixture(scope="session")
def tiny_sampled(tiny_bilevel):
    """Command line of a search that samples; the caller adds --runs."""
    flags = "--strategy random --budget 3 --recipe.steps 3 --recipe.crop 16 --recipe.batch-size 2"
    return [*tiny_bilevel, *flags.split(), "--workers", "1", "--threads", "1"]


@pytest.fixture(scope="session")
def sampled_records(tiny_sampled, tmp_path_factory):
    """What that search records, left alone."""
    return records_of(tiny_sampled, tmp_path_factory.mktemp("sampled"))


def records_of(argv, runs):
    assert search.main([*argv, "--runs", str(runs)]) == 0
    (run,) = runs.iterdir()
    return outcome(run)


def test_random_search_of_a_size_class(tiny_sampled, tmp_path):
    records = records_of([*tiny_sampled, "--budget", "2", "--params", "2600:6000"], tmp_path)
    assert len({str(record["canonical"]) for record in records}) == 2
    for record in records:
        evaluation = record["evaluation"]
        assert 2600 <= evaluation["costs"]["params"] <= 6000
        (metrics,) = evaluation["metrics"].values()
        assert set(metrics) == {"psnr", "ssim"}
        assert evaluation["rewards"] == {"stage0": metrics["ssim"] + metrics["psnr"] / 100}
        assert evaluation["feedback"] == "stage0"


def test_a_candidate_that_runs_out_of_memory_is_recorded(
    tiny_sampled, sampled_records, tmp_path, monkeypatch
):
    train, calls = TrainingRun.run, itertools.count()

    def exhausted(*args, **kwargs):
        if next(calls) == 1:
            torch.empty(1 << 50, dtype=torch.uint8)  # more than any address space
        return train(*args, **kwargs)

    monkeypatch.setattr(TrainingRun, "run", exhausted)
    first, failed, last = records_of(tiny_sampled, tmp_path)
    assert re.match(r"stage0: out of memory \(.*allocate memory", failed["evaluation"]["failure"])
    assert failed["evaluation"]["rewards"] == {}
    assert [first, last] == sampled_records[0::2]


def test_sampled_networks_do_not_depend_on_the_number_of_workers(
    tiny_sampled, sampled_records, tmp_path
):
    assert records_of([*tiny_sampled, "--workers", "2"], tmp_path) == sampled_records


def test_an_evaluation_follows_from_its_index(tiny_sampled):
    evaluator = evaluator_on(parse(tiny_sampled), "cpu")
    genotype = IRNASSpace(2, 2).sample(random.Random(0))
    first = evaluator(genotype, 3, {})
    torch.manual_seed(99)
    assert evaluator(genotype, 3, {}).rewards == first.rewards
    assert evaluator(genotype, 4, {}).rewards != first.rewards
    assert evaluator.costs(genotype) == first.costs
    diverging = parse([*tiny_sampled, "--recipe.lr", "1e30", "--recipe.max-grad-norm", "inf"])
    failure = evaluator_on(diverging, "cpu")(genotype, 3, {}).failure
    assert failure.startswith("stage0: training loss is ")


@pytest.mark.parametrize("given", [{"workers": 2}, {"devices": "cpu"}, {"engine": "ray"}])
def test_a_search_by_gradient_has_no_workers(given):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(PRESETS["demo"], strategy="darts", **given)
    assert str(caught.value) == (
        "workers, devices, engine: expected a --strategy that samples, predictor, evolution, ppo, "
        "random, got darts; a search by gradient trains one supernet"
    )
    dataclasses.replace(PRESETS["demo"], strategy="evolution", **given)


def test_an_empty_size_class(tiny_sampled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampled, "MAX_DRAWS", 20)
    flags = ["--params", "1000000:2000000", "--runs", str(tmp_path)]
    assert search.main([*tiny_sampled, *flags]) == 2
    pattern = (
        r"error: params: expected an architecture that has 1,000,000 to 2,000,000 parameters, got "
        r"none in 20 draws; they have \d,\d{3} to \d\d,\d{3}: change --params\n"
    )
    assert re.fullmatch(pattern, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("strategy", "space"),
    [("predictor", "--supernet.searched-depth --supernet.widths free"), ("evolution", "")],
)
def test_a_search_at_one_size_resumes_exactly(strategy, space, tiny_sampled, tmp_path):
    """With enough candidates for mutants and for a model of the rewards."""
    flags = f"""
        {space} --strategy {strategy} --params 4K --budget 4 --batch 1 --recipe.steps 1
        --predictor.initial 2 --predictor.pool 20 --evolution.population 2
    """
    at = tiny_sampled.index("--network.width")
    argv = [*tiny_sampled[:at], *tiny_sampled[at + 2 :], *flags.split(), "--runs"]
    assert search.main([*argv, str(tmp_path / "whole")]) == 0
    (whole,) = (tmp_path / "whole").iterdir()
    run = crashed([*argv, str(tmp_path / "run")], tmp_path / "run", before_a_checkpoint)
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)
    assert checkpoint(run)["strategy"]["strategy"] == strategy
    records = outcome(run)
    assert all(3000 <= r["evaluation"]["costs"]["params"] <= 5000 for r in records)
    assert {r["genotype"].get("widths") for r in records} == {"free" if space else None}
    if strategy == "predictor":  # what is trained is as wide as it was in the search
        recipe = "--rank 2 --device cpu --steps 1 --crop 16 --batch-size 2"
        assert train.main([str(run), *recipe.split()]) == 0
        _, record, *_ = Study.open(run, read_only=True).ranking()
        metrics = json.loads((run / "train-1" / "metrics.json").read_text())
        assert metrics["genotype"] == record.genotype
        assert metrics["params"] == record.evaluation.params
        settings = tomllib.loads((run / "train-1" / "config.toml").read_text())
        model, _ = load_model(run / "train-1" / "model.safetensors")
        assert settings["network"]["width"] == model.config.width


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
    assert bilevel.architecture == ArchitectureConfig(1e-3, 1e-3, "alpha", None, 0.0)
    assert paper.network == RestorerConfig()
    haze = parse(["restoration", "--preset", "paper", "--task", "dehazing"])
    assert (haze.channels, haze.network) == (3, RestorerConfig(reduction=8))


@pytest.mark.parametrize(
    ("given", "strategy", "params"),
    [
        ({}, "predictor", "20K"),
        ({"preset": "quick"}, "predictor", "90K"),
        ({"preset": "quick", "strategy": "random"}, "random", "90K"),
        ({"preset": "quick", "params": "0.2M"}, "predictor", "0.2M"),
        ({"preset": "quick", "network.width": "7"}, "predictor", None),
        ({"preset": "quick", "params": "None"}, "predictor", None),
        ({"preset": "quick", "strategy": "darts"}, "darts", None),
        ({"preset": "paper"}, "darts", None),
        ({"preset": "paper", "strategy": "auto"}, "predictor", None),
    ],
)
def test_sizes_of_sampled_networks(given, strategy, params):
    argv = [word for name, value in given.items() for word in (f"--{name}", value)]
    config = parse(["restoration", *argv])
    assert (config.strategy, config.params) == (strategy, params)
    typed = {"network.width": 7, "params": None if params is None else params}
    settings = {name: typed.get(name, value) for name, value in given.items()}
    assert search_with(settings) == config


def test_tasks_and_their_settings():
    assert parse(["restoration"]).task == Denoising(30.0)
    assert parse(["restoration", "--task.sigma", "50"]).task == Denoising(50.0)
    blind = parse(["restoration", "--task", "denoising", "--task.sigma", "30", "50", "70"])
    assert blind.task == Denoising((30.0, 50.0, 70.0))
    assert parse(["restoration", "--task.sigma", "real"]).task == Denoising("real")
    haze = parse(["restoration", "--task", "dehazing", "--task.beta", "1", "2"])
    assert (haze.task, haze.channels) == (Dehazing((1.0, 2.0)), 3)
    for task in (haze.task, haze.task.describe()):
        assert search_with({"task": task}) == haze
    assert parse(["restoration", "--task", "dehazing", "--channels", "1"]).channels == 1
    config = parse(["restoration", "--task=super-resolution", "--task.scale", "3", "--seed", "4"])
    assert config.task == SuperResolution(3)
    assert config.seed == 4
    assert type(config) is SearchConfig


def test_a_loss_that_is_not_finite(tiny_bilevel, tmp_path, capsys):
    flags = ["--bilevel.weights.lr", "1e30", "--runs", str(tmp_path)]
    assert search.main([*tiny_bilevel, *flags]) == 1  # nothing was found
    assert capsys.readouterr().err == (
        "error: search: the loss is nan in epoch 1; lower --bilevel.weights.lr in a new run\n"
    )


@pytest.mark.parametrize(("epoch", "status"), [(1, 1), (2, 2)])
def test_a_score_that_is_not_finite(epoch, status, tiny_bilevel, tmp_path, monkeypatch, capsys):
    calls = itertools.count(1)
    monkeypatch.setattr(
        bilevel, "psnr", lambda a, b: torch.full((1,), math.nan if next(calls) == epoch else 9.0)
    )
    assert search.main([*tiny_bilevel, "--bilevel.epochs", "3", "--runs", str(tmp_path)]) == status
    assert capsys.readouterr().err == (
        "error: search: what the supernet gives for the validation images is not finite in epoch "
        f"{epoch}; lower --bilevel.weights.lr in a new run"
        + (". The epochs before it are saved\n" if epoch > 1 else "\n")
    )
    (run,) = tmp_path.iterdir()
    assert len(outcome(run)) == epoch - 1


def test_space_of_the_samples_is_the_space():
    sizes, space = SizeClass(3, 2), IRNASSpace(3, 2)
    genotype = sizes.sample(random.Random(3))
    assert genotype == space.sample(random.Random(3))
    assert sizes.from_json(genotype.to_json()) == genotype


class Repeater:
    """Stands for a graph: records a step and runs it again."""

    def __init__(self, *_):
        self.repeated = 0

    def stream(self):
        return contextlib.nullcontext()

    def record(self, work):
        self.work = work
        return torch.full((), math.nan)

    def repeat(self):
        self.repeated += 1
        self.graph._loss = self.work()

    def close(self):
        self.graph = self.work = None


def test_recorded_steps_search_the_same(bilevel_run, tiny_bilevel, tmp_path, monkeypatch):
    """As on CUDA, where both halves of a step are graphs."""
    recorders = {name: Repeater() for name in ("weights", "architecture")}
    begin = bilevel.SupernetTraining.__init__

    def with_graphs(self, *arguments):
        begin(self, *arguments)
        self._graphs = {name: GraphedStep(recorder) for name, recorder in recorders.items()}
        for name, recorder in recorders.items():
            recorder.graph = self._graphs[name]

    monkeypatch.setattr(bilevel.SupernetTraining, "__init__", with_graphs)
    assert search.main([*tiny_bilevel, "--runs", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    assert_same(run, bilevel_run)
    assert all(recorder.repeated for recorder in recorders.values())


@pytest.mark.cuda
def test_halves_of_a_step_as_cuda_graphs(tiny_bilevel, tmp_path, monkeypatch):
    """The learning rate changes in every epoch; a resumed run records anew."""
    argv = [*tiny_bilevel, "--device", "cuda", "--runs"]
    repeats, repeat = [], CudaGraph.repeat
    monkeypatch.setattr(CudaGraph, "repeat", lambda graph: (repeats.append(graph), repeat(graph)))
    run = crashed([*argv, str(tmp_path / "graphs")], tmp_path / "graphs", before_a_checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the training step stays eager")
        assert search.main(["--resume", str(run)]) == 0
    assert len({*repeats}) == 4
    monkeypatch.setattr(GraphedStep, "__call__", lambda graph, step, batch: step(batch))
    assert search.main([*argv, str(tmp_path / "eager")]) == 0
    (eager,) = (tmp_path / "eager").iterdir()
    for graphed, expected in zip(outcome(run), outcome(eager), strict=True):
        got, wanted = (r["evaluation"]["metrics"]["supernet"] for r in (graphed, expected))
        assert got == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("scale", [1, 2])
def test_parameters_of_a_sample_are_counted_without_its_network(scale):
    sizes = SizeClass(3, 3, network=RestorerConfig(8, 16, 16, 8), channels=3, scale=scale)
    rng = random.Random(0)
    for genotype in (sizes.sample(rng) for _ in range(8)):
        network = Restorer(genotype, sizes.network, 3, scale)
        assert sizes.parameters(genotype) == count_parameters(network)


def test_a_run_without_features_has_no_cache(bilevel_run, tmp_path, capsys):
    run = shutil.copytree(bilevel_run, tmp_path / "run")
    assert search.main(["--resume", str(run), "--placement", "ram"]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {run}: expected no placement for restoration, which keeps no features; "
        "leave it out\n"
    )
