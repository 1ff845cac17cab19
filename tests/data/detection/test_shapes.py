"""The generated scenes with boxes: determinism, contents, arguments."""

import numpy as np
import pytest
import torch

from nasfast.data.detection import SyntheticShapes, load_detection_splits
from nasfast.data.detection.synthetic import _Shapes
from nasfast.utils.errors import UserError


def same(a, b):
    return torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes)


def test_a_sample_depends_on_seed_stream_and_index_alone():
    shapes = SyntheticShapes(5, seed=4)
    assert same(shapes[3], SyntheticShapes(50, seed=4, cache_in_memory=True)[3])
    assert same(shapes[-1], shapes[4])
    others = [{"seed": 5}, {"seed": 4, "stream": "val"}, {"seed": 4, "size": (128, 161)}]
    for other in (shapes[2], *(SyntheticShapes(5, **arguments)[3] for arguments in others)):
        assert not same(shapes[3], other)
    sets = [SyntheticShapes(6), *(SyntheticShapes(5, **arguments) for arguments in [*others, {}])]
    assert len({each.fingerprint() for each in sets}) == len(sets)
    with pytest.raises(IndexError):
        shapes[5]


def test_contents():
    """Boxes inside, as many of each class, in sizes over a factor of eight, some hidden."""
    splits = load_detection_splits("synthetic")
    assert [len(splits.train), len(splits.val), splits.test] == [512, 128, None]
    shapes = splits.val
    samples = list(shapes)
    assert shapes.sizes()[0] == tuple(samples[0].image.shape[1:]) == (128, 160)
    assert shapes.counts() == [len(sample.labels) for sample in samples]
    assert samples[3] is shapes[3]
    boxes = torch.cat([sample.boxes for sample in samples])
    left, top, right, bottom = boxes.unbind(1)
    assert ((left >= 0) & (left < right) & (right <= 160)).all()
    assert ((top >= 0) & (top < bottom) & (bottom <= 128)).all()
    counts = torch.bincount(torch.cat([sample.labels for sample in samples]))
    assert len(counts) == 4
    assert counts.max() < 1.2 * counts.min()
    sides = (right - left).sort().values
    assert sides[int(0.9 * len(sides))] > 4 * sides[int(0.1 * len(sides))]
    ignored = torch.cat([sample.ignored for sample in samples]).float().mean()
    assert 0 < ignored < 0.1


def test_boxes_fit_their_shapes():
    """The pixels of a shape that nothing hides fill its box to the edges."""
    whole = []
    for seed in range(40):
        scene = _Shapes(np.random.default_rng(seed), 128, 160)
        for index, (box, area, label) in enumerate(
            zip(scene.boxes, scene.areas, scene.labels, strict=True)
        ):
            rows, columns = np.nonzero(scene.seen == index)
            if len(rows) == area:
                whole.append(label)
                extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box.tolist() == extent
    assert set(whole) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_samples": 0}, UserError, "SyntheticShapes: expected num_samples >= 1, got 0"),
        ({"num_samples": 1, "seed": -1}, UserError, "SyntheticShapes: expected seed >= 0, got -1"),
        ({"num_samples": 1, "size": (64, 60)}, ValueError, "size of at least 64x64, got"),
        ({"num_samples": 1, "stream": "x"}, ValueError, "expected stream of .*, got 'x'"),
    ],
)
def test_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        SyntheticShapes(**arguments)
