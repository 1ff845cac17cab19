"""Trained networks predict on what a person has: any form, any size, and say what they refuse."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nasfast.data.base import IMAGENET_MEAN, IMAGENET_STD
from nasfast.inference.inputs import size_for
from nasfast.inference.model import Model, load
from nasfast.models.build import build_restorer
from nasfast.models.restorer import RestorerConfig
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.tasks.processor import Prediction, Preprocessing, Processor, Tiling
from nasfast.tasks.registry import processor_of

TRAININGS = Path(__file__).parents[1] / "fixtures" / "version1"
SIZES = [(1, 1), (1, 2), (5, 1), (7, 9), (33, 50)]


@pytest.fixture(scope="module")
def segmenter():
    return load(TRAININGS / "segmentation_training", "cpu")


@pytest.fixture(scope="module")
def denoiser():
    return load(TRAININGS / "restoration_training" / "model.safetensors", "cpu")


def enlarger(scale):
    genotype = IRNASGenotype(nodes=((("conv3x3", 0), ("skip", 1)),), levels=(0,))
    network = build_restorer(genotype, RestorerConfig(4, 4, 4, 4, residual=True), 3, scale)
    description = {
        "task": {"task": "super-resolution", "scale": scale},
        "genotype": genotype.to_json(),
        "channels": 3,
    }
    return Model(network, processor_of(description), description)


def of_size(model, *size):
    return Model(model.network, model.processor, {**model.description, "size": size})


def image_of(height, width, channels=3):
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)


@pytest.fixture
def spy(monkeypatch):
    """Shapes that networks see."""
    seen, whole = [], Model.map

    def spied(model, images):
        seen.append(tuple(images.shape))
        return whole(model, images)

    monkeypatch.setattr(Model, "map", spied)
    return seen


def test_what_a_model_says(segmenter, denoiser):
    assert segmenter.classes[:2] == ("sky", "building")
    assert segmenter.task, denoiser.task == ("segmentation", "denoising")
    assert segmenter.preprocessing == Preprocessing(IMAGENET_MEAN, IMAGENET_STD)
    assert not segmenter.training
    assert segmenter.genotype["space"] == "fast_nas" if isinstance(segmenter.genotype, dict) else 1
    assert repr(denoiser) == "Model(denoising, grey images, 847 parameters, cpu)"
    assert repr(segmenter).startswith("Model(segmentation, 8 classes (sky, building, ")
    assert "scale 3, RGB images" in repr(enlarger(3))


@pytest.mark.parametrize("size", SIZES)
def test_the_result_has_the_size_of_the_image(segmenter, denoiser, size):
    for model in (segmenter, denoiser, enlarger(3)):
        channels = model.preprocessing.channels
        image = image_of(*size, channels)
        prediction = model.predict(image)
        with torch.no_grad():
            output = model(model.preprocessing(image[None]))[0]
        expected = model.processor.prediction(output, image)
        assert torch.equal(prediction.image, image)
        if model.classes:
            assert prediction.mask.shape == size
            assert torch.equal(prediction.mask, expected.mask)
            assert prediction.mask.dtype == prediction.confidence.dtype == torch.uint8
        else:
            scale = model.processor.scale
            assert prediction.restored.shape == (channels, scale * size[0], scale * size[1])
            assert torch.equal(prediction.restored, expected.restored)
        assert json.loads(json.dumps(prediction.to_json()))["size"] == list(
            prediction.draw().shape[1:]
        )


def test_every_form_of_an_image(segmenter, denoiser, tmp_path):
    pixels = image_of(20, 30)
    array = pixels.permute(1, 2, 0).numpy()
    path = tmp_path / "image.png"
    picture = Image.fromarray(array)
    picture.save(path)
    forms = [path, str(path), picture, array, pixels, picture.convert("RGBA")]
    luma = torch.from_numpy(np.array(picture.convert("L")))
    for found in segmenter.predict(forms):
        assert torch.equal(found.image, pixels)
    for found in denoiser.predict(
        [*forms, luma[None], luma.numpy(), Image.fromarray(luma.numpy())]
    ):
        assert torch.equal(found.image, luma[None])
    assert torch.equal(segmenter.predict(luma.numpy()).image, luma.expand(3, -1, -1))
    turned = picture.copy()
    turned.getexif()[274] = 6  # to be turned right by a quarter
    assert torch.equal(segmenter.predict(turned).image, pixels.rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (torch.rand(3, 8, 8), r"Tensor float32 \[3, 8, 8\]"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"Tensor uint8 \[8, 8\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"Tensor uint8 \[2, 3, 8, 8\]"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), r"Tensor uint8 \[3, 0, 8\]"),
        (np.zeros((8, 8, 4), np.uint8), r"ndarray uint8 \[8, 8, 4\]"),
        (np.zeros((8, 8), np.uint16), r"ndarray uint16 \[8, 8\]"),
        (Image.new("I;16", (8, 9)), r"a PIL image of mode I;16, 8x9"),
        (Image.new("F", (8, 9)), r"a PIL image of mode F, 8x9"),
        (None, "NoneType"),
        ({"image": 1}, "dict"),
    ],
)
def test_other_forms_are_refused(segmenter, image, got):
    text = rf"^predict: expected an image as a path, .*, or a list of them, got {got}; scale "
    with pytest.raises(ValueError, match=text):
        segmenter.predict(image)
    with pytest.raises(ValueError, match=text):
        segmenter.predict([image_of(4, 4), image])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tile": 0}, "^tile: expected at least 1 pixel, got 0"),
        ({"tile": 40}, "^tile: expected at least 288 pixels .*, got 40$"),
        ({"batch": 0}, "^batch: expected at least 1, got 0$"),
        (
            {"resize": "big"},
            "^resize: expected 'auto', 'none' or the shorter side in pixels, at least 32",
        ),
        ({"resize": 31}, "at least 32, got 31$"),
        ({"resize": True}, "at least 32, got True$"),
        (
            {"resize": 1 << 20},
            r"^resize: expected at most 268,435,456 pixels, got 1048576x1310720 ",
        ),
    ],
)
def test_settings_that_do_not_fit(segmenter, settings, text):
    with pytest.raises(ValueError, match=text):
        segmenter.predict(image_of(400, 500), **settings)


def test_a_restoration_network_never_resizes(denoiser, spy):
    with pytest.raises(
        ValueError, match=r"^resize: expected 'auto' or 'none' for denoising, .* got 64"
    ):
        denoiser.predict(image_of(8, 8, 1), resize=64)
    of_size(denoiser, 8, 8).predict(image_of(40, 30, 1))
    assert spy == [(1, 1, 40, 30)]


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ((360, 480), "auto", (360, 480)),
        ((252, 400), "auto", (252, 400)),  # 0.7 of the usual side
        ((504, 900), "auto", (504, 900)),  # 1.4
        ((250, 250), "auto", (360, 360)),
        ((3000, 4000), "auto", (360, 480)),
        ((4000, 3000), "auto", (480, 360)),
        ((360, 3000), "auto", (360, 3000)),
        ((50, 100), "auto", (240, 480)),  # the longer side is not enlarged beyond the usual one
        ((1, 5000), "auto", (1, 5000)),
        ((1, 1), "auto", (360, 360)),
        ((3000, 4000), "none", (3000, 4000)),
        ((300, 400), 600, (600, 800)),
        ((5000, 1), 32, (160000, 32)),
    ],
)
def test_sizes_for_a_network(size, mode, expected):
    assert size_for(size, (360, 480), mode) == expected
    if mode == "auto":
        assert size_for(size, None, mode) == size


def test_resized_images_have_results_of_their_own_size(segmenter, spy):
    model = of_size(segmenter, 32, 48)
    assert model.predict(image_of(100, 150)).mask.shape == (100, 150)
    assert model.predict(image_of(100, 150), resize="none").mask.shape == (100, 150)
    assert model.predict(image_of(40, 60), resize=80).mask.shape == (40, 60)
    # padded to the stride
    assert spy == [(1, 3, 32, 64), (1, 3, 128, 160), (1, 3, 96, 128)]


def test_neighbours_of_one_size_share_a_batch(segmenter, spy):
    sizes = [(20, 30)] * 5 + [(30, 20), (20, 30)]
    images = [image_of(*size) for size in sizes]
    together = segmenter.predict(images, batch=4)
    assert [shape[0] for shape in spy] == [4, 1, 1, 1]
    for image, found in zip(images, together, strict=True):
        assert (segmenter.predict(image).mask == found.mask).float().mean() > 0.99
    del spy[:]
    segmenter.predict(images[:5], tile=40)  # two have no more pixels than a tile
    assert [shape[0] for shape in spy] == [2, 2, 1]
    assert segmenter.predict([]) == []


def test_no_tile_is_larger_than_asked_for(segmenter, denoiser, spy):
    whole = denoiser.predict(image_of(90, 130, 1))
    del spy[:]
    cut = denoiser.predict(whole.image, tile=50)
    assert {shape[2:] for shape in spy} == {(50, 50)}
    assert (cut.restored.int() - whole.restored.int()).abs().max() <= 1  # rounded to 8 bits
    del spy[:]
    assert segmenter.predict(image_of(40, 700), tile=310).mask.shape == (40, 700)
    assert len(spy) > 3
    assert {shape[2:] for shape in spy} == {(64, 288)}
    del spy[:]
    segmenter.predict(image_of(310, 20), tile=310)  # padded to 320 it would be larger
    assert {shape[2:] for shape in spy} == {(288, 32)}


def test_networks_of_one_input_size(denoiser, spy):
    """As an export with a fixed size has."""
    model = Model(
        denoiser.network,
        denoiser.processor,
        {**denoiser.description, "export": {"size": [40, 60], "least": 40}},
    )
    for size in ((40, 60), (7, 9), (100, 90)):
        image = image_of(*size, 1)
        fixed, free = model.predict(image).restored, denoiser.predict(image).restored
        assert fixed.shape == free.shape
        if size != (7, 9):  # its border is padded by its last pixels
            assert (fixed.int() - free.int()).abs().max() <= 1
    assert {shape[2:] for shape in spy if shape[2:] not in ((7, 9), (100, 90))} == {(40, 60)}
    with pytest.raises(
        ValueError, match=r"^tile: expected none, as this network takes inputs of 40x60 "
    ):
        model.predict(image, tile=64)


def test_results_can_be_changed_and_training_mode_does_not_last(segmenter):
    segmenter.train()
    prediction = segmenter.predict(image_of(9, 9))
    prediction.mask[:4] = 3
    assert not segmenter.training


def test_autocast_is_a_choice(segmenter, spy, monkeypatch):
    monkeypatch.setattr("nasfast.training.loop.autocast_dtype", lambda device: torch.bfloat16)
    dtypes = []
    hook = segmenter.network.decoder.conv_clf.register_forward_hook(
        lambda module, given, output: dtypes.append(output.dtype)
    )
    for autocast in (False, True):
        segmenter.predict(image_of(32, 32), autocast=autocast)
    hook.remove()
    assert dtypes == [torch.float32, torch.bfloat16]


def test_a_network_that_gives_nan_is_refused():
    model = enlarger(2)
    nn.init.constant_(model.network.last.bias, float("nan"))
    with pytest.raises(
        ValueError, match=r"^predict: expected finite outputs of the network, got NaN"
    ):
        model.predict(image_of(8, 8))


def test_a_mask_is_saved_with_its_palette(segmenter, tmp_path):
    prediction = segmenter.predict(image_of(30, 40))
    paths = prediction.save(tmp_path, "a.b")
    assert [path.name for path in paths] == ["a.b.png", "a.b-overlay.png"]
    mask, overlay = map(Image.open, paths)
    assert mask.mode == "P"
    assert np.array_equal(np.array(mask), prediction.mask.numpy())
    colour = prediction.colors[prediction.mask[3, 5]]
    assert np.array(mask.convert("RGB"))[3, 5].tolist() == list(colour)
    mixed = 0.6 * torch.tensor(colour) + 0.4 * prediction.image[:, 3, 5]
    assert np.array(overlay)[3, 5].tolist() == mixed.round().int().tolist()
    assert sum(prediction.shares.values()) == pytest.approx(1)
    assert 1 / 8 < prediction.to_json()["confidence"] <= 1


@pytest.mark.parametrize("place", ["run", "training", "file", "~"])
def test_where_a_model_is_loaded_from(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for i, name in enumerate(("restoration_training", "segmentation_training")):
        folder = tmp_path / "run" / f"train-{i + 1}"
        folder.mkdir(parents=True)
        data = (TRAININGS / name / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data)
    paths = {
        "run": tmp_path / "run",
        "training": tmp_path / "run" / "train-2",
        "file": str(tmp_path / "run" / "train-2" / "model.safetensors"),
        "~": "~/run",
    }
    model = load(paths[place], "cpu")
    assert model.task == "segmentation"
    assert model.path == tmp_path / "run" / "train-2" / "model.safetensors"


@pytest.mark.parametrize(
    ("given", "there", "text"),
    [
        ("run", [], "got no such file or folder; give the path that nasfast train printed$"),
        ("run", ["run/records.jsonl"], r"with one, got none; `nasfast train .*run` makes it$"),
        (
            "run",
            ["run/train-1/checkpoint.pt"],
            r"expected a finished training, got .*train-1, which was stopped; `nasfast train --res",
        ),
        ("x.safetensors", ["x.safetensors"], "expected a complete safetensors file, got .*x.safe"),
    ],
)
def test_what_cannot_be_loaded(given, there, text, tmp_path):
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=text):
        load(tmp_path / given, "cpu")


@dataclass(frozen=True)
class Depth(Prediction):
    image: torch.Tensor
    depth: torch.Tensor  # float32 [H, W], metres

    def draw(self):
        return (self.depth / self.depth.amax() * 255).byte().expand(3, -1, -1)

    def to_json(self):
        return {"size": list(self.depth.shape), "metres": [*map(float, self.depth.aminmax())]}

    def save(self, folder, stem):
        return []


class DepthProcessor(Processor):
    task = "depth"
    preprocessing = Preprocessing((0.0,) * 3, (1.0,) * 3)
    tiling = Tiling(32, halo=4, blend=4, multiple=4)

    def reduce(self, output):
        return output.exp()

    def result(self, reduced, image):
        return Depth(image, reduced[0])


class Boxes(Depth):
    pass


class BoxProcessor(DepthProcessor):
    task = "detection"
    full_size = False

    def reduce(self, output):
        return output

    def result(self, reduced, image):
        """The centre of what is bright, in pixels of the image."""
        bright, centre = reduced[0] / reduced[0].sum(), []
        for axis, side in enumerate(image.shape[-2:]):
            shares = bright.sum(1 - axis)
            centre.append((shares * (torch.arange(len(shares)) + 0.5)).sum() * side / len(shares))
        return Boxes(image, torch.stack(centre))


@pytest.mark.parametrize("size", [(32, 32), (28, 90), (200, 64)])
def test_coming_tasks_need_a_processor_alone(size):
    """A depth map and boxes, of images that are tiled and resized."""
    network = nn.AvgPool2d(4)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    spot = size[0] * 2 // 3, size[1] // 4
    image[:, spot[0] - 8 : spot[0] + 8, spot[1] - 8 : spot[1] + 8] = 255
    for usual in ([32, 32], None):
        description = {"genotype": None, "size": usual}
        depth = Model(network, DepthProcessor(), description).predict(image).depth
        assert depth.shape == size
        assert depth.dtype == torch.float32
        assert depth.min() == 1
        assert depth[spot] > 2
        centre = Model(network, BoxProcessor(), description).predict(image).depth
        assert (centre - torch.tensor(spot)).abs().max() < 1
