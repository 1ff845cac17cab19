"""A search whose costs matter: constraints, objectives, predicted and measured latencies."""

import dataclasses
import itertools
import os
import random
import re
import statistics
from pathlib import Path

import pytest
from test_sampling import QUIET, SPACE, Script, distinct, size, success, untimed

from nasfast.latency import Latencies, Profile, Target, UndeployableError, meter
from nasfast.latency.operators import Operator
from nasfast.methods.registry import METHODS
from nasfast.runs.objectives import Objectives
from nasfast.runs.study import Study
from nasfast.searches.costing import Costing
from nasfast.searches.limits import Limits, constraint
from nasfast.searches.sampling import Phase, SamplingSearch, SamplingSettings, _published
from nasfast.spaces import FastNASSpace, IRNASSpace, NASFCOSSpace, TemplateNASSpace
from nasfast.strategies import EvolutionConfig, PredictorConfig, make_strategy
from nasfast.utils.errors import UserError
from nasfast.workers import InProcess


class Costly(Script):
    """A script whose candidates have a memory too."""

    def costs(self, genotype):
        return size(genotype) | {"memory": 50.0 * size(genotype)["params"]}


class Fake:
    """Latencies of a microsecond a parameter; what is measured is a quarter more."""

    def __init__(self, fails=lambda genotype: False):
        self.predicted, self.measured, self.fails = [], [], fails

    def prepare(self, folder, say):
        pass

    def predict(self, genotype):
        self.predicted.append(genotype)
        return 1e-6 * size(genotype)["params"]

    def of(self, genotype):
        self.measured.append(genotype)
        if self.fails(genotype):
            raise UndeployableError("out of memory (fake)")
        return 1.25e-6 * size(genotype)["params"]


def play(root, latencies, strategy=None, evaluate=None, *, words=("score",), limits="", **more):
    """A search of six candidates, or the one in `root` continued; script and records."""
    script = Costly(distinct(), evaluate or (lambda i: success(0.1 * (i % 4 + 1))))
    phase = Phase(
        SPACE,
        strategy or script,
        script,
        more.pop("budget", 6),
        limits=Limits(tuple(map(constraint, limits.split()))),
        objectives=Objectives.of(words),
        costing=Costing(script, latencies),
        **more,
    )
    runs = list(root.glob("*"))
    config = {"objective": list(words)}
    opened = Study.open(*runs) if runs else Study.create(root, "segmentation", "x", config, {})
    with opened as study:
        SamplingSearch(phase).run(study, QUIET)
        return script, study.records


def test_counts_reject_before_predictions_and_these_before_measurements(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("nasfast.searches.sampling.say", lambda console, text: said.append(text))
    fake = Fake()
    limits = "macs<9 memory<1.5MB latency<24ms"
    script, records = play(tmp_path, fake, limits=limits, batch=2)
    asked = list(itertools.islice(distinct(), script.asked))
    small = [g for g in asked if size(g)["macs"] <= 9 and size(g)["params"] <= 30_000]
    quick = [g for g in small if size(g)["params"] <= 24_000]
    kept = [g for g in quick if 1.25 * size(g)["params"] <= 24_000]
    assert len(asked) > len(small) > len(quick) > len(kept)
    assert fake.predicted == small
    assert fake.measured == quick
    assert script.evaluated == [0, 1, 2, 3, 4, 5]
    assert [record.genotype for record in records] == [g.to_json() for g in kept]
    for record, genotype in zip(records, kept, strict=True):
        costs = record.evaluation.costs
        expected = size(genotype)["params"] * 1e-6
        assert costs["latency"] == pytest.approx(1.25 * expected)
        assert costs["predicted_latency"] == pytest.approx(expected)
    exceeded = [costs for record in records for costs in record.rejected]
    assert len(exceeded) == len(asked) - len(kept)
    late = [costs["latency"] for costs in exceeded if "latency" in costs]
    assert len(late) == len(small) - len(kept)
    assert min(late) > 0.024
    assert all("latency" not in costs or len(costs) == 1 for costs in exceeded)
    summed = [re.findall(r'(\d+) above --constraint "latency<24ms"', text) for text in said]
    assert sum(int(count) for counts in summed for count in counts) == len(late)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (
            "latency<1ms memory<1kB",
            'within --constraint "latency<1ms" and --constraint "memory<1kB", got 1,000 in a row '
            r'beyond; the smallest had [\d.]+ kB memory: raise --constraint "memory<1kB" in a new',
        ),
        (
            "latency<1us params<9M",
            r"the smallest had [\d.]+ ms latency and [\d,]+ params: raise --constraint \"latency<1",
        ),
    ],
)
def test_constraints_that_nothing_meets(limits, text, tmp_path):
    fake = Fake()
    with pytest.raises(UserError, match=f"^search: expected architectures .*{text}"):
        play(tmp_path, fake, limits=limits)
    assert fake.measured == []


def test_what_only_measurements_refuse_ends_soon(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setattr(fake, "of", lambda genotype: fake.measured.append(genotype) or 2.0)
    expected = (
        'search: expected architectures within --constraint "latency<1s", got 50 in a row beyond; '
        'the smallest had 2.00 s latency: raise --constraint "latency<1s" in a new run'
    )
    with pytest.raises(UserError, match=f"^{expected}$"):
        play(tmp_path, fake, limits="latency<1s")
    assert len(fake.measured) == 50


def test_a_network_that_does_not_run_on_the_target_is_a_failed_candidate(tmp_path):
    odd = [size(genotype)["params"] % 3 == 0 for genotype in itertools.islice(distinct(), 6)]
    assert 0 < sum(odd) < 6
    fake = Fake(lambda genotype: size(genotype)["params"] % 3 == 0)
    script, records = play(tmp_path, fake, words=("score", "latency"), batch=3)
    failures = [record.evaluation.failure for record in records]
    assert failures == ["latency: out of memory (fake)" if each else None for each in odd]
    assert script.evaluated == [i for i, each in enumerate(odd) if not each], "not trained"
    assert [told is None for told in script.told] == odd
    (run,) = tmp_path.iterdir()
    with Study.open(run) as study:
        assert {record.index for record in study.front()} <= set(script.evaluated)


def test_costs_that_do_not_matter_are_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Costly, "costs", None)
    _, records = play(tmp_path, None)
    assert [set(record.evaluation.costs) for record in records] == [{"params", "macs"}] * 6


def test_weighted_costs_are_told_as_expected(tmp_path):
    script, records = play(tmp_path, Fake(), words=("score", "latency:0.02"))
    objectives = Objectives.of(["score", "latency:0.02"])
    costs = [record.evaluation.costs for record in records]
    rewards = [0.1, 0.2, 0.3, 0.4, 0.1, 0.2]
    expected = [
        objectives.value(r, c | {"latency": c["predicted_latency"]}) for r, c in zip(rewards, costs)
    ]
    assert script.told == pytest.approx(expected)
    gate = statistics.fmean(map(objectives.value, rewards[:5], costs[:5]))
    assert objectives.value(script.gates[5], costs[5]) == pytest.approx(gate)


# ---- stopped and continued, with the latencies of a run

OPERATOR = Operator("conv", ((1, 1, 8, 8),), (1, 1, 8, 8), (1, 1, 1, 1), (1, 1, 0, 0, 1, 1, 1))
TARGET = Target("torch", "cpu", 1, 1, (8, 8), 3, "float32", "a processor", "1.0")


@pytest.fixture
def timed(monkeypatch):
    """Latencies in which everything is real but the clock: its factor, and how often it ran."""
    clock = {"factor": 1.0, "timed": 0}

    def count(genotype):  # milliseconds that are measured; a fifth less is predicted
        return size(genotype)["params"] // 1000

    def rounds(runs, seconds, least):
        clock["timed"] += 1
        first, other = map(count, runs)
        return [(first, clock["factor"] * other)]

    def profile(target, space, draw, heartbeat):
        reference = count(draw(random.Random(0)))
        networks = (({OPERATOR: 5 * reference}, float(reference)),)
        return Profile(target, space, networks, {OPERATOR: 0.2})

    monkeypatch.setattr(meter, "operators_on", lambda target, model: {OPERATOR: 4 * count(model)})
    monkeypatch.setattr(meter, "deployed", lambda genotype, target: genotype)
    monkeypatch.setattr(meter, "rounds", rounds)
    monkeypatch.setattr(meter, "measured_profile", profile)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return clock


SETTINGS = SamplingSettings(
    predictor=PredictorConfig(initial=2, pool=30), evolution=EvolutionConfig(population=2)
)


def search(root, name, stop=None, target=TARGET):
    """Six candidates in two batches, with a strategy that learns; stopped before one of them."""

    def evaluate(index):
        if index == stop:
            raise KeyboardInterrupt
        return success(0.1 + 0.01 * (7 * index % 11))

    words = ("score", "latency", "macs")
    latencies = Latencies(target, SPACE, lambda genotype: genotype)
    costing = Costing(Costly(None, None), latencies)
    objectives = Objectives.of(words)
    strategy = make_strategy(
        name, SPACE, 0, SETTINGS, lambda genotype: objectives.goals(costing(genotype))
    )
    limits = "latency<21ms"
    return play(root, latencies, strategy, evaluate, words=words, limits=limits, batch=3)[1]


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize(
    ("name", "stop", "machine"),
    [("predictor", 4, "a processor"), ("evolution", 5, "another"), ("random", 3, "another")],
)
def test_a_stopped_search_continues_without_measuring_again(
    name, stop, machine, checkpoint, tmp_path, timed
):
    """In the middle of a batch, although the clock, or the machine, is another."""
    whole = search(tmp_path / "a", name)
    rejected = timed["timed"] - len(whole)  # after they were measured
    assert rejected > 0 or name == "predictor"
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "b", name, stop)
    (run,) = (tmp_path / "b").iterdir()
    if not checkpoint:
        (run / "checkpoint" / "state.pt").unlink()
    timed.update(factor=0.5, timed=0)
    records = search(tmp_path / "b", name, None, dataclasses.replace(TARGET, machine=machine))
    assert timed["timed"] == 0
    assert untimed(records) == untimed(whole)


# ---- settings


def test_weighted_costs_are_what_ppo_learns_from(tmp_path):
    words = ("score", "macs:0.1")
    strategy = make_strategy("ppo", SPACE, 0, SamplingSettings(objective=words))
    _, records = play(tmp_path, None, strategy, words=words, limits="params<60k")
    assert len(records) == 6


@pytest.mark.parametrize(
    ("words", "limits", "front", "timed"),
    [
        (("score",), (), False, False),
        (("score",), ("latency<1s",), False, True),
        (("score", "params"), (), True, False),
        (("score", "latency:0.1"), (), False, True),
    ],
)
def test_the_phase_of_settings(words, limits, front, timed, tmp_path):
    given = {"latency_size": "16x32"} if timed else {}
    settings = SamplingSettings(objective=words, constraint=limits, **given)
    evaluator = Costly(distinct(), success)
    evaluator.image, evaluator.deployed = (3, 8, 8), None
    phase = settings.phase("evolution", SPACE, 0, evaluator, 6, InProcess())
    assert phase.costing is not None
    assert (phase.strategy._goals is not None) == front
    assert bool(phase.published) == (len(words) > 1)
    assert (phase.costing.latencies is not None) == timed
    if timed:
        assert phase.costing.latencies.target.shape == (1, 3, 16, 32)
        table = tmp_path / "table.json"
        Profile(TARGET, "fast_nas", (({OPERATOR: 2}, 3.0),), {OPERATOR: 1.0}).write(table)
        message = (
            f"latency-table {table}: expected times for images [1, 3, 16, 32], got a table for "
            "[1, 3, 8, 8]; give --latency-size and --latency-batch, or make another with nasfast"
        )
        gone = dataclasses.replace(settings, latency_table=tmp_path / "gone.json")
        with pytest.raises(
            UserError, match=r"^latency-table: expected a file of .*/gone.json, whi"
        ):
            gone.phase("evolution", SPACE, 0, evaluator, 6, InProcess())
        settings = dataclasses.replace(settings, latency_table=table)
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            settings.phase("evolution", SPACE, 0, evaluator, 6, InProcess())
        assert settings.in_run(tmp_path) == settings, "the run has no copy yet"
        (tmp_path / "latency").mkdir()
        kept = table.rename(tmp_path / "latency" / "latency.json")
        assert settings.in_run(tmp_path).latency_table == kept


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_every_method(method):
    def settings(**given):
        return METHODS[method].search_settings(strategy=given.pop("strategy", "auto"), **given)

    assert settings().objectives == Objectives()
    assert settings(objective=("score", "macs")).objectives.several
    assert settings(strategy="ppo", objective=("score", "macs:0.1")).objectives.costs == ("macs",)
    message = (
        "objective: expected one number for the strategy ppo to learn from, got score macs; give "
        "the costs weights, such as macs:0.02, or use --strategy predictor or evolution"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        settings(strategy="ppo", objective=("score", "macs"))
    with pytest.raises(UserError, match=r"^objective: expected score among them, got mac"):
        settings(objective=("macs",))
    for given in ("360", "0x5", "3x4x5"):
        with pytest.raises(UserError, match=f"^latency_size: expected HEIGHTxWIDTH, .* '{given}'"):
            settings(latency_size=given)
    others = {
        "latency_backend": "onnxruntime",
        "latency_table": Path("t.json"),
        "latency_size": "8x8",
        "latency_batch": 2,
        "latency_threads": 1,
    }
    for name, value in others.items():
        flag = name.replace("_", "-")
        message = (
            f"{name}: expected --objective score latency or a constraint of latency with --{flag}, "
            f"got neither; add one, or leave --{flag} out"
        )
        with pytest.raises(UserError, match=f"^{message}$"):
            settings(objective=("score", "macs"), **{name: value})
        assert settings(constraint=("latency<9ms",), **{name: value}).needs_latency


@pytest.mark.parametrize(
    ("space", "count"),
    [
        (FastNASSpace(), 3),
        (FastNASSpace(num_layers=2), 0),
        (TemplateNASSpace(), 2),
        (NASFCOSSpace(), 1),
        (IRNASSpace(), 1),
    ],
)
def test_published_architectures_of_a_space(space, count):
    found = _published(space)
    assert len(found) == count
    assert len(set(found.values())) == count


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("latency<20ms", ("latency", 0.02)),
        (" latency <= 2.5 us ", ("latency", 2.5e-6)),
        ("memory<64MB", ("memory", 64e6)),
        ("memory<64 MiB", ("memory", 2**26)),
        ("memory<0.5GiB", ("memory", 2**29)),
        ("params<0.3M", ("params", 300_000)),
        ("macs<1.5G", ("macs", 1_500_000_000)),
    ],
)
def test_constraints(text, limit):
    found = constraint(text)
    assert (found.cost, found.most) == (limit[0], pytest.approx(limit[1]))
    assert found.setting == f'--constraint "{text}"'


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        *(
            (text, f"constraint: expected COST<VALUE of latency, .*, got '{text}'; correct it")
            for text in ("latency", "speed<3", "latency>20ms", "params=3", "latency:3", "macs<")
        ),
        *(
            (f"latency<{value}", f"expected a latency with its unit, one of us.*20ms, got '{value}")
            for value in ("20", "0ms", "20MB", "-1ms", "1e-3s", "ms")
        ),
        ("memory<64Mb", "expected a memory with its unit, one of kB.*as 64MB, got '64Mb'; corr"),
        ("params<0", "constraint params: expected a count such as 300000"),
        ("params<3X", "constraint params: expected a count such as 300000"),
        (
            "macs<3M macs<2M",
            'expected one limit of macs, got --constraint "macs<3M" and --constraint "macs<2M"; le',
        ),
    ],
)
def test_what_is_no_constraint(texts, message):
    with pytest.raises(UserError, match=message):
        SamplingSettings(constraint=tuple(texts.split()))


def test_a_limit_and_a_constraint_of_the_same_cost():
    with pytest.raises(UserError, match='of params, got --max-params 1M and --constraint "params<'):
        SamplingSettings(max_params="1M", constraint=("params<2M",))


@pytest.mark.parametrize("method", METHODS)
def test_a_table_is_found_from_any_directory(method, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = METHODS[method].parse_search(
        [method, "--latency-table", "table.json", "--objective", "score", "latency"]
    )
    assert config.latency_table == tmp_path / "table.json"
