"""The reader of image files."""

import numpy as np
import pytest
from folders import save_image
from PIL import Image, ImageOps

from nasfast.data import images
from nasfast.data.images import identity, list_folder, measure, read_image
from nasfast.data.restoration import open_folder
from nasfast.utils.errors import UserError


def oriented(orientation):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photos_are_upright(tmp_path, suffix, orientation):
    path, plain = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    save_image(path, exif=oriented(orientation))
    save_image(plain)
    with Image.open(path) as file:
        wanted = np.asarray(ImageOps.exif_transpose(file)).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_image(path).numpy(), wanted)
    assert measure(path).size == wanted.shape[1:]
    turned = orientation > 1 and suffix != "tif"  # that one Pillow has always turned
    assert measure(path).turned == turned
    assert identity(path).endswith(" upright") == turned
    assert len(identity(plain)) == 64
    assert open_folder(tmp_path, 3).sizes[0] == wanted.shape[1:]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_orientation_is_none(tmp_path):
    save_image(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(9))
    assert read_image(tmp_path / "a.jpg").shape == (3, 8, 12)


@pytest.mark.parametrize("name", ["a.BMP", "a.JPG", "a.jpeg", "a.PNG", "a.tif", "a.TIFF", "a.webp"])
def test_formats_and_upper_case(tmp_path, name):
    save_image(tmp_path / name)
    assert list_folder(tmp_path).images == (tmp_path / name,)
    assert read_image(tmp_path / name).shape == (3, 8, 12)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes(tmp_path, mode):
    """Transparency is dropped, the colours below it stay."""
    image = Image.new("RGB", (12, 8), (200, 0, 0)).convert(mode)
    if "A" in mode:
        image.putalpha(0)
    image.save(tmp_path / "a.tif")
    for channels in (1, 3):
        wanted = np.atleast_3d(image.convert({1: "L", 3: "RGB"}[channels])).transpose(2, 0, 1)
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif", channels).numpy(), wanted)


def test_deep_images_are_refused(tmp_path):
    Image.fromarray(np.full((8, 12), 3000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "a.png")
    assert str(caught.value) == (
        f"image {tmp_path}/a.png has mode I;16: expected 8 bits a channel; convert it"
    )


def test_large_images(tmp_path, monkeypatch):
    """Up to a limit of our own; that of Pillow holds for others."""
    save_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(tmp_path / "a.png").shape == (3, 8, 12)
    assert Image.MAX_IMAGE_PIXELS == 10
    assert images.MAX_PIXELS > 14000**2
    monkeypatch.setattr(images, "MAX_PIXELS", 95)
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "a.png")
    assert str(caught.value) == (
        f"image {tmp_path}/a.png is too large: expected at most 95 pixels, got 8x12; cut it into "
        "tiles"
    )


def test_what_a_folder_holds(tmp_path):
    for name in ("a.png", "._a.png", "b.heic", "c/d.png"):
        save_image(tmp_path / name) if name.endswith("png") else (tmp_path / name).touch()
    found = list_folder(tmp_path)
    names = [[p.name for p in part] for part in (found.images, found.hidden, found.others)]
    assert names == [["a.png"], ["._a.png"], ["b.heic"]]
