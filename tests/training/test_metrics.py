import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasfast.training.metrics import ConfusionMatrix, SegmentationScores

CPU = torch.device("cpu")


def slow_scores(pairs, classes, ignore, omit):
    """(mIoU, mean accuracy, frequency-weighted IoU, IoU by class) by counting with sets."""
    pairs = [(p, t) for p, t in pairs if t != ignore]
    iou, accuracy, frequency = {}, {}, {}
    for c in range(classes):
        predicted = {i for i, (p, _) in enumerate(pairs) if p == c}
        labelled = {i for i, (_, t) in enumerate(pairs) if t == c}
        if labelled and c not in omit:
            iou[c] = len(predicted & labelled) / len(predicted | labelled)
            accuracy[c] = len(predicted & labelled) / len(labelled)
            frequency[c] = len(labelled)
    if not iou:
        return 0.0, 0.0, 0.0, (None,) * classes
    total = sum(frequency.values())
    return (
        sum(iou.values()) / len(iou),
        sum(accuracy.values()) / len(accuracy),
        sum(frequency[c] / total * iou[c] for c in iou),
        tuple(iou.get(c) for c in range(classes)),
    )


@settings(max_examples=60)
@given(st.data())
def test_against_counting(data):
    classes = data.draw(st.integers(1, 5))
    ignore = data.draw(st.sampled_from([255, classes, 0]))
    omit = data.draw(st.sets(st.integers(0, classes - 1)))
    cls = st.integers(0, classes - 1)
    pairs = data.draw(st.lists(st.tuples(cls, cls | st.just(ignore)), min_size=1, max_size=40))
    matrix = ConfusionMatrix(classes, ignore, CPU)
    cut = data.draw(st.integers(0, len(pairs)))
    for part in (pairs[:cut], pairs[cut:]):
        predictions, labels = torch.tensor(part, dtype=torch.int64).view(-1, 2).unbind(1)
        matrix.update(predictions, labels.to(torch.uint8))
    found, expected = matrix.compute(tuple(omit)), slow_scores(pairs, classes, ignore, omit)
    assert (found.miou, found.mean_accuracy, found.fw_iou) == pytest.approx(expected[:3])
    assert found.class_iou == pytest.approx(expected[3])
    assert found.reward**3 == pytest.approx(math.prod(expected[:3]))


def test_reward_is_the_cube_root():
    scores = SegmentationScores(0.2, 0.4, 0.1, (0.2,))
    assert scores.reward == pytest.approx(0.2)
    assert scores.as_dict() == {"miou": 0.2, "mean_accuracy": 0.4, "fw_iou": 0.1}


def test_nothing_labelled():
    matrix = ConfusionMatrix(3, 255, CPU)
    matrix.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 255))
    assert matrix.compute() == SegmentationScores(0.0, 0.0, 0.0, (None, None, None))
    assert matrix.compute().reward == 0


def test_shapes():
    message = (
        "ConfusionMatrix.update: expected predictions and labels of one shape, got [1, 2, 3] and "
        "[1, 4, 6]; resize the logits first"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ConfusionMatrix(3, 255, CPU).update(torch.zeros(1, 2, 3), torch.zeros(1, 4, 6))
