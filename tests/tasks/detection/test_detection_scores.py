"""AP against pycocotools, and worked out by hand."""

import contextlib
import importlib.util
import io

import pytest
import torch

from nasfast.data.detection import load_detection_splits
from nasfast.tasks.detection import DetectionTask
from nasfast.tasks.detection.scores import FIGURES, DetectionScores, ImageBoxes, coco_ap, voc_ap
from nasfast.utils.errors import UserError


def boxes_of(rows):
    return torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)


def image(truth=(), found=()):
    """Of (box, label, ignored) and of (box, label, score)."""
    return ImageBoxes(
        boxes_of(truth),
        torch.tensor([row[1] for row in truth], dtype=torch.int64),
        torch.tensor([row[2] for row in truth], dtype=torch.bool),
        torch.tensor([(r[0][2] - r[0][0]) * (r[0][3] - r[0][1]) for r in truth]),
        boxes_of(found),
        torch.tensor([row[2] for row in found]),
        torch.tensor([row[1] for row in found], dtype=torch.int64),
    )


def guesses(sample, classes, generator):
    """Boxes near the objects, doubled ones, of wrong classes, and where there is nothing."""
    height, width = sample.image.shape[1:]
    near = sample.boxes.repeat(2, 1)
    sizes = (near[:, 2:] - near[:, :2]).repeat(1, 2)
    near = near + 0.15 * sizes * torch.randn(near.shape, generator=generator)
    labels = sample.labels.repeat(2)
    wrong = torch.rand(len(labels), generator=generator) < 0.2
    labels = torch.where(wrong, (labels + 1) % classes, labels)
    low = torch.rand(3, 2, generator=generator) * torch.tensor([width, height]) / 2
    boxes = torch.cat([near, torch.cat([low, low + 40], 1)])
    boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, :2] + 1, boxes[:, 2:])], 1)
    labels = torch.cat([labels, torch.randint(classes, (3,), generator=generator)])
    return boxes, torch.rand(len(boxes), generator=generator), labels


@pytest.mark.parametrize("part", ["train", "val"])
def test_agrees_with_pycocotools(data_root, part):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root = data_root / "coco-mini" / "detection"
    data = getattr(load_detection_splits(root), part)
    generator, images, results = torch.Generator().manual_seed(1), [], []
    for sample in data:
        boxes, scores, labels = guesses(sample, len(data.classes), generator)
        images.append(
            ImageBoxes(
                sample.boxes, sample.labels, sample.ignored, sample.areas, boxes, scores, labels
            )
        )
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            category = data.category_ids[label]
            results.append(
                {
                    "image_id": sample.image_id,
                    "category_id": category,
                    "bbox": sides,
                    "score": score,
                }
            )
    found = coco_ap(images, len(data.classes))

    with contextlib.redirect_stdout(io.StringIO()):
        expected = COCO(root / f"annotations/instances_{part}2017.json")
        evaluation = COCOeval(expected, expected.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = [found.figures.get(name, -1.0) for name in FIGURES]
    assert ours == pytest.approx(evaluation.stats, abs=1e-6)
    assert 0.2 < found.figures["ap"] < 0.9
    precision = evaluation.eval["precision"]
    for k, category in enumerate(evaluation.params.catIds):
        label = data.category_ids.index(category)
        for name, part_ in (("class_ap", precision), ("class_ap50", precision[:1])):
            theirs = part_[:, :, k, 0, 2]
            own = getattr(found, name)[label]
            assert (-1 if own is None else own) == pytest.approx(theirs.mean(), abs=1e-6)


A, B, C = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]


def test_images_without_objects_count():
    right = image([(A, 0, False)], [(A, 0, 0.5)])
    wrong = image([], [(C, 0, 0.9)])
    assert coco_ap([right], 1).figures["ap50"] == pytest.approx(1)
    assert coco_ap([right, wrong], 1).figures["ap50"] == pytest.approx(0.5)
    assert voc_ap([right, wrong], 1) == (0.5,)


def test_ignored_objects_are_neither_missed_nor_found():
    ignored = [(A, 0, False), (B, 0, True)]
    for found in ([(A, 0, 0.5)], [(A, 0, 0.5), (B, 0, 0.9)]):
        assert coco_ap([image(ignored, found)], 1).figures["ap"] == pytest.approx(1)
        assert voc_ap([image(ignored, found)], 1) == (1.0,)


def test_nothing_to_find_and_nothing_found():
    assert coco_ap([image(), image([], [(A, 0, 0.9)])], 2).figures == {}
    assert coco_ap([image()], 2).class_ap == (None, None)
    assert voc_ap([image()], 2) == (None, None)
    missed = coco_ap([image([(A, 1, False)])], 2)
    assert missed.figures["ap"] == 0
    assert missed.class_ap == (None, 0.0)
    assert voc_ap([image([(A, 1, False)])], 2) == (None, 0.0)


def test_voc_by_hand():
    """Right, a double, right, wrong: precision 1, 1/2, 2/3, 1/2 at recall 1/3, 1/3, 2/3, 2/3."""
    truth = [(A, 0, False), (B, 0, False), (C, 0, False)]
    shifted = [0, 0, 10, 9]
    found = [(A, 0, 0.9), (shifted, 0, 0.8), (B, 0, 0.7), ([70, 70, 80, 80], 0, 0.6)]
    images = [image(truth, found)]
    assert voc_ap(images, 1)[0] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    # recalls 0, .1, .2, .3 with precision 1, then .4, .5, .6 with 2/3
    assert voc_ap(images, 1, points=11)[0] == pytest.approx((4 + 3 * 2 / 3) / 11)
    assert voc_ap([image(truth, [(shifted, 0, 0.9)])], 1, 0.95)[0] == 0


def test_scores_name_what_is_defined():
    figures = {"ap": 0.25, "ap50": 0.5, "ar_1": 0.3}
    scores = DetectionScores(-2.0, figures, {"classes": 1.5, "boxes": 0.5})
    assert list(scores.as_dict().items()) == [
        ("ap50", 0.5),
        ("ap", 0.25),
        ("ar_1", 0.3),
        ("loss_classes", 1.5),
        ("loss_boxes", 0.5),
    ]
    assert DetectionScores(-2.0, {}, {}).as_dict() == {"ap50": 0.0, "ap": 0.0}


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for needs in (lambda: DetectionTask(None), lambda: coco_ap([], 1)):
        with pytest.raises(UserError) as error:
            needs()
        assert str(error.value) == (
            "detection: expected the package faster-coco-eval, which computes AP, got none; "
            "pip install 'nasfast[detection]'"
        )
