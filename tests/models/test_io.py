"""Model files of every family of networks: written, read again, of earlier versions, damaged."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nasfast.encoders import MobileNetV2
from nasfast.models.build import (
    DETECTOR,
    FAMILIES,
    RESTORER,
    SEGMENTER,
    TEMPLATES,
    build_detector,
    build_restorer,
    build_segmenter,
    build_templates,
)
from nasfast.models.decoders import DecoderConfig, EncoderDecoder
from nasfast.models.detector import DetectorConfig
from nasfast.models.io import load_model, load_teacher, model_method, save_model
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.models.templates import TemplateConfig
from nasfast.models.zoo import ZOO
from nasfast.spaces import FastNASSpace, IRNASGenotype
from nasfast.spaces.nas_fcos import FOUND
from nasfast.training.cost import count_parameters
from nasfast.utils.errors import UserError
from nasfast.utils.seals import METADATA as CHECKSUM

VERSION1 = Path(__file__).parents[1] / "fixtures" / "version1"
NOTE = {"classes": ["road", "sky"], "note": {"miou": 0.5}}
FAST_NAS = FastNASSpace().from_json(
    [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]]
)
IR_NAS = IRNASGenotype(((("conv3x3", 0), ("def3x3", 1)), (("sep3x3", 1), ("skip", 2))), (1, 2))
DECODER = DecoderConfig(8)
TEMPLATE_NAS = ZOO["template_nas_arch0"].genotype
HEADS = TemplateConfig(8, faithful=True, aux_heads=True)
WIDTHS = DetectorConfig(32, normalized=True)
SMALL = RestorerConfig(4, 6, 5, 3, residual=True)

NETWORKS = {
    SEGMENTER: lambda: build_segmenter(MobileNetV2(0.1), FAST_NAS, 2, DECODER),
    TEMPLATES: lambda: build_templates(MobileNetV2(0.1, rows=3), TEMPLATE_NAS, 2, HEADS),
    RESTORER: lambda: build_restorer(IR_NAS, SMALL, channels=3, scale=2),
    DETECTOR: lambda: build_detector(MobileNetV2(0.1), FOUND, 7, WIDTHS),
}
DESCRIPTIONS = {
    SEGMENTER: {
        "genotype": FAST_NAS.to_json(),
        "decoder": dataclasses.asdict(DECODER),
        "outputs": 2,
        "encoder": {"name": "mobilenet_v2", "width": 0.1},
    },
    TEMPLATES: {
        "genotype": TEMPLATE_NAS.to_json(),
        "decoder": dataclasses.asdict(HEADS),
        "outputs": 2,
        "encoder": {"name": "mobilenet_v2", "width": 0.1},
    },
    RESTORER: {
        "genotype": IR_NAS.to_json(),
        "restorer": dataclasses.asdict(SMALL),
        "channels": 3,
        "scale": 2,
    },
    DETECTOR: {
        "genotype": FOUND.to_json(),
        "decoder": dataclasses.asdict(WIDTHS),
        "outputs": 7,
        "encoder": {"name": "mobilenet_v2", "width": 0.1},
    },
}


@pytest.fixture(params=list(NETWORKS))
def key(request):
    """A family of networks."""
    return request.param


@pytest.fixture
def saved(key, tmp_path):
    """A file and its network, with channels-last weights."""
    model = NETWORKS[key]()
    model(torch.rand(2, 3, 64, 64))  # running statistics other than 0 and 1
    model = model.to(memory_format=torch.channels_last).eval()
    path = tmp_path / "model.safetensors"
    save_model(path, model, NOTE)
    return path, model


def output(model, images):
    """Of a network in evaluation mode."""
    with torch.no_grad():
        found = model(images)
    return found if isinstance(found, torch.Tensor) else found[0]


def same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(
        map(torch.equal, state.values(), expected.values())
    )


def rewrite(path, change):
    """Save a file again after `change` of its tensors and metadata, by family."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        texts = dict(file.metadata())
    texts.pop(CHECKSUM, None)  # someone knows what they do
    metadata = {name: json.loads(text) for name, text in texts.items()}
    change(tensors, metadata)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    save_file(tensors, path, texts)


def test_every_family_is_tested():
    assert NETWORKS.keys() == DESCRIPTIONS.keys() == FAMILIES.keys()


def test_round_trip_is_bit_exact(key, saved):
    path, model = saved
    again, description = load_model(path)
    assert type(again) is type(model)
    assert not again.training
    assert description == {"version": 2, **NOTE, **DESCRIPTIONS[key]}
    assert model_method(path) == (key, None)
    assert same_state(again, model)
    images = torch.rand(1, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    again = again.to(memory_format=torch.channels_last)
    assert torch.equal(output(model, images), output(again, images))
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "network"), [("segmentation", EncoderDecoder), ("restoration", Restorer)]
)
def test_files_of_version_1(name, network):
    folder = VERSION1 / f"{name}_training"
    metrics = json.loads((folder / "metrics.json").read_text())
    model, description = load_model(folder / "model.safetensors", network)
    assert "version" not in description
    assert description["genotype"] == json.loads((folder / "genotype.json").read_text())
    assert count_parameters(model) == metrics["params"]
    channels = 1 if name == "restoration" else 3
    assert output(model, torch.rand(1, channels, 64, 64)).isfinite().all()


def test_a_newer_version_is_read_with_a_warning(key, saved):
    path, model = saved
    (config,) = FAMILIES[key].configs

    def grow(tensors, metadata):
        metadata[key][config]["dropout"] = 0.0
        metadata[key] |= {"version": 3, "licence": "MIT"}

    rewrite(path, grow)
    message = (
        f"{path}: a newer nasfast wrote it (version 3 of the description; this one reads 2); "
        f"ignored: {config}.dropout"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        again, description = load_model(path)
    assert description["licence"] == "MIT"
    assert same_state(again, model)


def drop_tensor(tensors, metadata):
    tensors.pop(sorted(tensors)[0])


def reshape_tensor(tensors, metadata):
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 4)
    tensors[name] = tensors[name][..., :0]


def change(name, value):
    def change(tensors, metadata):
        (key,) = metadata
        metadata[key][name] = value

    return change


def inner(outer, name, value):
    def change(tensors, metadata):
        (key,) = metadata
        metadata[key][outer][name] = value

    return change


def fill(value):
    def change(tensors, metadata):
        name = next(name for name, tensor in tensors.items() if tensor.dim() == 4)
        tensors[name] = torch.full_like(tensors[name], value, dtype=type(value))

    return change


def damage(text):
    return lambda tensors, metadata: metadata.update(dict.fromkeys(metadata, text))


most = "and at most 10"
DAMAGES = {
    SEGMENTER: [
        (change("decoder", {"dropout": 0.0}), "decoder: unknown setting 'dropout'; expected some"),
        (change("encoder", {"name": "vgg"}), "encoder: expected mobilenet_v2 or resnet, got 'vgg'"),
        (change("encoder", None), "'NoneType' object is not subscriptable"),
        (change("outputs", -1), "Trying to create tensor with negative dimension"),
        (change("outputs", 10**12), "of its weights 8 key(s) of another shape: "),
        (inner("decoder", "agg_size", 16_000), "of its weights "),
        (inner("decoder", "sep_repeats", 10**9), "decoder: DecoderConfig.sep_repeats: expected "),
        *(
            (
                inner("encoder", "width", width),
                f"mobilenet_v2: expected a width above 0 {most}, got",
            )
            for width in (-1, math.nan, math.inf, 1e300)
        ),
        (inner("encoder", "width", "0.1"), "width: expected a number, got '0.1'"),
        (inner("encoder", "width", 0.35), "of its weights "),
    ],
    TEMPLATES: [
        (change("encoder", {"name": "vgg"}), "encoder: expected mobilenet_v2 or resnet, got 'vgg'"),
        (inner("decoder", "sep_repeats", 2), "of its weights "),
        (change("genotype", FAST_NAS.to_json()), 'genotype: expected the keys "space", "templates'),
    ],
    RESTORER: [
        (
            change("restorer", {"width": 0}),
            "restorer: RestorerConfig.width: expected a value from 1 to 16,384, got 0",
        ),
        (inner("restorer", "width", math.nan), "restorer, width: expected an integer, got nan"),
        (inner("restorer", "head", 10**15), ""),
        (change("channels", 10**9), "of its weights "),
        (change("scale", -2), "scale: expected an integer from 1, got -2"),
    ],
    DETECTOR: [
        (change("outputs", 5), "outputs: expected an integer above 5, got 5"),
        (change("encoder", {"name": "resnet"}), "it lacks '"),
        (inner("decoder", "width", 33), "decoder: width: expected a multiple of 32"),
        (inner("decoder", "cat", "full"), "of its weights "),
    ],
}
for damages in DAMAGES.values():
    damages += [
        (damage("{"), "Expecting property name enclosed in double quotes"),
        (damage("[]"), "its description is no JSON object"),
        (damage('{"version": 2}'), "it lacks '"),
        (damage("[" * 100_000), "maximum recursion depth exceeded"),
        (fill(math.nan), "of its weights 1 key(s) not finite: "),
        (fill(1), "of its weights 1 key(s) of another type: "),
        (change("version", "two"), "'>' not supported between"),
        (change("genotype", {"space": "other"}), "genotype: expected "),
        (drop_tensor, "of its weights 1 key(s) missing: "),
        (reshape_tensor, "of its weights 1 key(s) of another shape: "),
    ]


def test_damaged_networks(key, saved):
    path, _ = saved
    whole = path.read_bytes()
    for damage, problem in DAMAGES[key]:
        path.write_bytes(whole)
        rewrite(path, damage)
        message = (
            f"{path}: expected a network as nasfast train wrote it, got a damaged file: {problem}"
        )
        with pytest.raises(UserError, match=f"^{re.escape(message)}.*; restore it from a copy$"):
            load_model(path)


@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 1.5])
def test_any_changed_value_is_read_or_refused(key, saved, value):
    path, _ = saved
    whole = path.read_bytes()
    (config,) = FAMILIES[key].configs
    for name in (*DESCRIPTIONS[key], *DESCRIPTIONS[key][config]):

        def change(tensors, metadata, name=name):
            described = metadata[key]
            (described if name in described else described[config])[name] = value

        path.write_bytes(whole)
        rewrite(path, change)
        with contextlib.suppress(UserError):
            load_model(path)


@pytest.mark.parametrize("read", [load_model, model_method])
@pytest.mark.parametrize("keep", [0, 5, 200, -50])
def test_incomplete_files(saved, keep, read):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    message = f"weights: expected a complete safetensors file, got {path} ("
    with pytest.raises(UserError, match=f"^{re.escape(message)}.*\\); restore it from a copy or"):
        read(path)


@pytest.mark.parametrize("read", [load_model, model_method])
@pytest.mark.parametrize(("metadata", "got"), [(None, "none"), ({"format": "pt"}, "'format'")])
def test_foreign_files(tmp_path, metadata, got, read):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata)
    message = (
        f"{path}: expected a model.safetensors that nasfast train wrote, with "
        "'nasfast.segmenter' or 'nasfast.templates' or 'nasfast.restorer' or "
        f"'nasfast.detector' in its metadata, got {got}; give another file"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        read(path)


def test_a_network_of_another_family():
    path = VERSION1 / "restoration_training" / "model.safetensors"
    message = "with 'nasfast.segmenter' or 'nasfast.templates' in its metadata, got 'nasfast.resto"
    with pytest.raises(UserError, match=re.escape(message)):
        load_teacher(path, ("road", "sky"))


def test_teachers(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, NETWORKS[SEGMENTER](), NOTE)
    assert not load_teacher(path, ("road", "sky")).training
    message = (
        f"teacher {path}: expected a network for sky, road, got one for road, sky; "
        "train one on this data first"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_teacher(path, ("sky", "road"))
    save_model(path, NETWORKS[SEGMENTER](), {})
    with pytest.raises(UserError, match="got one for no classes; train"):
        load_teacher(path, ("sky", "road"))
