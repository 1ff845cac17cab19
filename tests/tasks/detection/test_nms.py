"""Suppression and what goes into it, against loops."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasfast.models.points import points
from nasfast.tasks.detection import nms as module
from nasfast.tasks.detection.assign import assign
from nasfast.tasks.detection.losses import DetectionLoss, loss_sums, normalized, normalizers
from nasfast.tasks.detection.nms import nms
from nasfast.tasks.detection.postprocess import PostProcessing, detections

BOX = st.tuples(*[st.integers(-3, 12).map(float)] * 4)  # turned ones and empty ones, too
ROW = st.tuples(BOX, st.integers(-1, 4).map(lambda n: n / 4), st.integers(0, 2))


def plain(boxes, scores, labels, threshold, limit):
    def area(box):
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        over = False
        for j in kept:
            a, b = boxes[i], boxes[j]
            both = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
            union = area(a) + area(b) - both
            over |= labels[i] == labels[j] and both > threshold * union
        if not over and scores[i] >= 0:
            kept.append(i)
    return kept[:limit]


@pytest.fixture(params=["numba", "torch"])
def kernel(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(module, "_kernel", lambda: None)


@pytest.mark.parametrize("by", ["numba", "torch"])
@settings(max_examples=60)
@given(
    images=st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(ROW, min_size=n, max_size=n), min_size=1, max_size=2)
    ),
    threshold=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    limit=st.sampled_from([1, 4, None]),
)
def test_equals_loops(by, images, threshold, limit):
    boxes, scores, labels = (
        torch.tensor([[row[k] for row in image] for image in images]) for k in range(3)
    )
    with pytest.MonkeyPatch.context() as patch:
        if by == "torch":
            patch.setattr(module, "_kernel", lambda: None)
        kept = nms(boxes, scores, labels, threshold, limit)
    assert kept.shape == (len(images), limit or len(images[0]))
    for own, *image in zip(kept, boxes, scores, labels, strict=True):
        expected = plain(*(each.tolist() for each in image), threshold, limit)
        assert own.tolist() == expected + [-1] * (len(own) - len(expected))


def some(count, images=1, classes=3, side=300.0):
    """Boxes with scores and labels, which overlap."""
    center, size = side * torch.rand(images, count, 1, 2), 20 + 40 * torch.rand(images, count, 1, 2)
    boxes = torch.cat([center - size, center + size], 2).flatten(2)
    return boxes, torch.rand(images, count), torch.randint(classes, (images, count))


@pytest.mark.usefixtures("kernel")
def test_order_does_not_matter():
    found = some(400)
    order = torch.randperm(400)
    shuffled = [each[:, order] for each in found]
    once, again = nms(*found), nms(*shuffled)
    assert torch.equal(once[0], order[again[0]])
    assert 0 < (once >= 0).sum() <= 100


@pytest.mark.usefixtures("kernel")
def test_both_are_equal_for_fractions():
    found = some(300, images=2)
    for limit in (20, 300):
        assert torch.equal(nms(*found, limit=limit), module.nms_reference(*found, 0.6, limit))


@pytest.mark.usefixtures("kernel")
def test_classes_do_not_touch_each_other():
    """At coordinates whose sum with a shift had no digits left."""
    boxes = torch.tensor([[3e7, 3e7, 3e7 + 100, 3e7 + 100]]).expand(1, 80, 4)
    kept = nms(boxes, torch.linspace(1, 0.1, 80)[None], torch.arange(80)[None])
    assert kept[0, :80].tolist() == list(range(80))


@pytest.mark.parametrize("where", [0, 1])
def test_refuses_nan(where):
    found = some(3)
    found[where][0, 1] = torch.nan
    with pytest.raises(ValueError) as error:
        nms(*found)
    assert str(error.value) == "nms: expected boxes and scores that are numbers, got NaN"


def test_without_numba_or_a_place_for_what_it_compiles(monkeypatch):
    compiled = module._kernel.__wrapped__

    def njit(cache=False, nogil=False):
        if cache:
            raise RuntimeError("cannot cache function '_suppress': no locator available")
        return lambda function: function

    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(njit=njit))
    monkeypatch.setattr(module, "_kernel", compiled)
    found = some(40)
    assert torch.equal(nms(*found), module.nms_reference(*found, 0.6, 100))
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled() is None


def output_of(size, classes=3, images=2):
    """Of a detector; logits are rounded, so that scores are equal here and there."""
    count = len(points(*size)[0])
    output = torch.randn(images, classes + 5, count).mul_(2).round_()
    output[:, classes : classes + 4] = 30 * torch.rand(images, 4, count)
    return output


def plain_detections(output, size, image_size, settings):
    """Of one image, as section 4 of FCOS' description has it."""
    places, strides = points(*size)
    count = len(output) - 5
    found = []
    for stride in (8, 16, 32, 64, 128):
        level = []
        for k in range(count):
            for p in (strides == stride).nonzero().flatten().tolist():
                score = output[k, p].sigmoid()
                if score > settings.score_threshold:
                    level.append(((score * output[-1, p].sigmoid()).item(), k, p))
        found += sorted(level, key=lambda each: -each[0])[: settings.candidates]
    boxes = []
    for _, _, p in found:
        left, top, right, bottom = output[count : count + 4, p]
        x, y = places[p]
        sides = torch.stack([x - left, y - top, x + right, y + bottom])
        boxes.append(sides.clamp(min=0).minimum(torch.tensor(image_size * 2).flip(0)).tolist())
    real = [i for i, box in enumerate(boxes) if box[0] < box[2] and box[1] < box[3]]
    scores, labels = ([found[i][k] for i in real] for k in (0, 1))
    boxes = [boxes[i] for i in real]
    kept = plain(boxes, scores, labels, settings.nms_threshold, settings.limit)
    return [boxes[i] for i in kept], [scores[i] for i in kept], [labels[i] for i in kept]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("most", [30, 1000])
def test_detections_equal_loops(most):
    size, sizes = (64, 96), torch.tensor([[64, 96], [40, 70]])
    settings = PostProcessing(score_threshold=0.3, candidates=most, limit=50)
    output = output_of(size)
    found = detections(output, size, sizes, settings)
    for i in range(2):
        expected = plain_detections(output[i], size, sizes[i].tolist(), settings)
        count = len(expected[0])
        assert 0 < count <= 50
        assert torch.equal(found.boxes[i, :count], torch.tensor(expected[0]))
        assert torch.allclose(found.scores[i, :count], torch.tensor(expected[1]))
        assert found.labels[i, :count].tolist() == expected[2]
        assert (found.scores[i, count:] == -1).all()
        assert (found.labels[i, count:] == -1).all()


def test_a_class_counts_before_centerness():
    output = torch.full((1, 6, 23), 4.0)  # 16 + 4 + 1 + 1 + 1 points
    output[0, -1] = -6.0
    found = detections(output, (32, 32), torch.tensor([[32, 32]]))
    assert 0 < found.scores.max() < 0.05


def test_an_empty_result_of_an_untrained_network():
    output = output_of((32, 32))
    output[:, :3] = -5.0
    found = detections(output, (32, 32), torch.tensor([[32, 32]] * 2))
    assert (found.labels == -1).all()
    assert not found.boxes.any()


def test_no_step_waits_for_the_data():
    """On the device without data none could: from boxes and an output to losses and detections."""
    boxes, labels = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, device="meta").long()
    classes, distances = assign(boxes, labels, (64, 96), center_sampling=1.5)
    output = torch.empty(2, 8, classes.shape[1], device="meta", requires_grad=True)
    weight = normalizers(classes, distances, DetectionLoss())
    normalized(loss_sums(output, classes, distances, DetectionLoss()), weight).sum().backward()
    assert output.grad.shape == output.shape
    found = detections(output.detach(), (64, 96), torch.empty(2, 2, device="meta"))
    assert found.boxes.shape == (2, 100, 4)
