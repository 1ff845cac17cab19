"""Masks whose values are no class indices: refused with a remedy, or read by `mask_values`."""

import numpy as np
import pytest
from folders import save_mask, write_folder, write_lists
from PIL import Image

from nasfast.data import load_splits
from nasfast.data.folder import parse_mask_values
from nasfast.utils.errors import UserError

CLASSES = ("no", "yes", "edge", "far")


@pytest.mark.parametrize(
    ("values", "classes", "text"),
    [
        (
            (0, 255),
            2,
            "{root.name}: expected at least 2 of the 2 classes in the masks of train, got no; void "
            "(255) covers 50.0% of the pixels; if 0,255 mean no, yes, give --mask-values 0,255",
        ),
        (
            (0, 85, 170, 255),
            4,
            "mask {root}/masks/a.png has the value 85: expected 0..3 or 255 (ignore); if "
            "0,85,170,255 mean no, yes, edge, far, give --mask-values 0,85,170,255",
        ),
        (
            (1, 2),
            2,
            "mask {root}/masks/a.png has the value 2: expected 0..1 or 255 (ignore); if 1,2 mean "
            "no, yes, give --mask-values 1,2",
        ),
        (
            (0, 1, 2, 255),
            2,
            "mask {root}/masks/a.png has the value 2: expected 0..1 or 255 (ignore); if the "
            "classes are 0..2, the list of classes lacks names; if 2 is void, give --mask-values "
            "0,1; if 1,2 mean no, yes, give --mask-values 1,2",
        ),
        (
            (0, 1, 4),
            4,
            "mask {root}/masks/a.png has the value 4: expected 0..3 or 255 (ignore); if the "
            "classes are 0..4, the list of classes lacks names; if 4 is void, give --mask-values "
            "0,1,2,3",
        ),
        (
            (0, 1, 60, 70),
            2,
            "mask {root}/masks/a.png has the value 60: expected 0..1 or 255 (ignore); the masks "
            "hold 0, 1, 60, 70: save class indices, or give --mask-values and the value of each "
            "class, no, yes",
        ),
        (
            (255,),
            2,
            "{root.name}: expected at least 2 of the 2 classes in the masks of train, got none; "
            "void (255) covers 100.0% of the pixels; the masks hold 255: save class indices, or "
            "give --mask-values and the value of each class, no, yes",
        ),
    ],
)
def test_a_remedy_is_offered(tmp_path, values, classes, text):
    write_folder(tmp_path, "abcd", values, CLASSES[:classes])
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path)
    assert str(caught.value) == text.format(root=tmp_path)


def test_values_become_indices(tmp_path):
    write_folder(tmp_path, "abcd", (0, 255, 7))
    splits = load_splits(tmp_path, mask_values="0, 255")
    mask = np.asarray(Image.open(splits.train.pairs[0][1]))
    wanted = np.select([mask == 0, mask == 255], [0, 1], splits.train.ignore_index)
    np.testing.assert_array_equal(splits.train[0].mask.numpy(), wanted)
    assert splits.train.label_counts().sum(0).nonzero().flatten().tolist() == [0, 1, 255]
    other = load_splits(tmp_path, mask_values="255,0")
    assert other.train.fingerprint() != splits.train.fingerprint()


def test_indices_as_values_are_the_same_masks(tmp_path):
    write_folder(tmp_path, "abcd", (0, 1, 255))
    plain, given = load_splits(tmp_path), load_splits(tmp_path, mask_values="0,1")
    for a, b in zip(plain.train, given.train, strict=True):
        np.testing.assert_array_equal(a.mask.numpy(), b.mask.numpy())


@pytest.mark.parametrize("text", ["0", "0,0", "0,256", "0,x", "0,1,2", "", "0;255", "-1,0", "0,²"])
def test_values_that_are_none(text):
    with pytest.raises(UserError) as caught:
        parse_mask_values(text, CLASSES[:2])
    assert str(caught.value) == (
        "mask-values: expected 2 different numbers of 0..255, one a class (no, yes), such as 0,255 "
        f"for two, got {text!r}"
    )


def test_drawn_data_have_no_values():
    with pytest.raises(UserError, match="mask-values: expected a folder of masks, got synthetic"):
        load_splits("synthetic", mask_values="0,255")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_other_modes_are_refused(tmp_path, mode):
    write_folder(tmp_path, "abcd")
    Image.new(mode, (12, 8)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path)
    assert str(caught.value) == (
        f"mask {tmp_path}/masks/a.png has mode {mode}: expected an 8-bit index mask (grey or "
        "palette PNG whose pixel values are class indices); replace each colour by its class's "
        "index"
    )


def test_masks_as_jpeg(tmp_path):
    write_folder(tmp_path, "abcd")
    (tmp_path / "masks" / "a.png").unlink()
    save_mask(tmp_path / "masks" / "a.jpg", (0, 255))
    with pytest.raises(UserError, match=r"a.jpg has the value \d+: .*; JPEG changes values; "):
        load_splits(tmp_path)


def test_all_faults_are_counted(tmp_path):
    write_folder(tmp_path, "abcd")
    write_lists(tmp_path, "abc", "d")
    for stem in "ac":
        (tmp_path / "images" / f"{stem}.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path)
    assert str(caught.value).endswith(" (and 1 more, which nasfast check lists)")
    assert [fault.split()[1] for fault in caught.value.faults] == [
        f"{tmp_path}/images/{stem}.png" for stem in "ac"
    ]
