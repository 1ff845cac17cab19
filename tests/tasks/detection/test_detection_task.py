"""Detection as a dense task: targets, losses over parts, scores, predictions."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nasfast.data.detection import (
    BoxSample,
    BoxTrainTransform,
    BoxValTransform,
    DetectionDataset,
    DetectionSplits,
)
from nasfast.models.points import points
from nasfast.tasks.detection import DetectionLoss, DetectionTask
from nasfast.tasks.detection.losses import centerness
from nasfast.tasks.registry import processor_of
from nasfast.training.loop import NonFiniteLossError, Runtime

CPU = Runtime(torch.device("cpu"))
WHOLE = BoxValTransform()
BOXES = [
    [([8, 8, 40, 40], 0, False), ([50, 10, 90, 60], 1, False)],
    [],
    [([0, 0, 70, 50], 1, False), ([20, 20, 44, 44], 0, False), ([60, 30, 95, 63], 1, True)],
    [([30, 5, 66, 58], 0, False)],
]


class Scenes(DetectionDataset):
    """Bright boxes on grey, each image with other boxes."""

    name, classes, category_ids = "scenes", ("disc", "long name"), (7, 90)
    colors = ((255, 255, 0), (0, 0, 160))

    def __len__(self):
        return len(BOXES)

    def __getitem__(self, index):
        rows = BOXES[index]
        boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).view(-1, 4)
        image = torch.full((3, 64, 96), 90, dtype=torch.uint8)
        for left, top, right, bottom in boxes.int().tolist():
            image[:, top:bottom, left:right] += 20
        return BoxSample(
            image,
            boxes,
            torch.tensor([row[1] for row in rows], dtype=torch.int64),
            torch.tensor([row[2] for row in rows], dtype=torch.bool),
            (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            index,
        )

    def fingerprint(self):
        return "scenes"

    def sizes(self):
        return [(64, 96)] * len(self)

    def counts(self):
        return [len(rows) for rows in BOXES]


def task_of(**settings):
    scenes = Scenes()
    loss = DetectionLoss(**{"size_scale": 0.5, **settings})
    return DetectionTask(DetectionSplits(scenes, scenes, scenes, scenes), loss)


def answer(task, targets, sure=6.0):
    """The output that the targets ask for."""
    rows, columns = targets["inside"].shape[1:]
    dense = task.resize_targets(targets, (8 * rows, 8 * columns))
    names, distances = dense["classes"], dense["distances"]
    output = torch.full((len(names), task.outputs, names.shape[1]), -sure)
    output[:, 2:6] = distances.transpose(1, 2)
    found = torch.where(names >= 0, sure, -sure)[:, None]
    output[:, :2] = torch.full_like(output[:, :2], -sure).scatter(
        1, names.clamp(min=0)[:, None], found
    )
    output[:, -1] = torch.logit(centerness(distances), eps=1e-3)
    return output


def batches(task, size, transform=WHOLE):
    for first in range(0, len(BOXES), size):
        indices = list(range(first, min(first + size, len(BOXES))))
        images, targets = task.load_padded(task.search_val, indices, transform)
        yield images, targets


def test_targets():
    task = task_of()
    transform = BoxValTransform(None, shorter_side=80)
    images, targets = task.load_padded(task.search_val, [2, 1], transform)
    assert images.shape == (2, 3, 96, 128)
    assert targets["boxes"].shape == (2, 3, 4)
    assert targets["labels"].tolist() == [[1, 0, -3], [-1, -1, -1]]
    assert targets["boxes"][0, 1].tolist() == [25, 25, 55, 55]
    assert targets["areas"][0, 1].item() == 900
    assert targets["index"].tolist() == [2, 1]
    assert targets["size"].tolist() == [[80, 120]] * 2
    assert targets["scale"].tolist() == [[1.25, 1.25]] * 2
    assert targets["inside"].tolist() == [[[1] * 4] * 3] * 2
    dense = task.resize_targets(targets, (24, 32))
    count = len(points(96, 128)[0])
    assert dense["classes"].shape == (2, count)
    assert dense["distances"].shape == (2, count, 4)
    assert set(dense["classes"].unique().tolist()) == {-2, -1, 0, 1}
    crops = BoxTrainTransform(64, shorter_side=80)
    _, targets = task.load_padded(task.search_train, [0], crops, torch.Generator())
    assert targets["scale"].tolist() == [[1, 1]]


def test_the_criterion_takes_boxes_and_what_they_become():
    task = task_of()
    ((_, targets),) = batches(task, 4)
    output = torch.randn(4, 7, len(points(64, 96)[0])).abs()
    dense = task.resize_targets(targets, (16, 24))
    assert torch.equal(task.criterion(output, targets), task.criterion(output, dense))
    assert torch.equal(task.weight(targets), task.weight(dense))
    assert task.assignment == "sizes x 0.5, center sampling 0.0"
    other = task_of(center_sampling=1.5).resize_targets(targets, (16, 24))
    assert (other["classes"] >= 0).sum() < (dense["classes"] >= 0).sum()


@pytest.mark.parametrize("count_images", [True, False])
def test_parts_make_the_loss_of_the_whole(count_images):
    """As parts of a batch, or processes, add theirs; one part has no object."""
    task = task_of(count_images=count_images)
    ((_, targets),) = batches(task, 4)
    targets = task.resize_targets(targets, (16, 24))
    output = torch.randn(4, 7, len(points(64, 96)[0])).abs().requires_grad_()
    whole = task.loss(output, [], targets, aux_weight=0.0)
    parts = [{name: value[i : i + 1] for name, value in targets.items()} for i in range(4)]
    total = sum(task.weight(part) for part in parts)
    sum_ = sum(
        task.loss(output[i : i + 1], [], part, aux_weight=0.0, shares=task.weight(part) / total)
        for i, part in enumerate(parts)
    )
    if count_images:
        assert sum_.item() == pytest.approx(whole.item(), rel=1e-5)
    else:  # a part without positives counts as one
        assert sum_.item() == pytest.approx(whole.item(), rel=0.02)
    (grad,) = torch.autograd.grad(sum_, output)
    assert grad.isfinite().all()


def overwritten(pairs):
    """Batches whose memory is used again, as that of a feature cache."""
    for output, targets in pairs:
        yield output, targets
        for target in targets.values():
            target.zero_()


def test_scores_do_not_depend_on_batches():
    task = task_of()
    found = [
        task.score(
            overwritten((answer(task, t, 2.0), t) for _, t in batches(task, size)),
            lambda output: output,
            CPU,
        )
        for size in (1, 3, 4)
    ]
    for scores in found[1:]:
        assert scores.as_dict() == pytest.approx(found[0].as_dict())
    scores = found[0]
    assert scores.reward == pytest.approx(-sum(scores.losses.values()))
    ((_, targets),) = batches(task, 4)
    losses = task.criterion(answer(task, targets, 2.0), targets)
    assert list(scores.losses.values()) == pytest.approx(losses.tolist(), rel=1e-5)
    assert scores.ap == pytest.approx(1)
    assert scores.class_ap50 == pytest.approx((1, 1))
    assert [each.name for each in task.class_scores(scores)] == ["disc", "long name"]
    assert len(scores.images) == 4


def test_ap_is_that_of_the_images_own_pixels():
    """Three times as large, the objects stay small or medium."""
    task = task_of()
    large = BoxValTransform(None, shorter_side=192)
    figures = [
        task.score(
            ((answer(task, targets), targets) for _, targets in batches(task, 2, transform)),
            lambda output: output,
            CPU,
        ).figures
        for transform in (WHOLE, large)
    ]
    assert set(figures[0]) == set(figures[1])
    assert "ap_large" not in figures[0]
    assert "ap_small" in figures[0]


def test_the_reward_can_be_ap():
    scenes = Scenes()
    task = DetectionTask(DetectionSplits(scenes, scenes, scenes, scenes), judge="ap")
    pairs = ((answer(task, targets), targets) for _, targets in batches(task, 4))
    scores = task.score(pairs, lambda output: output, CPU)
    assert scores.reward == scores.ap > 0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_score_for_what_is_no_number(value):
    task = task_of()
    ((_, targets),) = batches(task, 4)
    output = answer(task, targets)
    output[0, 3, 5] = value
    with pytest.raises(NonFiniteLossError) as error:
        task.score([(output, targets)], lambda output: output, CPU)
    assert str(error.value) == "the network's outputs are not finite"


class Answers(nn.Module):
    """Gives what it is told, for any image."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, images):
        return self.output, []


def test_pictures():
    task = task_of()
    _, targets = next(batches(task, 1))
    scores = task.score([(answer(task, targets), targets)], lambda output: output, CPU)
    model = Answers(answer(task, targets))
    files = task.show(model, scores, Scenes().subset([0]), WHOLE, CPU)
    assert list(files) == ["image-0000.png", "classes.json"]
    assert Image.open(io.BytesIO(files["image-0000.png"])).width > 3 * 96
    panels = task.panels(model, Scenes(), 0, WHOLE, CPU)
    assert list(panels) == ["image", "truth", "prediction"]
    yellow = torch.tensor([255, 255, 0], dtype=torch.uint8)[:, None, None]
    for name, panel in panels.items():
        edge = (panel == yellow).all(0)
        assert edge.any() == (name != "image")
    left = (panels["prediction"] == yellow).all(0).any(0).nonzero().min().item()
    assert left in range(22, 27)  # 8 pixels, in a picture of three times the size
    assert json.loads(files["classes.json"])[1]["name"] == "long name"


def test_a_processor_by_its_description(tmp_path):
    """Boxes in the pixels of an image that the network sees at half the size."""
    task = task_of()
    _, targets = next(batches(task, 1))
    output = answer(task, targets)
    description = {
        "method": "detection",
        "classes": list(Scenes.classes),
        "category_ids": list(Scenes.category_ids),
        "colors": [list(color) for color in Scenes.colors],
    }
    processor = processor_of(description)
    assert processor == task.processor
    plain = processor_of({"method": "detection", "classes": ["a", "b"]})
    assert plain.category_ids == (1, 2)
    with pytest.raises(ValueError) as error:
        processor_of({**description, "category_ids": [7]})
    assert str(error.value) == "category_ids: expected one for each of 2 classes, got 1"
    large = torch.zeros(3, 128, 192, dtype=torch.uint8)
    (found,) = processor.detect(output, (64, 96), targets["size"], [large])
    same = processor.prediction(output[0], Scenes()[0].image)
    torch.testing.assert_close(found.boxes, 2 * same.boxes)
    told = found.to_json()
    assert told["size"] == [128, 192]
    wanted = {
        "disc": ([16, 16, 64, 64], 7),
        "long name": ([100, 20, 80, 100], 90),
    }
    assert len(told["objects"]) == 2
    for entry in told["objects"]:
        box, category = wanted[entry["class"]]
        assert entry["bbox"] == box
        assert entry["category_id"] == category
        assert 0.5 < entry["score"] <= 1
    results, picture = found.save(tmp_path, "name")
    assert (results.name, picture.name) == ("name.json", "name-boxes.png")
    assert json.loads(results.read_text()) == found.coco_results()
    assert found.coco_results("5")[0]["image_id"] == "5"
    assert np.asarray(Image.open(picture)).shape == (256, 384, 3)
    json.dumps(told)
