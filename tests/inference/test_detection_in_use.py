"""Detectors in use: objects in images of any size, whole, in tiles, and from exported files."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nasfast.data.detection import BoxSample, BoxValTransform
from nasfast.inference.export import agrees, check_exportable, compare, export
from nasfast.inference.model import Model, load
from nasfast.models.points import STRIDES, level_sizes, points
from nasfast.tasks.detection.postprocess import Boxes, detections
from nasfast.tasks.registry import processor_of
from nasfast.utils.errors import UserError

DESCRIPTION = {
    "genotype": {"space": "nas_fcos", "fpn": None, "head": None},
    "method": "detection",
    "classes": ["cat", "dog"],
    "category_ids": [17, 18],
}


class Bright(nn.Module):
    """Finds bright rectangles; those of the first channel are cats, those of the second dogs. The
    point of P3 nearest to the centre is the surest."""

    def forward(self, x):
        places, strides = points(x.shape[-2], x.shape[-1])
        output = torch.full((len(x), 7, len(places)), -9.0)
        output[:, 2:6] = 1.0
        for i, label in itertools.product(range(len(x)), range(2)):
            light = F.pad(x[i, label] > 0, (1, 1, 1, 1))
            for p in range(int((strides == 8).sum())):
                column, row = (int(v) + 1 for v in places[p])
                if row <= x.shape[-2] and column <= x.shape[-1] and light[row, column]:
                    ends = [
                        int((~line).to(torch.uint8).argmax())
                        for line in (
                            light[row, :column].flip(0),
                            light[:row, column].flip(0),
                            light[row, column:],
                            light[row:, column],
                        )
                    ]
                    output[i, label, p] = 6.0
                    output[i, 2:6, p] = torch.tensor(ends, dtype=torch.float32)
                    output[i, 6, p] = min(ends) / max(ends)
        return output, []


class Points(nn.Module):
    """A convolution of the image at each level's resolution: many boxes with spread scores."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 7, 9, padding=4)
        nn.init.normal_(self.conv.weight, std=0.8, generator=generator)
        self.register_buffer("sides", torch.tensor([0, 0, 1, 1, 1, 1, 0]).view(7, 1) == 1)

    def forward(self, x):
        x = self.conv(x)
        pools = [(1 + s / 99) * F.avg_pool2d(x, s, ceil_mode=True).flatten(2) for s in STRIDES]
        x = torch.cat(pools, 2)
        return torch.where(self.sides, 8 * x.clamp(max=3).exp(), x), []


def model_of(network, **more):
    description = {**DESCRIPTION, **more}
    return Model(network, processor_of(description), description)


def scene(size, boxes):
    """uint8 ``[3, H, W]`` with rectangles (label, left, top, right, bottom)."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for label, left, top, right, bottom in boxes:
        image[label, top:bottom, left:right] = 255
    return image


def found(prediction):
    rows = zip(prediction.labels.tolist(), prediction.boxes.tolist(), strict=True)
    return sorted((label, *(round(v, 2) for v in box)) for label, box in rows)


SCENES = [
    ((50, 70), [(0, 3, 5, 30, 41), (1, 40, 11, 70, 50)]),
    ((33, 90), [(1, 50, 1, 80, 30)]),
    ((64, 32), []),
    ((50, 70), [(1, 9, 9, 60, 41)]),
]


def test_objects_have_the_pixels_of_their_images(spy):
    model = model_of(Bright())
    images = [scene(*each) for each in SCENES]
    for prediction, image, (_, boxes) in zip(model.predict(images), images, SCENES, strict=True):
        assert found(prediction) == sorted(boxes)
        assert torch.equal(prediction.image, image)
        assert prediction.category_ids == (17, 18)
    assert set(spy) == {(1, 3, 64, 96), (1, 3, 64, 32)}
    del spy[:]
    pair = model.predict([images[0], images[3]])  # of one size
    assert [found(each) for each in pair] == [sorted(SCENES[i][1]) for i in (0, 3)]
    assert spy == [(2, 3, 64, 96)]


@pytest.fixture
def spy(monkeypatch):
    """Shapes that networks see."""
    seen, whole = [], Model.map

    def spied(model, images):
        seen.append(tuple(images.shape))
        return whole(model, images)

    monkeypatch.setattr(Model, "map", spied)
    return seen


@pytest.mark.parametrize(
    ("said", "resize", "size"),
    [
        ({"size": [60, 80]}, "auto", (60, 80)),  # 120 is more than 1.4 times 60
        ({"size": [100, 140]}, "auto", (120, 160)),
        ({"size": [60, 80], "shorter_side": 90}, "auto", (90, 120)),
        ({"size": [60, 80], "shorter_side": 90, "longer_side": 100}, "auto", (75, 100)),
        ({"size": [60, 80], "longer_side": 80}, "auto", (60, 80)),
        ({"size": [60, 80], "shorter_side": 90}, "none", (120, 160)),
        ({"shorter_side": 90}, 240, (240, 320)),
    ],
)
def test_boxes_come_back_from_a_resized_image(said, resize, size, spy):
    model, box = model_of(Bright(), **said), (0, 24, 36, 108, 96)
    image = scene((120, 160), [box])
    (got,) = found(model.predict(image, resize=resize))
    assert torch.tensor(got).sub(torch.tensor(box)).abs().max() <= 2
    assert spy[0][2:] == tuple(-(-side // 32) * 32 for side in size)
    if resize == "auto" and "size" in said and len(said) > 1:  # as it was scored
        sides = said.get("shorter_side"), said.get("longer_side")
        none = torch.zeros(0)
        sample = BoxSample(image, torch.zeros(0, 4), none.long(), none.bool(), none, 0)
        assert BoxValTransform(None, *sides)(sample).image.shape[1:] == size


def test_tiles_find_what_the_whole_image_shows(spy):
    boxes = [
        (0, 5, 5, 25, 30),
        (1, 80, 10, 104, 30),  # crosses the right border of the first tile
        (0, 60, 75, 90, 100),  # a corner of four tiles
        (1, 150, 120, 175, 145),
        (0, 200, 150, 230, 170),
    ]
    image, model = scene((170, 230), boxes), model_of(Bright())
    assert found(model.predict(image)) == sorted(boxes)
    del spy[:]
    assert found(model.predict(image, tile=128)) == sorted(boxes)
    assert len(spy) == 6
    assert max(max(shape[2:]) for shape in spy) == 128
    assert found(model.predict(scene((170, 230), []), tile=100)) == []
    large = [(0, 10, 8, 220, 40)]  # no tile shows it: its parts stay
    parts = found(model.predict(scene((170, 230), large), tile=128))
    assert {part[1] for part in parts} >= {10}
    assert {part[3] for part in parts} >= {220}
    with pytest.raises(UserError, match=r"^tile: expected at least 64 pixels \(tiles of this net"):
        model.predict(image, tile=50)


def test_outputs_that_are_not_finite():
    network = Points()
    network.conv.bias.data[1] = float("nan")
    with pytest.raises(UserError, match=r"^predict: expected finite outputs of the network, got"):
        model_of(network).predict(scene(*SCENES[0]))


def test_the_output_is_that_of_the_padded_image():
    model = model_of(Points())
    count = sum(rows * columns for rows, columns in level_sizes(64, 96))
    with torch.no_grad():
        assert model(torch.rand(2, 3, 50, 70)).shape == (2, 7, count)
    assert (
        repr(model) == "Model(detection, 2 classes (cat, dog), RGB images, 1,708 parameters, cpu)"
    )


def test_objects_above_a_threshold():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8, generator=generator)
    prediction = model_of(Points()).predict(image)
    threshold = prediction.scores.median().item()
    some = prediction.above(threshold)
    assert 0 < len(some.boxes) == (prediction.scores >= threshold).sum() < len(prediction.boxes)
    assert (some.scores >= threshold).all()
    none = prediction.above(1.0)
    assert none.to_json()["objects"] == none.coco_results(3) == []
    assert not torch.equal(prediction.above(0.1).draw(), prediction.draw())  # else from 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def inside(folder):
    """A detector, and the model of its file with the suppression inside."""
    model = model_of(Points())
    export(model, folder / "inside.onnx", nms="inside")
    return model, load(folder / "inside.onnx", "cpu")


@pytest.mark.parametrize("size", [(270, 390), (97, 130), (64, 64), (20, 300), (129, 40)])
def test_suppression_inside_equals_ours(inside, size):
    model, exported = inside
    generator = torch.Generator().manual_seed(sum(size))
    images = torch.randn(3, 3, *size, generator=generator)
    images[2] = -9.0  # equal scores
    with torch.no_grad():
        padded = tuple(-(-side // 32) * 32 for side in size)
        expected = detections(model(images), padded, torch.tensor([size] * 3))
    got = exported.network.detect(images)
    assert (expected.scores[:2] >= 0).sum() > 20
    assert torch.equal(got.labels[:2], expected.labels[:2])
    assert torch.allclose(got.boxes[:2], expected.boxes[:2], atol=1e-3)
    assert torch.allclose(got.scores[:2], expected.scores[:2], atol=1e-5)
    assert torch.equal(got.scores < 0, got.labels < 0)
    ((shape, share),) = compare(model, exported, [images[:2]])
    assert (shape, share) == ((2, 3, *size), 1.0)
    assert agrees(exported, 0.99)
    assert not agrees(exported, 0.9)


def test_a_file_with_the_suppression_inside_predicts(inside):
    model, exported = inside
    image = torch.randint(0, 256, (3, 75, 99), dtype=torch.uint8)
    for options in ({}, {"resize": 50}, {"tile": 64}):
        expected, got = (each.predict(image, **options) for each in (model, exported))
        assert torch.equal(expected.labels, got.labels)
        assert torch.allclose(expected.boxes, got.boxes, atol=1e-3)
    with pytest.raises(UserError) as error:
        exported(torch.zeros(1, 3, 64, 64))
    assert str(error.value) == (
        f"{exported.network.path}: expected a file that gives the output of its network, got one "
        "that gives boxes; export it with --nms outside"
    )


def test_equal_objects_count_both_ways(inside, monkeypatch):
    model, exported = inside
    images = torch.randn(1, 3, 64, 64)
    own = exported.network.detect(images)
    for wrong in (
        own._replace(boxes=own.boxes + 9),
        own._replace(labels=1 - own.labels),
        own._replace(scores=torch.full_like(own.scores, -1)),
    ):
        monkeypatch.setattr(exported.network, "detect", lambda _, wrong=wrong: Boxes(*wrong))
        ((_, share),) = compare(model, exported, [images])
        assert share < 0.5


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_files_that_give_the_output(folder, format):
    model, path = model_of(Points()), folder / f"outside.{format}"
    export(model, path, format=format, size=(75, 99))
    exported = load(path, "cpu")
    images = torch.randn(2, 3, 75, 99)
    assert [agrees(exported, value) for _, value in compare(model, exported, [images])] == [True]
    for size in ((75, 99), (40, 70), (110, 99)):  # the network's, padded, and fitted
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        got = exported.predict(image)
        assert got.boxes.amax(0)[2] <= size[1]
        assert got.boxes.amax(0)[3] <= size[0]
        if size == (75, 99):
            assert torch.allclose(got.boxes, model.predict(image).boxes, atol=1e-3)
    box = (0, 12, 16, 60, 80)
    fixed = model_of(Bright(), export={"size": [75, 99], "least": 1})
    (got,) = found(fixed.predict(scene((110, 99), [box])))
    assert torch.tensor(got).sub(torch.tensor(box)).abs().max() <= 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"format": "pt2", "nms": "inside"},
            "nms: expected outside for --format pt2, as torch alone has no suppression, got inside;"
            " leave it out, or use --format onnx",
        ),
        (
            {"format": "onnx", "argmax": True},
            "argmax: expected a network of 1 to 256 classes of pixels, got 2 of a network for "
            "detection; leave it out",
        ),
    ],
)
def test_what_cannot_be_exported(options, text):
    with pytest.raises(UserError) as error:
        check_exportable(model_of(Points()), **options)
    assert str(error.value) == text


def test_suppression_is_for_detectors():
    description = {"classes": ["a", "b"], "genotype": None}
    model = Model(nn.Conv2d(3, 2, 1), processor_of(description), description)
    with pytest.raises(UserError) as error:
        check_exportable(model, "onnx", nms="inside")
    assert str(error.value) == (
        "nms: expected inside for a network for detection only, got one for segmentation; "
        "leave it out"
    )
