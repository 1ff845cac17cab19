"""What would mislead a search: errors before it begins, and warnings."""

import shutil

import pytest
from folders import save_image, save_mask, write_folder, write_lists
from PIL import Image

from nasfast.data import SyntheticStreets, load_splits, split_for_search
from nasfast.data.checks import check_images, check_splits
from nasfast.data.restoration import open_images
from nasfast.utils.errors import UserError

STEMS = [f"{i:02d}" for i in range(24)]


@pytest.fixture
def folder(tmp_path):
    """20 images to train on, 4 to validate; nothing to warn of."""
    write_folder(tmp_path, STEMS)
    write_lists(tmp_path, STEMS[:20], STEMS[20:])
    return tmp_path


def warnings(folder, **options):
    return list(check_splits(load_splits(folder, **options), folder).warnings)


def test_nothing_to_warn_of(folder):
    (folder / "images" / "._00.png").touch()
    (folder / "images" / "Thumbs.db").touch()
    (folder / "README.txt").touch()
    assert warnings(folder) == []
    assert warnings_of_images(folder / "images") == [ONE]


ONE = "candidates are scored on one image, so that rewards say little; add images"


def copies(folder):
    shutil.copy(folder / "images/03.png", folder / "images/21.png")


def both_lists(folder):
    write_lists(folder, STEMS[:22], STEMS[20:])


def a_line_twice(folder):
    write_lists(folder, [*STEMS[:20], "05"], STEMS[20:])


def few(folder):
    write_lists(folder, STEMS[:14], STEMS[20:])


def orphans(folder):
    for name in ("x", "y"):
        save_mask(folder / "masks" / f"{name}.png", (0, 1))


def subfolders(folder):
    save_image(folder / "images/more/a.png")
    save_image(folder / "raw/b.JPG")
    save_image(folder / "raw/c.jpg")


def kinds(folder):
    (folder / "images" / "photo.HEIC").touch()


def jpeg_masks(folder):
    for name in ("00", "01"):
        (folder / "masks" / f"{name}.png").rename(folder / "masks" / f"{name}.jpg")


def third_class(folder):
    (folder / "classes.txt").write_text("no\nyes\nedge\n")


def third_class_255(folder):
    third_class(folder)
    for path in (folder / "masks").iterdir():
        save_mask(path, (0, 1, 255))


def void(folder):
    for path in (folder / "masks").iterdir():
        save_mask(path, (0, 1, *[255] * 6))


NEVER = "the class edge never occurs in the masks of "
VOID = (
    "; void (255) covers 25.0% of the pixels; if 0,1,255 mean no, yes, edge, give --mask-values "
    "0,1,255"
)
KINDS = "bmp, jpeg, jpg, png, tif, tiff, webp"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (
            both_lists,
            [
                "2 images are both in train and in val: 20.png, 21.png; scores on val will be too "
                "good"
            ],
        ),
        (
            copies,
            [
                "1 images are both in train and in val under other names, by content: 21.png; "
                "scores on val will be too good"
            ],
        ),
        (
            a_line_twice,
            [
                "1 images are in train more than once: 05.png; a search may score candidates on "
                "what they were trained on"
            ],
        ),
        (few, [ONE]),
        (orphans, ["2 masks have no image: x.png, y.png"]),
        (
            subfolders,
            [
                "3 images lie in folders that are not read: images/more (1: a.png), raw (2: b.JPG, "
                "c.jpg); move or convert them"
            ],
        ),
        (
            kinds,
            [
                f"1 files beside images are of a kind that is not read ({KINDS}): images (1: "
                "photo.HEIC); move or convert them"
            ],
        ),
        (
            jpeg_masks,
            [
                "2 masks of train are JPEG, which changes values to those of other classes: "
                "00.jpg, 01.jpg; save them as PNG from their source"
            ],
        ),
        (third_class, [NEVER + "train", NEVER + "val"]),
        (third_class_255, [NEVER + "train" + VOID, NEVER + "val" + VOID]),
        (
            void,
            [
                f"in the masks of {part}, void (255) covers 75.0% of the pixels"
                for part in ("train", "val")
            ],
        ),
    ],
)
def test_warnings(folder, change, wanted):
    change(folder)
    assert warnings(folder) == wanted


def test_values_that_are_not_listed(folder):
    for path in (folder / "masks").iterdir():
        save_mask(path, (0, 7, 200, 9))
    assert warnings(folder, mask_values="0,200") == [
        f"masks of {part} hold 7, 9, which --mask-values does not list: void, 50.0% of the pixels"
        for part in ("train", "val")
    ]


def test_the_reward_has_to_count_something(folder):
    for i in STEMS[:20]:
        save_mask(folder / "masks" / f"{i}.png", (0, 1) if i == "00" else (1,))
    splits = load_splits(folder)
    assert check_splits(splits, folder).errors == (
        f"{folder.name}: expected at least 2 classes in the 2 images that a search holds out of "
        "train to score candidates, got yes; add images, or give another --seed",
    )
    for i in STEMS[:20]:
        save_mask(folder / "masks" / f"{i}.png", (0, 1))
    splits = load_splits(folder)
    assert check_splits(splits, folder, omit=[0]).errors == ()
    assert check_splits(splits, folder, omit=[0, 1]).errors == (
        "omit: expected to leave one of the classes in the 2 images that score candidates (no, "
        "yes), got all of them; the reward would have nothing to count",
    )
    for stem in STEMS[20:]:
        save_mask(folder / "masks" / f"{stem}.png", (255,))
    with pytest.raises(UserError) as caught:
        load_splits(folder)
    assert str(caught.value).startswith(
        f"{folder.name}: expected at least 1 of the 2 classes in the masks of val, got none; void "
        "(255) covers 100.0% of the pixels"
    )


def test_drawn_data():
    train, val = SyntheticStreets(20), SyntheticStreets(2, stream="val")
    found = check_splits(split_for_search(train, val, seed=0), test=True)
    assert [row["images"] for row in found.facts["parts"]] == [20, 2]
    assert len(found.facts["classes"]) == len(found.legend) == 8
    assert [tile[:3] for tile in found.tiles] == [*["tra"] * 10, *["val"] * 2]
    assert (found.warnings, found.errors) == ((), ())


def warnings_of_images(folder):
    return list(check_images(open_images(folder, 3), folder).warnings)


@pytest.fixture
def photos(tmp_path):
    """So many that two validate."""
    for i in range(100):
        save_image(tmp_path / "train" / f"{i:03d}.bmp", i)
    for i in range(3):
        save_image(tmp_path / "test" / f"{i:03d}.bmp", 200 + i)
    return tmp_path


def test_images_for_restoration(photos):
    assert warnings_of_images(photos) == []
    shutil.copy(photos / "train/007.bmp", photos / "test/001.bmp")
    shutil.copy(photos / "train/001.bmp", photos / "train/099.bmp")
    Image.open(photos / "train/005.bmp").save(photos / "train/005.png")
    save_image(photos / "train/deep/a.png")
    (photos / "train" / "._000.bmp").touch()
    assert warnings_of_images(photos) == [
        "1 images are both in train and in val under other names, by content: 099.bmp; scores on "
        "val will be too good",
        "1 images are both in train and in test under other names, by content: 001.bmp; scores on "
        "test will be too good",
        "1 names come with several suffixes: 005; if they are the same images, a test may hold "
        "what was trained on",
        "1 images lie in folders that are not read: train/deep (1: a.png); move or convert them",
    ]


def test_pairs_for_restoration(tmp_path):
    for i in range(3):
        save_image(tmp_path / "clean" / f"{i}.png", i)
        save_image(tmp_path / "rainy" / f"{i}.png", 10 * i)
    save_image(tmp_path / "loose.png")
    assert warnings_of_images(tmp_path) == [
        ONE,
        "1 of 3 pairs hold the same file as clean and as degraded image",
        "1 images lie in folders that are not read: . (1: loose.png); move or convert them",
    ]
    save_image(tmp_path / "rainy/2.jpg")
    with pytest.raises(UserError) as caught:
        open_images(tmp_path, 3)
    assert str(caught.value) == (
        f"{tmp_path}/rainy/2.jpg and 2.png: expected one image of the name '2', got two; rename "
        "or remove one"
    )
