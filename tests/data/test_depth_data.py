"""Readers of depth: layouts, values that are no depth, what counts, and bad files."""

import numpy as np
import pytest
import torch
from folders import SIZE, save_image, save_mask
from PIL import Image

from nasfast.data import SyntheticStreets, folder_of
from nasfast.data.depth import DepthReading, DepthSample, StreetDepths, load_depth_splits
from nasfast.data.depth.base import Counted
from nasfast.data.depth.checks import check_depths
from nasfast.data.depth_maps import read_depth
from nasfast.utils.errors import UserError

MM = DepthReading(scale=1000)


def save_depth(path, values=1500, size=SIZE):
    """A PNG of 16 bits, or a .npy of floats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.broadcast_to(values, size)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array.astype(np.uint16)).save(path)


def write_pairs(root, stems="abcde", suffix=".png", values=1500):
    for i, stem in enumerate(stems):
        save_image(root / "images" / f"{stem}.jpg", i)
        save_depth(root / "depths" / f"{stem}{suffix}", values)
    return root


def write_frames(folder, count):
    for i in range(count):
        save_image(folder / f"frame-{i:06}.color.png", i)
        save_depth(folder / f"frame-{i:06}.depth.png", 1000 + i)
    return folder


def names(dataset):
    return [image.name for image, _ in dataset.pairs]


def test_pairs_of_one_name(tmp_path):
    splits = load_depth_splits(write_pairs(tmp_path), MM)
    assert (len(splits.train), len(splits.val), splits.test) == (4, 1, None)
    sample = splits.val[0]
    assert sample.image.shape == (3, *SIZE)
    assert sample.mask.dtype == torch.float32
    assert sample.mask.unique().tolist() == [1.5]
    assert load_depth_splits(tmp_path, MM).train.fingerprint() == splits.train.fingerprint()
    for name, ids in (("train", "abc"), ("val", "d"), ("test", "e")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{i}.jpg" for i in ids))
    splits = load_depth_splits(tmp_path, MM)
    parts = (splits.train, splits.val, splits.test)
    assert [names(part) for part in parts] == [["a.jpg", "b.jpg", "c.jpg"], ["d.jpg"], ["e.jpg"]]


def test_arrays_of_floats_are_metres(tmp_path):
    splits = load_depth_splits(write_pairs(tmp_path, suffix=".npy", values=2.5))
    assert splits.train[0].mask.unique().tolist() == [2.5]
    assert splits.train.per_metre == 1000


@pytest.mark.parametrize(("image", "depth"), [("image_{}", "depth_{}"), ("{}.rgb", "{}.depth")])
def test_names_that_differ_in_a_word(image, depth, tmp_path):
    for i in range(3):
        save_image(tmp_path / f"{image.format(i)}.png", i)
        save_depth(tmp_path / f"{depth.format(i)}.png")
    splits = load_depth_splits(tmp_path, MM)
    assert sorted(names(splits.train) + names(splits.val)) == [
        f"{image.format(i)}.png" for i in range(3)
    ]


def test_seven_scenes(tmp_path):
    """Millimetres; the end of the sequences validates, as neighbours are alike."""
    splits = load_depth_splits(write_frames(tmp_path / "one", 10))
    assert (len(splits.train), names(splits.val)[0]) == (8, "frame-000008.color.png")
    assert splits.train[3].mask.unique().tolist() == pytest.approx([1.003])
    for number, count in ((1, 5), (2, 3), (3, 5)):
        write_frames(tmp_path / "scene" / f"seq-{number:02}", count)
    (tmp_path / "scene" / "TrainSplit.txt").write_text("sequence1\nsequence3\n")
    (tmp_path / "scene" / "TestSplit.txt").write_text("sequence2\n")
    splits = load_depth_splits(tmp_path / "scene")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 2, 3)
    assert {image.parent.name for image, _ in splits.val.pairs} == {"seq-03"}
    (tmp_path / "scene" / "TestSplit.txt").write_text("sequence9\n")
    with pytest.raises(UserError, match="expected frames in seq-09/, which a list of the scene "):
        load_depth_splits(tmp_path / "scene")


@pytest.mark.parametrize(
    ("values", "dtype", "scale", "metres"),
    [
        ([0, 500, 65535], np.uint16, 1000, [0, 0.5, 0]),
        ([np.nan, np.inf, -1, 65535.0], np.float32, None, [0, 0, 0, 65535]),
        ([0.5, 2.0], np.float64, 2, [0.25, 1]),
    ],
)
def test_values_that_are_no_depth(values, dtype, scale, metres, tmp_path):
    np.save(tmp_path / "a.npy", np.array([values], dtype))
    assert read_depth(tmp_path / "a.npy", scale).tolist() == [metres]


def test_what_counts():
    """Rows 45 to 470 and columns 41 to 600 of NYU Depth v2; depths up to the cap."""

    class Ramp(StreetDepths):
        def __getitem__(self, index):
            ramp = torch.linspace(1, 11, 480 * 640).view(480, 640)
            return DepthSample(torch.zeros(3, 480, 640, dtype=torch.uint8), ramp)

    data, reading = Ramp(1, (480, 640), stream="val"), DepthReading(crop="eigen", cap=10)
    counted = Counted(data, reading, None, keep=False)
    rows, columns = (counted[0].mask > 0).nonzero().T
    assert [rows.min(), columns.min(), columns.max()] == [45, 41, 600]
    assert counted[0].mask.max() <= 10
    assert data[0].mask[470, 0] > 10  # rows below are left out by the cap
    assert counted.name == "synthetic (Eigen crop, depths up to 10 m)"
    half = Counted(data, reading, 320, keep=False)
    assert (half.sizes(), half[0].image.shape) == ([(240, 320)], (3, 240, 320))
    assert len({each.fingerprint() for each in (data, counted, half)}) == 3


def test_drawn_depths_are_of_the_drawn_scenes():
    """The sky has none, houses and cars are where they were painted."""
    streets, depths = SyntheticStreets(2, stream="val"), StreetDepths(2, stream="val")
    for index in range(2):
        frame, sample = streets[index], depths[index]
        assert torch.equal(frame.image, sample.image)
        assert not sample.mask[frame.mask == 0].any()
        road = sample.mask * (frame.mask == 2)
        rows = [row[row > 0].median().item() for row in road if (row > 0).sum() > 20]
        assert rows == sorted(rows, reverse=True)
        assert 1 < rows[-1] < rows[0] <= 100


def grey(path):
    save_mask(path, (1, 2))


@pytest.mark.parametrize(
    ("spoil", "reading", "text"),
    [
        (
            lambda file: None,
            DepthReading(),
            ".png holds whole numbers: expected --depth.scale, values a metre, which the file "
            "does not say, got none; add it (1000 for millimetres",
        ),
        (
            lambda file: save_depth(file, size=(4, 6)),
            MM,
            "b.png is 4x6 (height x width); resize the depth without interpolation",
        ),
        (
            grey,
            MM,
            "b.png has 8 bits a pixel: expected a PNG of 16 bits or a .npy, as 8 are too few",
        ),
        (
            save_image,
            MM,
            "b.png is a colour image (mode RGB): expected a PNG of 16 bits or a .npy with one "
            "depth a pixel; give the depths themselves",
        ),
        (lambda file: file.unlink(), MM, "no depth for 'b': expected a file of that name in"),
        (lambda file: file.write_bytes(b"no"), MM, "depth {file} cannot be read: "),
    ],
    ids=["scale", "size", "8 bits", "colour", "missing", "damaged"],
)
def test_bad_files(spoil, reading, text, tmp_path):
    file = write_pairs(tmp_path) / "depths" / "b.png"
    spoil(file)
    with pytest.raises(UserError) as caught:
        load_depth_splits(tmp_path, reading)
    assert text.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((2, 3, 3)), "expected an array [height, width] of numbers, got [2, 3, 3] of "),
        (np.array([["a"]]), "expected an array [height, width] of numbers, got [1, 1] of <U1"),
        (np.array([[None]]), "cannot be read: Object arrays"),
    ],
)
def test_bad_arrays(array, text, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError) as caught:
        read_depth(tmp_path / "a.npy", None)
    assert text in str(caught.value)


def test_no_valid_pixel(tmp_path):
    save_depth(write_pairs(tmp_path) / "depths" / "b.png", 65535)
    findings = check_depths(load_depth_splits(tmp_path, MM), folder_of(tmp_path), test=True)
    assert findings.warnings[-1] == (
        "1 depth files of train have no valid pixel: b.png; take them and their images out"
    )
    assert (findings.facts["parts"][0]["valid"], findings.errors) == (0.75, ())
    assert next(iter(findings.tiles.values())).shape == (3, SIZE[0], 2 * SIZE[1])
    with pytest.raises(UserError) as caught:
        load_depth_splits(tmp_path, DepthReading(scale=1000, cap=1))
    assert str(caught.value) == (
        f"{tmp_path.name} (depths up to 1 m): expected depths in train, got no valid pixel in any "
        "of its 4 files; look at the files, --depth.scale and --depth.cap"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("synthetic", "depth.scale: expected a folder of depth files, got synthetic; leave it"),
        ("nowhere", "data: expected 'synthetic' or a folder, got 'nowhere'; give an existing"),
    ],
)
def test_data_that_is_none(data, text):
    with pytest.raises(UserError, match=text):
        load_depth_splits(data, MM)


def test_another_kind_of_folder(tmp_path):
    save_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"has no known layout: expected 7-Scenes .* found a.png"):
        load_depth_splits(tmp_path)


@pytest.mark.parametrize(
    ("folder", "count", "scale"), [("nyuv2-mini", 10, 1000), ("7scenes-mini", 34, None)]
)
def test_real_folders(folder, count, scale, data_root):
    splits = load_depth_splits(data_root / folder, DepthReading(scale), resize_longer=64)
    assert len(splits.train) + len(splits.val) == count
    sample = splits.train[0]
    assert sample.image.shape == (3, 48, 64)
    assert 0.3 < sample.mask[sample.mask > 0].median() < 5
