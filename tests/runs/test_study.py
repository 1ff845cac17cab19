"""The run directory: durable records, atomic files, one writer, runs of other versions."""

import datetime
import itertools
import json
import multiprocessing
import os
import random
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from nasfast.runs.records import VERSION, Evaluation, Record
from nasfast.runs.study import Study
from nasfast.utils.errors import UserError
from nasfast.utils.seals import unsealed

OLD = Path(__file__).parents[1] / "fixtures" / "version1"
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)


def make_record(index, *rewards, failure=None, duplicate_of=None, phase=0):
    """A plausible record, of a success unless it has a failure."""
    rewards = rewards or (() if failure else (0.3, 0.4))
    named = {f"stage{i}": reward for i, reward in enumerate(rewards)}
    metrics = {stage: {"miou": reward - 0.05} for stage, reward in named.items()}
    costs, seconds = {"params": 2_000_000 + index, "macs": 10**9}, {"stage0_train": 1.5}
    evaluation = Evaluation(named, metrics, costs, 0.2, seconds, "stage0", failure)
    genotype = {"space": "fast_nas", "cell": [index], "connections": [[3, 3]]}
    when = "2026-01-01T00:00:00+00:00"
    return Record(index, genotype, genotype, 7, evaluation, duplicate_of, when, phase)


def append_all(study, records):
    """Append them; the best one's index after each."""
    best = []
    for record in records:
        study.append(record)
        best.append(json.loads((study.path / "best.json").read_text())["index"])
    return best


@pytest.fixture
def study(tmp_path):
    with Study.create(tmp_path / "runs", "segmentation", "demo", {}, {"gpu": None}) as study:
        yield study


def interrupt(*_):
    raise KeyboardInterrupt


def test_create_lays_out_the_directory(study, tmp_path):
    assert study.path.parent == tmp_path / "runs"
    assert study.path.name.endswith("-segmentation-demo")
    assert (study.env, study.method) == ({"gpu": None}, "segmentation")
    assert (study.records, study.best, study.ranking()) == ((), None, [])
    files = {"study.json", "config.toml", "env.json", "records.jsonl", "lock", "checkpoint"}
    assert {path.name for path in study.path.iterdir()} == files
    description = {"version": 2, "method": "segmentation", "ranking": "score"}
    assert unsealed(json.loads((study.path / "study.json").read_text()), "") == description


@pytest.mark.parametrize("whole", range(4))
def test_a_run_that_is_half_made_is_none(whole, tmp_path, monkeypatch):
    """Whichever file the crash came before."""
    calls = itertools.chain([os.replace] * whole, itertools.repeat(interrupt))
    monkeypatch.setattr(os, "replace", lambda source, target: next(calls)(source, target))
    with pytest.raises(KeyboardInterrupt):
        Study.create(tmp_path, "segmentation", "demo", {}, {})
    (path,) = tmp_path.iterdir()
    with pytest.raises(UserError, match=r"not a run directory: it has no .*records\.jsonl"):
        Study.open(path)


def test_config_round_trip(tmp_path):
    @dataclass(frozen=True)
    class Optimizer:
        betas: tuple[float, float] = (0.9, 0.999)
        clip: float | None = None

    table = {"text": 'quoted "é" \\ \n', "amp": True}
    config = {"seed": 3, "teacher": None, "data": Path("a/b"), "optimizer": Optimizer()}
    config["stages"] = ({"crop": (256, 256), "distill": None}, table)
    with Study.create(tmp_path, "segmentation", "demo", config, {}) as run:
        path = run.path
    assert Study.open(path, read_only=True).config == {
        "seed": 3,
        "data": "a/b",
        "optimizer": {"betas": [0.9, 0.999]},
        "stages": [{"crop": [256, 256]}, table],
    }


def test_config_of_a_wrong_type(tmp_path):
    with pytest.raises(TypeError, match=r"config train\.lr\[1\]: expected a bool, .* got NoneType"):
        Study.create(tmp_path, "segmentation", "demo", {"train": {"lr": [0.1, None]}}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b"])
def test_name_must_fit_a_directory(tmp_path, name):
    with pytest.raises(ValueError, match=r"name: expected letters, digits and .* got"):
        Study.create(tmp_path, "segmentation", name, {}, {})


def test_collisions_get_a_suffix(tmp_path, monkeypatch):
    monkeypatch.setattr("nasfast.runs.study.datetime.datetime", mock.Mock(now=lambda: NOW))
    paths = []
    for _ in range(3):
        with Study.create(tmp_path, "segmentation", "demo", {}, {}) as run:
            run.append(make_record(0))
            paths.append(run.path)
    stem = "20260102-030405-segmentation-demo"
    assert [path.name for path in paths] == [stem, f"{stem}-2", f"{stem}-3"]
    assert [len(Study.open(path).records) for path in paths] == [1, 1, 1]


def test_records_and_best_survive_reopening(study):
    records = [make_record(0), make_record(1, failure="x"), make_record(2, duplicate_of=0)]
    for record in records:
        study.append(record)
        at_once = Study.open(study.path, read_only=True)  # on the disk when `append` returns
        assert at_once.records == study.records
    study.close()
    best = study.path / "best.json"
    content = best.read_bytes()
    best.unlink()
    with Study.open(study.path) as reopened:
        assert reopened.records == tuple(records)
        assert best.read_bytes() == content
        reopened.append(make_record(3))
        assert len(reopened.records) == 4


RANKED = {
    "by score, of equals the earliest": (
        "score",
        [
            make_record(0, 0.5),
            make_record(1, 0.3, 0.4),
            make_record(2, failure="x"),
            make_record(3, 0.3, 0.4, duplicate_of=1),
            make_record(4, 0.35, 0.6),
            make_record(5, 0.9),
            make_record(6, 0.3, 0.4),
        ],
        [0, 1, 1, 1, 4, 4, 4],
        [4, 1, 6, 5, 0],
    ),
    "a later phase first, repeating nothing of an earlier one": (
        "score",
        [
            make_record(0, 0.5),
            make_record(1, 0.7, 0.8),
            make_record(2, 0.1, phase=1, duplicate_of=0),
            make_record(3, 0.2, phase=1),
            make_record(4, 0.2, phase=1, duplicate_of=3),
        ],
        [0, 1, 2, 3, 3],
        [3, 2, 1, 0],
    ),
    "the last first": (
        "last",
        [
            make_record(0, 0.9),
            make_record(1, 0.5),
            make_record(2, 0.4, duplicate_of=0),
            make_record(3, 0.7),
            make_record(4, 0.6, duplicate_of=1),
            make_record(5, failure="x"),
        ],
        [0, 1, 2, 3, 4, 4],
        [4, 3, 2],
    ),
}


@pytest.mark.parametrize("case", RANKED)
def test_ranking_and_best(case, tmp_path):
    kind, records, best, ranking = RANKED[case]
    with Study.create(tmp_path, "segmentation", "demo", {}, {}, ranking=kind) as study:
        assert append_all(study, records) == best
    reader = Study.open(study.path, read_only=True)
    assert [record.index for record in reader.ranking()] == ranking
    assert reader.best == records[ranking[0]]


def test_failures_only_have_no_best(study):
    study.append(make_record(0, failure="x"))
    assert study.best is None
    assert not (study.path / "best.json").exists()


def test_index_out_of_order(study):
    message = r"record index: expected 0 .*, got 3; append every record once, in order"
    with pytest.raises(ValueError, match=message):
        study.append(make_record(3))


def test_full_disk_leaves_no_torn_line(study, monkeypatch):
    study.append(make_record(0))

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=r"No space left on device: '.*records\.jsonl'"):
            study.append(make_record(1))
        with pytest.raises(OSError, match=r"No space left on device: '.*state\.pt'"):
            study.save_checkpoint({"step": 1})
    study.append(make_record(1))
    study.close()
    assert Study.open(study.path, read_only=True).records == (make_record(0), make_record(1))


def test_torn_last_line_at_every_byte(study):
    records = (make_record(0), make_record(1), make_record(2))
    append_all(study, records)
    study.close()
    file = study.path / "records.jsonl"
    whole = file.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for data in (whole[:start] + bytes(100), *(whole[:n] for n in range(start, len(whole)))):
        file.write_bytes(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert Study.open(study.path, read_only=True).records == records[:2]
            assert file.read_bytes() == data
            assert caught == []
            with Study.open(study.path) as reopened:
                assert reopened.records == records[:2]
        assert file.read_bytes() == whole[:start]
        assert ["line 3 was torn" in str(w.message) for w in caught] == [True] * (len(data) > start)
    with Study.open(study.path) as reopened:
        reopened.append(records[2])
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda a, b, c: a + b[:20] + "\n" + c, "line 2: expected one JSON record, got"),
        (lambda a, b, c: a + "{}\n" + c, "line 2: not a record of this version"),
        (lambda a, b, c: a + "\n" + b + c, "line 2: expected one JSON record, got"),
        (lambda a, b, c: a + "[" * 10**5 + "\n" + c, "line 2: expected one JSON record, got"),
        (lambda a, b, c: a + c, "line 2: not a record.*index: expected 1, got 2"),
    ],
)
def test_broken_middle_line(study, damage, text):
    append_all(study, [make_record(0), make_record(1), make_record(2)])
    study.close()
    file = study.path / "records.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(damage(*lines))
    with pytest.raises(UserError, match=rf"records\.jsonl, {text}"):
        Study.open(study.path)
    file.write_text("".join(lines))
    Study.open(study.path).close()


def test_not_a_run_directory(tmp_path):
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match=r"not a run .* no env\.json, records\.jsonl; give"):
        Study.open(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "config.toml"):
        with pytest.raises(UserError, match=r"it has no config\.toml, env\.json, records"):
            Study.open(path)


@pytest.mark.parametrize("run", ["segmentation", "restoration", "restoration_random"])
def test_runs_of_version_1(run, tmp_path):
    path = shutil.copytree(OLD / run, tmp_path / run)
    file = path / "records.jsonl"
    before = file.read_text()
    reader = Study.open(path, read_only=True)
    assert file.read_text() == before
    assert reader.method == run.removesuffix("_random")
    records, best = reader.records, reader.best
    assert [record.index for record in records] == list(range(before.count("\n")))
    assert reader.load_checkpoint() is not None
    if run == "restoration":  # a gradient search: where it ended
        assert (best, best.evaluation.feedback) == (records[-1], "supernet")
    else:
        scores = [record.score for record in records]
        assert [record.score for record in reader.ranking()] == sorted(scores, reverse=True)
        assert {record.evaluation.feedback for record in records} == {"stage0"}
    assert json.loads((OLD / run / "best.json").read_text())["index"] == best.index

    better = make_record(len(records), *[0.99] * len(best.evaluation.rewards))
    with Study.open(path) as study:
        assert study.records == records
        study.append(better)
    assert (
        Record.from_json(unsealed(json.loads((path / "best.json").read_text()), ""))
        == study.best
        == better
    )
    assert file.read_text().startswith(before)
    assert Study.open(path, read_only=True).records == (*records, better)


def test_a_run_without_a_method(study):
    study.close()
    (study.path / "study.json").unlink()
    with pytest.raises(UserError, match=r"config\.toml: expected the name of .* got None; restore"):
        Study.open(study.path)


def test_records_of_a_newer_version(study):
    append_all(study, [make_record(0, 0.1), make_record(1, 0.2)])
    study.close()
    file = study.path / "records.jsonl"
    forms = [unsealed(json.loads(line), "") for line in file.read_text().splitlines()]
    for form in forms:
        form |= {"version": VERSION + 1, "energy": {"joule": 3}}
    file.write_text("".join(json.dumps(form) + "\n" for form in forms))
    with pytest.warns(UserWarning, match="records of version 6, this nasfast knows 5") as caught:
        reopened = Study.open(study.path)
    assert len(caught) == 1
    with reopened:
        assert unsealed(json.loads((study.path / "best.json").read_text()), "") == forms[1]
        reopened.append(make_record(2))
    form = json.loads(file.read_text().splitlines()[2])
    assert (form["version"], set(forms[0]) - set(form)) == (VERSION, {"energy"})


def test_a_run_of_a_newer_version(study):
    append_all(study, [make_record(0, 0.1), make_record(1, 0.2)])
    study.close()
    description = {"version": 3, "method": "segmentation", "ranking": "pareto", "phases": 2}
    (study.path / "study.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"study\.json: .* continue the run with that one$"):
        Study.open(study.path)
    with pytest.warns(UserWarning, match=r"study\.json: expected version 2, got 3 of nasfast"):
        reader = Study.open(study.path, read_only=True)
    assert reader.best == make_record(1, 0.2)


def test_checkpoint_round_trip(study):
    assert study.load_checkpoint() is None
    study.save_checkpoint({"step": 1})
    state = {"weight": torch.randn(3, 2), "rng": random.Random(1).getstate(), "names": ["a", None]}
    study.save_checkpoint(state)
    loaded = study.load_checkpoint()
    assert loaded is not None
    torch.testing.assert_close(loaded.pop("weight"), state.pop("weight"), rtol=0, atol=0)
    assert loaded == state


def test_failed_checkpoint_keeps_the_old_one(study, monkeypatch):
    study.save_checkpoint({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study.save_checkpoint({"step": 2})
    assert study.load_checkpoint() == {"step": 1}
    study.close()
    names = [path.name for path in (study.path / "checkpoint").iterdir()]
    assert names == ["state.pt"]
    (study.path / "checkpoint" / ".state.pt.123.tmp").write_bytes(b"of one that was killed")
    Study.open(study.path).close()
    assert [path.name for path in (study.path / "checkpoint").iterdir()] == names


def test_second_writer_is_refused(study):
    holder = rf"is being written by process {os.getpid()}; wait for it or stop it first"
    with pytest.raises(UserError, match=holder):
        Study.open(study.path)
    study.append(make_record(0))
    study.close()
    study.close()
    Study.open(study.path).close()


def test_reader_and_closed_study_do_not_write(study):
    study.close()
    for closed in (study, Study.open(study.path, read_only=True)):
        for write in (lambda s: s.append(make_record(0)), lambda s: s.save_checkpoint({})):
            with pytest.raises(RuntimeError, match=r"closed or open for reading only; use Study\."):
                write(closed)


def test_forked_child_does_not_hold_the_lock(study):
    fork = multiprocessing.get_context("fork")
    started, end = fork.Event(), fork.Event()
    child = fork.Process(target=lambda: (started.set(), end.wait()))
    child.start()
    try:
        assert started.wait(60)
        with pytest.raises(UserError, match="is being written"):
            Study.open(study.path)
        study.close()
        Study.open(study.path).close()
    finally:
        end.set()
        child.join()


# ---- files of the best record


def kept(study):
    return {
        str(path.relative_to(study.path / "predictions")): path.read_bytes()
        for path in (study.path / "predictions").rglob("*")
        if path.is_file()
    }


def test_the_best_record_keeps_its_files(study):
    """Equal ones, worse ones and failures keep none; a best one without files has none."""
    found = []
    for record in (
        make_record(0, failure="stage0: out of memory"),
        make_record(1, 0.4),
        make_record(2, 0.3, 0.2),
        make_record(3, 0.3, 0.2),
        make_record(4, 0.3, 0.5),
        make_record(5, 0.3, 0.1),
    ):
        study.keep_files(record, {"of.txt": b"%d" % record.index, "a.png": b"png"})
        study.append(record)
        found.append({name: data for name, data in kept(study).items() if name.endswith("txt")})
    best = [None, 1, 2, 2, 4, 4]
    assert found == [{} if i is None else {f"architecture-{i}/of.txt": b"%d" % i} for i in best]
    assert study.best_files == study.path / "predictions" / "architecture-4"
    last = make_record(6, 0.9, 0.9)
    study.keep_files(last, {})
    study.append(last)
    assert kept(study) == {}
    assert "files" not in (study.path / "records.jsonl").read_text()


def test_the_last_record_keeps_its_files_where_it_is_the_choice(tmp_path):
    with Study.create(tmp_path, "restoration", "demo", {}, {}, ranking="last") as study:
        for record in (make_record(0, 0.4), make_record(1, 0.2), make_record(2, 0.4)):
            study.keep_files(record, {"of.txt": b"%d" % record.index})
            study.append(record)
            name = f"architecture-{record.index}/of.txt"
            assert kept(study) == {name: b"%d" % record.index}


def test_a_crash_between_files_and_record_loses_neither(study, monkeypatch):
    first, second = make_record(0, 0.3), make_record(1, 0.4)
    study.keep_files(first, {"of.txt": b"0"})
    study.append(first)
    study.keep_files(second, {"of.txt": b"torn", "old.txt": b""})
    assert (study.best_files / "of.txt").read_bytes() == b"0"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            study.keep_files(second, {"of.txt": b"1"})
    study.keep_files(second, {"of.txt": b"1"})
    study.append(second)
    assert kept(study) == {"architecture-1/of.txt": b"1"}
    assert not list(study.path.glob("predictions/.*"))
