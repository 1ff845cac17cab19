import json
from dataclasses import asdict

import pytest
import torch

import nasfast
from nasfast.encoders import MobileNetV2
from nasfast.methods.registry import read_genotype
from nasfast.models.build import build_restorer
from nasfast.models.decoders import DecoderConfig
from nasfast.models.detector import DetectorConfig
from nasfast.models.io import load_model, save_model
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.models.zoo import ZOO, create_model, list_models
from nasfast.spaces import IRNASGenotype, IRNASSpace
from nasfast.training.cost import count_macs, count_parameters
from nasfast.utils.errors import UserError


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs", "fewer"),
    [
        ("fast_nas_arch0", 2_629_909, 4.2082, 1_088),
        ("fast_nas_arch1", 2_810_133, 2.8545, 1_088),
        ("fast_nas_arch2", 2_853_141, 3.3727, 1_088),
        ("template_nas_arch0", 280_147, 13.7184, 1_088),
        ("template_nas_arch1", 268_235, 18.7162, 1_088),
        ("irnas-denoise", 661_693, 92.2379, 57_600),
        ("irnas-derain", 591_523, 90.4172, 0),
    ],
)
def test_published_counts(name, parameters, gmacs, fewer):
    entry = ZOO[name]
    published = create_model(name, faithful=True)
    assert count_parameters(published) == parameters
    macs = count_macs(published, entry.size, channels=entry.channels)
    assert macs == pytest.approx(gmacs * 1e9, abs=5e4)
    assert count_parameters(create_model(name)) == parameters - fewer


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("template_nas_arch0", 275_531, 1.0818), ("template_nas_arch1", 263_619, 1.4932)],
)
def test_published_counts_on_camvid(name, parameters, gmacs):
    network = create_model(name, num_classes=11, faithful=True)
    assert count_parameters(network) == parameters
    assert count_macs(network, (360, 480)) == pytest.approx(gmacs * 1e9, abs=5e4)
    assert count_parameters(network.encoder) == 56_576


@pytest.mark.parametrize(
    ("arch", "parameters", "rmse", "delta"),
    [(0, 2_618_369, 0.523, 0.830), (1, 2_798_593, 0.526, 0.832), (2, 2_841_601, 0.525, 0.820)],
)
def test_published_counts_for_depth(arch, parameters, rmse, delta):
    name = f"fast_nas_arch{arch}"
    assert count_parameters(create_model(name, num_classes=1, faithful=True)) == parameters
    figures = {figure.measure: figure.published for figure in nasfast.model_info(name).figures}
    assert figures["depth, NYU Depth v2: RMSE, m"] == rmse
    assert figures["depth, NYU Depth v2: delta < 1.25"] == delta


@pytest.mark.parametrize(
    ("arch", "parameters", "pckh", "ap"),
    [(0, 2_618_369, 0.865, 0.658), (1, 2_798_593, 0.870, 0.659), (2, 2_841_601, 0.871, 0.659)],
)
def test_published_counts_for_keypoints(arch, parameters, pckh, ap):
    """As for depth, and 3 x 3 x 64 weights and a bias of the classifier for each other joint."""
    name = f"fast_nas_arch{arch}"
    network = create_model(name, num_classes=17, faithful=True)
    assert count_parameters(network) == parameters + 16 * 577
    figures = {figure.measure: figure.published for figure in nasfast.model_info(name).figures}
    assert figures["keypoints, MPII: PCKh@0.5"] == pckh
    assert figures["keypoints, COCO: AP"] == ap


@pytest.mark.parametrize(("name", "layers", "nodes"), [("denoise", 4, 5), ("derain", 3, 4)])
def test_restorers_of_the_zoo(name, layers, nodes):
    entry = ZOO[f"irnas-{name}"]
    IRNASSpace(layers, nodes).encode(entry.genotype)
    assert IRNASGenotype.from_json(entry.genotype.to_json()) == entry.genotype
    net = build_restorer(entry.genotype, entry.network, entry.channels).eval()
    images = torch.rand(1, entry.channels, 8, 8)
    with torch.no_grad():
        assert net(images).shape == images.shape


def test_names_match_a_pattern():
    assert list_models() == list(ZOO)
    assert list_models("*denoise*") == ["irnas-denoise"]
    assert list_models("arch") == []
    assert list_models("*fcos_mnv2_128") == ["fpn_fcos_mnv2_128", "nas_fcos_mnv2_128"]


def test_a_segmentation_network_is_new_and_in_training_mode():
    model = create_model("fast_nas_arch1", num_classes=11)
    assert model.training
    output, aux = model(torch.rand(2, 3, 64, 64))
    assert output.shape == (2, 11, 8, 8)
    assert [x.shape[1] for x in aux] == [11, 11, 11]


GENOTYPE = ZOO["fast_nas_arch1"].genotype
CELL = ZOO["irnas-derain"].genotype


@pytest.fixture
def small(tmp_path):
    """A model file of three classes, as a training writes it."""
    torch.manual_seed(1)
    parts = {"genotype": GENOTYPE.to_json(), "outputs": 3}
    model = create_model(parts | {"encoder": ENCODER, "decoder": SMALL}).eval()
    save_model(tmp_path / "model.safetensors", model, {"classes": ["a", "b", "c"]})
    return tmp_path / "model.safetensors", model


ENCODER = {"name": "mobilenet_v2", "width": 0.35}
SMALL = {"agg_size": 8, "sep_repeats": 1, "aux_cell": False}


def test_every_form_of_an_architecture_gives_its_network(tmp_path):
    published = json.loads(
        json.dumps([[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]])
    )
    (tmp_path / "best.json").write_text(json.dumps({"index": 3, "genotype": GENOTYPE.to_json()}))
    (tmp_path / "genotype.json").write_text(json.dumps(GENOTYPE.to_json()))
    named = create_model("fast_nas_arch1")
    for source in (
        published,
        GENOTYPE,
        GENOTYPE.to_json(),
        tmp_path,
        str(tmp_path / "genotype.json"),
        tmp_path / "best.json",
    ):
        model = create_model(source)
        assert model.decoder.genotype == GENOTYPE
        assert count_parameters(model) == count_parameters(named)
    genotype = ZOO["template_nas_arch1"].genotype
    published = [[*map(list, genotype.templates)], [*map(list, genotype.layers)]]
    for source in (published, genotype, genotype.to_json()):
        model = create_model(source, 5)
        assert (model.decoder.genotype, model.decoder.conv_clf.out_channels) == (genotype, 5)
    metrics = {"genotype": CELL.to_json(), "task": {"task": "super-resolution", "scale": 3}}
    restorer = create_model(metrics, channels=3)
    assert isinstance(restorer, Restorer)
    assert (restorer.genotype, restorer.scale, restorer.channels) == (CELL, 3, 3)
    assert restorer.config == RestorerConfig()


def test_detectors_from_every_form(tmp_path):
    """As the authors' files write it, too: each block in a list of its own."""
    entry = ZOO["nas_fcos_mnv2_128"]
    found = entry.genotype
    published = [[list(block)] for block in found.fpn] + [[0], list(found.head.ops)]
    for source in (published, found, found.to_json(), {"genotype": found.to_json()}):
        with torch.device("meta"):
            model = create_model(source)
        assert (model.decoder.genotype, model.decoder.outputs) == (found, 85)
        assert model.decoder.config == DetectorConfig()
    with torch.device("meta"):
        model = create_model("nas_fcos_r50_128_256", num_classes=3, faithful=True)
    assert model.decoder.config == DetectorConfig(128, 256, faithful=True)
    assert model.encoder.describe()["size"] == "resnet50"
    small = {"genotype": found.to_json(), "encoder": ENCODER, "decoder": asdict(DetectorConfig(32))}
    path, trained = tmp_path / "model.safetensors", create_model(small, num_classes=2)
    save_model(path, trained, {})
    assert create_model(path, pretrained=path).decoder.outputs == 7
    with pytest.warns(UserWarning, match="its classifier has 2 classes, this network 4"):
        model = create_model(path, num_classes=4, pretrained=path)
    old = trained.state_dict()
    new = {name for name, own in model.state_dict().items() if not own.equal(old[name])}
    assert new == {f"decoder.head.classify.{part}" for part in ("weight", "bias")}


def test_a_model_file_gives_its_own_sizes_and_its_weights_when_asked(small):
    path, trained = small
    images = torch.rand(1, 3, 32, 32)
    new = create_model(path).eval()
    assert new.decoder.config == DecoderConfig(**SMALL)
    assert not torch.equal(new(images)[0], trained(images)[0])
    assert read_genotype(path) == GENOTYPE.to_json()
    for source in (path, path.parent):
        again = create_model(source, pretrained=str(path)).eval()
        assert torch.equal(again(images)[0], trained(images)[0])


def test_the_published_first_block_is_kept_in_a_file(tmp_path):
    parts = {"genotype": GENOTYPE.to_json(), "encoder": ENCODER, "decoder": SMALL}
    model = create_model(parts, faithful=True)
    save_model(tmp_path / "model.safetensors", model, {})
    again, description = load_model(tmp_path / "model.safetensors")
    assert description["encoder"] == ENCODER | {"expand_first": True}
    assert again.state_dict().keys() == model.state_dict().keys()
    more = set(model.state_dict()) - set(create_model(parts).state_dict())
    assert {".".join(name.split(".")[:4]) for name in more} == {"encoder.features.1.conv"}


def test_another_number_of_classes_gets_a_new_classifier_only(small):
    path, trained = small
    with pytest.warns(UserWarning, match="classifier is new") as caught:
        model = create_model(path, num_classes=5, pretrained=path)
    assert [str(warning.message) for warning in caught] == [
        f"pretrained {path}: its classifier has 3 classes, this network 5: the classifier is new "
        "and has to be trained"
    ]
    own = model.state_dict()
    changed = {name for name, old in trained.state_dict().items() if own[name].shape != old.shape}
    heads = ("conv_clf", "aux_heads.0.0", "aux_heads.1.0", "aux_heads.2.0")
    assert changed == {f"decoder.{head}.{part}" for head in heads for part in ("weight", "bias")}
    assert all(torch.equal(own[n], t) for n, t in trained.state_dict().items() if n not in changed)


def test_an_encoder_starts_from_its_weights_alone(tmp_path):
    encoder = MobileNetV2()
    path = tmp_path / "mobilenet_v2.pth"
    torch.save(encoder.state_dict(), path)
    for name in ("fast_nas_arch0", "template_nas_arch0"):
        for faithful in (False, True):
            model = create_model(name, pretrained=path, faithful=faithful)
            assert torch.equal(
                model.encoder.features[5].conv[0][0].weight, encoder.features[5].conv[0][0].weight
            )
    torch.save(encoder.features[:1].state_dict(prefix="features."), path)
    with pytest.raises(UserError, match="at width 1 with a 1x1 convolution in its first"):
        create_model("fast_nas_arch0", pretrained=path, faithful=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"source": "fast_nas_arc1"},
            f"architecture: expected a name of the zoo ({', '.join(ZOO)}), a run, or a file with a "
            "genotype, got fast_nas_arc1; did you mean fast_nas_arch1?",
        ),
        (
            {"source": {"space": "depth"}},
            'create_model: expected a genotype whose "space" is one of fast_nas, template_nas, '
            "ir_nas, nas_fcos, got 'depth'; give a genotype.json or best.json that nasfast wrote",
        ),
        ({"source": 3}, "create_model: expected a name, a path or a genotype, got int"),
        (
            {"source": "irnas-denoise", "num_classes": 3},
            "num_classes: expected none for a restoration network, got 3; give channels=1 or "
            "channels=3",
        ),
        (
            {"source": "fast_nas_arch0", "channels": 1},
            "channels: expected 3 for a segmentation network, got 1; leave it out",
        ),
        (
            {"source": "nas_fcos_mnv2_128", "channels": 1},
            "channels: expected 3 for a detection network, got 1; leave it out",
        ),
        (
            {"source": "irnas-denoise", "channels": 2},
            "channels: expected 1, grey, or 3, colour, got 2",
        ),
        (
            {"source": "fast_nas_arch0", "num_classes": 0},
            "num_classes: expected at least 1, got 0",
        ),
        (
            {"source": "irnas-denoise", "pretrained": True},
            "pretrained: expected the path of a model.safetensors, got True; there are no weights "
            "to download: nasfast train makes them",
        ),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(UserError) as error:
        create_model(**arguments)
    assert str(error.value) == text


def test_weights_of_another_network_are_refused(small):
    path, _ = small
    with pytest.raises(UserError) as error:
        create_model("fast_nas_arch2", pretrained=path)
    assert str(error.value).startswith(
        f"pretrained {path}: expected the weights of this network, got "
    )
    assert str(error.value).endswith(
        f"; create_model({str(path)!r}, pretrained={str(path)!r}) builds the network of the file"
    )


def test_the_zoo_is_part_of_the_namespace():
    assert nasfast.create_model is create_model
    assert nasfast.list_models is list_models
