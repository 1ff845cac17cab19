"""The Cityscapes layout: ids to labels, cities, and archives that are unpacked in part."""

import shutil

import numpy as np
import pytest
import torch
from folders import save_image, save_mask, write_cityscapes
from hypothesis import given
from hypothesis import strategies as st

from nasfast.data import TrainTransform, batch, folder, load_splits
from nasfast.data.checks import check_splits
from nasfast.data.cityscapes import CLASSES, LABELS
from nasfast.data.folder import CITYSCAPES_IDS, FileDataset
from nasfast.utils.errors import UserError

IDS = {  # of the 19 classes, as the benchmark lists them
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31,
    "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
CITIES = {"train": {"aachen": 10, "ulm": 2}, "val": {"lindau": 2}}


@pytest.fixture
def streets(tmp_path):
    return write_cityscapes(tmp_path / "streets", CITIES)


def test_ids_become_the_labels_of_the_benchmark():
    assert [LABELS[value] for value in IDS.values()] == list(range(19))
    assert list(IDS) == list(CLASSES)
    assert {label for value, label in LABELS.items() if value not in IDS.values()} == {255}
    assert sorted(LABELS) == list(range(34))


@given(st.lists(st.sampled_from(range(34)), min_size=2, max_size=30))
def test_masks_of_any_ids(tmp_path_factory, values):
    root = tmp_path_factory.mktemp("frame")
    save_image(root / "a.png", size=(len(values), 4))
    save_mask(root / "m.png", values, (len(values), 4))
    pair = root / "a.png", root / "m.png"
    data = FileDataset("frame", CLASSES, [pair], labels=LABELS)
    wanted = [CITYSCAPES_IDS.index(v) if v in CITYSCAPES_IDS else 255 for v in values]
    assert data[0].mask[:, 0].tolist() == wanted
    assert (
        data.label_counts()[0].tolist() == np.bincount(np.repeat(wanted, 4), minlength=256).tolist()
    )


def test_parts(streets):
    write_cityscapes(streets, {"test": {"bonn": 1}}, values=(1, 3))
    splits = load_splits(streets)
    sizes = [len(d) for d in (splits.search_train, splits.search_val, splits.train, splits.val)]
    assert sizes == [11, 1, 12, 2]
    assert (len(splits.train.classes), splits.train.ignore_index) == (19, 255)
    assert splits.train.colors[13] == (0, 0, 142)
    assert splits.train[0].mask[:, 0].unique().tolist() == [0, 13, 255]
    with pytest.raises(UserError, match="gtFine/test: expected masks with labels, got none: the b"):
        _ = splits.test
    one, *more = check_splits(splits, streets).warnings
    assert one.startswith("candidates are scored on one image")
    assert [" never occur in the masks of " in warning for warning in more] == [True, True]
    shutil.rmtree(streets / "gtFine/test")
    assert load_splits(streets).test is None


def test_masks_of_labels(tmp_path):
    """They are read where there are no ids, and are the same data in other files."""
    write_cityscapes(tmp_path, CITIES, "labelTrainIds", (0, 13, 255))
    assert load_splits(tmp_path).train[0].mask[:, 0].unique().tolist() == [0, 13, 255]
    write_cityscapes(tmp_path, CITIES, "labelIds", (7, 8))
    assert load_splits(tmp_path).train[0].mask[:, 0].unique().tolist() == [0, 1]


def remove(*names):
    def change(root):
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def empty(name):
    def change(root):
        shutil.rmtree(root / name)
        (root / name).mkdir()

    return change


def fill(ending, values):
    return lambda root: write_cityscapes(root, {"val": {"lindau": 1}}, ending, values)


FRAME = "aachen/aachen_000003_000019"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (remove("gtFine"), "{root}/gtFine/train is missing: Cityscapes is leftImg8bit/ "),
        (
            remove("leftImg8bit/val"),
            "{root}/leftImg8bit/val is missing: Cityscapes is .*; unpack leftImg8bit_trainvalt.* "
            "in {root}$",
        ),
        (
            empty("gtFine/train"),
            "{root}/gtFine/train: expected a folder of each city, such as aachen, got nothing; "
            "unpack gtFine_trainvaltest.zip in {root}$",
        ),
        (
            remove("leftImg8bit/train/ulm"),
            "2 of 2 masks of train in ulm have no image: expected {root}/leftImg8bit/train/ulm/"
            "ulm_000000_000019_leftImg8bit.png; unpack leftImg8bit_trainvaltest.zip again, or",
        ),
        (
            remove(f"gtFine/train/{FRAME}_gtFine_labelIds.png"),
            "1 of 10 images of train in aachen have no mask: expected {root}/gtFine/train/"
            f"{FRAME}_gtFine_labelIds.png; unpack gtFine_trainvaltest.zip again, or remove what",
        ),
        (
            lambda root: (root / "leftImg8bit/val/bonn").mkdir(),
            "{root}/leftImg8bit/val/bonn: expected images .*, got none; unpack leftImg8bit_tr",
        ),
        (
            fill("labelIds", (7, 34)),
            r"lindau_000000_000019_gtFine_labelIds.png has the value 34: expected 0..33; if the "
            r"masks hold the labels 0..18 and 255, name them \*_gtFine_labelTrainIds.png$",
        ),
        (fill("labelIds", (0, 1, 255)), "labelIds.png has the value 255: expected 0..33; if the m"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(streets, change, text):
    change(streets)
    with pytest.raises(UserError, match=text.format(root=streets)):
        load_splits(streets)


def test_ids_under_the_name_of_labels(tmp_path):
    write_cityscapes(tmp_path, CITIES, "labelTrainIds")
    text = (
        r"has the value 26: expected 0..18 or 255 \(ignore\); if the masks hold the label ids "
        r"0..33, name them \*_gtFine_labelIds.png"
    )
    with pytest.raises(UserError, match=text):
        load_splits(tmp_path)


def test_ids_in_a_folder_of_masks(tmp_path):
    for i in range(4):
        save_image(tmp_path / f"images/{i}.png", i)
        save_mask(tmp_path / f"masks/{i}.png", (7, 23, 26, 0))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    values = ",".join(map(str, IDS.values()))
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path)
    assert str(caught.value).endswith(
        f"if the values are label ids of Cityscapes, give --mask-values {values}"
    )
    splits = load_splits(tmp_path, mask_values=values)
    assert splits.train[0].mask.unique().tolist() == [0, 10, 13, 255]


def test_values_are_known(streets):
    with pytest.raises(UserError) as caught:
        load_splits(streets, mask_values="7,8")
    assert str(caught.value) == (
        "mask-values: expected none for Cityscapes, whose ids are known, got '7,8'; leave it out"
    )


@pytest.mark.parametrize("near", ["leftImg8bit", ".."])
def test_the_folder_nearby_is_named(streets, near):
    with pytest.raises(UserError) as caught:
        load_splits(streets / near)
    assert str(caught.value).endswith(f"; give {streets}, which is of a known kind") == (
        near == "leftImg8bit"
    )
    assert "streets, which is of a known kind" in str(caught.value)


def test_large_data_are_read_at_each_access(streets, monkeypatch):
    """The samples are the same; broken frames are found by a check of the whole."""
    kept = load_splits(streets)
    monkeypatch.setattr(folder, "KEPT", 1000)
    read = load_splits(streets)
    assert read.train._masks == read.train._images == []
    assert read.train.sizes() == kept.train.sizes()
    assert read.train.fingerprint() == kept.train.fingerprint()
    for one, other in zip(read.train, kept.train, strict=True):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.mask, other.mask)
    crops = TrainTransform(16, 16)
    images, _ = batch(read.search_train, [3, 0, 3], crops, torch.Generator().manual_seed(0))
    wanted, _ = batch(kept.search_train, [3, 0, 3], crops, torch.Generator().manual_seed(0))
    assert torch.equal(images, wanted)
    frame = streets / f"leftImg8bit/train/{FRAME}_leftImg8bit.png"
    frame.write_bytes(frame.read_bytes()[:-100])
    splits = load_splits(streets)
    assert check_splits(splits, streets).errors == ()
    errors = check_splits(splits, streets, test=True).errors
    assert len(errors) == 1
    assert errors[0].startswith(f"image {frame} cannot be read: ")
