"""Networks for keypoints in use: people by their boxes, whole images, and exported files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from nasfast.commands.predict import main
from nasfast.inference.export import agrees, check_exportable, compare, export
from nasfast.inference.model import Model, load
from nasfast.inference.people import image_key, read_boxes
from nasfast.tasks.registry import processor_of
from nasfast.utils.errors import UserError

JOINTS = ["nose", "left_wrist", "right_wrist"]
DESCRIPTION = {
    "genotype": {"space": "fast_nas"},
    "task": "keypoints",
    "classes": JOINTS,
    "size": [96, 64],
}


class Colours(nn.Module):
    """Its heatmaps are the red, green and blue of the image, in cells of 4 pixels."""

    def forward(self, x):
        return F.avg_pool2d(x - x.amin((2, 3), keepdim=True), 4), []


def model_of(**more):
    description = {**DESCRIPTION, **more}
    return Model(Colours(), processor_of(description), description)


def dots(places, size=(120, 160)):
    """uint8 ``[3, H, W]``, black, with a red, a green and a blue blob of each person."""
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    image = torch.zeros(3, *size)
    for person in places:
        for channel, (across, down) in enumerate(person):
            image[channel] += 255 * torch.exp(-((x - across) ** 2 + (y - down) ** 2) / 18)
    return image.clamp(max=255).byte()


PLACES = [
    [[30.0, 30.0], [50.0, 60.0], [20.0, 75.0]],
    [[110.0, 40.0], [130.0, 70.0], [100.0, 90.0]],
]
BOXES = [(15.0, 20.0, 60.0, 90.0), (95.0, 25.0, 140.0, 105.0)]


def test_people_by_their_boxes():
    model, image = model_of(), dots(PLACES)
    poses = model.predict(image, boxes=BOXES, batch=1)
    assert (poses.joints - torch.tensor(PLACES)).abs().max() < 0.7
    assert torch.allclose(poses.joints, model.predict(image, boxes=BOXES).joints)
    assert poses.boxes.tolist() == [list(box) for box in BOXES]
    assert poses.draw().shape == (3, 240, 320)
    found = poses.to_json()
    assert (found["size"], found["joints"]) == ([120, 160], JOINTS)
    first = found["people"][0]
    assert first["keypoints"][:2] == pytest.approx([29.5, 29.5], abs=0.7)  # of pixels from 0
    assert first["bbox"] == [15, 20, 45, 70]
    none, other = model.predict([image, image], boxes=[[], BOXES[1:]])
    assert none.joints.shape == (0, 3, 2)
    assert none.to_json()["people"] == []
    assert torch.allclose(other.joints, poses.joints[1:], atol=1e-3)


def test_crops_that_are_padded():
    poses = model_of(size=[90, 70]).predict(dots(PLACES), boxes=BOXES)
    assert (poses.joints - torch.tensor(PLACES)).abs().max() < 0.7


def test_a_whole_image_is_one_person():
    image = dots(PLACES[:1], (90, 60))
    poses = model_of().predict(image)
    assert (poses.joints - torch.tensor(PLACES[:1])).abs().max() < 0.7
    assert poses.boxes.tolist() == [[0, 0, 60, 90]]


@pytest.mark.parametrize("box", [(5, 5, 5, 20), (200, 0, 220, 50), (1, 2, 3), (0, 0, np.nan, 9)])
def test_a_box_needs_area(box):
    with pytest.raises(UserError, match="boxes: expected left, top, right and bottom of some area"):
        model_of().predict(dots(PLACES), boxes=[box])


def test_an_exported_file_finds_the_same(tmp_path):
    model = model_of()
    with pytest.raises(UserError, match="argmax: expected a network of 1 to 256 classes"):
        check_exportable(model, "pt2", argmax=True)
    export(model, tmp_path / "model.pt2", format="pt2", size=(96, 64))
    exported = load(tmp_path / "model.pt2", "cpu")
    ((shape, value),) = compare(model, exported, [torch.rand(2, 3, 96, 64)])
    assert shape == (2, 3, 96, 64)
    assert agrees(exported, value)
    image = dots(PLACES)
    expected, found = (each.predict(image, boxes=BOXES) for each in (model, exported))
    assert torch.allclose(expected.joints, found.joints, atol=1e-3)


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def entry(image, box, **more):
    left, top, right, bottom = box
    return {"image": image, "bbox": [left, top, right - left, bottom - top], **more}


def test_the_command_reads_boxes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nasfast.commands.predict.load", lambda path, device: model_of())
    for name in ("000012.png", "b.png"):
        pixels = dots(PLACES).permute(1, 2, 0).numpy()
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    boxes = write(
        tmp_path / "boxes.json",
        [
            {"image_id": 12, "category_id": 1, "bbox": [15, 20, 45, 70], "score": 0.9},
            {"image_id": 12, "category_id": 1, "bbox": [95, 25, 45, 80], "score": 0.2},
            {"image_id": 12, "category_id": 7, "bbox": [0, 0, 9, 9], "score": 0.9},
        ],
    )
    out = tmp_path / "out"
    words = ["model", str(tmp_path / "in"), "--out", str(out), "--boxes", str(boxes)]
    assert main(words) == 0
    people = json.loads((out / "000012.json").read_text())["people"]
    assert len(people) == 1
    assert people[0]["keypoints"][:2] == pytest.approx([29.5, 29.5], abs=0.7)
    assert json.loads((out / "b.json").read_text())["people"] == []
    assert (out / "000012-poses.png").is_file()
    results = json.loads((out / "coco-results.json").read_text())
    assert [(each["image_id"], each["category_id"]) for each in results] == [(12, 1)]
    assert main([*words, "--overwrite", "--threshold", "0.1"]) == 0
    assert len(json.loads((out / "coco-results.json").read_text())) == 2
    capsys.readouterr()
    for more, text in (
        (["--threshold", "0.5"], "threshold: expected --boxes FILE beside it for keypoints"),
        (
            ["--boxes", str(write(tmp_path / "other.json", [entry("c.png", BOXES[0])]))],
            "expected boxes of the 2 images, got some of c; name the images as their files are",
        ),
    ):
        assert main([*words[:4], "--overwrite", *more]) == 2
        assert text in capsys.readouterr().err.replace("\n", " ")


def test_boxes_are_for_keypoints(tmp_path, monkeypatch, capsys):
    description = {"genotype": None, "classes": ["a", "b", "c"]}
    model = Model(Colours(), processor_of(description), description)
    with pytest.raises(UserError, match="boxes: expected none for segmentation, which takes whole"):
        model.predict(dots(PLACES), boxes=BOXES)
    monkeypatch.setattr("nasfast.commands.predict.load", lambda path, device: model)
    Image.fromarray(dots(PLACES).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    words = ["model", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--boxes", "b.json"]
    assert main(words) == 2
    assert "boxes: expected none for segmentation, which takes whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({}, "expected a list of boxes, got '{}'; give objects with \"image\" and"),
        ([{"bbox": [1, 2, 3, 4]}], 'entry 0: expected "image" or "image_id", got'),
        (
            [{"image": "a", "bbox": [1, 2]}],
            r'entry 0: expected "bbox" \[left, top, width, height\]',
        ),
        ([entry("a", BOXES[0]), entry("a", (5, 5, 5, 9))], 'entry 1: expected "bbox" of some area'),
    ],
)
def test_faulty_files_of_boxes(tmp_path, entries, text):
    with pytest.raises(UserError, match=text):
        read_boxes(write(tmp_path / "boxes.json", entries), 0.3)


def test_names_of_images():
    assert [image_key(name) for name in (12, "000012", "x/000012.jpg", "a/b.png", "b.v2.png")] == [
        *["12"] * 3,
        "b",
        "b.v2",
    ]
