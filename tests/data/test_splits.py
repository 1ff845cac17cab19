"""Splits, subsets, fingerprints and normalisation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nasfast.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SyntheticStreets,
    load_splits,
    normalize,
    split_for_search,
)
from nasfast.data.base import default_colors
from nasfast.utils.errors import UserError


@given(size=st.integers(2, 200), seed=st.integers(0, 2**32))
def test_search_split_is_a_partition_of_train(size, seed):
    train = SyntheticStreets(size)
    splits = split_for_search(train, SyntheticStreets(3, stream="val"), seed=seed)
    held_out = splits.search_val._indices
    assert sorted(splits.search_train._indices + held_out) == list(range(size))
    assert len(held_out) == max(1, round(size / 10))
    assert splits.train is train
    assert len(splits.val) == 3


def test_seed_changes_only_the_search_split():
    a, b, again = (load_splits("synthetic", seed=seed) for seed in (1, 2, 1))
    assert a.train.fingerprint() == b.train.fingerprint()
    assert a.val.fingerprint() == b.val.fingerprint()
    assert a.search_train.fingerprint() != b.search_train.fingerprint()
    assert a.search_train.fingerprint() == again.search_train.fingerprint()


def test_one_training_sample_cannot_be_divided():
    one = SyntheticStreets(1)
    message = r"synthetic: expected at least 2 training samples, .* got 1"
    with pytest.raises(ValueError, match=message):
        split_for_search(one, one, seed=0)


def test_subset_is_a_view_and_composes():
    streets = SyntheticStreets(8, cache_in_memory=True)
    subset = streets.subset([5, 2, -1]).subset([2, 0])
    assert [sample.image is streets[i].image for sample, i in zip(subset, (7, 5))] == [True, True]
    assert (len(subset), subset.classes, subset.colors) == (2, streets.classes, streets.colors)
    assert (subset.name, subset.ignore_index) == (streets.name, streets.ignore_index)
    assert len({d.fingerprint() for d in (streets, subset, streets.subset(range(8)))}) == 3
    with pytest.raises(IndexError):
        streets.subset([8])


def test_fingerprint_is_equal_in_another_process():
    code = "from nasfast.data import load_splits; s = load_splits('synthetic', seed=3)\n"
    code += "print(s.search_val.fingerprint(), s.val[7].image.sum().item())"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    splits = load_splits("synthetic", seed=3)
    assert out == f"{splits.search_val.fingerprint()} {splits.val[7].image.sum().item()}\n"


def test_unknown_sources(tmp_path):
    message = "expected 'synthetic' or a folder, got 'synthetik'; give an existing"
    with pytest.raises(UserError, match=message):
        load_splits("synthetik")
    (tmp_path / "frames").mkdir()
    message = (
        r"no known layout: expected CamVid \(train.txt \+ train/ .*\) or a folder pair "
        r"\(images/ \+ masks/ \+ classes.txt\) or Cityscapes \(leftImg8bit/ .*\) or PASCAL VOC "
        r"\(JPEGImages/ \+ .*\), found frames$"
    )
    with pytest.raises(UserError, match=message):
        load_splits(tmp_path)


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images / 255 - mean) / std
    for dtype in (torch.uint8, torch.float32, torch.float64):
        got = normalize(images.to(dtype))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)
    last = images.to(memory_format=torch.channels_last)
    assert normalize(last).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"expected images \[N, 3, H, W\], got \[3, 5, 7\]"):
        normalize(images[0])


def test_default_colors_are_those_of_voc():
    colors = default_colors(255)
    assert colors[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert colors[15:18] == ((192, 128, 128), (0, 64, 0), (128, 64, 0))
    assert colors[21] == (128, 64, 128)
    assert len(set(colors)) == 255
