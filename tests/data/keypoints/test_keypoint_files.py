"""Folders of COCO keypoints and of MPII: what is read, and what is said of what is wrong."""

import json

import pytest
import torch
from folders import save_image

from nasfast.data.images import FaultyFiles
from nasfast.data.keypoints import (
    KeypointParts,
    SyntheticPeople,
    divide,
    load_keypoint_splits,
)
from nasfast.data.keypoints.base import SIGMAS, Skeleton
from nasfast.data.keypoints.checks import check_keypoints
from nasfast.utils.errors import UserError

NAN = float("nan")

SIZE = (60, 80)
COCO_NAMES = ["nose", "left_wrist", "right_wrist"]


def person(image, number, **changes):
    """A person of COCO's annotations, with three joints."""
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "bbox": [10, 5, 40, 50],
        "area": 900.0,
        "iscrowd": 0,
        "keypoints": [20, 10, 2, 15, 30, 1, 0, 0, 0],
        "num_keypoints": 2,
        **changes,
    }


def write_coco(root, people=None, *, names=COCO_NAMES, parts=("train", "val"), images=6):
    for k, part in enumerate(parts):
        files = [f"{part}-{i}.png" for i in range(images)]
        for i, name in enumerate(files):
            save_image(root / "images" / name, [k, i], SIZE)
        found = people if people is not None else [person(i, i) for i in range(images)]
        content = {
            "images": [{"id": i, "file_name": n, "height": 60} for i, n in enumerate(files)],
            "annotations": found,
            "categories": [{"id": 1, "name": "person", "keypoints": list(names)}],
        }
        path = root / "annotations" / f"person_keypoints_{part}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def entry(image):
    """A person of MPII, 100 pixels high, about (41, 21)."""
    return {
        "image": image,
        "joints": [[float(k), 20.0] for k in range(1, 17)],
        "joints_vis": [1] * 15 + [0],
        "center": [41, 21],
        "scale": 0.5,
    }


def write_mpii(root, people=None, parts=("train", "valid"), images=6):
    for k, part in enumerate(parts):
        names = [f"{part}-{i}.png" for i in range(images)]
        for i, name in enumerate(names):
            save_image(root / "images" / name, [k, i], SIZE)
        path = root / "annot" / f"{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([entry(name) | (people or {}) for name in names]))
    return root


def test_coco(tmp_path):
    splits = load_keypoint_splits(write_coco(tmp_path))
    data = splits.train
    assert (data.skeleton.joints, len(data), len(splits.val)) == (tuple(COCO_NAMES), 6, 6)
    first = data[0].person
    assert first.box == (10, 5, 50, 55)
    assert first.joints[:2].tolist() == [[20.5, 10.5], [15.5, 30.5]]
    assert first.visible.tolist() == [2, 1, 0]
    assert (first.area, first.head, data.head_from) == (900, 0, "")
    assert data.skeleton.sigmas == (0.026, 0.062, 0.062)
    assert data[5].image.shape == (3, *SIZE)
    assert data.fingerprint() != splits.val.fingerprint()
    assert not check_keypoints(splits, tmp_path, test=True).errors


def test_coco_mini_is_read_as_it_is(data_root):
    """53 of 87 people have joints, one is a crowd; 17 sigmas of COCO."""
    from pycocotools.cocoeval import Params

    splits = load_keypoint_splits(data_root / "coco-mini" / "keypoints")
    assert (len(splits.train), len(splits.val)) == (53, 40)
    assert splits.train.jointless == 33
    assert splits.train.skeleton == Skeleton(tuple(SIGMAS))
    assert list(SIGMAS.values()) == pytest.approx(Params("keypoints").kpt_oks_sigmas.tolist())
    expected = "33 people of train have no labelled joint and are left out"
    assert expected in check_keypoints(splits).warnings


def test_one_part_is_divided(tmp_path):
    splits = load_keypoint_splits(write_coco(tmp_path, parts=["train"], images=10))
    assert (len(splits.train), len(splits.val)) == (8, 2)
    mpii = load_keypoint_splits(write_mpii(tmp_path / "mpii", parts=["train"], images=10))
    assert (len(mpii.train), len(mpii.val)) == (8, 2)


def test_mpii(tmp_path):
    """Pixels are counted from 1; the box is a square of 200 x scale, 15 x scale below the centre;
    the head's size is 0.6 x the diagonal of its box."""
    splits = load_keypoint_splits(write_mpii(tmp_path / "a", {"head_box": [10, 10, 40, 50]}))
    data = splits.train
    first = data[0].person
    assert first.box == pytest.approx((-9.5, -22, 90.5, 78))
    assert first.joints[0].tolist() == [0.5, 19.5]
    assert first.visible.tolist() == [2] * 15 + [0]
    assert (first.head, data.head_from) == (30, "0.6 x the diagonal of the head's box")
    assert data.skeleton.sigmas is None
    other = load_keypoint_splits(write_mpii(tmp_path / "b")).train
    assert other[0].person.head == 1  # upper neck to head top
    assert other.head_from == "distance of upper_neck and head_top, as the data have no head_box"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"keypoints": [1, 2, 2]},
            "keypoints of 9 numbers, x, y and visibility of 3 joints, got 3",
        ),
        ({"keypoints": None}, "keypoints of 9 numbers, x, y and visibility of 3 joints, got None"),
        ({"keypoints": [1, 2, 3] * 3}, r"keypoints \[x, y, 0, 1 or 2, \.\.\], got \[1, 2, 3"),
        ({"bbox": [1, 2, 3]}, r"bbox \[left, top, width, height\], got \[1, 2, 3\]"),
        ({"image_id": 77}, "the id of one of the 6 images, got image_id 77"),
        ({"bbox": [1, 2, NAN, 4]}, r"bbox \[left, top, width, height\], got \[1, 2, nan, 4\]"),
        (
            {"keypoints": [1, 2, 2, 3, NAN, 2, 5, 6, 2]},
            "finite coordinates of left_wrist, got 3.5, nan",
        ),
        ({"area": "big"}, "an area in pixels, or none, got 'big'"),
        ({"area": -4}, "an area in pixels, or none, got -4"),
        ({"area": NAN}, "an area in pixels, or none, got nan"),
        ({"category_id": 7}, "category_id 1, that of the joints, or of another category, got 7"),
        ({"category_id": [1]}, r"category_id 1, that of the joints, or of another category, got"),
    ],
)
def test_faulty_people_of_coco(tmp_path, changes, text):
    write_coco(tmp_path, [person(0, 0), person(1, 1, **changes)])
    with pytest.raises(FaultyFiles, match=rf"annotation 1: expected {text}.*; correct it or"):
        load_keypoint_splits(tmp_path)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["nose", "left_wrsit", "tail"], "got 'left_wrsit'; did you mean left_wrist\\?"),
        (["nose", "left_wrist", "tail"], "got 'tail'; rename it"),
        (["nose", "nose", "left_ear"], "expected each joint once, got 'nose' twice; rename one"),
        ([], "expected one category with the names of its joints as 'keypoints', got 0 of 1"),
    ],
)
def test_unknown_joints(tmp_path, names, text):
    with pytest.raises(UserError, match=text):
        load_keypoint_splits(write_coco(tmp_path, names=names))


def test_parts_of_other_joints(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, names=["nose", "left_ear", "right_ear"], parts=["val"])
    with pytest.raises(UserError, match=r"expected the joints of .*train2017.json .nose, left_wri"):
        load_keypoint_splits(tmp_path)


def test_nobody_with_joints(tmp_path):
    write_coco(tmp_path, [person(0, 0, keypoints=[0] * 9)])
    with pytest.raises(
        UserError,
        match="expected people with labelled joints in train, got none, only 1 without joints; "
        "label some",
    ):
        load_keypoint_splits(tmp_path)


def test_nobody_with_a_box(tmp_path):
    write_coco(tmp_path, [person(0, 0, bbox=[10, 5, 0, 50])])
    text = "expected people with labelled joints in train, got none, only 1 without a box; label"
    with pytest.raises(UserError, match=text):
        load_keypoint_splits(tmp_path)


def test_nobody_in_data_that_are_not_divided(tmp_path):
    write_coco(tmp_path, [person(0, 0, iscrowd=1)], parts=["train"])
    text = r"train2017.json: expected people with labelled joints in at least 2 images, got 0 of 6"
    with pytest.raises(UserError, match=f"{text}; label some$"):
        load_keypoint_splits(tmp_path)


def test_what_is_left_out_is_said(tmp_path):
    """A joint outside of the image, boxes without area and beside the image, and no joints."""
    people = [
        *(person(i, i) for i in range(5)),
        person(5, 5, keypoints=[200, 10, 2, 15, 30, 1, 0, 0, 0]),
        person(5, 6, bbox=[10, 5, 0, 50]),
        person(5, 7, bbox=[100, 5, 20, 50]),
        person(5, 8, keypoints=[0] * 9),
        person(5, 9, iscrowd=1),
    ]
    splits = load_keypoint_splits(write_coco(tmp_path, people))
    assert len(splits.train) == 6
    assert splits.train[5].person.visible.tolist() == [0, 1, 0]
    warnings = [text for text in check_keypoints(splits).warnings if "train" in text]
    assert [text.split("/")[0] for text in warnings] == [
        "2 people of train have a box without area in the image and are left out: ",
        "1 joints of train lie outside of the image and count as not labelled: ",
        "1 people of train have no labelled joint and are left out",
        "no one in train has the joints right_wrist: nothing is learned of them",
    ]
    assert "annotation 5: nose (200.5, 10.5) in 60x80" in warnings[1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"joints": [[1, 2]]}, "joints of 16 joints, got 1"),
        ({"joints_vis": [1] * 15}, "joints_vis of 16 joints, got 15"),
        ({"joints_vis": [3] * 16}, r"joints_vis of 0 and 1, got \[3, 3"),
        (
            {"joints": [[NAN, 2]] + [[1, 2]] * 15},
            r"finite coordinates of right_ankle, got \[nan, 2\]",
        ),
        ({"scale": 0}, "a scale above 0, got 0"),
        ({"center": [1]}, r"center \[x, y\], got \[1\]"),
        ({"head_box": [9, 9, 9, 20]}, r"head_box \[left, top, right, bottom\] of some area, got"),
        ({"image": 5}, "the name of a file as image, got 5"),
    ],
)
def test_faulty_people_of_mpii(tmp_path, changes, text):
    write_mpii(tmp_path, changes)
    with pytest.raises(FaultyFiles, match=rf"train.json, person 0: expected {text}.*correct it or"):
        load_keypoint_splits(tmp_path)


def test_folders_of_other_kinds(tmp_path):
    with pytest.raises(UserError, match=r"has no known layout: expected MPII \(annot/train.json"):
        load_keypoint_splits(tmp_path)
    (tmp_path / "annot").mkdir()
    (tmp_path / "annot/train.json").write_text("{}")
    with pytest.raises(UserError, match=r"expected a list of people, got '{}'; give annot/train"):
        load_keypoint_splits(tmp_path)
    with pytest.raises(UserError, match="expected 'synthetic' or a folder, got 'nowhere'"):
        load_keypoint_splits("nowhere")


def test_findings_of_generated_people():
    train, val = (SyntheticPeople(30, stream=stream) for stream in ("train", "val"))
    splits = divide(KeypointParts(train, val), seed=0, fraction=0.5)
    findings = check_keypoints(splits, test=True)
    assert findings.warnings == findings.errors == ()
    assert len(findings.tiles) == 12
    assert [row["part"] for row in findings.facts["parts"]] == ["train", "val"]
    assert findings.facts["joints"][1]["joint"] == "1 left_shoulder"
    assert all(isinstance(tile, torch.Tensor) for tile in findings.tiles.values())
