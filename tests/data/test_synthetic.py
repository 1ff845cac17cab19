"""The synthetic streets: determinism, contents, arguments."""

import pytest
import torch

from nasfast.data import SyntheticStreets, load_splits


def same(a, b):
    return torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask)


def test_a_sample_depends_on_seed_stream_and_index_alone():
    streets = SyntheticStreets(5, seed=4)
    assert same(streets[3], SyntheticStreets(50, seed=4, cache_in_memory=True)[3])
    assert same(streets[-1], streets[4])
    others = [{"seed": 5}, {"seed": 4, "stream": "val"}, {"seed": 4, "stream": "pretrain"}]
    for other in (streets[2], *(SyntheticStreets(5, **arguments)[3] for arguments in others)):
        assert not same(streets[3], other)
    with pytest.raises(IndexError):
        streets[5]


def test_fingerprints_differ_with_every_argument():
    arguments = [{}, {"seed": 1}, {"size": (96, 96)}, {"stream": "val"}]
    sets = [SyntheticStreets(6), *(SyntheticStreets(5, **changes) for changes in arguments)]
    assert len({s.fingerprint() for s in sets}) == len(sets)
    assert SyntheticStreets(5, cache_in_memory=True).fingerprint() == sets[1].fingerprint()


@pytest.mark.parametrize("size", [(96, 128), (32, 32), (128, 64), (33, 161)])
def test_shapes_and_labels(size):
    for sample in SyntheticStreets(12, seed=7, size=size):
        assert (sample.image.shape, sample.mask.shape) == ((3, *size), size)
        assert sample.image.dtype == sample.mask.dtype == torch.uint8
        assert set(sample.mask.unique().tolist()) <= {*range(8), 255}


def test_every_class_is_common_enough_to_learn():
    splits = load_splits("synthetic")
    masks = torch.stack([splits.train[i].mask for i in range(100)])
    share = torch.bincount(masks.flatten().long(), minlength=256) / masks.numel()
    assert share[:8].min() > 0.005
    assert share[:8].max() < 0.5
    assert 0 < share[255] < 0.05
    assert all((masks == c).flatten(1).any(1).float().mean() > 0.6 for c in range(8))


def test_cached_samples_are_kept():
    assert load_splits("synthetic").val[3] is not load_splits("synthetic").val[3]
    val = load_splits("synthetic").val
    assert val[3] is val[3]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_samples": 0}, "expected num_samples >= 1, got 0"),
        ({"num_samples": 1, "seed": -1}, "expected seed >= 0, got -1"),
        ({"num_samples": 1, "size": (96, 31)}, r"expected size of at least 32x32, got \(96, 31\)"),
        ({"num_samples": 1, "stream": "test"}, "expected stream of .*'pretrain'.*, got 'test'"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=f"SyntheticStreets: {text}"):
        SyntheticStreets(**arguments)
