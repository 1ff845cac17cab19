"""Large images, reduced when they are read."""

import numpy as np
import pytest
import torch
from folders import save_mask, write_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nasfast.data import load_splits
from nasfast.data.reduced import reduced_size
from nasfast.utils.errors import UserError


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(32, 2000))
def test_sizes(height, width, longer):
    size = reduced_size((height, width), longer)
    assert max(size) == min(longer, max(height, width))
    if max(height, width) > longer:
        scale = longer / max(height, width)
        assert all(abs(new - max(1, old * scale)) <= 0.5 for new, old in zip(size, (height, width)))
    else:
        assert size == (height, width)


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, "abcdef", size=(40, 80))
    ramp = np.repeat(np.linspace(0, 255, 80)[None], 40, 0).round().astype(np.uint8)
    for path in (tmp_path / "images").iterdir():
        Image.fromarray(ramp).save(path)
    for path in (tmp_path / "masks").iterdir():
        save_mask(path, (0, 1, 255, 1), (40, 80))
    return tmp_path


def test_image_and_mask(folder):
    whole, half = load_splits(folder), load_splits(folder, resize_longer=40)
    for name in ("search_train", "search_val", "train", "val"):
        data, large = getattr(half, name), getattr(whole, name)
        assert set(data.sizes()) == {(20, 40)}
        assert data.sizes() == [sample.mask.shape for sample in data]
        assert torch.equal(data.label_counts(), large.label_counts())
        assert data.fingerprint() != large.fingerprint()
        assert (data.classes, len(data)) == (large.classes, len(large))
        assert data.name == f"{large.name} reduced to 40"
    small, sample = half.train[0], whole.train[0]
    means = sample.image[0, 0].float().view(40, 2).mean(1)
    torch.testing.assert_close(small.image[0, 9].float(), means, atol=1, rtol=0)
    assert torch.equal(small.mask, sample.mask[1::2, 1::2])
    assert [torch.equal(s.image, small.image) for s in half.train.load([1, 0])] == [True, True]


def test_small_images_stay(folder):
    """Searches and caches of features of such data stay valid."""
    whole, same = load_splits(folder), load_splits(folder, resize_longer=80)
    assert same.search_train.fingerprint() == whole.search_train.fingerprint()
    assert same.train[0].image.shape == (3, 40, 80)


def test_every_layout(folder):
    (folder / "test.txt").write_text("a\n")
    assert load_splits(folder, resize_longer=64).test.sizes() == [(32, 64)]
    drawn = load_splits("synthetic", resize_longer=64)
    assert drawn.search_val[0].image.shape == (3, 48, 64)


@pytest.mark.parametrize("longer", [0, -1, 31])
def test_sides_that_are_none(folder, longer):
    with pytest.raises(UserError) as caught:
        load_splits(folder, resize_longer=longer)
    assert str(caught.value) == f"resize-longer: expected at least 32 pixels, got {longer}"
