"""The generated scenes with boxes: determinism, contents, arguments."""

import pytest
import torch

from nasfast.data.detection import SyntheticShapes, load_detection_splits
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
    """What is unlike the ground touches all four edges of the box of a lone object."""
    for seed in range(40):
        (sample,) = SyntheticShapes(1, seed)
        areas = (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(1)
        assert (sample.areas <= areas + 1).all()
        whole = (
            (sample.boxes[:, :2] > 0).all(1)
            & (sample.boxes[:, 2] < 160)
            & (sample.boxes[:, 3] < 128)
        )
        disc = whole & (sample.labels == 0) & (areas > 200)
        torch.testing.assert_close(sample.areas[disc], areas[disc] * torch.pi / 4, rtol=0.1, atol=0)


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
