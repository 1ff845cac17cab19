"""Images for restoration: layouts, the division, and every error."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nasfast.data.checks import check_images
from nasfast.data.restoration import LAYOUTS, RestorationData, open_folder, open_images
from nasfast.tasks.restoration.dehazing import Dehazing
from nasfast.tasks.restoration.patches import ImagePatches
from nasfast.utils.errors import UserError


def save(path, height=20, width=30, mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    (image.convert("L").convert(mode) if mode != "RGB" else image).save(path)


@pytest.fixture
def flat(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.png", seed=i)
    return tmp_path


def test_bsds_layout_and_published_division(tmp_path):
    root = tmp_path / "bsds"
    for part, count in (("train", 60), ("val", 42), ("test", 2)):
        for i in range(count):
            save(root / "images" / part / f"{part[0]}{i}.jpg", 12, 12)
    save(root / "images" / "train" / "100.jpg", 12, 12)
    data = open_images(root, 1)
    assert (len(data.train), len(data.val), len(data.test)) == (101, 2, 2)
    names = [*data.train.names, *data.val.names]
    assert names == sorted(names)  # as strings, both folders in one list
    assert (names[0], names[-1]) == ("100.jpg", "v9.jpg")
    weights, architecture = data.halves()
    assert weights.names + architecture.names == data.train.names
    assert (len(weights), len(architecture)) == (51, 50)
    assert data.channels == 1


def test_bsds500_itself(data_root):
    """The last 2 % are the six images that the published search validates on."""
    if not (data_root / "bsds500").is_dir():
        pytest.skip(f"no BSDS500 at {data_root / 'bsds500'}")
    data = open_images(data_root / "bsds500", 1)
    assert [len(half) for half in data.halves()] == [147, 147]
    names = [f"{number}.jpg" for number in (90076, 92059, 94079, 95006, 97017, 97033)]
    assert list(data.val.names) == names
    assert len(data.test) == 200
    assert data.fingerprint()[:16] == "747a495fe2de51db"  # resumed runs depend on it
    assert sum(height > width for height, width in data.test.sizes) == 66


def test_flat_folder(flat):
    data = open_images(flat, 3)
    assert (len(data.train), len(data.val), len(data.test)) == (7, 1, 2)
    parts = [name for part in (data.train, data.val, data.test) for name in part.names]
    assert sorted(parts) == sorted(f"{i}.png" for i in range(10))
    assert open_images(flat, 3).test.names == data.test.names
    assert len(open_folder(flat, 3)) == 10
    pair = data.train[0]
    wanted = np.asarray(Image.open(flat / pair.name)).transpose(2, 0, 1)
    np.testing.assert_array_equal(pair.clean.numpy(), wanted)
    assert pair.degraded is None
    assert data.train[0] is pair  # read once
    assert data.train[:2][0] is pair
    with pytest.raises(IndexError):
        data.train[7]


def test_grey_is_the_luma(flat):
    (pair,) = (p for p in open_folder(flat, 1) if p.name == "3.png")
    wanted = np.asarray(Image.open(flat / "3.png").convert("L"))
    np.testing.assert_array_equal(pair.clean[0].numpy(), wanted)
    assert pair.clean.dtype == torch.uint8


@pytest.mark.parametrize("degraded", ["rainy", "hazy", "noisy", "degraded"])
def test_pairs_in_two_folders(tmp_path, degraded):
    for i in range(5):
        save(tmp_path / "clean" / f"{i}.png", seed=i)
        save(tmp_path / degraded / f"{i}.jpg", seed=i + 10)
    data = open_images(tmp_path, 3)
    assert (len(data.train), len(data.val), len(data.test)) == (3, 1, 1)
    assert data.train.degradations == {degraded}
    pair = data.test[0]
    stem = pair.name.removesuffix(".png")
    with Image.open(tmp_path / degraded / f"{stem}.jpg") as file:
        wanted = np.asarray(file).transpose(2, 0, 1)
    np.testing.assert_array_equal(pair.degraded.numpy(), wanted)


def test_pairs_by_suffix(data_root):
    folder = data_root / "rain-sample" / "synthetic"
    if not folder.is_dir():
        pytest.skip(f"no rainy images at {folder}")
    pairs = open_folder(folder, 3)
    assert pairs.sizes == ((350, 550), (480, 576), (494, 640))
    assert pairs.degradations == {"rainy"}
    assert pairs[0].degraded.float().mean() > pairs[0].clean.float().mean()
    data = open_images(folder, 3)
    assert (len(data.train), len(data.val), len(data.test)) == (1, 1, 1)
    with pytest.raises(UserError) as error:
        data.halves()
    assert str(error.value) == (
        "synthetic: a search divides the training images in two and needs at least 2, got 1; add "
        "some"
    )


def save_depth(path, values):
    path.parent.mkdir(exist_ok=True)
    np.save(path, values) if path.suffix == ".npy" else Image.fromarray(values).save(path)


@pytest.mark.parametrize(
    ("folder", "suffix", "kind"), [("", "npy", float), ("clean", "png", np.uint16)]
)
def test_depth_beside_clean_images(tmp_path, folder, suffix, kind):
    """In any unit: 1 is the farthest point. Patches cut it with the image."""
    values = np.arange(1, 601).reshape(20, 30)
    for i in range(4):
        save(tmp_path / folder / f"{i}.png", seed=i)
        save_depth(tmp_path / "depth" / f"{i}.{suffix}", (values * (i + 1)).astype(kind))
    images = open_folder(tmp_path, 3, depth=True)
    assert len(images.depths) == len(images) == 4
    wanted = torch.from_numpy(values / 600).float()[None]
    torch.testing.assert_close(images[2].depth, wanted)
    torch.testing.assert_close(images[2].map(lambda part: part[:, 5:]).depth, wanted[:, 5:])
    patches = ImagePatches(images, Dehazing(), 20)
    assert patches._patch(images[2], [0.0] * 6).depth.shape == (1, 20, 20)
    before = images.fingerprint()
    save_depth(tmp_path / "depth" / f"1.{suffix}", values.astype(kind))
    assert open_folder(tmp_path, 3, depth=True).fingerprint() != before
    facts = check_images(open_images(tmp_path, 3, depth=True), tmp_path, test=True).facts
    assert [row["with depth"] for row in facts["parts"]] == [2, 1, 1]
    assert "not read" not in facts


@pytest.mark.parametrize(
    ("file", "values", "text"),
    [
        (
            "b.npy",
            np.ones((20, 30)),
            f"data: {{root}}/a.png has no depth partner; expected {LAYOUTS}",
        ),
        (
            "a.npy",
            np.ones((20, 31)),
            "data: expected pairs of one size, got {root}/a.png of 20x30 and {root}/depth/a.npy of "
            "20x31 (height x width); replace or remove this pair",
        ),
        (
            "a.npy",
            np.ones((20, 30, 3)),
            "depth {root}/depth/a.npy: expected an array [height, width] of numbers, got ",
        ),
        (
            "a.png",
            np.ones((20, 30), np.uint8),
            "depth {root}/depth/a.png has 8 bits a pixel: expected a PNG of 16 bits or a .npy, ",
        ),
        (
            "a.npy",
            np.array([*[1.0] * 597, 0, -1, np.nan]).reshape(20, 30),
            "depth {root}/depth/a.npy: expected values above 0, got 3 of 600 pixels without; fill "
            "these holes",
        ),
        ("a.npy", None, "depth {root}/depth/a.npy cannot be read: "),
    ],
)
def test_depth_that_cannot_be_used(tmp_path, file, values, text):
    save(tmp_path / "a.png")
    if values is None:
        (tmp_path / "depth").mkdir()
        (tmp_path / "depth" / file).write_text("no array")
    else:
        save_depth(tmp_path / "depth" / file, values)
    assert open_folder(tmp_path, 3)[0].depth is None  # of no matter to the other tasks
    with pytest.raises(UserError) as caught:
        open_folder(tmp_path, 3, depth=True).read_all()
    assert str(caught.value).startswith(text.format(root=tmp_path))


def test_drawn_images():
    grey, colour = open_images("synthetic", 1), open_images("synthetic", 3)
    assert (len(colour.train), len(colour.val), len(colour.test)) == (98, 2, 10)
    assert set(colour.train.sizes) == {(96, 128), (128, 96)}
    assert all(tuple(colour.test[i].clean.shape[1:]) == colour.test.sizes[i] for i in range(4))
    again = open_images("synthetic", 3)
    assert torch.equal(again.train[5].clean, colour.train[5].clean)
    assert not torch.equal(colour.test[5].clean, colour.train[5].clean)
    assert grey.train[0].clean.shape == (1, 128, 96)
    assert colour.train[0].clean.float().std() > 20
    assert again.fingerprint() == colour.fingerprint() != grey.fingerprint()


def test_fingerprint_follows_the_contents(flat):
    before = open_images(flat, 3).fingerprint()
    assert open_images(flat, 3).fingerprint() == before != open_images(flat, 1).fingerprint()
    save(flat / "4.png", seed=99)
    assert open_images(flat, 3).fingerprint() != before


@given(st.integers(2, 400))
def test_halves_and_validation_cover_the_training_images(count):
    images = open_images("synthetic", 1).train.subset([0] * count)
    data = RestorationData(images, images[:1], images[:1])
    first, second = data.halves()
    assert len(first) + len(second) == count
    assert len(first) - len(second) in (0, 1)


BROKEN = {  # the fourth of ten images in a folder, by what becomes of it
    "not an image": (
        lambda path: path.write_text("not a png"),
        "cannot be read: cannot identify image file",
    ),
    "huge": (
        lambda path: Image.new("1", (14000, 14000)).save(path),
        "is too large: expected at most 90000000 pixels, got 14000x14000; cut it into tiles",
    ),
    "deep": (
        lambda path: Image.fromarray(np.zeros((20, 20), np.uint16)).save(path),
        "has mode I;16: expected 8 bits a channel; convert it",
    ),
    "grey": (
        lambda path: save(path, mode="L"),
        "is grey: expected a colour image for 3 channels; take it out, or use 1 channel, which "
        "converts colour images, where the task is not about colour",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_image_that_cannot_be_used_is_named(flat, how, monkeypatch):
    monkeypatch.setattr("nasfast.data.images.MAX_PIXELS", 90_000_000)
    path, (spoil, text) = flat / "4.png", BROKEN[how]
    spoil(path)
    with pytest.raises(UserError) as caught:
        open_images(flat, 3)
    assert str(caught.value).startswith(f"image {path} {text}")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (
            {"1ground_truth": (20, 30), "2rain": (20, 30)},
            f"data: {{root}}/1ground_truth.png has no degraded partner; expected {LAYOUTS}",
        ),
        (
            {"clean/a": (20, 30), "rainy/b": (20, 30)},
            f"data: {{root}}/clean/a.png has no degraded partner; expected {LAYOUTS}",
        ),
        (
            {"1ground_truth": (20, 30), "1rain": (20, 31)},
            "data: expected pairs of one size, got {root}/1ground_truth.png of 20x30 and "
            "{root}/1rain.png of 20x31 (height x width); replace or remove this pair",
        ),
        (
            {"clean/a": (20, 30), "hazy/a": (20, 30), "hazy/b": (20, 30)},
            f"data: {{root}}/hazy/b.png has no clean partner; expected {LAYOUTS}",
        ),
        (
            {"clean/a": (20, 30), "hazy/a": (20, 30), "noisy/a": (20, 30)},
            "data: expected one folder of degraded images beside {root}/clean, got hazy/ and "
            "noisy/; name the task of one of them, or move one elsewhere",
        ),
        ({}, f"data: {{root}} holds no images: expected {LAYOUTS}; found notes.txt"),
        (
            {"a": (20, 30), "b": (20, 30)},
            "{root}: expected at least 3 images (training, validation, test), got 2; add some",
        ),
        (
            {"train/a": (20, 30), "test/b": (20, 30)},
            "{root.name}: expected at least 2 training images (one validates), got 1; add some",
        ),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, sizes, text):
    (tmp_path / "notes.txt").touch()
    for stem, size in sizes.items():
        save(tmp_path / f"{stem}.png", *size)
    with pytest.raises(UserError) as caught:
        open_images(tmp_path, 3)
    assert str(caught.value).startswith(text.format(root=tmp_path))


def test_a_task_decides_between_folders_of_degraded_images(tmp_path):
    for stem in (f"{folder}/{name}" for folder in ("clean", "hazy", "noisy") for name in "abc"):
        save(tmp_path / f"{stem}.png", 20, 30)
    for pairs in ("hazy", "noisy"):
        data = open_images(tmp_path, 3, pairs=pairs)
        assert {paths[1].parent.name for paths in data.train.files} == {pairs}
        assert data.test.degradations == {pairs}
    with pytest.raises(UserError, match="got hazy/ and noisy/"):
        open_images(tmp_path, 3, pairs="rainy")


def test_clean_images_beside_what_a_task_does_not_read(tmp_path):
    for stem in ("clean/a", "clean/b", "clean/c", "depth/a"):
        save(tmp_path / f"{stem}.png", 20, 30)
    assert len(open_folder(tmp_path, 3)) == 3


def cut_in_the_pixels(whole):
    return whole[:-500]


def damaged_in_the_pixels(whole):
    return whole[:200] + bytes(100) + whole[300:]


@pytest.mark.parametrize(
    ("spoil", "suffix"),
    [
        *((cut_in_the_pixels, suffix) for suffix in ("png", "jpg", "bmp", "tif", "webp")),
        (damaged_in_the_pixels, "png"),  # the others have no checksums
        (None, "png"),
    ],
)
def test_a_file_that_breaks_later_is_named(tmp_path, spoil, suffix):
    """Opening reads headers only."""
    path = tmp_path / f"0.{suffix}"
    save(path, 40, 40)
    images = open_folder(tmp_path, 3)
    uses = [lambda: images[0]]
    if spoil:
        path.write_bytes(spoil(path.read_bytes()))
    else:
        path.unlink()
        uses.append(images.fingerprint)
    for use in uses:
        with pytest.raises(UserError) as error:
            use()
        assert str(error.value).startswith(f"image {path} cannot be read: ")
        assert str(error.value).endswith("; replace the file or take it out of the folder")


def forbidden(*_):
    raise PermissionError(13, "Permission denied", "somewhere")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("PIL.Image.open", "image {root}/0.png cannot be read: Permission denied; replace the "),
        (
            "os.scandir",
            "data: expected a folder of images, got '{root}', which cannot be read: Permission "
            "denied; check the path and its permissions",
        ),
    ],
)
def test_what_may_not_be_read_is_named(flat, monkeypatch, function, text):
    monkeypatch.setattr(function, forbidden)
    with pytest.raises(UserError) as error:
        open_images(flat, 3)
    assert str(error.value).startswith(text.format(root=flat))


def test_sources(tmp_path):
    with pytest.raises(UserError) as error:
        open_images(tmp_path / "none", 1)
    assert str(error.value) == (
        f"data: expected 'synthetic' or a folder, got '{tmp_path / 'none'}'; check the path and "
        "its permissions"
    )
    with pytest.raises(UserError) as error:
        open_folder(tmp_path / "none", 1)
    assert str(error.value) == (
        f"data: expected a folder of images, got '{tmp_path / 'none'}', which cannot be read: No "
        "such file or directory; check the path and its permissions"
    )
    with pytest.raises(ValueError) as caught:
        open_images("synthetic", 2)
    assert str(caught.value) == "channels: expected 1 (grey) or 3 (RGB), got 2"


def test_names_in_another_encoding(flat):
    (flat / "3.png").rename(flat / "caf\udce9.png")  # latin-1
    data = open_images(flat, 1)
    assert len(data.train) + len(data.val) + len(data.test) == 10
