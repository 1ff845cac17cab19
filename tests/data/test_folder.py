"""A folder of images and masks: round trip and every error."""

import numpy as np
import pytest
from PIL import Image

from nasfast.data import load_splits, open_folder
from nasfast.data.folder import id_of
from nasfast.utils.errors import UserError

CLASSES = ["background", "cell", "nucleus"]
SIZE = (24, 17)  # width, height


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(10):
        pixels = rng.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
        labels = rng.choice([0, 1, 2, 255], pixels.shape[:2]).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/f{i}.png")
        mask = Image.fromarray(labels)
        if i % 2:
            mask = mask.convert("P")
            mask.putpalette([*range(256)] * 3)
            mask.putdata(labels.ravel().tolist())
        mask.save(tmp_path / f"masks/f{i}.png")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return tmp_path


def write(path, *shape, value=0, dtype=np.uint8):
    Image.fromarray(np.full(shape, value, dtype)).save(path)


@pytest.mark.parametrize("cache", [True, False])
def test_round_trip(folder, cache):
    (folder / "train.txt").write_text("f0\nf1\n\nf2.png\n")
    (folder / "val.txt").write_text("images/f4.png masks/f4.png\n")
    train, val = open_folder(folder, cache_in_memory=cache)
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


def test_fingerprint_follows_the_contents(folder):
    before = open_folder(folder)[0].fingerprint()
    for path in (folder / "images").iterdir():
        write(path, SIZE[1], SIZE[0], 3, value=7)
    assert open_folder(folder)[0].fingerprint() != before
    (folder / "classes.txt").write_text("a\nb\nc\n")
    assert len({before, *(open_folder(folder)[i].fingerprint() for i in (0, 1))}) == 3


def test_binary_masks(folder):
    (folder / "classes.txt").write_text("no\nyes\n")
    for path in (folder / "masks").iterdir():
        Image.fromarray(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE[::-1]) % 3 == 0).save(path)
    assert open_folder(folder)[0][0].mask.unique().tolist() == [0, 1]


def spoil_value(folder):
    write(folder / "masks/f3.png", *SIZE[::-1], value=3)


def spoil_mode(folder):
    write(folder / "masks/f3.png", *SIZE[::-1], 3)


def spoil_size(folder):
    write(folder / "masks/f3.png", 17, 23)


def spoil_image(folder):
    (folder / "images/f3.png").write_bytes(b"not an image")


def truncate_image(folder):
    path = folder / "images/f3.png"
    path.write_bytes(path.read_bytes()[:-200])


def truncate_mask(folder):
    path = folder / "masks/f3.png"
    path.write_bytes(path.read_bytes()[:70])


def lose_mask(folder):
    (folder / "masks/f3.png").unlink()


def lose_image(folder):
    (folder / "images/f3.png").unlink()
    (folder / "train.txt").write_text("f1\nf3\n")
    (folder / "val.txt").write_text("f2\n")


def lose_list(folder):
    (folder / "train.txt").write_text("f1\n")


def empty_list(folder):
    (folder / "train.txt").write_text("\n")
    (folder / "val.txt").write_text("f2\n")


def no_classes(folder):
    (folder / "classes.txt").write_text("")


def many_classes(folder):
    (folder / "classes.txt").write_text("c\n" * 256)


def no_images(folder):
    for path in (folder / "images").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_value, r"masks/f3.png has the value 3: expected 0..2 or 255 \(ignore\)"),
        (spoil_mode, r"masks/f3.png has mode RGB: expected an 8-bit index mask"),
        (
            spoil_size,
            r"differ in size: .*images/f3.png is 17x24, .*masks/f3.png is 17x23",
        ),
        (spoil_image, r"image .*images/f3.png cannot be read: cannot identify"),
        (truncate_image, r"image .*images/f3.png cannot be read: "),
        (truncate_mask, r"mask .*masks/f3.png cannot be read: "),
        (
            lose_mask,
            r"no mask for id 'f3': expected '.*masks/f3' with .* .jpg or .jpeg or .png \(1 of 8",
        ),
        (lose_image, r"no image for id 'f3': expected '.*images/f3' .*1 of 2"),
        (lose_list, r"expected both train.txt and val.txt or neither, got one"),
        (empty_list, r"train.txt is empty: expected one entry per line"),
        (no_classes, r"classes.txt is empty: expected one entry per line"),
        (many_classes, r"classes.txt: expected at most 255 classes, got 256"),
        (no_images, r"images: expected at least 2 images, got 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_errors_name_the_file(folder, spoil, text):
    spoil(folder)
    with pytest.raises(UserError, match=text):
        load_splits(folder)


def test_a_lazy_frame_that_breaks_later_is_named(folder):
    train, _ = open_folder(folder, cache_in_memory=False)
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"image .*images/f\d.png cannot be read"):
        train[0]


def test_ids():
    assert id_of("0001TP_006690") == "0001TP_006690"
    assert id_of("/SegNet/CamVid/train/x.1.png /SegNet/CamVid/trainannot/x.1.png") == "x.1"
    assert id_of("frame.0001") == "frame.0001"
