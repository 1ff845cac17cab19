"""Joint transforms: sizes for any aspect ratio, alignment of image and mask, determinism."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasfast.data import Sample, SyntheticStreets, TrainTransform, ValTransform, batch
from nasfast.data.transforms import colored

side = st.integers(1, 90)
wanted_side = st.integers(2, 90)
size = st.one_of(wanted_side, st.tuples(wanted_side, wanted_side))


def pair(value):
    return (value, value) if isinstance(value, int) else value


def gradient(height, width):
    """A frame whose red channel equals its mask, so that misalignment shows."""
    mask = torch.linspace(0, 255, height)[:, None] + torch.zeros(width)
    mask = (mask / 2 + torch.linspace(0, 127, width)).round().to(torch.uint8)
    return Sample(mask.expand(3, -1, -1).contiguous(), mask)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(side, side, size, wanted_side, st.floats(0.05, 3), st.floats(1, 3), st.integers(0, 2**40))
@settings(max_examples=300)
def test_crops_have_the_size_asked_for(height, width, crop, shorter, low, ratio, seed):
    train, frame = TrainTransform(crop, shorter, (low, low * ratio)), gradient(height, width)
    for got in (train(frame, generator(seed)), ValTransform(crop)(frame)):
        assert got.image.shape == (3, *pair(crop))
        assert got.mask.shape == pair(crop)
        assert got.image.dtype == got.mask.dtype == torch.uint8


@given(st.integers(0, 2**40))
@settings(max_examples=50)
def test_image_and_mask_stay_aligned(seed):
    got = TrainTransform((65, 81), 80)(gradient(96, 128), generator(seed))
    difference = got.image[0].int() - got.mask.int()
    assert difference.abs().max() <= 4
    assert abs(difference.float().mean()) < 0.6


def test_scale_is_drawn_and_raised():
    """With a crop of the whole, the share of the frame in view is 1 / scale."""
    frame = gradient(200, 300)

    def spans(transform):
        crops = [transform(frame, generator(seed)).mask[:, 0].float() for seed in range(200)]
        return torch.tensor([c.max() - c.min() for c in crops]) / 127.5 * 200 / 99

    drawn = 1 / spans(TrainTransform(100, 2, (0.7, 1.4), mirror=False))
    assert drawn.min() == pytest.approx(0.7, abs=0.05)
    assert drawn.max() == pytest.approx(1.4, abs=0.1)
    raised = 1 / spans(TrainTransform(100, 260, (0.7, 1.4), mirror=False))
    assert raised.min() == pytest.approx(1.3, abs=0.05)


def test_mirror():
    frame = gradient(32, 48)
    plain = TrainTransform((32, 48), 2, (1, 1), mirror=False)
    assert all(torch.equal(plain(frame, generator(s)).mask, frame.mask) for s in range(8))
    mirrored = [TrainTransform((32, 48), 2, (1, 1))(frame, generator(s)) for s in range(200)]
    flips = [torch.equal(m.mask, frame.mask.flip(-1)) for m in mirrored]
    assert 70 < sum(flips) < 130
    assert all(torch.equal(m.image[0], m.mask) for m in mirrored)


def test_jitter_changes_colours_alone():
    frame = next(iter(SyntheticStreets(1)))
    plain = TrainTransform(64, 64)
    for seed in range(20):
        got, same = (TrainTransform(64, 64, jitter=j)(frame, generator(seed)) for j in (0.4, 0.0))
        expected = plain(frame, generator(seed))
        assert torch.equal(same.image, expected.image)
        assert torch.equal(got.mask, expected.mask)
        assert not torch.equal(got.image, expected.image)
        assert got.image.dtype == torch.uint8
    assert torch.equal(colored(frame.image, 1, 1, 1), frame.image)
    assert torch.equal(colored(frame.image, 0.5, 1, 1), (frame.image * 0.5).round().byte())
    grey = colored(frame.image, 1, 1, 0).int()
    assert (grey - grey[:1]).abs().max() == 0
    flat = colored(frame.image, 1, 0, 1)
    assert len(flat.unique()) == 1
    with pytest.raises(ValueError, match=r"expected jitter from 0 to 1, got 2$"):
        TrainTransform(8, 8, jitter=2)


def test_crops_reach_every_corner():
    transform, frame = TrainTransform(2, 2, (1, 1), mirror=False), gradient(3, 3)
    crops = [transform(frame, generator(seed)).mask for seed in range(99)]
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) == 4


def test_masks_hold_no_new_values():
    streets = SyntheticStreets(10)
    for i, sample in enumerate(streets):
        got = TrainTransform((97, 131), 150)(sample, generator(i))
        assert set(got.mask.unique().tolist()) <= set(sample.mask.unique().tolist())


def test_validation():
    frame = gradient(40, 60)
    assert ValTransform(None)(frame) is frame
    got = ValTransform((20, 31))(frame)
    assert torch.equal(got.mask, frame.mask[10:30, 14:45])
    assert torch.equal(got.image, frame.image[:, 10:30, 14:45])


def test_batches_follow_the_generator():
    streets, transform = SyntheticStreets(6), TrainTransform((65, 97), 70)
    first, second, other = (batch(streets, [4, 0, 4], transform, generator(s)) for s in (1, 1, 2))
    assert first[0].shape == (3, 3, 65, 97)
    assert first[1].shape == (3, 65, 97)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][0], first[0][2])
    before = torch.get_rng_state()
    batch(streets, [0], transform, generator())
    assert torch.equal(before, torch.get_rng_state())


class Mixed(SyntheticStreets):
    def __getitem__(self, index):
        return gradient(32 + index, 40)


def test_errors():
    def refused(message):
        return pytest.raises(ValueError, match=re.escape(message))

    with refused("got 2 samples of sizes [(32, 40), (33, 40)]; crop"):
        batch(Mixed(2), [1, 0], ValTransform(None))
    with refused("expected one or more samples of one size, got 0"):
        batch(Mixed(2), [], ValTransform(None))
    with refused("TrainTransform: expected a torch.Generator, got None"):
        batch(Mixed(2), [0], TrainTransform(8, 8))
    with refused("TrainTransform: expected crop of at least 2 pixels, got 1"):
        TrainTransform(1, 8)
    with refused("expected shorter_side of at least 2 pixels, got -1"):
        TrainTransform(8, -1)
    with refused("0 < low <= high, got (1.4, 0.7)"):
        TrainTransform(8, 8, (1.4, 0.7))
    with refused("ValTransform: expected size of at least 2 pixels, got (8, 0)"):
        ValTransform((8, 0))
