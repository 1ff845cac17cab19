"""Whatever is wrong with a file, its reader says so in one line that names it."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nasfast.data import open_camvid, open_folder
from nasfast.data.restoration import open_images
from nasfast.methods.registry import method_of_genotype, read_genotype
from nasfast.runs.study import Study
from nasfast.utils.errors import text_for_user

OLD = Path(__file__).parents[1] / "fixtures" / "version1" / "segmentation"


def run(place):
    """A run of today's form."""
    shutil.copytree(OLD, place)
    description = {"version": 2, "method": "segmentation", "ranking": "score"}
    (place / "study.json").write_text(json.dumps(description))
    return place


def folder(place):
    """Images, masks, lists and classes, as a folder, as CamVid and for restoration."""
    classes = [{"name": name, "color": [i, i, i]} for i, name in enumerate("ab")]
    for name in ("images", "masks", "train", "trainannot", "val", "valannot"):
        (place / name).mkdir(parents=True)
        channels = () if name.endswith(("masks", "annot")) else (3,)
        for stem in "xyz":
            pixels = np.ones((30, 40, *channels), np.uint8)
            pixels[::2] = 0
            Image.fromarray(pixels).save(place / name / f"{stem}.png")
    (place / "classes.txt").write_text("a\nb\n")
    (place / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": 255}))
    (place / "train.txt").write_text("x\n")
    (place / "val.txt").write_text("y\n")
    return place


def opened(path):
    """All that is read of a run."""
    study = Study.open(path, read_only=True)
    study.load_checkpoint()
    Study.open(path).close()


def decoded(path):
    """A folder whose frames are read at each access."""
    _ = open_folder(path, cache_in_memory=False)[0][0]


def restored(path):
    """All images of a folder, one of them damaged."""
    data = open_images(path / "train", 3)
    _ = [pair.clean for part in (data.train, data.val, data.test) for pair in part]
    data.train.fingerprint()


def genotype(path):
    """As a training reads it."""
    form = read_genotype(path / "best.json")
    method_of_genotype(form).genotype(form)


MADE = {"run": run, "folder": folder}
READERS = {
    f"{read.__name__} {name}": (made, name, read)
    for made, read, names in [
        ("run", opened, "study.json config.toml env.json records.jsonl best.json lock"),
        ("run", opened, "checkpoint/state.pt"),
        ("run", genotype, "best.json"),
        ("folder", open_folder, "classes.txt train.txt images/x.png masks/x.png"),
        ("folder", decoded, "images/x.png"),
        ("folder", restored, "train/x.png"),
        ("folder", open_camvid, "classes.json val.txt train/x.png trainannot/x.png"),
    ]
    for name in names.split()
}


def in_its_place(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def content(data):
    return lambda path: path.write_bytes(data)


DAMAGES = {
    "missing": lambda path: path.unlink(missing_ok=True),
    "a directory": in_its_place,
    "a link to itself": lambda path: (path.unlink(missing_ok=True), path.symlink_to(path)),
    "empty": content(b""),
    "half": lambda path: (
        path.exists() and path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])
    ),
    "zeros": content(bytes(300)),
    "no text": content(b"\xff\xfe\x80\x81" * 9),
    "other text": content(b"hello, world\n"),
    "null": content(b"null\n"),
    "a number": content(b"3\n3\n"),
    "a list": content(b"[1, 2]\n[1, 2]\n"),
    "an object": content(b"{}\n{}\n"),
    "nested": content(b"[" * 100_000 + b"\n\n"),
    "too many digits": content(b"1" * 10_000 + b"\n\n"),
    "no image data": content(b"\x89PNG\r\n\x1a\n" + b"IHDR" * 9),
    "no zip": content(b"PK\x03\x04" + b"x" * 200),
}


def outcome(read, place):
    """What the user reads of an error; a defect is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a last line that is torn
        try:
            read(place)
        except Exception as error:
            text = text_for_user(error)
            if text is None:
                raise
            return text
    return None


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_named(reader, damage, tmp_path):
    made, name, read = READERS[reader]
    place = MADE[made](tmp_path / made)
    assert outcome(read, place) is None
    DAMAGES[damage](place / name)
    text = outcome(read, place)
    if text is not None:
        assert str(place) in text or read is genotype  # of a form that no file need hold
        assert len(text.splitlines()) == 1
        assert len(text) < 700


@pytest.mark.parametrize("reader", READERS)
def test_random_damage(reader, tmp_path):
    made, name, read = READERS[reader]
    place = MADE[made](tmp_path / made)
    path = place / name
    whole = path.read_bytes() if path.exists() else b""
    at = st.integers(0, max(len(whole) - 1, 0))

    @settings(max_examples=40)
    @given(st.lists(st.tuples(at, st.binary(max_size=4)), max_size=4), at)
    def damaged(changes, end):
        data = bytearray(whole)
        for start, new in changes:
            data[start : start + len(new)] = new
        path.write_bytes(bytes(data[: end or None]))
        outcome(read, place)

    damaged()


def test_a_picture_that_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr("nasfast.data.images.MAX_PIXELS", 500)
    text = outcome(open_folder, folder(tmp_path))
    assert str(text).startswith(f"image {tmp_path}/images/x.png is too large: expected at most")
