"""Which box a point learns, against loops over points and boxes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasfast.models.points import points
from nasfast.tasks.detection import assign as module
from nasfast.tasks.detection.assign import SIZES, assign

SIZE = (64, 96)
COORDINATE = st.integers(-2, 25).map(lambda number: 4.0 * number)  # points lie on edges, too


def plain(boxes, labels, size, scale, radius):
    """Of one image."""
    places, strides = points(*size)
    bounds = [-1, *(scale * bound for bound in SIZES), float("inf")]
    classes, distances = [], []
    for (x, y), stride in zip(places.tolist(), strides.tolist(), strict=True):
        level = [8, 16, 32, 64, 128].index(stride)
        smallest, found, sides, covered = float("inf"), -1, [1.0] * 4, False
        for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
            away = [x - left, y - top, right - x, bottom - y]
            if label == -1 or min(away) <= 0:
                continue
            if label < -1:
                covered = True
                continue
            near = abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)
            area = (right - left) * (bottom - top)
            takes = bounds[level] <= max(away) <= bounds[level + 1]
            if takes and area < smallest and (not radius or max(near) < radius * stride):
                smallest, found, sides = area, label, away
        classes.append(-2 if found == -1 and covered else found)
        distances.append(sides)
    return classes, distances


@settings(max_examples=40)
@given(
    images=st.lists(
        st.lists(st.tuples(st.tuples(*[COORDINATE] * 4), st.integers(-4, 2)), max_size=5),
        min_size=1,
        max_size=3,
    ),
    scale=st.sampled_from([1.0, 0.125]),
    radius=st.sampled_from([0.0, 1.5]),
    chunk=st.sampled_from([1, 10**6]),
)
def test_equals_loops(images, scale, radius, chunk):
    most = max(map(len, images))
    rows = [image + [((0.0,) * 4, -1)] * (most - len(image)) for image in images]
    boxes = torch.tensor([[box for box, _ in row] for row in rows]).view(len(rows), most, 4)
    labels = torch.tensor([[label for _, label in row] for row in rows], dtype=torch.int64)
    labels = labels.view(len(rows), most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        classes, distances = assign(boxes, labels, SIZE, size_scale=scale, center_sampling=radius)
    for i, (own, names) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        expected = plain(own, names, SIZE, scale, radius)
        assert classes[i].tolist() == expected[0]
        assert distances[i].tolist() == expected[1]


@pytest.mark.parametrize(
    ("stride", "bottom", "taken"), [(8, 68, 0), (8, 69, -1), (16, 72, 0), (16, 71, -1)]
)
def test_levels_learn_both_of_their_bounds(stride, bottom, taken):
    """The first point, at half the stride, is 64 pixels from the bottom, or just not."""
    boxes = torch.tensor([[[0.0, 0.0, 17.0, bottom]]])
    classes, distances = assign(boxes, torch.zeros(1, 1, dtype=torch.int64), (96, 96))
    first = points(96, 96)[1].tolist().index(stride)
    half = stride / 2
    assert classes[0, first] == taken
    sides = [half, half, 17 - half, bottom - half]
    assert distances[0, first].tolist() == (sides if taken == 0 else [1.0] * 4)
