"""What a search looks for: words, values, gates, fronts, and the files of a run."""

import dataclasses
import functools
import json
import math
import random
import statistics

import pytest
from test_study import make_record

from nasfast.runs.objectives import Objectives, front
from nasfast.runs.records import Evaluation
from nasfast.runs.study import Study
from nasfast.searches.halving import rung_gates
from nasfast.utils.errors import UserError

COSTS = "score, latency, params, macs, memory"


def costed(index, reward, **costs):
    """A record of a candidate with one stage and such costs."""
    record = make_record(index, reward)
    evaluation = dataclasses.replace(record.evaluation, costs=record.evaluation.costs | costs)
    return dataclasses.replace(record, evaluation=evaluation)


def evaluated(reward, stopped=None, **costs):
    rewards = {"stage0.1": 0.1} if stopped else {"stage0": reward, "stage1": reward / 2}
    stop = {"gate": 0.2, "estimate": reward} if stopped else None
    return Evaluation(rewards, {}, costs, None, {}, "stage0", None, stop)


@pytest.mark.parametrize(
    ("words", "costs", "several"),
    [
        (["score"], (), False),
        (["latency", "score", "macs"], ("latency", "macs"), True),
        (["score", "memory:0.02", "params:1"], ("memory", "params"), False),
    ],
)
def test_objectives(words, costs, several):
    found = Objectives.of(words)
    assert (found.costs, found.several) == (costs, several)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            "score speed",
            f"expected {COSTS}, or one with a weight such as latency:0.02, got 'spee",
        ),
        ("score macs macs", "expected each once, got macs twice; leave one out"),
        ("latency params", "expected score among them, got latency params; without it"),
        ("", "expected score among them, got none; without it the smallest network would be the"),
        ("score:2 macs:1", "expected score without a weight, got score:2; the weight of a cost"),
        ("score macs:1 params", "expected weights for all costs or for none, got params without;"),
        *(
            (
                f"score macs:{weight}",
                f"expected a weight above 0, .* got 'macs:{weight}'; wri",
            )
            for weight in ("", "x", "0", "-1", "nan", "inf", "1:2")
        ),
    ],
)
def test_what_is_no_objective(words, text):
    with pytest.raises(UserError, match=f"^objective: {text}"):
        Objectives.of(words.split())


def test_a_weight_is_what_a_halving_is_worth():
    objectives = Objectives.of(["score", "latency:0.02", "params:0.1"])
    cost = {"latency": 0.016, "params": 2e6}
    value = objectives.value(0.5, cost)
    assert objectives.value(0.5, cost | {"latency": 0.008}) == pytest.approx(value + 0.02)
    assert objectives.value(0.5, cost | {"params": 4e6}) == pytest.approx(value - 0.1)
    assert Objectives.of(["score", "latency"]).value(0.5, cost) == 0.5
    assert math.isfinite(objectives.value(0.5, {"latency": 0.0, "params": 0}))


# ---- gates


BEFORE = [evaluated(0.3, macs=2), evaluated(0.5, True, macs=8), evaluated(0.4, macs=4)]


def test_gates_are_running_means_with_estimates_of_what_was_stopped():
    gates = Objectives().gates(BEFORE, {})
    assert gates == {
        "stage0": statistics.fmean([0.3, 0.5, 0.4]),
        "stage1": statistics.fmean([0.15, 0.2]),
    }
    assert Objectives().gates([], {}) == {}


def test_a_gate_of_weighted_values_follows_from_the_costs_of_the_candidate():
    objectives = Objectives.of(["score", "macs:0.1"])
    mean = statistics.fmean([0.3 - 0.1, 0.5 - 0.3, 0.4 - 0.2])
    for macs in (1, 4, 64):
        gate = objectives.gates(BEFORE, {"macs": macs})["stage0"]
        assert objectives.value(gate, {"macs": macs}) == pytest.approx(mean)


def on_a_line(count=8, slope=0.05):
    return [evaluated(0.4 + slope * i, macs=2**i, params=1000) for i in range(count)]


@pytest.mark.parametrize(
    ("before", "macs", "gate"),
    [
        (on_a_line(5), 1, 0.5),  # too few: their mean
        (on_a_line(), 2**2, 0.5),
        (on_a_line(), 2**2.5, 0.525),
        (on_a_line(), 2.0**-40, 0.4),  # no further than what was found
        (on_a_line(), 2.0**40, 0.75),
        (on_a_line(slope=-0.05), 1, 0.225),  # larger and worse: no line, the mean
        ([evaluated(0.1 * i, macs=4, params=1) for i in range(6)], 64, 0.25),  # no spread
    ],
)
def test_on_the_way_to_a_front_a_gate_is_what_is_expected_at_such_costs(before, macs, gate):
    objectives = Objectives.of(["score", "macs", "params"])
    found = objectives.gates(before, {"macs": macs, "params": 1000})
    assert found["stage0"] == pytest.approx(gate, abs=2e-3)


# ---- fronts


@pytest.mark.parametrize(
    ("costs", "points", "expected"),
    [
        # reward and costs of each; the order is by reward
        ("macs", [(0.5, 10), (0.6, 10), (0.4, 9.9), (0.3, 11), (0.2, 1)], [1, 2, 4]),
        ("latency", [(0.6, 10), (0.5, 9.6), (0.4, 9.4), (0.3, 9.0)], [0, 2]),  # ties of 5 %
        ("latency", [(0.6, 10), (0.5, 9.6), (0.4, 9.2), (0.3, 8.7)], [0, 2, 3]),
        ("macs", [(0.5, 8), (0.5, 7), (0.5, 7)], [1]),  # equal rewards: the cheapest, the first
        ("latency macs", [(0.6, 10, 5), (0.5, 9.9, 4), (0.4, 5, 9), (0.4, 9.9, 5)], [0, 1, 2]),
    ],
)
def test_front(costs, points, expected):
    names = costs.split()
    records = [
        costed(i, reward, **dict(zip(names, values))) for i, (reward, *values) in enumerate(points)
    ]
    assert [record.index for record in front(records, names)] == expected


def run_of(root, objective, points):
    """Records of (reward, macs), and the index in best.json, the indices in front.json after each;
    the path of the run."""
    found = []
    with Study.create(root, "segmentation", "demo", {"objective": objective}, {}) as study:
        for i, (reward, macs) in enumerate(points):
            study.append(costed(i, reward, macs=macs))
            best = json.loads((study.path / "best.json").read_text())["index"]
            path = study.path / "front.json"
            kept = json.loads(path.read_text()) if path.exists() else {"front": []}
            assert kept.get("objectives", objective) == objective
            found.append((best, [record["index"] for record in kept["front"]]))
    return found, study.path


POINTS = [(0.5, 8), (0.4, 9), (0.4, 2), (0.6, 16), (0.4, 1)]


def test_a_run_keeps_its_front(tmp_path):
    found, path = run_of(tmp_path, ["score", "macs"], POINTS)
    assert found == [(0, [0]), (0, [0]), (0, [0, 2]), (3, [3, 0, 2]), (3, [3, 0, 4])]
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    study = Study.open(path, read_only=True)
    assert [record.index for record in study.front()] == [3, 0, 4]
    assert study.point(study.front()[1]) == (-0.5, 3.0)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == files
    wanted = (path / "front.json").read_bytes()
    (path / "front.json").write_text("torn")  # what a crash left
    Study.open(path).close()
    assert (path / "front.json").read_bytes() == wanted


def test_weights_rank(tmp_path):
    found, path = run_of(tmp_path, ["score", "macs:0.1"], POINTS)
    assert found == [(0, []), (0, []), (2, []), (2, []), (4, [])]  # values .2 .08 .3 .2 .4
    study = Study.open(path, read_only=True)
    assert [record.index for record in study.ranking()] == [4, 2, 0, 3, 1]
    assert study.front() == study.ranking()[:1]


def test_what_passed_fewer_stages_is_not_on_the_front(tmp_path):
    with Study.create(tmp_path, "segmentation", "demo", {"objective": ["score", "macs"]}, {}) as s:
        s.append(make_record(0, 0.9))
        s.append(make_record(1, 0.2, 0.3))
        s.append(make_record(2, failure="stage0: out of memory"))
        assert [record.index for record in s.front()] == [1]


def test_a_run_without_objectives_has_no_front_file(tmp_path):
    with Study.create(tmp_path, "segmentation", "demo", {}, {}) as study:
        study.append(make_record(0))
        assert (study.front(), study.published) == ([study.best], {})
        study.write_published({"fast_nas_arch0": {"macs": 5.0}})
        assert study.published == {"fast_nas_arch0": {"macs": 5.0}}
    assert not (study.path / "front.json").exists()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("objective = 3", "config.toml: objective: expected a list of words such as .*, got 3; re"),
        ('objective = "score"', "objective: expected a list of words such as .*, got 'score'; re"),
        ('objective = ["score", 1]', r"expected a list of words such as .*, got \['score', 1\]"),
        ('objective = ["score", "speed"]', f"config.toml: objective: expected {COSTS}, or"),
        ('objective = ["score", "latency"]', "line 1: .*costs: expected latency, which is an obj"),
    ],
)
def test_a_damaged_objective(line, text, tmp_path):
    with Study.create(tmp_path, "segmentation", "demo", {}, {}) as study:
        study.append(make_record(0))
    (study.path / "config.toml").write_text(line + "\n")
    for read_only in (True, False):
        with pytest.raises(UserError, match=text):
            Study.open(study.path, read_only=read_only)


def test_the_gate_of_a_large_network_with_two_costs_that_go_together():
    rng = random.Random(0)
    before = []
    for _ in range(20):
        size = 2.0 ** rng.uniform(0, 3)
        costs = {"latency": size * rng.uniform(0.95, 1.05), "macs": size, "params": 1.0}
        reward = 0.5 + 0.02 * math.log2(size) + rng.uniform(-0.02, 0.02)
        before.append(Evaluation({"stage0": reward}, {}, costs, None, {}, "stage0"))
    objectives = Objectives.of(["score", "latency", "macs"])
    (gate,) = objectives.gates(before, {"latency": 8.0, "macs": 8.0}).values()
    assert gate == pytest.approx(0.56, abs=0.02)
    assert gate < max(each.rewards["stage0"] for each in before)


def test_rungs_stop_what_is_worse_than_its_costs_let_one_expect():
    """Small networks score less: on the way to a front they must not stop for it."""
    before = []
    for i, size in enumerate([1.0, 2.0, 4.0, 8.0] * 3):
        score = 0.1 + 0.1 * math.log2(size) + 0.01 * (i // 4)
        rewards = {"stage0.1": score, "stage0": score}
        before.append(Evaluation(rewards, {}, {"macs": size}, None, {}, "stage0"))
    plain, front, weighted = (
        functools.partial(rung_gates, before, 0.5, Objectives.of(words))
        for words in (["score"], ["score", "macs"], ["score", "macs:0.1"])
    )
    assert plain({})["stage0.1"] == rung_gates(before, 0.5)["stage0.1"] == pytest.approx(0.26)
    for gates in (front, weighted):
        found = [gates({"macs": size})["stage0.1"] for size in (1.0, 2.0, 4.0, 8.0)]
        assert found == pytest.approx([0.11, 0.21, 0.31, 0.41], abs=2e-3)
