"""Boxes of PASCAL VOC: what XML says, lists, classes, and the text of each fault."""

import re

import pytest
import torch
from folders import save_image, voc_object, write_boxes
from PIL import Image

from nasfast.data.base import UnknownLayout
from nasfast.data.detection import load_detection_splits
from nasfast.data.detection.voc import CLASSES
from nasfast.data.images import ORIENTATION
from nasfast.utils.errors import UserError

LISTS = {"train": "abc", "val": "de"}


def ids(dataset):
    return "".join(sample.image_id for sample in dataset)


def test_what_an_annotation_says(tmp_path):
    """Coordinates from 1, the last pixel included; children in any order; parts are no objects."""
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    objects = [
        voc_object("dog", 1, 1, 60, 40, "<difficult>0</difficult>" + part),
        voc_object("dog", 2.5, 3, 20.25, 9, "<difficult>1</difficult><pose>Left</pose>"),
        voc_object("cat", 11, 6, 30, 25, "<difficult/>"),
        voc_object("cat", 59, 0, 64, 20, "<difficult></difficult>"),  # crosses the border
        voc_object("cat", 8, 8, 8, 8),  # no area
    ]
    leftovers = "<folder>x</folder><filename>y.png</filename><path>/home/z.jpg</path>"
    unknown = "<size><width>inf</width><height>0</height></size>"
    size = "<size><width>60</width><height>30</height></size>"
    root = write_boxes(tmp_path, LISTS, {"b": leftovers + size + "".join(objects), "c": unknown})
    train = load_detection_splits(root).train
    sample = train[1]
    assert sample.boxes.tolist() == [
        [0, 0, 60, 40],
        [1.5, 2, 20.25, 9],
        [10, 5, 30, 25],
        [58, 0, 60, 20],
    ]
    dog, cat = CLASSES.index("dog"), CLASSES.index("cat")
    assert sample.labels.tolist() == [dog, dog, cat, cat]
    assert sample.ignored.tolist() == [False, True, False, False]
    assert sample.areas.tolist() == [2400, 18.75 * 7, 400, 40]
    assert sample.image.shape == (3, 40, 60)
    assert train.classes == CLASSES
    assert (train.counts(), train.sizes()) == ([1, 4, 0], [(40, 60)] * 3)
    assert train[2].boxes.shape == (0, 4)
    assert [len(train.dropped), len(train.clipped), len(train.resized)] == [1, 1, 1]
    assert "b.xml (30x60, the image 40x60)" in train.resized[0]


def test_parts(tmp_path):
    root = write_boxes(tmp_path, {**LISTS, "test": "fg"}, {}, "VOCdevkit/VOC2012")
    splits = load_detection_splits(tmp_path)
    assert (splits.home, splits.train.name) == (root, "VOC2012")
    assert [ids(splits.train), ids(splits.val), ids(splits.test)] == ["abc", "de", "fg"]
    assert sorted(ids(splits.search_train) + ids(splits.search_val)) == ["a", "b", "c"]
    assert len(load_detection_splits(tmp_path, held_out=0.6).search_val) == 2
    (root / "Annotations/f.xml").unlink()
    assert load_detection_splits(root).test is None
    lists = root / "ImageSets/Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "trainval.txt").write_text("a  -1\nd.jpg\nJPEGImages/b.jpg\n")
    assert ids(load_detection_splits(root).train) == "ab"
    (lists / "val.txt").unlink()
    splits = load_detection_splits(root)
    assert sorted(ids(splits.train) + ids(splits.val)) == ["a", "b", "d"]
    (lists / "trainval.txt").unlink()  # what is not of test
    splits = load_detection_splits(root)
    assert sorted(ids(splits.train) + ids(splits.val)) == ["a", "b", "c", "d", "e"]


def test_annotations_beside_images(tmp_path):
    """In folders of parts, as some tools export them, or all in one."""
    for word, stems in {"train": "abc", "valid": "de", "test": "f"}.items():
        for stem in stems:
            save_image(tmp_path / word / f"{stem}.png", size=(40, 60))
            box = voc_object("cat", 11, 6, 30, 25)
            (tmp_path / word / f"{stem}.xml").write_text(f"<annotation>{box}</annotation>")
    splits = load_detection_splits(tmp_path)
    assert [ids(splits.train), ids(splits.val), ids(splits.test)] == ["abc", "de", "f"]
    splits = load_detection_splits(tmp_path / "train")
    assert (sorted(ids(splits.train) + ids(splits.val)), splits.test) == (["a", "b", "c"], None)
    (tmp_path / "train").rename(tmp_path / "images")
    splits = load_detection_splits(tmp_path)
    assert sorted(ids(splits.train) + ids(splits.val)) == ["a", "b", "c"]


def test_classes(tmp_path):
    cell = {"a": voc_object("cell", 1, 1, 9, 9), "d": voc_object("Cell", 1, 1, 9, 9)}
    root = write_boxes(tmp_path, LISTS, cell)
    text = f"{root}/Annotations/d.xml: expected a class of the boxes of train (cat, cell), got 'Cel"
    with pytest.raises(UserError, match=re.escape(text) + "l'; did you mean cell"):
        load_detection_splits(root)
    (root / "labels.txt").write_text("Cell\ncell\ncat\n")
    train = load_detection_splits(root).train
    assert (train.classes, train.category_ids) == (("Cell", "cell", "cat"), (1, 2, 3))
    assert train[0].labels.tolist() == [1]
    (root / "labels.txt").write_text("cell\ncell\n")
    with pytest.raises(UserError, match=r"labels.txt: expected each class once, got 'cell' twice"):
        load_detection_splits(root)


@pytest.mark.parametrize(
    ("objects", "text"),
    [
        ("<object>", "b.xml: expected XML, got a fault in it (mismatched tag: line 1, column"),
        ("<object/>", "b.xml: expected a <name> in each <object>, got none; add it"),
        ("<object><name>cat</name></object>", "b.xml: expected a <bndbox> with xmin, ymin, xmax, "),
        (voc_object("cat", "1,5", 1, 9, 9), "b.xml: expected a number for <xmin>, got '1,5'; corr"),
        (voc_object("cat", 1, 1, 9, 9, "<difficult>2</difficult>"), "<difficult> 0 or 1 of 'cat'"),
        (
            voc_object("cat", "nan", 1, 9, 9),
            "b.xml: box of 'cat': expected finite edges, got left nan, top 0, right 9, bottom 9 in "
            "an image of 40x60; correct it or remove it",
        ),
        (voc_object("cat", 9, 1, 5, 9), "expected left < right and top < bottom, got left 9, top "),
        (voc_object("cat", 70, 1, 80, 9), "expected a box that meets its image, got left 69, top "),
    ],
)
def test_faults_of_an_annotation(tmp_path, objects, text):
    root = write_boxes(tmp_path, LISTS, {"b": objects, "e": objects})
    with pytest.raises(UserError, match=re.escape(text)) as error:
        load_detection_splits(root)
    assert str(error.value).startswith(f"{root}/Annotations/b.xml: ")


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        (
            "JPEGImages/b.jpg",
            r"b.xml: expected its image in .*JPEGImages, got none of the name 'b'",
        ),
        (
            "Annotations/b.xml",
            r"no annotation for id 'b': expected .*b.xml \(1 of 3 missing\); add",
        ),
        ("ImageSets/Main/train.txt", "expected train.txt or trainval.txt beside val.txt, got neit"),
    ],
)
def test_what_is_missing_is_said(tmp_path, gone, text):
    root = write_boxes(tmp_path, LISTS, {})
    (root / gone).unlink()
    with pytest.raises(UserError, match=text):
        load_detection_splits(root)


def test_what_is_cut_or_empty_is_said(tmp_path):
    root = write_boxes(tmp_path, LISTS, dict.fromkeys("de", ""))
    text = f"{root.name}: expected boxes in the 2 images of val, got none; annotate some"
    with pytest.raises(UserError, match=text):
        load_detection_splits(root)
    (root / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val.txt is empty: expected one entry per line; add them"):
        load_detection_splits(root)
    xml = root / "Annotations/a.xml"
    (root / "ImageSets/Main/val.txt").write_text("a\n")
    whole = xml.read_text()
    for text in (whole[:50], f'<?xml version="1.0" encoding="gb2312"?>{whole}'):
        xml.write_text(text)
        with pytest.raises(UserError, match=r"a.xml: expected XML, got a fault in it \(.*; restor"):
            load_detection_splits(root)


def test_unknown_folders(tmp_path):
    text = "expected 'synthetic' or a folder, got 'nowhere'; give an existing folder"
    with pytest.raises(UserError, match=text):
        load_detection_splits("nowhere")
    root = write_boxes(tmp_path / "below", LISTS, {})
    text = f"no known layout: expected COCO .* or PASCAL VOC .*, found below; give {root}, which"
    with pytest.raises(UnknownLayout, match=text):
        load_detection_splits(tmp_path)
    for year in ("VOC2007", "VOC2012"):
        write_boxes(tmp_path, LISTS, {}, year)
    with pytest.raises(UserError, match=r"expected one folder of VOC in .*, got VOC2007, VOC2012;"):
        load_detection_splits(tmp_path)


def test_orientation(tmp_path):
    """Boxes are of the upright image; those of the image as it is stored are refused."""
    size = "<size><width>{}</width><height>{}</height></size>"
    root = write_boxes(tmp_path, LISTS, {"a": voc_object("cat", 31, 41, 40, 60)})
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    save_image(root / "JPEGImages/a.jpg", 0, (40, 60), exif=tags)
    train = load_detection_splits(root).train
    assert (train.sizes()[0], train[0].boxes.tolist()) == ((60, 40), [[30, 40, 40, 60]])
    xml = root / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("<object>", size.format(60, 40) + "<object>", 1))
    text = (
        f"a.xml: expected boxes of the upright image, 60x40 by the EXIF orientation of "
        f"{root}/JPEGImages/a.jpg, got those of 40x60; turn the boxes too, or remove the orient"
    )
    with pytest.raises(UserError, match=text):
        load_detection_splits(root)


def test_reading_and_fingerprints(tmp_path):
    """Kept or read at each access, the samples are the same; every edge counts."""
    root = write_boxes(tmp_path, LISTS, {})
    kept, read = (load_detection_splits(root, cache_in_memory=keep).train for keep in (1, 0))
    for one, other in zip(kept.load([2, 0]), read.load([2, 0]), strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.boxes, other.boxes)
    assert kept.fingerprint() == read.fingerprint()
    assert kept.subset([0]).objects().boxes.tolist() == kept[0].boxes.tolist()
    assert kept.subset([1, 2]).objects().sample.tolist() == [0, 1]
    xml = root / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("30", "31"))
    assert load_detection_splits(root).train.fingerprint() != kept.fingerprint()
    image = root / "JPEGImages/c.jpg"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(UserError, match=f"image {image} cannot be read: .*; replace the file"):
        load_detection_splits(root)


def test_blood_cells(data_root):
    """205 + 87 + 72 images, 4,888 boxes, two of them without an area."""
    splits = load_detection_splits(data_root / "bccd", cache_in_memory=False)
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts] == [205, 87, 72]
    assert [sum(part.counts()) for part in parts] == [2804, 1137, 945]
    assert [len(part.dropped) for part in parts] == [1, 1, 0]
    assert splits.train.classes == ("Platelets", "RBC", "WBC")
    sample = splits.val[0]
    assert (sample.image_id, sample.boxes[0].tolist()) == ("BloodImage_00000", [259, 176, 491, 376])
