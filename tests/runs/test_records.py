"""Records: round trips, versions, and each field that cannot be read."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasfast.runs.records import VERSION, Evaluation, Record
from nasfast.utils.errors import UserError

METRICS = {"miou": 0.4, "mean_accuracy": 0.5, "fw_iou": 0.6}
EVALUATION = Evaluation(
    rewards={"stage0": 0.41, "stage1": 0.52},
    metrics={"stage0": METRICS, "stage1": METRICS},
    costs={"params": 123_456, "macs": 4_208_200_000, "latency": 0.25},
    gate=0.4,
    seconds={"stage0_train": 12.5, "stage0_validate": 1.0},
    feedback="stage0",
)
FORM = {"space": "fast_nas", "cell": [8, [0, 0, 5, 2]]}
RECORD = Record(3, FORM, FORM, 7, EVALUATION, None, time="2026-01-02T03:04:05+00:00")
COSTS = {"params": 1, "macs": 2}
FAILED = Evaluation({}, {}, COSTS, None, {"stage0_train": 0.5}, "stage0", "stage0: out of memory")
STOPPED = Evaluation(
    {"a.1": 0.3, "a.2": 0.35}, {}, COSTS, 0.4, {}, "a", stopped={"gate": 0.36, "estimate": 0.4}
)
HALF = Evaluation({"b": 0.9}, {"b": METRICS}, COSTS, 0.4, {}, "b", failure="a: out of memory")

words = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
per_name = st.dictionaries(words, numbers, max_size=3)
evaluations = st.builds(
    Evaluation,
    rewards=st.dictionaries(words, numbers, min_size=1, max_size=4),
    metrics=st.dictionaries(words, per_name, max_size=2),
    costs=st.dictionaries(words, st.integers() | numbers).map(lambda costs: costs | COSTS),
    gate=st.none() | numbers,
    seconds=per_name,
    feedback=words,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(words, values, max_size=3)
records = st.builds(
    Record,
    index=st.integers(0),
    genotype=objects,
    canonical=objects,
    seed=st.integers(),
    evaluation=evaluations | st.sampled_from([FAILED, HALF, STOPPED]),
    duplicate_of=st.none() | st.integers(0),
    time=words,
    phase=st.integers(0),
    rejected=st.lists(st.dictionaries(words, st.integers() | numbers)).map(tuple),
)


def written(record):
    """Its line, as another process reads it."""
    return json.loads(json.dumps(record.to_json()))


@given(records, st.randoms())
def test_round_trip_keeps_the_order_of_the_stages_whatever_that_of_the_fields(record, random):
    form = written(record)
    rewards = list(form["evaluation"]["rewards"].items())
    random.shuffle(rewards)
    form["evaluation"]["rewards"] = dict(rewards)
    read = Record.from_json(form)
    assert read == record
    assert list(read.evaluation.rewards) == list(record.evaluation.rewards)
    assert read.score == record.score
    assert json.dumps(read.to_json()) == json.dumps(record.to_json())


@given(records, objects, objects, st.integers(VERSION + 1))
def test_fields_of_a_newer_version_are_kept(record, more, inner, version):
    known, form = written(record), written(record)
    form["version"] = version
    form |= {name: value for name, value in more.items() if name not in known}
    form["evaluation"] |= {k: v for k, v in inner.items() if k not in known["evaluation"]}
    read = Record.from_json(copy.deepcopy(form))
    assert written(read) == form
    assert Record.from_json(written(read)) == read
    assert replace(read, version=VERSION, unknown={}) == record


def test_an_evaluation_of_a_newer_record_may_be_repeated_by_this_version():
    form = RECORD.to_json() | {"version": VERSION + 1, "energy": 5}
    form["evaluation"] |= {"spread": 0.1}
    repeated = replace(RECORD, index=4, evaluation=Record.from_json(form).evaluation)
    assert Record.from_json(written(repeated)) == repeated


@given(objects.filter(bool), st.booleans(), st.sampled_from([1, VERSION]))
def test_unknown_fields_of_a_known_version_are_refused(more, inside, version):
    form = old_form() if version == 1 else written(RECORD)
    inner = form["evaluation"] if inside else form
    added = {f"new {name}": value for name, value in more.items()}
    inner |= added
    unknown = re.escape(", ".join(sorted(added)))
    with pytest.raises(UserError, match=f"(?s)missing: none, unknown: {unknown}$"):
        Record.from_json(form)


def old_form():
    """The first record of a run that version 1 wrote."""
    run = Path(__file__).parents[1] / "fixtures" / "version1" / "segmentation"
    return json.loads((run / "records.jsonl").read_text().splitlines()[0])


def test_version_1():
    form = old_form()
    record = Record.from_json(copy.deepcopy(form))
    old = form["evaluation"]
    assert (record.version, record.phase, record.evaluation.feedback) == (VERSION, 0, "stage0")
    assert record.evaluation.costs == {"params": old["params"], "macs": old["macs"]}
    assert (record.evaluation.params, record.evaluation.macs) == (old["params"], old["macs"])
    assert list(record.evaluation.rewards.items()) == sorted(old["rewards"].items())
    assert Record.from_json(written(record)) == record


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3(version):
    form = written(RECORD) | {"version": version}
    del form["evaluation"]["stopped"]
    if version == 2:
        del form["rejected"]
    before = copy.deepcopy(form)
    assert Record.from_json(form) == RECORD
    assert form == before


def test_what_a_rung_stopped_ranks_below_what_finished():
    finished = replace(STOPPED, rewards={"a.1": 0.1, "a.2": 0.1, "a": 0.1}, stopped=None)
    assert replace(RECORD, evaluation=STOPPED).score < replace(RECORD, evaluation=finished).score
    assert (STOPPED.told, STOPPED.stopped_after, STOPPED.rungs) == (0.4, 2, ["a.1", "a.2"])
    assert (finished.told, finished.stopped_after) == (0.1, None)
    assert (FAILED.told, HALF.told) == (None, 0.9)


@pytest.mark.parametrize("version", ["2", 0, -1, 2.0, True, None])
def test_no_version(version):
    message = f"record.version: expected an integer from 1, got {version!r}; the line is damaged"
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        Record.from_json(RECORD.to_json() | {"version": version})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda form: form.pop("seed"), "missing: seed"),
        (lambda form: form["evaluation"].pop("costs"), "missing: costs"),
        (lambda form: form.update(genotype=[1]), "record.genotype: expected an object"),
    ],
)
def test_a_newer_version_that_this_one_cannot_read(change, text):
    form = written(RECORD) | {"version": 7}
    change(form)
    match = (
        rf"^record: expected a form of version {VERSION} or one that adds to it, got version 7 "
        rf"\(.*{text}.*\); open it with the newer nasfast that wrote it, this is \d"
    )
    with pytest.raises(UserError, match=match):
        Record.from_json(form)


def test_score_orders_by_phase_stages_and_reward():
    def score(rewards, phase=0):
        evaluation = replace(EVALUATION, rewards=rewards)
        return replace(RECORD, evaluation=evaluation, phase=phase).score

    assert RECORD.score == (0, 2, 0.52)
    assert score({"z": 0.9}) < score({"z": 0.2, "a": 0.3}) < RECORD.score < score({"z": 0.1}, 1)
    assert replace(RECORD, evaluation=FAILED).score is None
    assert replace(RECORD, evaluation=HALF).score is None


def test_nothing_to_read():
    message = "Evaluation: expected a reward or a failure, got neither; give the failure's cause"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(EVALUATION, rewards={})
    with pytest.raises(UserError, match=r"rewards: expected a reward or a failure, got \{\}"):
        Evaluation.from_json(EVALUATION.to_json() | {"rewards": {}, "stages": []})
    with pytest.raises(UserError, match=r"^evaluation: expected the fields rewards, .* got none"):
        Evaluation.from_json({})
    with pytest.raises(UserError, match=r"^record: expected an object, got \[1\]"):
        Record.from_json([1])


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("record.index", "3", "an integer"),
        ("record.index", True, "an integer"),
        ("record.genotype", [1], "an object"),
        ("record.canonical", None, "an object"),
        ("record.seed", 1.5, "an integer"),
        ("record.phase", None, "an integer"),
        ("record.evaluation", [], "an object"),
        ("record.duplicate_of", "0", "an integer"),
        ("record.time", 5, "a string"),
        ("record.evaluation.rewards", 0.3, "an object"),
        ("record.evaluation.rewards.stage0", None, "a number"),
        ("record.evaluation.metrics.stage1.miou", "high", "a number"),
        ("record.evaluation.gate", "0.1", "a number"),
        ("record.evaluation.costs", 3, "an object"),
        ("record.evaluation.costs", {"params": 1}, '"params" and "macs"'),
        ("record.evaluation.costs.params", "many", "a number"),
        ("record.evaluation.seconds.stage0_train", False, "a number"),
        ("record.evaluation.stages", {}, "a list"),
        ("record.evaluation.stages", ["stage0"], "the stages of the rewards, ['stage0', 'stage1']"),
        ("record.evaluation.feedback", None, "a string"),
        ("record.evaluation.failure", 0, "a string"),
    ],
)
def test_malformed_field(path, value, expected):
    form = written(RECORD)
    *parents, last = path.split(".")[1:]
    inner = form
    for name in parents:
        inner = inner[name]
    inner[last] = value
    message = f"{path}: expected {expected}, got {value!r}; the line is damaged or was edited"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Record.from_json(form)
