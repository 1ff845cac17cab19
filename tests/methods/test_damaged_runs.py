"""Runs and trainings whose files are damaged or edited: one line says which, and how to go on."""

import contextlib
import itertools
import re
import shutil
import zipfile

import pytest
import torch
from search_runs import assert_same, assert_same_training, full_disk

from nasfast.commands import evaluate, report, search, train
from nasfast.runs.study import Study

COMMANDS = {
    "search --resume": lambda place: search.main(["--resume", place]),
    "train": lambda place: train.main([place, "--device", "cpu", "--out", f"{place}/out"]),
    "train --resume": lambda place: train.main(["--resume", place]),
    "evaluate": lambda place: evaluate.main([place, "--device", "cpu", "--seconds", "0"]),
    "report": lambda place: report.main([place]),
}


def flip(path):
    """One bit of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        tensor = archive.read(max(archive.infolist(), key=lambda info: info.file_size))
    data = bytearray(path.read_bytes())
    data[data.index(tensor)] ^= 1
    path.write_bytes(data)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def saved(content):
    return lambda path: torch.save(content, path)


def text(content):
    return lambda path: path.write_text(content)


def edit(old, new):
    """Of somebody who knows what they do: the checksum goes."""

    def change(path):
        content = re.sub(r"^checksum = .*\n", "", path.read_text())
        assert old in content
        path.write_text(content.replace(old, new, 1))

    return change


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))


def checkpoints(path, foreign, remedy):
    """Rows of a checkpoint."""
    wanted = f"{path}: expected the checkpoint that nasfast wrote there, got "
    nothing = "nothing that torch.save wrote"
    return [
        (flip, f"{wanted}a damaged file: the checksum of", remedy),
        (halve, f"{wanted}an incomplete file", remedy),
        (text(""), f"{wanted}{nothing}", remedy),
        (saved([1]), f"{wanted}a list", remedy),
        (saved({"x": torch.zeros(1)}), f"{wanted}another one (KeyError: '{foreign}')", remedy),
    ]


def rows(file, found):
    return [(file, damage, begin, end) for damage, begin, end in found]


STATE, CONFIG, RECORDS = "checkpoint/state.pt", "config.toml", "records.jsonl"
RECORDED = f"from a copy, or remove PLACE/{STATE}: the search then continues from the records"
AGAIN = "or remove it: the training then begins again"
CORRECT = "correct the value"
ANOTHER = "Was the file written by another version of nasfast?"
COPY = "restore it from a copy"
MORE = "expected the 5 records that the checkpoint has seen, got 3; "
TABLE = {
    ("tiny_run", "search --resume"): [
        *rows(
            STATE, checkpoints(f"PLACE/{STATE}", "told", RECORDED)[:4]
        ),  # test_sampling has the last
        (CONFIG, text("budget = "), f"PLACE/{CONFIG}: expected TOML, got 'budget = '", COPY),
        (CONFIG, edit("budget = 6", 'budget = "6"'), f"PLACE/{CONFIG}, budget: expected", CORRECT),
        (CONFIG, edit("budget = 6", "budgets = 6"), f"PLACE/{CONFIG}: unknown setting", ANOTHER),
        (CONFIG, edit("budget = 6", "budget = -6"), f"PLACE/{CONFIG}: SearchConfig.budget:", ""),
        (
            CONFIG,
            edit('"predictor"', '"pbt"'),
            f"PLACE/{CONFIG}, strategy: expected one of 'auto'",
            CORRECT,
        ),
        ("env.json", text("{}"), "PLACE/env.json: expected the identity of inputs", "from a copy"),
        ("study.json", text("{}"), 'PLACE/study.json: expected "version" 2', COPY),
    ],
    ("bilevel_run", "search --resume"): [
        *rows(STATE, checkpoints(f"PLACE/{STATE}", "epoch", f"{COPY}, or start a new run")),
        (STATE, lambda path: path.unlink(), "PLACE/checkpoint: expected the state of epoch 5", ""),
        (RECORDS, cut, f"PLACE/{RECORDS}: {MORE}", f"{COPY}, or start a new run"),
    ],
    ("tiny_run", "train"): [
        (CONFIG, edit('data = "', 'data = 3 # "'), f"PLACE/{CONFIG}, data: expected a s", CORRECT),
        (RECORDS, text("x\nx\n"), f"PLACE/{RECORDS}, line 1: expected one JSON record", "a copy"),
    ],
    ("bilevel_run", "train"): [
        (CONFIG, edit('"demo"', "[1]"), f"PLACE/{CONFIG}, preset: expected one of ", CORRECT),
        (CONFIG, edit('"denoising"', '"x"'), f"PLACE/{CONFIG}: task: expected one of", ""),
    ],
    ("tiny_model", "train --resume"): [
        *rows("checkpoint.pt", checkpoints("PLACE/checkpoint.pt", "model", AGAIN)),
        (CONFIG, edit("epochs = 4", "epochs = 4.5"), f"PLACE/{CONFIG}, epochs: expected", CORRECT),
        ("genotype.json", text("["), "train: ", ""),
    ],
    ("trained_restorer", "train --resume"): [
        *rows("checkpoint.pt", checkpoints("PLACE/checkpoint.pt", "data", AGAIN)),
    ],
    ("tiny_model", "evaluate"): [
        (
            "model.safetensors",
            halve,
            "weights: expected a complete safetensors file, got PLACE",
            "",
        ),
        ("model.safetensors", lambda path: path.unlink(), "PLACE: expected a finished train", ""),
    ],
    ("tiny_run", "evaluate"): [("best.json", text(""), "PLACE: expected a model.", "makes it")],
    ("tiny_run", "report"): [
        (RECORDS, text("x\nx\n"), f"PLACE/{RECORDS}, line 1: expected one JSON record", "a copy"),
    ],
}


@pytest.mark.parametrize(("fixture", "command"), TABLE)
def test_damaged_files(fixture, command, request, tmp_path, capsys):
    whole = request.getfixturevalue(fixture)
    for number, (name, damage, begin, end) in enumerate(TABLE[fixture, command]):
        place = shutil.copytree(whole, tmp_path / str(number))
        damage(place / name)
        assert COMMANDS[command](str(place)) == 2, (name, begin)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {begin}".replace("PLACE", str(place)))
        assert line.endswith(end.replace("PLACE", str(place)))
        assert "weights_only" not in line


def test_a_search_goes_on_from_its_records(tiny_run, tmp_path):
    """PPO is told them again: the same candidates, and in the end the same controller."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / STATE).unlink()
    cut(run / RECORDS)
    assert search.main(["--resume", str(run)]) == 0
    assert_same(run, tiny_run)


def test_a_training_begins_again(trained_restorer, tmp_path):
    out = shutil.copytree(trained_restorer, tmp_path / "train")
    for name in ("checkpoint.pt", "model.safetensors"):
        (out / name).unlink()
    assert train.main(["--resume", str(out)]) == 0
    assert_same_training(out, trained_restorer)


# ---- full disks


def fill_disk(patch, stack, target, name, count):
    """No file may grow from the `count`th call of a function on."""
    called, calls = getattr(target, name), itertools.count(1)

    def full(*arguments):
        if next(calls) == count:
            stack.enter_context(full_disk(100))
        return called(*arguments)

    patch.setattr(target, name, full)


@pytest.mark.parametrize(
    ("argv", "whole", "command", "place"),
    [
        ("tiny_bilevel", "bilevel_run", search, (Study, "save_checkpoint", 3)),
        ("tiny_restorer", "trained_restorer", train, (train, "save_checkpoint", 2)),
    ],
)
def test_a_full_disk_loses_nothing(argv, whole, command, place, request, tmp_path, capsys):
    argv, whole = request.getfixturevalue(argv), request.getfixturevalue(whole)
    out = ["--runs", str(tmp_path)] if command is search else ["--out", str(tmp_path / "train")]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        fill_disk(patch, stack, *place)
        assert command.main([*argv, *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    (made,) = tmp_path.iterdir()
    assert line.startswith(f"error: [Errno 27] File too large: '{made}")
    assert line.endswith(
        "; make room there: what was saved before is whole, and --resume continues"
        " a search or a training from it, the same command a study"
    )
    assert not list(made.rglob("*.tmp"))
    assert command.main(["--resume", str(made)]) == 0
    (assert_same if command is search else assert_same_training)(made, whole)


def test_a_full_disk_while_features_are_encoded(tiny_search, tmp_path, capsys):
    flags = ["--cache-dir", str(tmp_path / "cache"), "--runs", str(tmp_path / "runs")]
    with full_disk(1000):
        assert search.main([*tiny_search, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: [Errno 27] feature cache: ")
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "cache").iterdir())
