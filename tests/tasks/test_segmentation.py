import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nasfast.data import SyntheticStreets, ValTransform, split_for_search
from nasfast.tasks.base import prepare_images
from nasfast.tasks.segmentation import VECTOR, SegmentationTask, resize_labels
from nasfast.training.loop import Runtime, in_order

RUNTIME = Runtime(torch.device("cpu"))
TRAIN = SyntheticStreets(5, size=(32, 48))
VAL = SyntheticStreets(2, size=(32, 48), stream="val")
TASK = SegmentationTask(split_for_search(TRAIN, VAL, seed=0))
CLASSES = 8


def cross_entropy(logits, labels, weight=None):
    task = dataclasses.replace(TASK, class_weight=weight)
    return task.criterion(logits, {"labels": labels})


def labels_of(*size):
    labels = torch.randint(0, CLASSES, size, dtype=torch.uint8)
    labels[torch.rand(size) < 0.2] = 255
    return labels


@pytest.fixture
def batch_of_two():
    return torch.randn(2, CLASSES, 6, 5, requires_grad=True), labels_of(2, 6, 5)


def test_task_reads_classes_and_ignore_index_from_the_data():
    assert (TASK.outputs, TASK.ignore_index) == (CLASSES, 255)


@pytest.mark.parametrize("index", [-1, CLASSES])
def test_omitted_classes_exist(index):
    with pytest.raises(
        ValueError, match=f"^omit: expected classes from 0 to 7, got {index}; leave "
    ):
        SegmentationTask(TASK.splits, (0, index))


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_against_torch(batch_of_two, weighted):
    logits, labels = batch_of_two
    # small weights: their sum over the pixels stays below one
    weight = torch.rand(CLASSES) * 1e-3 if weighted else None
    expected = F.cross_entropy(logits, labels.long(), weight, ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, labels, weight), expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("classes", [2, VECTOR - 1, VECTOR, VECTOR + 5])
def test_gradients_of_cross_entropy_keep_the_memory_format(classes, memory_format):
    logits = torch.randn(2, classes, 6, 5).contiguous(memory_format=memory_format)
    logits.requires_grad_()
    labels = torch.randint(0, classes, (2, 6, 5), dtype=torch.uint8)
    labels[:, 0] = 255
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.is_contiguous(memory_format=memory_format)))
    cross_entropy(logits, labels).backward()
    # rows of channels are a view: the gradient of planes lies in rows too
    assert seen == [memory_format is torch.channels_last or classes < VECTOR]
    exact = logits.detach().double().requires_grad_()
    F.cross_entropy(exact, labels.long(), ignore_index=255).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-7, rtol=1e-5)


def test_cross_entropy_is_at_the_labels_resolution(batch_of_two):
    logits, labels = batch_of_two[0], labels_of(2, 24, 20)
    enlarged = F.interpolate(logits, (24, 20), mode="bilinear")
    expected = F.cross_entropy(enlarged, labels.long(), ignore_index=255)
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


def test_cross_entropy_is_float32(batch_of_two):
    logits, labels = batch_of_two
    half = logits.detach().bfloat16()
    loss = cross_entropy(half, labels)
    assert loss.dtype == torch.float32
    assert loss == cross_entropy(half.float(), labels)


@pytest.mark.parametrize("weight", [None, torch.rand(CLASSES)])
def test_cross_entropy_without_labels_is_zero(batch_of_two, weight):
    logits, labels = batch_of_two
    loss = cross_entropy(logits, torch.full_like(labels, 255), weight)
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_loss_is_the_sum_of_its_terms(batch_of_two):
    logits, labels = batch_of_two
    aux = [torch.randn(2, CLASSES, 3, 4), torch.randn(2, CLASSES, 6, 5)]
    teacher = torch.randn(2, CLASSES, 12, 9, dtype=torch.float16)
    weight = torch.rand(CLASSES) + 0.5

    def weighted(scores):
        scores = F.interpolate(scores, (6, 5), mode="bilinear")
        return F.cross_entropy(scores, labels.long(), weight, ignore_index=255)

    enlarged = F.interpolate(logits, (12, 9), mode="bilinear")
    expected = (
        weighted(logits)
        + 0.15 * (weighted(aux[0]) + weighted(aux[1]))
        + 0.3 * ((enlarged - teacher.float()) ** 2).mean()
    )
    task, targets = dataclasses.replace(TASK, class_weight=weight), {"labels": labels}
    loss = task.loss(logits, aux, targets, aux_weight=0.15, teacher=teacher, kd_weight=0.3)
    torch.testing.assert_close(loss, expected)
    plain = TASK.loss(logits, [], targets, aux_weight=0.15)
    assert plain == cross_entropy(logits, labels)


def test_resize_labels_takes_the_nearest_label():
    labels = torch.arange(16, dtype=torch.uint8).view(1, 4, 4) + 240
    resized = resize_labels(labels, (2, 2))
    assert resized.dtype == torch.uint8
    assert resized.tolist() == [[[245, 247], [253, 255]]]
    assert torch.equal(resize_labels(resized, (2, 2)), resized)


def test_prepare_images():
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    prepared = prepare_images(images, RUNTIME)
    assert prepared.is_contiguous(memory_format=torch.channels_last)
    red = (images[:, 0] / 255 - 0.485) / 0.229
    torch.testing.assert_close(prepared[:, 0], red)


def test_batches():
    batches = list(TASK.batches(TRAIN, in_order(5, 2), ValTransform(None), RUNTIME))
    assert [tuple(images.shape) for images, _ in batches] == [(2, 3, 32, 64)] * 2 + [(1, 3, 32, 64)]
    labels, images = batches[2][1]["labels"][0], batches[2][0]
    assert torch.equal(labels[:, :48], TRAIN[4].mask)
    assert (labels[:, 48:] == 255).all()
    torch.testing.assert_close(images[..., 48:], images[..., 47:48].expand(-1, -1, -1, 16))


class Oracle(nn.Module):
    """Gives one-hot logits of stored labels, batch by batch, at half the resolution."""

    def __init__(self, dataset):
        super().__init__()
        self.masks = [sample.mask for sample in dataset]

    def forward(self, images):
        assert not self.training
        labels = torch.stack([F.pad(self.masks.pop(0), (0, 16)) for _ in images]).long()
        logits = F.one_hot(labels.masked_fill(labels == 255, 0), CLASSES).permute(0, 3, 1, 2)
        return logits.float()[..., ::2, ::2], []


def test_score_images_at_full_resolution():
    beats = []
    runtime = Runtime(torch.device("cpu"), lambda: beats.append(1))
    model = Oracle(TRAIN)
    scores = TASK.score_images(model, TRAIN, ValTransform(None), runtime, batch_size=2)
    assert len(beats) == 3
    assert not model.masks
    assert 0.5 < scores.miou < 1  # thin things are lost at half the resolution


def test_score_counts_every_pixel_and_omits_classes():
    labels = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    logits = F.one_hot(torch.tensor([[[1, 1], [1, 1]]]), CLASSES).permute(0, 3, 1, 2).float()
    pairs = [(logits, {"labels": labels})]
    both = TASK.score(pairs, lambda x: x, RUNTIME)
    assert both.class_iou[:3] == (0, pytest.approx(2 / 3), None)
    assert both.mean_accuracy == 0.5
    without = SegmentationTask(TASK.splits, omit=(0,)).score(pairs, lambda x: x, RUNTIME)
    assert without.class_iou[:3] == (None, pytest.approx(2 / 3), None)
    assert without.mean_accuracy == without.fw_iou / without.miou == 1


def test_a_prediction_is_drawn():
    image = torch.full((3, 4, 6), 100, dtype=torch.uint8)
    logits = torch.zeros(CLASSES, 4, 6)
    logits[2] = 1
    drawn = TASK.processor.prediction(logits, image).draw()
    colour = torch.tensor(TRAIN.colors[2])[:, None, None]
    assert torch.equal(drawn, (0.6 * colour + 40).round().byte().expand(3, 4, 6))
