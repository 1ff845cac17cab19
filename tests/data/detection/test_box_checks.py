"""What `check_detection` says of data with boxes."""

import re

import pytest
from folders import coco_content, voc_object, write_boxes, write_coco

from nasfast.data import load_splits
from nasfast.data.base import UnknownLayout
from nasfast.data.detection import DetectionParts, SyntheticShapes, load_detection_splits
from nasfast.data.detection.base import divide
from nasfast.data.detection.checks import check_detection

LISTS = {"train": "abcd", "val": "ef", "test": "gh"}


def test_drawn_data():
    parts = DetectionParts(SyntheticShapes(30), SyntheticShapes(9, stream="val"))
    findings = check_detection(divide(parts, seed=0, fraction=0.1), test=True)
    assert (findings.warnings, findings.errors, len(findings.tiles)) == ((), (), 12)
    assert list(findings.legend) == ["disc", "ring", "square", "triangle", "ignored"]
    train = findings.facts["parts"][0]
    assert (train["part"], train["images"], train["height x width"]) == ("train", 30, "128x160")
    assert [row["class"] for row in findings.facts["classes"]] == [
        "0 disc",
        "1 ring",
        "2 square",
        "3 triangle",
    ]


def test_findings(tmp_path):
    """Every warning, with the file that it is about."""
    size = "<size><width>9</width><height>9</height></size>"
    cat, hard = voc_object("cat", 11, 6, 30, 25), "<difficult>1</difficult>"
    objects = {
        "a": cat + voc_object("dog", 5, 5, 5, 9),
        "b": cat + voc_object("dog", 50, 30, 66, 40) + size,
        "c": "",
        "d": "",
        "e": voc_object("dog", 1, 1, 5, 5) * 101,
        "f": voc_object("cat", 1, 1, 40, 40, hard),
    }
    root = write_boxes(tmp_path, LISTS, objects)
    (root / "classes.txt").write_text("cat\ndog\nemu\n")
    (root / "JPEGImages/spare.webp").write_bytes((root / "JPEGImages/a.jpg").read_bytes())
    (root / "JPEGImages/e.jpg").write_bytes((root / "JPEGImages/a.jpg").read_bytes())
    (root / "old").mkdir()
    (root / "old/a.png").touch()
    splits = load_detection_splits(root, seed=1)
    findings = check_detection(splits, root, test=True)
    said = "\n".join(findings.warnings)
    for text in (
        "candidates are scored on one image",
        "the class emu has no box in train\n",
        "the class emu has no box in val\n",
        f"1 boxes of train have no area and are left out: {root}/Annotations/a.xml: box of 'dog",
        f"1 boxes of train cross the border of the image and are clipped: {root}/Annotations/b.xml",
        "1 annotations of train are of another size than the image, which counts: ",
        "50% of the images of train have no box: all of them is learned as background; leave out",
        "1 images of val have more than 100 boxes, up to 101; AP counts 100 detections in an image",
        "99% of the boxes of val are smaller than 8 pixels, the finest stride, in images of 40x60",
        "1 images are both in train and in val under other names, by content: e.jpg; scores on val",
        "1 images lie in folders that are not read: old (1: a.png); move or convert them",
    ):
        assert text in said
    assert len(findings.warnings) == 12
    rows = {row["part"]: row for row in findings.facts["parts"]}
    assert [rows["train"][key] for key in ("images", "without a box", "boxes")] == [4, 2, 3]
    assert (rows["val"]["ignored"], rows["test"]["boxes"]) == (1, 2)
    assert findings.facts["classes"][1]["boxes, val"] == 101
    assert findings.facts["not read"][0]["names"] == "spare.webp"
    assert len(findings.tiles) == 8
    tile = findings.tiles["val: f"]
    assert tile.shape == (3, 213, 320)
    assert tile[:, 2, 1].tolist() == [255] * 3  # the border of what is ignored
    assert check_detection(splits, root).tiles == {}


def test_large_objects_and_unread_images(tmp_path):
    content = coco_content(
        range(4), [(k, {"image_id": k, "bbox": [0, 0, 600, 20]}) for k in (0, 1)]
    )
    write_coco(tmp_path / "train.json", tmp_path / "images", content, (20, 700))
    write_coco(tmp_path / "val.json", tmp_path / "images", content, (20, 700))
    splits = load_detection_splits(tmp_path, cache_in_memory=False)
    seeds = (check_detection(load_detection_splits(tmp_path, seed=seed)) for seed in range(20))
    text = "images that a search holds out of train to score candidates, got none; add images, or g"
    assert any(text in error for findings in seeds for error in findings.errors)
    path = tmp_path / "images/3.png"
    path.write_bytes(path.read_bytes()[:-100])
    findings = check_detection(splits, tmp_path, test=True)
    text = "100% of the boxes of train are larger than 512 pixels, for one level, in images of 20x7"
    assert text in "\n".join(findings.warnings)
    assert re.match(f"image {path} cannot be read: ", findings.errors[-1])
    assert findings.tiles == {}


def test_segmentation_does_not_take_boxes(tmp_path):
    with pytest.raises(UnknownLayout):
        load_splits(write_boxes(tmp_path, LISTS, {}))
