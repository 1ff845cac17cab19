"""Transforms of images with boxes: valid boxes, alignment, determinism, batches."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasfast.data.detection import (
    FILL,
    BoxSample,
    BoxTrainTransform,
    BoxValTransform,
    SyntheticShapes,
    batch,
)
from nasfast.utils.errors import UserError

side = st.integers(1, 60)
wanted = st.integers(2, 60)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make(height, width, boxes=(), ignored=None):
    """Each box is filled with its number, so that misalignment shows; label = number."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    for number, (left, top, right, bottom) in enumerate(boxes.round().int().tolist()):
        image[:, top:bottom, left:right] = 100 + 20 * number
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    labels = torch.arange(len(boxes))
    flags = torch.tensor(ignored or [False] * len(boxes), dtype=torch.bool)
    return BoxSample(image, boxes, labels, flags, areas, "name")


@st.composite
def samples(draw):
    height, width = draw(side), draw(side)
    corners = st.tuples(*[st.floats(0, 1, width=32)] * 4)
    boxes = []
    for x0, y0, x1, y1 in draw(st.lists(corners, max_size=5)):
        left, right = sorted((x0 * width, x1 * width))
        top, bottom = sorted((y0 * height, y1 * height))
        if right - left > 1e-3 and bottom - top > 1e-3:
            boxes.append([left, top, right, bottom])
    return make(
        height,
        width,
        boxes,
        draw(st.lists(st.booleans(), min_size=(n := len(boxes)), max_size=n)) or None,
    )


transforms = st.one_of(
    st.builds(
        BoxTrainTransform,
        st.none() | wanted | st.tuples(wanted, wanted),
        st.none() | wanted,
        st.none() | wanted,
        st.tuples(st.floats(0.1, 1), st.floats(1, 3)),
        jitter=st.sampled_from([0, 0.4]),
        visible=st.floats(0, 1),
    ),
    st.builds(BoxValTransform, st.none() | wanted, st.none() | wanted, st.none() | wanted),
)


@given(samples(), transforms, st.integers(0, 2**40))
@settings(max_examples=200)
def test_boxes_stay_valid(sample, transform, seed):
    got = transform(sample, generator(seed))
    height, width = got.image.shape[1:]
    if transform.crop is not None:
        crop = transform.crop
        assert (height, width) == ((crop, crop) if isinstance(crop, int) else crop)
    elif transform.longer_side is not None:
        assert max(height, width) <= max(2, transform.longer_side)
    assert got.image.dtype == torch.uint8
    left, top, right, bottom = got.boxes.unbind(1)
    assert ((left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)).all()
    assert ((left < right) & (top < bottom)).all()
    assert len(got.boxes) == len(got.labels) == len(got.ignored) == len(got.areas)
    if transform.crop is None:
        assert got.labels.tolist() == sample.labels.tolist()
        assert torch.equal(got.ignored, sample.ignored)
    assert set(got.labels[~got.ignored].tolist()) <= set(sample.labels[~sample.ignored].tolist())
    assert torch.isfinite(got.areas).all()
    assert (got.areas >= 0).all()
    again = transform(sample, generator(seed))
    assert torch.equal(again.image, got.image)
    assert torch.equal(again.boxes, got.boxes)


@given(st.integers(0, 2**40))
@settings(max_examples=60)
def test_image_and_boxes_stay_aligned(seed):
    """An image that is painted from the boxes is the same, but for their borders."""
    sample = make(80, 100, [[4, 6, 34, 30], [50, 10, 90, 70], [10, 40, 40, 76]])
    got = BoxTrainTransform((64, 72), 72, scale_range=(1, 1.5))(sample, generator(seed))
    again = torch.zeros_like(got.image)
    for (left, top, right, bottom), label in zip(got.boxes.round().int(), got.labels, strict=True):
        again[:, top:bottom, left:right] = 100 + 20 * label
    differs = (again[0].int() - got.image[0].int()).abs() > 70
    assert differs.sum() <= 2 * (got.boxes[:, 2:] - got.boxes[:, :2]).sum()


def test_scale_and_longer_side():
    sample = make(40, 80, [[10, 10, 20, 30]])
    got = BoxValTransform(shorter_side=20)(sample)
    assert (got.image.shape[1:], got.boxes.tolist()) == ((20, 40), [[5, 5, 10, 15]])
    assert got.areas.tolist() == [50]
    assert BoxValTransform(shorter_side=80, longer_side=120)(sample).image.shape == (3, 60, 120)
    assert BoxValTransform(longer_side=20)(sample).image.shape == (3, 10, 20)
    assert BoxValTransform(longer_side=200)(sample) is sample
    drawn = [
        BoxTrainTransform(None, 40, scale_range=(0.5, 1))(sample, generator(i)) for i in range(50)
    ]
    heights = [got.image.shape[1] for got in drawn]
    assert (min(heights) < 24, max(heights) > 36, max(heights) <= 40) == (True, True, True)
    assert (
        10 < sum(bool(got.boxes[0, 0] > got.image.shape[2] / 2) for got in drawn) < 40
    )  # mirrored


def test_crops():
    """Clipped boxes have the rest of their area; those that are hardly there are ignored."""
    sample = make(40, 80, [[0, 0, 30, 40], [25, 10, 65, 20], [10, 10, 21, 20], [0, 0, 20, 9]])
    got = BoxValTransform(crop=40)(sample)  # 20 .. 60 of the width
    assert got.labels.tolist() == [0, 1, 2]
    assert got.boxes.tolist() == [[0, 0, 10, 40], [5, 10, 40, 20], [0, 10, 1, 20]]
    torch.testing.assert_close(got.areas, torch.tensor([400.0, 350, 10]))
    assert got.ignored.tolist() == [False, False, True]
    padded = BoxTrainTransform((50, 90), flip=1)(sample, generator())
    assert padded.boxes[0].tolist() == [60, 0, 90, 40]  # mirrored with the padding
    assert padded.image[:, 45, 45].tolist() == list(FILL)
    empty = BoxTrainTransform(10)(make(40, 80), generator())
    assert empty.boxes.shape == (0, 4)


def test_batches():
    """Padded at the right and at the bottom; ignored boxes are -2 - class, missing ones -1."""
    samples = [make(10, 20, [[0, 0, 5, 5], [1, 1, 9, 9]], [False, True]), make(30, 8), make(4, 4)]
    got = batch(samples, BoxValTransform())
    assert got.images.shape == (3, 3, 30, 20)
    assert got.images[2, :, 4, 0].tolist() == got.images[2, :, 0, 4].tolist() == list(FILL)
    assert got.sizes.tolist() == [[10, 20], [30, 8], [4, 4]]
    assert got.labels.tolist() == [[0, -3], [-1, -1], [-1, -1]]
    assert got.boxes[0, 1].tolist() == [1, 1, 9, 9]
    assert got.areas.tolist() == [[25, 64], [0, 0], [0, 0]]
    more = batch(samples[1:], BoxValTransform(), size=(32, 32), most=7)
    assert (more.images.shape, more.labels.shape) == ((2, 3, 32, 32), (2, 7))
    assert batch(samples[1:], BoxValTransform()).boxes.shape == (2, 0, 4)
    shapes = SyntheticShapes(4)
    transform = BoxTrainTransform(96, jitter=0.3)
    one, other = (batch(shapes.load(range(4)), transform, generator(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("make_transform", "error", "text"),
    [
        (lambda: BoxTrainTransform(1), UserError, "expected crop of at least 2 pixels, got 1"),
        (
            lambda: BoxValTransform(longer_side=0),
            UserError,
            "BoxValTransform: expected longer_side",
        ),
        (
            lambda: BoxTrainTransform(9, scale_range=(2, 1)),
            ValueError,
            "0 < low <= high, got (2, 1",
        ),
        (lambda: BoxTrainTransform(9, flip=2), ValueError, "expected flip from 0 to 1, got 2"),
        (
            lambda: BoxTrainTransform(9)(make(9, 9)),
            ValueError,
            "expected a torch.Generator, got No",
        ),
    ],
)
def test_arguments(make_transform, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make_transform()
