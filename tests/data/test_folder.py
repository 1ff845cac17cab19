"""A folder of images and masks: round trip and every error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nasfast.data import load_splits, open_folder
from nasfast.data.folder import id_of
from nasfast.utils.errors import UserError

CLASSES = ["background", "cell", "nucleus"]
SIZE = (17, 24)  # height, width


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(10):
        pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        labels = rng.choice([0, 1, 2, 255], SIZE).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/f{i}.png")
        mask = Image.fromarray(labels)
        if i % 2:
            mask = mask.convert("P")
            mask.putpalette([*range(256)] * 3)
            mask.putdata(labels.ravel().tolist())
        mask.save(tmp_path / f"masks/f{i}.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return tmp_path


def pixels(*shape, value=0):
    """A file with an image of one value."""
    return lambda path: Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def text(content):
    return lambda path: path.write_text(content)


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


LISTED = {"train.txt": text("f1\nf3\n"), "val.txt": text("f2\n")}


@pytest.mark.parametrize("cache", [True, False])
def test_round_trip(folder, cache):
    (folder / "train.txt").write_text("f0\nf1\n\nf2.png\n")
    (folder / "val.txt").write_text("images/f4.png masks/f4.png\n")
    train, val, *_ = open_folder(folder, cache_in_memory=cache)
    assert (train.name, train.classes, train.ignore_index) == (folder.name, tuple(CLASSES), 255)
    assert (len(train), len(val), len(train.colors)) == (3, 1, 3)
    for name, sample in zip(("f0", "f1", "f2", "f4"), [*train, *val], strict=True):
        image = np.asarray(Image.open(folder / f"images/{name}.png")).transpose(2, 0, 1)
        mask = np.asarray(Image.open(folder / f"masks/{name}.png"))
        np.testing.assert_array_equal(sample.image.numpy(), image)
        np.testing.assert_array_equal(sample.mask.numpy(), mask)
    with pytest.raises(IndexError):
        train[3]


def test_split_by_hash(folder):
    splits = load_splits(folder)
    assert (len(splits.train), len(splits.val)) == (8, 2)
    assert (len(splits.search_train), len(splits.search_val)) == (7, 1)
    before = splits.val.fingerprint()
    assert load_splits(folder, seed=1, cache_in_memory=False).val.fingerprint() == before


def test_test_part(folder):
    """Its images are in no other part, and are read when asked for only."""
    assert load_splits(folder).test is None
    (folder / "test.txt").write_text("f0\nf7\n")
    (folder / "masks/f7.png").unlink()
    splits = load_splits(folder)
    assert (len(splits.train), len(splits.val)) == (6, 2)
    with pytest.raises(UserError, match=r"test.txt: no mask for id 'f7': .* \(1 of 2 missing\)"):
        _ = splits.test
    (folder / "test.txt").write_text("f0\n")
    wanted = np.asarray(Image.open(folder / "masks/f0.png"))
    np.testing.assert_array_equal(splits.test[0].mask.numpy(), wanted)


def test_fingerprint_follows_the_contents(folder):
    before = open_folder(folder)[0].fingerprint()
    for path in (folder / "images").iterdir():
        pixels(*SIZE, 3, value=7)(path)
    assert open_folder(folder)[0].fingerprint() != before
    (folder / "classes.txt").write_text("a\nb\nc\n")
    assert len({before, *(open_folder(folder)[i].fingerprint() for i in (0, 1))}) == 3


def test_binary_masks(folder):
    (folder / "classes.txt").write_text("no\nyes\n")
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 3 == 0).save(path)
    assert open_folder(folder)[0][0].mask.unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (
            {"masks/f3.png": pixels(*SIZE, value=3)},
            r"masks/f3.png has the value 3: expected 0..2 or 255 \(ignore\)",
        ),
        (
            {"masks/f3.png": pixels(*SIZE, 3)},
            r"masks/f3.png has mode RGB: expected an 8-bit index mask",
        ),
        (
            {"masks/f3.png": pixels(17, 23)},
            r"differ in size: .*images/f3.png is 17x24, .*masks/f3.png is 17x23",
        ),
        ({"images/f3.png": text("x")}, r"image .*images/f3.png cannot be read: cannot identify"),
        ({"images/f3.png": cut(-200)}, r"image .*images/f3.png cannot be read: "),
        ({"masks/f3.png": cut(70)}, r"mask .*masks/f3.png cannot be read: "),
        (
            {"masks/f3.png": Path.unlink},
            r"no mask for id 'f3': expected '.*masks/f3' with .* .tiff or .webp \(1 of 8",
        ),
        (
            LISTED | {"images/f3.png": Path.unlink},
            r"no image for id 'f3': expected '.*images/f3' .*1 of 2",
        ),
        ({"val.txt": text("f1\n")}, "expected both train.txt and val.txt or neither, got one"),
        (LISTED | {"train.txt": text("\n")}, "train.txt is empty: expected one entry per line"),
        ({"classes.txt": text("")}, "classes.txt is empty: expected one entry per line"),
        ({"classes.txt": text("c\n" * 256)}, "classes.txt: expected 2 to 255 classes, .* got 256"),
        (
            {f"images/f{i}.png": Path.unlink for i in range(10)},
            "images: expected at least 2 images, got 0",
        ),
    ],
)
def test_errors_name_the_file(folder, spoiled, message):
    for name, spoil in spoiled.items():
        spoil(folder / name)
    with pytest.raises(UserError, match=message):
        load_splits(folder)


@pytest.mark.parametrize("cache", [True, False])
def test_a_photo_that_is_turned(folder, cache):
    """Its mask is as the photo looks; one as it is stored does not fit, and the error says why."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.full((SIZE[1], SIZE[0], 3), 7, np.uint8)
    for path in (folder / "images").iterdir():
        Image.fromarray(image).save(path, exif=exif)
    splits = load_splits(folder, cache_in_memory=cache)
    assert splits.train[0].image.shape == (3, *splits.train[0].mask.shape) == (3, *SIZE)
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.full((SIZE[1], SIZE[0]), 1, np.uint8)).save(path)
    with pytest.raises(UserError) as caught:
        open_folder(folder, cache_in_memory=cache)
    assert len(caught.value.faults) == 8
    assert caught.value.faults[0].endswith(
        "f0.png is 24x17 (height x width); the image is upright by its EXIF orientation, turn the "
        "mask too"
    )


def test_a_lazy_frame_that_breaks_later_is_named(folder):
    train, *_ = open_folder(folder, cache_in_memory=False)
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"image .*images/f\d.png cannot be read"):
        train[0]


def test_ids():
    assert id_of("0001TP_006690") == "0001TP_006690"
    assert id_of("/SegNet/CamVid/train/x.1.png /SegNet/CamVid/trainannot/x.1.png") == "x.1"
    assert id_of("frame.0001") == "frame.0001"


def test_names_in_another_encoding(folder):
    for part in ("images", "masks"):
        (folder / part / "f3.png").rename(folder / part / "caf\udce9.png")  # latin-1
    parts = open_folder(folder)
    assert len(parts.train) + len(parts.val) == 10
