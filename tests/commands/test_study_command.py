"""Architectures of a run trained longer: what is kept, what continues, the figures, the report."""

import json
import pickle
import shutil
import statistics

import pytest
from search_runs import Crash

import nasfast
from nasfast.commands import study, train
from nasfast.methods.registry import METHODS
from nasfast.methods.segmentation.train import DecoderTraining
from nasfast.runs.correlation import FOLDER, CorrelationStudy, draw
from nasfast.runs.study import Study
from nasfast.training.loop import NonFiniteLossError
from nasfast.utils.seals import unsealed
from nasfast.workers import WorkerConfig

FLAGS = [
    "--device",
    "cpu",
    "--epochs",
    "1",
    "--batch-size",
    "4",
    "--crop",
    "32",
    "--decoder.agg-size",
    "8",
]
SIZE = ["--top", "2", "--others", "1", "--seeds", "2"]
ALONE = [*SIZE, "--no-control"]


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def results(run):
    return json.loads((run / FOLDER / "study-results.json").read_text())


def keep_records(run, count):
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[:count]))


class Elsewhere:
    """Evaluates as a worker does, with what has been pickled."""

    def __init__(self, build):
        self.trainer = pickle.loads(pickle.dumps(build))("cpu")

    def evaluate(self, trainer, jobs, progress):
        return (self.trainer(job.genotype, job.index, job.gates) for job in jobs)

    def close(self):
        pass


@pytest.fixture
def begun(monkeypatch):
    """What `finish` is given: (architecture, seed) of each network that was trained."""
    found, finish = [], DecoderTraining.finish

    def counted(training):
        found.append(training.out.name)
        return finish(training)

    monkeypatch.setattr(DecoderTraining, "finish", counted)
    return found


def test_a_killed_study_trains_what_is_missing(run, begun, monkeypatch, capsys):
    save, calls = train.save_checkpoint, iter(range(100))

    def crash(path, state):
        save(path, state)
        if next(calls) == 2:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", crash)
        with pytest.raises(Crash):
            study.main([str(run), *ALONE, *FLAGS])
    assert [t["failure"] for t in results(run)["trainings"]] == [None, None]
    monkeypatch.setattr(WorkerConfig, "engine_for", lambda config, build: Elsewhere(build))
    assert study.main([*FLAGS, *ALONE, "--workers", "2", str(run)]) == 0
    assert len(begun) == len(set(begun)) == 6
    found = results(run)
    assert len(found["trainings"]) == found["summary"]["trainings"] == 6
    for name in begun:
        assert (run / FOLDER / name / "model.safetensors").is_file()
        assert not (run / FOLDER / name / "checkpoint.pt").exists()
    # nothing is trained again, more seeds are added, and other settings are refused
    before = found["trainings"]
    assert study.main([str(run), *ALONE, *FLAGS]) == 0
    assert results(run)["trainings"] == before
    assert len(begun) == 6
    capsys.readouterr()
    assert study.main([str(run), *ALONE, *FLAGS, "--epochs", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: study {run}: expected epochs 1, as the study began, got 2; give that, or move "
        f"{run / FOLDER} away for another study"
    )
    changed = unsealed(results(run), "")
    changed["inputs"]["training data"] = "other"
    (run / FOLDER / "study-results.json").write_text(json.dumps(changed))
    assert study.main([str(run), *ALONE, *FLAGS, "--seeds", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: study {run}: expected the training data that the study began ")
    page = (run / "report.html").read_text()
    assert "Does the search's reward predict?" in page
    assert "Spearman" in page


def test_a_random_search_of_the_same_budget(run, capsys):
    keep_records(run, 3)
    assert study.main([str(run), "--top", "3", "--seeds", "1", *FLAGS]) == 0
    (control,) = (run / FOLDER / "random").iterdir()
    found = Study.open(control, read_only=True)
    settings, ours = found.config, Study.open(run, read_only=True).config
    assert (settings["strategy"], settings["budget"], settings["seed"]) == ("random", 3, 0)
    assert settings["stage0"] == ours["stage0"]
    summary = results(run)["summary"]
    assert summary["random_search"]["stage0"]["control"]["candidates"] == 3
    means = {
        i: statistics.fmean(scores) for i, scores in CorrelationStudy.read(run).scores().items()
    }
    assert f"best     architecture {max(means, key=means.get)}, mIoU " in capsys.readouterr().out
    assert "Against a random search of the same budget" in (run / "report.html").read_text()
    shutil.rmtree(control)  # the report goes on without it
    assert CorrelationStudy.read(run).summary(Study.open(run, read_only=True))["random_search"] is (
        None
    )
    assert study.main([str(run), *SIZE, *FLAGS, "--control", str(run)]) == 2


def test_failures_are_counted_out(run, monkeypatch, capsys):
    def fail(training, wanted="arch-"):
        if wanted in training.out.name:
            raise NonFiniteLossError("training loss is nan after 1 steps")
        return "loss"

    monkeypatch.setattr(DecoderTraining, "round", fail)
    assert study.main([str(run), *ALONE, *FLAGS]) == 1
    assert capsys.readouterr().err.startswith(
        "error: study: all of the 6 trainings failed (6 x training loss is nan after 1 steps); "
    )
    monkeypatch.undo()
    bad, round_ = results(run)["top"][0], DecoderTraining.round
    monkeypatch.setattr(
        DecoderTraining,
        "round",
        lambda t: fail(t) if f"arch-{bad}-seed-1" == t.out.name else round_(t),
    )
    summary = nasfast.study(
        run,
        quiet=True,
        top=2,
        others=1,
        seeds=2,
        no_control=True,
        **{"device": "cpu", "epochs": 1, "batch_size": 4, "crop": 32, "decoder.agg_size": 8},
    )
    assert (summary["failed"], summary["architectures"]) == (1, 3)
    assert "1 of 6 trainings failed; left out." in (run / "report.html").read_text()


def test_the_sample_is_random_and_grows(tiny_run):
    pool = Study.open(tiny_run, read_only=True).ranking()
    top, sample = draw(pool, 2, 2)
    assert list(top) == [record.index for record in pool[:2]]
    assert len(set(sample) - set(top)) == 2
    assert draw(pool, 2, 3)[1][: len(sample)] == sample
    assert set(draw(pool, 2, 99)[1]) == {record.index for record in pool}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--top", "1", "--others", "1"], "study: expected --top and --others of 3 architectures"),
        (["--rank", "2"], "study: expected no rank, which the study decides for each of its"),
        (["--no-control", "--control", "x"], "study: expected --control or --no-control, got both"),
        (["--control", "RUN"], "control RUN: expected a finished search of segmentation with"),
        (["--phase", "2"], "study RUN: expected a phase from 1 to 1, got 2; leave --phase out for"),
    ],
)
def test_settings_that_are_refused(words, text, run, capsys):
    assert study.main([str(run), *(w.replace("RUN", str(run)) for w in words)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {text}".replace("RUN", str(run)))
    assert not (run / FOLDER).exists()


def test_architectures_of_each_phase(run):
    """As of a search in two: the first three records, then the others."""
    lines = (run / "records.jsonl").read_text().splitlines()
    records = [
        unsealed(json.loads(line), "") | {"phase": int(i > 2)} for i, line in enumerate(lines)
    ]
    (run / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = Study.open(run, read_only=True)
    first, second = ({record.index for record in study.pool_of(found, n)} for n in (1, 2))
    assert first == {0, 1, 2}
    assert second == {record.index for record in study.pool_of(found)}
    assert not first & second
    detection = METHODS["detection"].search_with({"preset": "quick"}).with_budgets([3, 4])
    assert (detection.budget, detection.head_phase.budget) == (3, 4)


def damage(run, how):
    if how == "few":
        keep_records(run, 2)
    elif how == "gradient":
        (run / "study.json").write_text(
            '{"version": 2, "method": "segmentation", "ranking": "last"}'
        )
    else:
        (run / FOLDER / ("arch-1-seed-0" if how == "lost" else ".")).mkdir(parents=True)
        if how != "lost":
            (run / FOLDER / "study-results.json").write_text(how)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("few", "study RUN: expected a search of at least 3 architectures, got 2; nasfast search "),
        ("gradient", "study RUN: expected a search that trained its candidates one by one, got "),
        ("lost", "study RUN: expected the results beside the trainings in RUN/study, got none"),
        ("[]", "RUN/study/study-results.json: expected a JSON object"),
        ('{"version": 9}', 'RUN/study/study-results.json: expected "version" 1, which nasfast '),
        ('{"version": 1}', "RUN/study/study-results.json: expected the setting 'metric', got none"),
    ],
)
def test_runs_that_are_refused(how, text, run, capsys):
    damage(run, how)
    assert study.main([str(run), *FLAGS]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {text}".replace("RUN", str(run)))


def test_what_is_no_run(tmp_path, capsys):
    assert study.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not a run directory: it has")
