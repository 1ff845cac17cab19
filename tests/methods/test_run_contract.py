"""Killed, crashed or stopped anywhere and resumed, searches and trainings of all methods end as if
left alone."""

import functools
import json
import os
import re
import shutil
import signal
import time
import tomllib
from pathlib import Path

import pytest
import tomli_w
from search_runs import (
    Crash,
    assert_same,
    assert_same_training,
    before_a_checkpoint,
    crashed,
    drawn_moments,
    killed_and_resumed,
    outcome,
    start,
    wait_for_records,
)

from nasfast.commands import search, train
from nasfast.methods.segmentation import search as segmentation
from nasfast.runs.checkpoint import save_checkpoint
from nasfast.runs.study import Study
from nasfast.utils.seals import read_sealed

SEARCHES = {
    "segmentation": ("tiny_search", "tiny_run"),
    "restoration": ("tiny_bilevel", "bilevel_run"),
}
TRAININGS = {
    "segmentation": ("tiny_training", "tiny_model"),
    "restoration": ("tiny_restorer", "trained_restorer"),
}


@pytest.fixture(params=SEARCHES.values(), ids=SEARCHES)
def searched(request):
    """Command line of a search, and the run that it gives uninterrupted."""
    return [request.getfixturevalue(name) for name in request.param]


@pytest.fixture(params=TRAININGS.values(), ids=TRAININGS)
def trained(request):
    """Command line of a training, and the directory that it gives uninterrupted."""
    return [request.getfixturevalue(name) for name in request.param]


# ---- searches


def test_killed_anywhere_a_search_repeats_nothing_and_changes_nothing(searched, tmp_path, nightly):
    """Once, and with --nightly a second time after it was resumed."""
    argv, whole = searched
    rng, kills = drawn_moments(), 2 if nightly else 1

    def somewhere_after(count, process):
        wait_for_records(process, tmp_path, count)
        time.sleep(rng.uniform(0, 0.5))  # in the next candidate or epoch, or while it is written

    waits = [functools.partial(somewhere_after, n) for n in sorted(rng.sample(range(5), kills))]
    run = killed_and_resumed([*argv, "--runs", str(tmp_path)], tmp_path, waits)
    assert_same(run, whole)
    assert (run / "report.html").is_file()


def in_the_middle_of_a_record(monkeypatch):
    append = Study.append

    def crash(study, record):
        if record.index == 3:
            with (study.path / "records.jsonl").open("a") as file:
                file.write(json.dumps(record.to_json())[:100])
            raise Crash
        append(study, record)

    monkeypatch.setattr(Study, "append", crash)


@pytest.mark.parametrize("moment", [before_a_checkpoint, in_the_middle_of_a_record])
@pytest.mark.filterwarnings("error")
def test_crash_around_a_record(moment, searched, tmp_path, monkeypatch):
    argv, whole = searched
    run = crashed([*argv, "--runs", str(tmp_path)], tmp_path, moment)
    if moment is in_the_middle_of_a_record:
        with pytest.warns(UserWarning, match="line 4 was torn"):
            assert search.main(["--resume", str(run)]) == 0
    else:
        assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)


def test_a_signal_stops_and_tells_how_to_continue(searched, tmp_path, monkeypatch, capsys):
    argv, whole = searched
    append = Study.append

    def interrupted(study, record):
        append(study, record)
        if record.index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Study, "append", interrupted)
        assert search.main([*argv, "--runs", str(tmp_path)]) == 130
    (run,) = tmp_path.iterdir()
    out, err = capsys.readouterr()
    again = f"nasfast search --resume {run}\n"
    assert f"stopped; everything is saved. Continue with\n  {again}" in out
    assert err == ""
    assert len(outcome(run)) == 2
    assert (run / "report.html").is_file()
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, whole)


def test_a_signal_before_the_first_candidate(tiny_search, tmp_path, monkeypatch, capsys):
    load = segmentation.load_encoder
    monkeypatch.setattr(
        segmentation,
        "load_encoder",
        lambda *given: (os.kill(os.getpid(), signal.SIGTERM), load(*given))[1],
    )
    fresh = ["--cache-dir", str(tmp_path / "cache"), "--runs", str(tmp_path / "runs")]
    assert search.main([*tiny_search, *fresh]) == 130
    assert (
        "stopped; nothing was begun. Continue with\n  nasfast search --device cpu"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "runs").exists()


def test_the_module_ends_with_the_status():
    process = start(["--data", "/no/where"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: data: expected 'synthetic' or a folder, got '/no/where'")
    assert err.count("\n") == 1


# ---- trainings


def test_what_a_training_leaves(trained):
    (source, *_), out = trained
    wanted = {"checkpoint.pt", "config.toml", "env.json", "genotype.json", "metrics.json"}
    assert {path.name for path in out.iterdir()} >= wanted | {"model.safetensors"}
    best = json.loads((Path(source) / "best.json").read_text())["genotype"]
    assert json.loads((out / "metrics.json").read_text())["genotype"] == best
    assert read_sealed(out / "genotype.json") == best


def test_a_training_whose_data_moved(trained, tmp_path, capsys):
    """Equal content is the same data wherever it is; other content is refused."""
    _, whole = trained
    out = shutil.copytree(whole, tmp_path / "train")
    settings = tomllib.loads((out / "config.toml").read_text())
    here = shutil.copytree(settings["data"], tmp_path / "there" / Path(settings["data"]).name)
    gone = settings["data"] + "-gone"
    del settings["checksum"]
    (out / "config.toml").write_text(tomli_w.dumps(settings | {"data": gone}))
    assert train.main(["--resume", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {out}: expected its data in {gone}, got no such folder; give --data DIR "
        "where it has moved\n"
    )
    assert train.main(["--resume", str(out), "--data", str(here)]) == 0
    assert tomllib.loads((out / "config.toml").read_text())["data"] == str(here)
    assert_same_training(out, whole, description=False)
    images = [path for path in sorted(here.glob("**/*.png")) if path.parent.name != "masks"]
    for path in images:
        path.write_bytes(images[0].read_bytes())
    capsys.readouterr()
    assert train.main(["--resume", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"error: resume {out}: expected the training images that it began with, got other content "
        f"in {here}; restore it or start a new training\n"
    )


def test_a_killed_training_gives_the_same_network(trained, tmp_path):
    argv, whole = trained
    out = tmp_path / "train"
    process = start([*argv, "--out", str(out)], module="nasfast.train")
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr
    assert train.main(["--resume", str(out)]) == 0
    assert_same_training(out, whole)


def test_ctrl_c_tells_how_to_continue_a_training(trained, tmp_path, monkeypatch, capsys):
    argv, whole = trained

    def interrupt_after(path, state):
        save_checkpoint(path, state)
        os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "a folder"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", interrupt_after)
        assert train.main([*argv, "--out", str(out)]) == 130
    printed = capsys.readouterr().out
    assert f"Continue with\n  nasfast train --resume '{out}'\n" in printed
    assert train.main([f"--resume={out}"]) == 0
    printed += capsys.readouterr().out
    done = re.findall(r"^(?:epoch|step) (\d)/(\d)  loss", printed, re.MULTILINE)
    assert len(done) == len(set(done)) > 1  # nothing is repeated
    assert done[-1][0] == done[-1][1]
    assert_same_training(out, whole)
