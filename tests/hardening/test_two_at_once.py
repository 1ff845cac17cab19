"""Two commands that write to one place at once: no result is lost, and no file is half of each."""

import itertools
import json
import re
from pathlib import Path

import pytest
from commands import start
from PIL import Image

from nasfast.inference.model import load

BUSY = re.compile(r"error: (.*) is being written by process \d+; wait for it or stop it first\n")


@pytest.fixture
def at_once(tmp_path_factory):
    """Run command lines of nasfast at the same time; the exit status and stderr of each."""
    folder = tmp_path_factory.mktemp("errors")

    def run(*commands):
        places = (
            folder / f"{i}.txt" for i in itertools.count() if not (folder / f"{i}.txt").exists()
        )
        started = [start(argv, place) for argv, place in zip(commands, places)]
        return [command.end() for command in started]

    return run


def one_of(ends, subject):
    """Exactly one of two was refused: while the other wrote, or as its result was there."""
    (_, error), (status, text) = sorted(ends, reverse=True)[:2]
    assert (sorted(end[0] for end in ends), text) == ([0, 2], ""), ends
    assert status == 0
    busy = BUSY.fullmatch(error)
    return busy[1].startswith(str(subject)) if busy else str(subject) in error


def test_trainings_of_one_run_have_a_folder_each(own_run, tiny_training, at_once):
    flags = tiny_training[1:]
    ranks = at_once(*(["train", own_run, "--rank", rank, *flags] for rank in (1, 2)))
    assert [status for status, _ in ranks] == [0, 0], ranks
    found = [json.loads((own_run / f"train-{n}" / "genotype.json").read_text()) for n in (1, 2)]
    assert found[0] != found[1]
    for n in (1, 2):
        assert load(own_run / f"train-{n}", "cpu").task == "segmentation"
    page = (own_run / "report.html").read_text()
    assert all(f"train-{n}: " in page for n in (1, 2))  # the second to end shows both
    assert not list(own_run.glob("**/.*"))


def test_a_folder_with_a_name_is_of_one_training(tiny_training, tmp_path, at_once):
    out = tmp_path / "train"
    assert one_of(at_once(*(["train", *tiny_training, "--out", out],) * 2), out)
    assert load(out, "cpu").task == "segmentation"


def test_a_training_is_continued_by_one(tiny_training, tmp_path, at_once):
    """Whoever comes second is refused, or finds it finished and says its scores again."""
    out = tmp_path / "train"
    ((status, _),) = at_once(["train", *tiny_training, "--out", out])
    assert status == 0
    before = load(out, "cpu").description
    ends = at_once(*(["train", "--resume", out],) * 2)
    assert {status for status, _ in ends} <= {0, 2}
    assert all(error == "" or BUSY.fullmatch(error)[1] == str(out) for _, error in ends)
    assert load(out, "cpu").description == before


def test_an_encoder_is_written_by_one(tmp_path, at_once):
    flags = "pretrain --frames 16 --epochs 1 --batch-size 2 --crop 32 --width 0.1 --device cpu"
    out = tmp_path / "encoder.safetensors"
    assert one_of(at_once(*([*flags.split(), "--out", out],) * 2), out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_results_are_written_by_one(tiny_model, tiny_data, tmp_path, at_once):
    out = tmp_path / "results"
    images = tiny_data / "images"
    assert one_of(at_once(*(["predict", tiny_model, images, "--out", out],) * 2), out)
    index = json.loads((out / "predictions.json").read_text())
    for image in index["images"]:
        for name in image["files"]:
            Image.open(out / name).verify()
    assert not list(Path(out).glob(".*"))


def test_an_export_is_written_by_one(tiny_model, tmp_path, at_once, nightly):
    """Without the second's refusal it would be replaced unseen; one after the other may."""
    if not nightly:
        pytest.skip("takes half a minute: --nightly")
    out = tmp_path / "net.pt2"
    command = ["export", tiny_model, "--format", "pt2", "--size", "32x48", "--out", out]
    ends = at_once(command, command)
    assert sorted(status for status, _ in ends) in ([0, 0], [0, 2]), ends
    assert all(error == "" or BUSY.fullmatch(error)[1] == str(out) for s, error in ends if s)
    assert load(out, "cpu").task == "segmentation"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_reports_are_whole(own_run, at_once):
    ends = at_once(*(["report", own_run],) * 2)
    assert [status for status, _ in ends] == [0, 0], ends
    assert (own_run / "report.html").read_text().rstrip().endswith("</html>")
    assert not list(own_run.glob(".*"))
