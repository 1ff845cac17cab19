"""The PASCAL VOC layout: lists, the augmented set, and where the folder lies."""

import shutil

import pytest
import torch
from folders import write_voc
from hypothesis import given
from hypothesis import strategies as st

from nasfast.data import TrainTransform, ValTransform, batch, load_splits
from nasfast.data.base import default_colors
from nasfast.data.checks import check_splits
from nasfast.utils.errors import UserError

LISTS = {"train": "abcd", "val": "efg"}


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "VOCdevkit/VOC2012", LISTS)


def names(dataset):
    return "".join(image.stem for image, _ in dataset.pairs)


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012", "VOCdevkit", ""])
def test_the_folder_and_those_above_it(voc, tmp_path, place):
    splits = load_splits(tmp_path / place)
    assert (names(splits.train), names(splits.val), splits.test) == ("abcd", "efg", None)
    assert (len(splits.train.classes), splits.train.classes[15]) == (21, "person")
    assert splits.train.colors == default_colors(21)
    assert splits.train[0].mask.unique().tolist() == [0, 15, 255]
    (voc / "SegmentationObject").mkdir()
    shutil.copy(voc / "SegmentationClass/a.png", voc / "SegmentationObject/a.png")
    (tmp_path / "other").mkdir()
    shutil.copy(voc / "SegmentationClass/a.png", tmp_path / "other/a.png")
    warnings = check_splits(splits, tmp_path / place).warnings
    assert not any("not read" in warning for warning in warnings)


def test_the_augmented_list(voc):
    write_voc(voc, {"train_aug": "abcdhij"}, (0, 3), "SegmentationClassAug")
    lines = [f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n" for i in "abcdhij"]
    (voc / "ImageSets/Segmentation/train_aug.txt").write_text("".join(lines))
    splits = load_splits(voc)
    assert (names(splits.train), names(splits.val)) == ("abcdhij", "efg")
    assert splits.train[0].mask.unique().tolist() == [0, 3]
    assert splits.val[0].mask.unique().tolist() == [0, 15, 255]
    shutil.rmtree(voc / "SegmentationClassAug")
    text = r"train_aug.txt is there and .*/SegmentationClassAug is missing: the augmented set has"
    with pytest.raises(UserError, match=text):
        load_splits(voc)


def test_lists_of_a_part(voc):
    lists = voc / "ImageSets/Segmentation"
    write_voc(voc, {"trainval": "abcdefg", "test": "hi"})
    assert names(load_splits(voc).train) == "abcd"
    assert names(load_splits(voc).test) == "hi"
    (lists / "train.txt").unlink()
    assert names(load_splits(voc).train) == "abcd"
    (voc / "SegmentationClass/h.png").unlink()  # as from the server of the challenge
    assert load_splits(voc).test is None
    (lists / "trainval.txt").unlink()
    text = "expected train.txt, trainval.txt or train_aug.txt or trainaug.txt, got none; unpack"
    with pytest.raises(UserError, match=text):
        load_splits(voc)


@given(st.permutations("abcdefg"), st.sampled_from(["{}", "JPEGImages/{}.jpg", "{}\t1", " {} "]))
def test_trainval_without_val_is_train(tmp_path_factory, order, line):
    """Whatever the order and the form of the lines."""
    global made
    root = made = made or write_voc(
        tmp_path_factory.mktemp("voc"), {"val": "efg", "trainval": "abcdefg"}
    )
    lists = root / "ImageSets/Segmentation"
    (lists / "trainval.txt").write_text("\n".join(line.format(i) for i in order))
    assert names(load_splits(root).train) == "".join(i for i in order if i in "abcd")


made = None


@pytest.mark.parametrize(
    ("gone", "text"),
    [
        ("SegmentationClass", "{root}/SegmentationClass is missing: VOC is JPEGImages/ "),
        ("ImageSets/Segmentation", "{root}/ImageSets/Segmentation is missing: VOC is "),
        ("ImageSets/Segmentation/val.txt", "Segmentation/val.txt is missing: .*; unpack its arch"),
        ("SegmentationClass/b.png", "train.txt: no mask for id 'b': expected .* \\(1 of 4 missing"),
        ("JPEGImages/b.jpg", "train.txt: no image for id 'b': expected .* \\(1 of 4 missing"),
    ],
)
def test_what_is_missing_is_said(voc, gone, text):
    path = voc / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=text.format(root=voc)):
        load_splits(voc.parent)


def test_two_years(voc, tmp_path):
    write_voc(voc.parent / "VOC2007", LISTS, (0, 21))
    text = "expected one folder of VOC in .*, got VOC2007, VOC2012; give one of them"
    with pytest.raises(UserError, match=text):
        load_splits(voc.parent)
    with pytest.raises(UserError, match=r"has the value 21: expected 0..20 or 255 \(ignore\)"):
        load_splits(voc.parent / "VOC2007")


def test_real_photos(data_root, tmp_path):
    """Five, as the challenge stores them: palette masks, many sizes."""
    ids = sorted(path.stem for path in (data_root / "voc-sample").glob("*.jpg"))
    write_voc(tmp_path, {"train": [], "val": []})
    for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (tmp_path / folder).mkdir()
        for i in ids:
            shutil.copy(data_root / f"voc-sample/{i}.{suffix}", tmp_path / folder)
    for part, chosen in (("train", ids[:3]), ("val", ids[3:])):
        (tmp_path / f"ImageSets/Segmentation/{part}.txt").write_text("\n".join(chosen))
    splits = load_splits(tmp_path, resize_longer=400)
    assert [len(splits.train), len(splits.val)] == [3, 2]
    assert {max(size) for data in (splits.train, splits.val) for size in data.sizes()} == {400}
    assert set(splits.train.label_counts().sum(0).nonzero().flatten().tolist()) <= {*range(21), 255}
    images, masks = batch(
        splits.train, [0, 1, 2], TrainTransform(256, 300), torch.Generator().manual_seed(0)
    )
    assert (images.shape, masks.shape) == ((3, 3, 256, 256), (3, 256, 256))
    images, _ = batch(splits.val, [0, 1], ValTransform(400))
    assert images.shape == (2, 3, 400, 400)
