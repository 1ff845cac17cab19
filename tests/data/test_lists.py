"""Lists of images and of classes: their lines, encodings and faults."""

import pytest
from folders import save_image, save_mask, write_folder, write_lists
from hypothesis import assume, given
from hypothesis import strategies as st

from nasfast.data import load_splits
from nasfast.data.folder import FIRST_COLUMN, id_of, read_lines
from nasfast.data.images import IMAGE_SUFFIXES
from nasfast.utils.errors import UserError

names = st.text(st.characters(exclude_categories=("Cc", "Zl", "Zp"), exclude_characters="/\\"))
names = names.map(str.strip).filter(bool)
suffixes = st.sampled_from(IMAGE_SUFFIXES).flatmap(lambda s: st.sampled_from([s, s.upper()]))


@given(names, names, suffixes, suffixes, st.sampled_from("/\\"))
def test_a_line_is_its_first_column(name, other, suffix, second, slash):
    assume(FIRST_COLUMN.match(name)[1] is None and FIRST_COLUMN.match(name)[0] == name)
    assert id_of(name) == name
    assert id_of(name + suffix) == name
    assert id_of(f"{name}\t{other}") == name
    assert id_of(f"{name}{suffix}\t{other}{second}") == name
    assert id_of(f"{slash}a{slash}{name}{suffix} {other}{second}") == name


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("street 1", "street 1"),
        ("street 1.png", "street 1"),
        ("in the street/a 1.JPG masks/a 1.png", "a 1"),
        ("a 1\tb 1", "a 1"),
        (r"images\a.png", "a"),
        ("a.png.bak", "a.png.bak"),
    ],
)
def test_lines(line, wanted):
    assert id_of(line) == wanted


def test_masks_of_other_names(tmp_path):
    """A second column is the mask where it is an image's name."""
    write_folder(tmp_path, "abcd")
    write_lists(tmp_path, ["images/a.png masks/b.png", "b\t0.5", "c.png\tc.png"], ["d"])
    pairs = load_splits(tmp_path).train.pairs
    assert [image.stem + mask.stem for image, mask in pairs] == ["ab", "bb", "cc"]


def test_names_with_spaces(tmp_path):
    """None of them is the image of another."""
    stems = ["street", *(f"street {i}" for i in range(6))]
    write_folder(tmp_path, stems)
    write_lists(tmp_path, stems[1:], stems[:1])
    images = [image.stem for image, _ in load_splits(tmp_path).train.pairs]
    assert images == stems[1:]
    write_lists(tmp_path, ["street 1 2", *stems[1:]], stems[:1])
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path)
    assert "no image for id 'street 1 2': " in str(caught.value)
    assert str(caught.value).endswith("; add it (columns of a list end at a tab or a suffix)")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists_of_windows(tmp_path, encoding):
    path = tmp_path / "list.txt"
    path.write_bytes("Himmel\r\nStraße\r\n\r\n".encode(encoding))
    assert read_lines(path) == ["Himmel", "Straße"]


@pytest.mark.parametrize("name", ["classes.txt", "train.txt", "val.txt"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("straße\nhimmel\n".encode("latin-1"), "expected text in UTF-8, got other bytes at 4"),
        ("a\nb\n".encode("utf-16"), "expected text in UTF-8, got other bytes at 0"),
        ("a\nb\n".encode("utf-16-le"), "expected text in UTF-8, got zero bytes, as in UTF-16"),
    ],
)
def test_other_encodings(tmp_path, name, content, text):
    write_folder(tmp_path)
    write_lists(tmp_path, "abcd", "ef")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {text}")


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (["sky", "road", "sky"], "expected each class once, got 'sky' 2 times; rename one"),
        (["sky"], "expected 2 to 255 classes, a line each, background too, got 1"),
    ],
)
def test_classes_that_are_none(tmp_path, classes, text):
    write_folder(tmp_path, classes=classes)
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path)
    assert str(caught.value) == f"{tmp_path}/classes.txt: {text}"


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_the_same_stem_twice(tmp_path, folder):
    write_folder(tmp_path)
    save = save_image if folder == "images" else (lambda path: save_mask(path, (0, 1)))
    save(tmp_path / folder / "b.bmp")
    with pytest.raises(UserError) as caught:
        load_splits(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/{folder}/b.bmp and b.png: expected one image of the name 'b', got two; "
        "rename or remove one"
    )


def test_half_of_the_images_in_another_format(tmp_path):
    """All are read."""
    write_folder(tmp_path)
    for stem, suffix in zip("abcdef", ["tif", "TIFF", "bmp", "webp", "jpg", "JPEG"], strict=True):
        (tmp_path / "images" / f"{stem}.png").unlink()
        save_image(tmp_path / "images" / f"{stem}.{suffix}")
    splits = load_splits(tmp_path)
    assert len(splits.train) + len(splits.val) == 12
