"""``nasfast predict``: what is found, what is written, and what is never lost."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nasfast.commands import predict
from nasfast.inference.model import Model

TRAININGS = Path(__file__).parents[1] / "fixtures" / "version1"
SEGMENTER, DENOISER = (
    str(TRAININGS / f"{name}_training") for name in ("segmentation", "restoration")
)


def draw(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for name in ("b.png", "a.jpg", "a.png", "a-overlay.png", "trip/a.jpg", "trip/[1].png"):
        draw(root / name)
    draw(root / ".thumbs" / "a.png")
    (root / "notes.txt").write_text("none")
    (root / "trip" / "README").write_text("none")
    return root


def run(*words, model=SEGMENTER):
    return predict.main([model, *map(str, words), "--device", "cpu"])


def index_of(out):
    return json.loads((out / "predictions.json").read_text())


def test_a_folder_with_all_below_it(photos, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run(photos, "--out", out) == 0
    index = index_of(out)
    files = {Path(e["image"]).relative_to(photos).as_posix(): e["files"] for e in index["images"]}
    assert files == {
        "a-overlay.png": ["a-overlay.png", "a-overlay-overlay.png"],
        "a.jpg": ["a-2.png", "a-2-overlay.png"],  # its overlay would have the name of that mask
        "a.png": ["a-3.png", "a-3-overlay.png"],
        "b.png": ["b.png", "b-overlay.png"],
        "trip/[1].png": ["trip/[1].png", "trip/[1]-overlay.png"],
        "trip/a.jpg": ["trip/a.png", "trip/a-overlay.png"],
    }
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert written == {name for names in files.values() for name in names} | {"predictions.json"}
    assert Image.open(out / "b.png").mode == "P"
    assert Image.open(out / "b.png").size == (40, 30)
    entry = index["images"][0]
    assert entry["size"] == [30, 40]
    assert sum(entry["classes"].values()) == pytest.approx(1)
    assert index["classes"][:2] == ["sky", "building"]
    assert index["task"] == "segmentation"
    assert index["model"].endswith("segmentation_training/model.safetensors")
    printed = capsys.readouterr().out
    assert "ignored 2 files that are no images: 1 .txt, 1 without suffix" in printed
    assert f"6 of 6 done; {out}" in printed


def test_files_and_patterns_each_once(photos, tmp_path):
    out, single = tmp_path / "out", photos / "trip" / "[1].png"
    words = [single, photos / "*.jpg", photos / "**" / "*.jpg", photos / "a.jpg"]
    assert run(*words, "--out", out, model=DENOISER) == 0
    found = [(Path(e["image"]).name, e["files"]) for e in index_of(out)["images"]]
    assert found == [("[1].png", ["[1].png"]), ("a.jpg", ["a.png"]), ("a.jpg", ["a-2.png"])]
    restored = Image.open(out / "a.png")
    assert (restored.mode, restored.size) == ("L", (40, 30))


def test_one_damaged_image_does_not_stop_the_others(photos, tmp_path, capsys):
    out, damaged = tmp_path / "out", photos / "aa.png"
    damaged.write_bytes(b"no image")
    assert run(photos, photos / "nowhere.png", "--out", out) == 1
    index = index_of(out)
    assert len(index["images"]) == 6
    assert set(index["failed"]) == {str(damaged), str(photos / "nowhere.png")}
    printed = capsys.readouterr()
    assert f"failed: image {damaged} cannot be read: " in printed.err
    assert f"failed: {photos / 'nowhere.png'}: expected a file, a folder or a" in printed.err
    assert f"6 of 8 done; {out}" in printed.out
    assert run(damaged, "--out", tmp_path / "none") == 1
    assert capsys.readouterr().out.endswith("0 of 1 done\n"), "there is no such folder"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere"], "error: predict: expected image files (.bmp, "),
        (["empty"], "found none in empty\n"),
        ([], "found none in no argument\n"),
        (["photos/a.jpg", "--tile", "0"], "error: tile: expected at least 1 pixel, got 0\n"),
        (
            ["photos/a.jpg", "--resize", "5"],
            "error: resize: expected 'auto', 'none' or the shorter",
        ),
        (["photos/a.jpg", "--batch", "0"], "error: batch: expected at least 1, got 0\n"),
        (["photos/a.jpg", "--out", "photos/b.png"], "expected --out to be a folder, got the file"),
        (
            ["photos/a.jpg", "--out", "/proc/x"],
            "error: /proc/x: expected a directory that can be made and written to, got no such "
            "file or directory; give another --out\n",
        ),
        (
            ["photos/trip", "--out", "photos"],
            "error: predict: expected a folder apart from the images, got --out photos, below "
            "which no image is read; give another folder\n",
        ),
        (["~nobody-here/a.jpg"], "error: ~nobody-here/a.jpg: expected a home directory for ~, got"),
    ],
)
def test_what_is_refused(words, text, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert run(*(["--out", "out"] if "--out" not in words else []), *words) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_nothing_is_overwritten_unless_asked(photos, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    (out / "b.png").write_bytes(b"mine")
    words = photos / "b.png", "--out", out
    assert run(*words) == 2
    assert f"expected no earlier results in {out}, got b.png; give another --out, or --over" in (
        capsys.readouterr().err
    )
    assert (out / "b.png").read_bytes() == b"mine"
    assert run(*words, "--overwrite") == 0
    assert Image.open(out / "b.png").size == (40, 30)
    assert (out / "mine.txt").read_text() == "kept"
    assert run(*words) == 2
    assert "got b.png and 2 more; give" in capsys.readouterr().err


def test_an_image_is_never_replaced_by_its_result(photos, capsys):
    before = (photos / "b.png").read_bytes()
    assert run(photos / "b.png", "--out", photos, "--overwrite") == 2
    assert f"where the result would replace {photos / 'b.png'}; give another" in (
        capsys.readouterr().err
    )
    assert (photos / "b.png").read_bytes() == before


def test_names_that_begin_with_a_tilde(photos, tmp_path, monkeypatch):
    """Such as those that an open document leaves; and a shell expands none in --out=~/x."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    draw(Path("~$photo.jpg"))
    assert run("~$photo.jpg", "--out=~/out") == 0
    assert index_of(tmp_path / "home" / "out")["images"][0]["files"][0] == "~$photo.png"


def test_results_in_the_folder_of_the_images_are_no_images(photos):
    out = photos / "out"
    for _ in range(2):
        assert run(photos, "--out", out, "--overwrite", model=DENOISER) == 0
        assert len(index_of(out)["images"]) == 6


def test_a_stop_leaves_whole_files(photos, tmp_path, monkeypatch, capsys):
    whole, calls = Model.map, []

    def stopped(model, images):
        calls.append(images)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return whole(model, images)

    monkeypatch.setattr(Model, "map", stopped)
    out = tmp_path / "out"
    assert run(photos, "--out", out, "--batch", "1") == 130
    done = index_of(out)["images"]
    assert len(done) == 2
    written = {p.name for p in out.rglob("*")}
    assert written == {name for e in done for name in e["files"]} | {"predictions.json"}
    assert f"2 of 6 done, stopped; {out}" in capsys.readouterr().out


def test_settings_reach_the_network(photos, tmp_path, monkeypatch):
    seen, whole = [], Model.map

    def spied(model, images):
        seen.append(tuple(images.shape))
        return whole(model, images)

    monkeypatch.setattr(Model, "map", spied)
    big = draw(tmp_path / "big.png", (90, 80))
    assert run(big, "--out", tmp_path / "1", "--tile", "50", model=DENOISER) == 0
    assert {shape[2:] for shape in seen} == {(50, 50)}
    del seen[:]
    assert run(big, "--out", tmp_path / "2", "--resize", "40", "--autocast") == 0
    assert seen == [(1, 3, 64, 64)]  # 40x45, padded to the stride
    assert torch.tensor(Image.open(tmp_path / "2" / "big.png").size).tolist() == [90, 80]
