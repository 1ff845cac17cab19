"""Boxes of YOLO: layouts, lines, names in YAML, and the text of each fault."""

import re

import pytest
from folders import save_image

from nasfast.data.detection import load_detection_splits
from nasfast.data.detection.yolo import names_in
from nasfast.utils.errors import UserError

LINE = "1 0.5 0.5 0.2 0.5\n"


def write(root, pattern, texts, names="names: [cat, dog]\n"):
    """Texts by stem by folder."""
    for word, each in texts.items():
        for stem, text in each.items():
            folder = pattern.format(kind="images", part=word)
            save_image(root / folder / f"{stem}.png", [*stem.encode()], (40, 60))
            label = root / pattern.format(kind="labels", part=word) / f"{stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    (root / "data.yaml").write_text(names)
    return root


@pytest.mark.parametrize("pattern", ["{kind}/{part}", "{part}/{kind}"])
def test_layouts_and_lines(tmp_path, pattern):
    lines = "0 .25 .5 .5 1\n\n1 0.1 0.1 0.5 0.25 0.2 0.9\n"
    texts = {"train": {"a": lines, "b": ""}, "valid": {"c": LINE}, "test": {"d": LINE}}
    root = write(tmp_path, pattern, texts)
    (tmp_path / pattern.format(kind="labels", part="train") / "b.txt").unlink()
    splits = load_detection_splits(root)
    assert [part.counts() for part in (splits.train, splits.val, splits.test)] == [[2, 0], [1], [1]]
    sample = splits.train[0]
    assert (sample.image_id, sample.labels.tolist()) == ("a", [0, 1])
    assert sample.boxes[0].tolist() == [0, 0, 30, 40]
    assert sample.boxes[1].tolist() == pytest.approx([6, 4, 30, 36])
    assert splits.train.classes == ("cat", "dog")


def test_one_folder(tmp_path):
    root = write(tmp_path, "{kind}", {"": dict.fromkeys("abcde", LINE)})
    splits = load_detection_splits(root)
    assert (len(splits.train), len(splits.val), splits.test) == (4, 1, None)
    (root / "data.yaml").unlink()
    text = f"{root}: expected data.yaml or classes.txt with the names of the classes, got neither;"
    with pytest.raises(UserError, match=text):
        load_detection_splits(root)
    (root / "classes.txt").write_text("a\nb\n")
    assert load_detection_splits(root).train.classes == ("a", "b")
    (root / "classes.txt").write_text("a\na\n")
    with pytest.raises(UserError, match=r"classes.txt: expected each class once, got 'a' twice"):
        load_detection_splits(root)


@pytest.mark.parametrize(
    "text",
    [
        "names: ['a b', c, \"d, e\"]",
        "nc: 3\nnames: [\n  a b,\n  c, 'd, e'\n]\nx: 1",
        "names: {2: 'd, e', 0: a b, 1: c}",
        "names:\n- a b\n- 'c'\n# more\n- d, e  # last\nval: x",
        "path: x\nnames:\n  0: a b\n  1: c\n\n  2: d, e\ntrain: y",
    ],
)
def test_names(tmp_path, text):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    assert names_in(path) == ["a b", "c", "d, e"]


@pytest.mark.parametrize("text", ["nc: 3", "names:\n", "names: {0: a, 2: b}", "names: []"])
def test_faults_of_names(tmp_path, text):
    root = write(tmp_path, "{kind}/{part}", {"train": {"a": LINE}}, text)
    with pytest.raises(
        UserError, match=r"data.yaml: expected 'names', a list of the classes or th"
    ):
        load_detection_splits(root)


SHARES = "a.txt, line 1: expected a class of 0..1 and the centre, width and height of a box in sha"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("2 .5 .5 .1 .1", SHARES),
        ("0 .5 .5 .1", SHARES),
        ("cat .5 .5 .1 .1", SHARES),
        ("0 .5 .5 .1 x", SHARES),
        (
            "0 300 200 20 10",
            "a.txt: box of 'cat': expected a box that meets its image, got left 174",
        ),
        ("0 nan .5 .1 .1", "a.txt: box of 'cat': expected finite edges, got left nan"),
        ("0 .5 .5 -.1 .1", "a.txt: box of 'cat': expected left < right and top < bottom, got left"),
    ],
)
def test_faults_of_lines(tmp_path, line, text):
    root = write(tmp_path, "{kind}/{part}", {"train": {"a": line, "b": LINE}, "val": {"c": LINE}})
    with pytest.raises(UserError, match=re.escape(text)):
        load_detection_splits(root)


def test_what_is_missing_is_said(tmp_path):
    root = write(tmp_path, "{kind}/{part}", {"train": {"a": LINE, "b": LINE}, "val": {"c": LINE}})
    (root / "images/train/b.png").unlink()
    text = f"{root}/labels/train/b.txt: expected its image in {root}/images/train, got none of the "
    with pytest.raises(UserError, match=text):
        load_detection_splits(root)
    (root / "images/val/c.png").unlink()
    (root / "labels/train/b.txt").unlink()
    with pytest.raises(UserError, match=f"{root}/images/val: expected images, got none; add them"):
        load_detection_splits(root)
