"""Boxes of COCO: what JSON says, where files lie, and the text of each fault."""

import json
import re

import pytest
from folders import CATEGORIES, coco_content, save_image, write_coco

from nasfast.data.detection import load_detection_splits
from nasfast.utils.errors import UserError

ONE = [(5, {"image_id": 1})]


def write(root, train, val=None):
    """train.json and val.json beside the images."""
    for name, content in (("train", train), ("val", val or coco_content(annotations=ONE))):
        write_coco(root / f"{name}.json", root / "images", content)
    return root


def test_what_annotations_say(tmp_path):
    """Sparse ids, crowds, areas and images without boxes; a group of categories is none itself."""
    boxes = [
        ("x", 90, {"bbox": [1.5, 2, 10, 20.25], "area": 55.5, "iscrowd": 0}),
        (9, 90, {"iscrowd": 1}),
        ("x", 0, {"bbox": [0, 0, 0, 9]}),
        ("x", 0, {"bbox": [-3, 30, 20, 20], "area": 10**400}),
    ]
    annotations = [
        (k, {"image_id": image, "category_id": category, **more})
        for k, (image, category, more) in enumerate(boxes)
    ]
    categories = [
        {"id": 90, "name": "plate", "supercategory": "blood"},
        {"id": 0, "name": "cell", "supercategory": "blood"},
        {"id": 2, "name": "blood", "supercategory": "none"},
    ]
    content = coco_content([7, "x", 9], annotations, categories)
    content["images"][0] |= {"height": 20}
    del content["images"][2]["height"]
    train = load_detection_splits(write(tmp_path, content, content)).train
    assert (train.classes, train.category_ids) == (("cell", "plate"), (0, 90))
    assert [sample.image_id for sample in train] == [7, "x", 9]
    assert train.counts() == [0, 2, 1]
    sample = train[1]
    assert sample.boxes.tolist() == [[1.5, 2, 11.5, 22.25], [0, 30, 17, 40]]
    assert sample.areas.tolist() == [55.5, 170]
    assert sample.labels.tolist() == [1, 0]
    assert (train[2].labels.tolist(), train[2].ignored.tolist()) == ([1], [True])
    assert [len(train.dropped), len(train.clipped), len(train.resized)] == [1, 1, 1]
    text = f"{tmp_path}/train.json, image 7 (20x60, the image 40x60)"
    assert train.resized == (text,)


@pytest.mark.parametrize(
    ("file", "images", "name"),
    [
        ("annotations/instances_{}2017.json", "{}2017", "{}.jpg"),
        ("annotations/instances_{}2017.json", "images/{}2017", "{}.jpg"),
        ("annotations/{}.json", "images", "{}.png"),
        ("{}.json", "images/{}", "sub\\{}.png"),
        ("{}/_annotations.coco.json", "{}", "{}.jpg"),
        ("{}.json", "", "data/{}.png"),
        ("annotations/person_keypoints_{}2017.json", "images/{}2017", "{}.png"),
    ],
)
def test_layouts(tmp_path, file, images, name):
    words = {"train": [1, 2], "val": [3], "test": [4]}
    words = {"valid" if "_annotations" in file and w == "val" else w: i for w, i in words.items()}
    for word, ids in words.items():
        content = coco_content(ids, [(8, {"image_id": ids[0]})], name=name)
        write_coco(tmp_path / file.format(word), tmp_path / images.format(word), content)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations/captions_train2017.json").write_text("{}")
    splits = load_detection_splits(tmp_path)
    parts = [splits.train, splits.val, splits.test]
    assert [[sample.image_id for sample in part] for part in parts] == [*words.values()]
    assert [part.counts() for part in parts] == [[1, 0], [1], [1]]


def test_data_that_are_not_divided(tmp_path):
    content = coco_content(range(10), [(i, {"image_id": i}) for i in range(10)])
    write_coco(tmp_path / "annotations/instances_default.json", tmp_path / "images", content)
    splits = load_detection_splits(tmp_path)
    assert (len(splits.train), len(splits.val), splits.test) == (8, 2, None)
    names = {sample.image_id for part in (splits.train, splits.val) for sample in part}
    assert names == set(range(10))


BOX = "annotation 5: expected bbox [left, top, width, height], got "


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_id": 8}, "annotation 5: expected the id of one of the 2 images, got image_id 8; "),
        (
            {"image_id": [1]},
            "expected the id of one of the 2 images, got image_id [1]; correct it ",
        ),
        (
            {"category_id": 4},
            "expected a category of 3, 70, got category_id 4; correct it or remov",
        ),
        ({"bbox": [1, 2, 3]}, BOX + "[1, 2, 3]; correct it or remove it"),
        ({"bbox": None}, BOX + "None; correct it or remove it"),
        ({"bbox": [1, 2, 3, "4"]}, BOX + "[1, 2, 3, '4']; correct it or remove it"),
        ({"bbox": [1, 2, 10**400, 4]}, BOX + "[1, 2, 1000"),
        (
            {"bbox": [1, 2, float("nan"), 4]},
            BOX + "[1, 2, nan, 4]; correct it or remove it",
        ),
        (
            {"bbox": [9, 9, -2, 4]},
            "image 1: box of 'cell': expected left < right and top < bottom, ",
        ),
        (
            {"bbox": [60, 9, 2, 4]},
            "expected a box that meets its image, got left 60, top 9, right ",
        ),
    ],
)
def test_faults_of_an_annotation(tmp_path, change, text):
    annotations = [(5, {"image_id": 1, **change}), (6, {"image_id": 1, **change})]
    root = write(tmp_path, coco_content(annotations=annotations))
    with pytest.raises(UserError, match=re.escape(text)) as error:
        load_detection_splits(root)
    assert str(error.value).startswith(f"{root}/train.json")
    assert "(and 1 more, which nasfast check lists)" in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images": []}, "expected images, got an empty list; add them"),
        ({"categories": None}, "expected the lists images, annotations, categories, got no 'categ"),
        ({"images": [{"id": 1}]}, "with 'id' and 'name', got KeyError: 'file_name'; correct it"),
        ({"images": [{"id": 1, "file_name": "1.png"}] * 2}, "different ids of images, got 1 of 2;"),
        ({"categories": [{"id": 1e999, "name": "a"}]}, "'name', got OverflowError: cannot convert"),
        (
            {"categories": [{"id": "3", "name": "cell"}]},
            "expected whole numbers as ids of categories, got '3'; renumber them",
        ),
        (
            {"categories": [*CATEGORIES, {"id": 5, "name": "a\nb"}]},
            r"expected names of classes in one line of text, got 'a\nb'; rename it",
        ),
        ({"categories": []}, "annotation 5: expected a category of none, got category_id 3; corr"),
        (
            {"categories": [{"id": 3, "name": "cell"}, {"id": 4, "name": "cell"}]},
            "expected categories of different names, got 'cell' twice; correct them",
        ),
        (
            {"images": [{"id": 1, "file_name": "gone.png"}, {"id": 2, "file_name": "1.png"}]},
            "images, got no 'gone.png' (1 of 2 missing); add them",
        ),
    ],
)
def test_faults_of_a_file(tmp_path, change, text):
    root = write(tmp_path, coco_content(annotations=ONE))
    content = coco_content(annotations=ONE) | change
    (root / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(text)) as error:
        load_detection_splits(root)
    assert str(error.value).startswith(f"{root}/train.json: ")


def test_faults_between_files(tmp_path):
    root = write(tmp_path, coco_content(annotations=ONE))
    other = [{"id": 3, "name": "Cell"}, *CATEGORIES[1:]]
    write(root, coco_content(annotations=ONE), coco_content(annotations=ONE, categories=other))
    text = f"{root}/val.json: expected the category 3 to be 'cell' as in {root}/train.json, got 'Ce"
    with pytest.raises(UserError, match=text):
        load_detection_splits(root)
    more = [*CATEGORIES, {"id": 5, "name": "x"}]
    test = coco_content(annotations=[(5, {"image_id": 1, "category_id": 5})], categories=more)
    write_coco(root / "test.json", root / "images", test)
    splits = load_detection_splits(write(root, coco_content(annotations=ONE)))
    text = f"{root}/test.json: expected boxes of the categories of {root}/train.json, got 5 \\('x'"
    with pytest.raises(UserError, match=text):
        _ = splits.test
    for year in ("2014", "2017"):
        path = root / f"annotations/instances_train{year}.json"
        write_coco(path, root / "images", coco_content(annotations=ONE))
    text = "expected one file of annotations of train in .*, got annotations/instances_train2014.j"
    with pytest.raises(UserError, match=text):
        load_detection_splits(root)


def test_what_is_cut_is_said(tmp_path):
    root = write(tmp_path, coco_content(annotations=ONE))
    file = root / "train.json"
    file.write_text(file.read_text()[:99])
    with pytest.raises(UserError, match=rf"{file}: expected JSON, got '.*; restore it from a copy"):
        load_detection_splits(root)
    only_crowds = coco_content(annotations=[(5, {"image_id": 1, "iscrowd": 1})])
    text = "expected boxes in the 2 images of train, got none, only 1 that are difficult or crowds;"
    with pytest.raises(UserError, match=text):
        load_detection_splits(write(root, only_crowds))
    write(root, coco_content(annotations=ONE))
    save_image(root / "images/1.png", 0, (3, 3))  # is measured, not what the file says
    with pytest.raises(UserError, match="expected a box that meets its image, got left 10"):
        load_detection_splits(root)


def test_coco_mini(data_root):
    splits = load_detection_splits(data_root / "coco-mini/detection", cache_in_memory=False)
    parts = [splits.train, splits.val]
    assert [(len(part), sum(part.counts())) for part in parts] == [(32, 288), (6, 136)]
    assert [int(part.objects().ignored.sum()) for part in parts] == [4, 1]
    assert (len(splits.train.classes), splits.train.category_ids[-1]) == (80, 90)
    persons = load_detection_splits(data_root / "coco-mini/keypoints", cache_in_memory=False)
    assert persons.train.classes == ("person",)
    assert [sum(part.counts()) for part in (persons.train, persons.val)] == [87, 65]
