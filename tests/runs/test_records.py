import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasfast.runs.records import Evaluation, Record

METRICS = {"miou": 0.4, "mean_accuracy": 0.5, "fw_iou": 0.6}
EVALUATION = Evaluation(
    rewards={"stage0": 0.41, "stage1": 0.52},
    metrics={"stage0": METRICS, "stage1": METRICS},
    gate=0.4,
    params=123_456,
    macs=4_208_200_000,
    seconds={"stage0_train": 12.5, "stage0_validate": 1.0},
)
RECORD = Record(
    index=3,
    genotype={"space": "fast_nas", "cell": [8, [0, 0, 5, 2]]},
    canonical={"space": "fast_nas", "cell": [8, [0, 0, 2, 5]]},
    seed=7,
    evaluation=EVALUATION,
    duplicate_of=None,
    time="2026-01-02T03:04:05+00:00",
)
FAILED = Evaluation({}, {}, None, 1, 2, {"stage0_train": 0.5}, failure="out of memory")

HALF = Evaluation(
    {"stage0": 0.9}, {"stage0": METRICS}, 0.4, 1, 2, {}, failure="stage1: out of memory (fake)"
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
per_name = st.dictionaries(st.text(max_size=8), numbers, max_size=3)
evaluations = st.builds(
    Evaluation,
    rewards=st.dictionaries(st.sampled_from(["stage0", "stage1"]), numbers, min_size=1),
    metrics=st.dictionaries(st.text(max_size=8), per_name, max_size=2),
    gate=st.none() | numbers,
    params=st.integers(0),
    macs=st.integers(0),
    seconds=per_name,
)
objects = st.dictionaries(st.text(), st.none() | st.integers() | st.lists(st.integers()))
records = st.builds(
    Record,
    index=st.integers(0),
    genotype=objects,
    canonical=objects,
    seed=st.integers(),
    evaluation=evaluations | st.sampled_from([FAILED, HALF]),
    duplicate_of=st.none() | st.integers(0),
    time=st.text(),
)


@given(records)
def test_round_trip(record):
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_score_orders_by_stages_then_reward():
    def score(rewards):
        evaluation = Evaluation(rewards, {}, None, 0, 0, {})
        return Record(0, {}, {}, 0, evaluation, None, "").score

    assert RECORD.score == (2, 0.52)
    assert score({"stage0": 0.9}) < score({"stage1": 0.3, "stage0": 0.2}) < RECORD.score
    assert Record(0, {}, {}, 0, FAILED, None, "").score is None


def test_neither_reward_nor_failure():
    message = "Evaluation: expected a reward or a failure, got neither; give the failure's cause"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Evaluation({}, {}, None, 0, 0, {})


def test_a_failure_keeps_finished_stages_but_has_no_score():
    record = dataclasses.replace(RECORD, evaluation=HALF)
    assert record.score is None
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("record.index", "3", "an integer"),
        ("record.index", True, "an integer"),
        ("record.genotype", [1], "an object"),
        ("record.canonical", None, "an object"),
        ("record.seed", 1.5, "an integer"),
        ("record.evaluation", [], "an object"),
        ("record.duplicate_of", "0", "an integer"),
        ("record.time", 5, "a string"),
        ("record.evaluation.rewards", 0.3, "an object"),
        ("record.evaluation.rewards.stage0", None, "a number"),
        ("record.evaluation.metrics.stage1.miou", "high", "a number"),
        ("record.evaluation.gate", "0.1", "a number"),
        ("record.evaluation.params", 1.0, "an integer"),
        ("record.evaluation.macs", None, "an integer"),
        ("record.evaluation.seconds.stage0_train", False, "a number"),
        ("record.evaluation.failure", 0, "a string"),
    ],
)
def test_malformed_field(path, value, wanted):
    obj = json.loads(json.dumps(RECORD.to_json()))
    *parents, last = path.split(".")[1:]
    inner = obj
    for name in parents:
        inner = inner[name]
    inner[last] = value
    message = f"{path}: expected {wanted}, got {value!r}; the line is damaged or was edited"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Record.from_json(obj)


def test_missing_and_unknown_fields():
    obj = RECORD.to_json()
    obj["sed"] = obj.pop("seed")
    with pytest.raises(
        ValueError, match=(r"record: expected the fields index, .*; " r"missing: seed, un")
    ):
        Record.from_json(obj)
    with pytest.raises(ValueError, match=r"unknown: sed$"):
        Record.from_json(obj)
    with pytest.raises(
        ValueError, match=(r"evaluation: expected the fields rewards, " r".* got none; mi")
    ):
        Evaluation.from_json({})
    with pytest.raises(ValueError, match=r"record: expected an object, got \[1\]"):
        Record.from_json([1])
