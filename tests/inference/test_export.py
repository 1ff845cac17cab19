"""Exported networks compute what PyTorch computes, and say what they are."""

import dataclasses
import json
import sys
import zipfile

import pytest
import torch
from torch import nn

import nasfast.inference.exported
import nasfast.inference.model
from nasfast.data import SyntheticStreets, ValTransform, split_for_search
from nasfast.encoders import FeatureInfo
from nasfast.inference.export import agrees, check_batches, compare, export, quantize
from nasfast.inference.model import Model, load
from nasfast.methods.segmentation.evaluate import scores_of
from nasfast.models.decoders import Decoder, DecoderConfig, EncoderDecoder
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.models.templates import TemplateConfig, TemplateDecoder, TemplateNetwork
from nasfast.spaces.fast_nas import Cell, FastNASGenotype
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.spaces.template_nas import Layer, Template, TemplateNASGenotype
from nasfast.tasks.registry import processor_of
from nasfast.tasks.restoration import task_from_json
from nasfast.tasks.segmentation import Segmentation, SegmentationTask
from nasfast.training.loop import Runtime, in_order
from nasfast.utils.errors import UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
SIZES = ((49, 70), (36, 53), (64, 40))


class Taps(nn.Module):
    """An encoder of two convolutions, the first of a stride."""

    def __init__(self, stride=2):
        super().__init__()
        steps = ((3, stride), (8, 2))
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 3, step, 1) for c, step in steps)

    def forward(self, x):
        first = self.convs[0](x)
        return [first, self.convs[1](first)]


def segmenter():
    """Global pooling, dilations, and maps of two sizes that are resized."""
    genotype = FastNASGenotype(Cell(4, ((0, 1, 7, 5),)), ((0, 1),), num_taps=2)
    taps = [FeatureInfo("", 8, 2), FeatureInfo("", 8, 4)]
    decoder = Decoder(genotype, taps, 3, DecoderConfig(4, aux_cell=False))
    description = {"classes": ["sky", "road", "[post]"], "genotype": genotype.to_json()}
    return EncoderDecoder(Taps(), decoder), description


def templates():
    """Maps of stride 64, whose taps are padded and whose output is cut; pooling; both sums."""
    layers = Layer(1, 0, 0, 0, 1), Layer(2, 0, 1, 1, 0)
    genotype = TemplateNASGenotype((Template(0, 3, 0), Template(4, 2, 1)), layers)
    taps = [FeatureInfo("", 8, 16), FeatureInfo("", 8, 32)]
    decoder = TemplateDecoder(genotype, taps, 3, TemplateConfig(4))
    assert decoder.padded
    description = {"classes": ["sky", "road", "[post]"], "genotype": genotype.to_json()}
    return TemplateNetwork(Taps(16), decoder), description


def restorer(scale, reduction=1):
    """With a deformable convolution; in super-resolution also a shuffle and an enlargement."""
    nodes = ((("def3x3", 0), ("sep3x3", 1)),)
    genotype = IRNASGenotype(nodes, (0,))
    config = RestorerConfig(4, 4, 4, 4, residual=True, atrous=False, reduction=reduction)
    name = "denoising" if scale == 1 else "super-resolution"
    task = {"task": name} | ({"scale": scale} if scale > 1 else {})
    description = {
        "task": task_from_json(task).describe(),
        "channels": 3,
        "genotype": genotype.to_json(),
        "restorer": dataclasses.asdict(config),
    }
    return Restorer(genotype, config, 3, scale), description


def model_of(made):
    network, description = made
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return Model(network, processor_of(description), description)


def written(model, path, **options):
    export(model, path, **options)
    return model, path, load(path, "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def segmentation(folder):
    """A network, the path of its ONNX file, and that file as a model."""
    return written(model_of(segmenter()), folder / "segmenter.onnx")


@pytest.fixture(scope="module")
def upscaler(folder):
    return written(model_of(restorer(2)), folder / "restorer.onnx")


@pytest.fixture(scope="module")
def blocks(folder):
    """Of pixels, which the network reads as one."""
    return written(model_of(restorer(1, reduction=4)), folder / "blocks.onnx")


@pytest.fixture(scope="module")
def program(folder):
    """The same for an archive of torch.export."""
    return written(model_of(restorer(1)), folder / "restorer.pt2", format="pt2")


@pytest.fixture(scope="module")
def template_graph(folder):
    return written(model_of(templates()), folder / "templates.onnx")


@pytest.mark.parametrize(
    "name", ["segmentation", "upscaler", "blocks", "program", "template_graph"]
)
def test_equals_pytorch_in_three_sizes_and_batches_1_and_3(name, request):
    model, _, exported = request.getfixturevalue(name)
    batches = [torch.randn(batch, 3, *size) for size in SIZES for batch in (1, 3)]
    for images, (shape, difference) in zip(batches, compare(model, exported, batches), strict=True):
        assert shape == images.shape
        assert difference <= 1e-4
        scale = model.processor.scale
        assert exported(images).shape[-2:] == tuple(scale * side for side in shape[-2:])
    with torch.autocast("cpu", torch.bfloat16):
        assert (exported(images) - model(images).float()).abs().max() > 1e-4
        assert exported(images).dtype == torch.float32


def test_an_archive_of_templates_equals_pytorch(folder):
    options = {"format": "pt2", "size": SIZES[0]}
    model, _, exported = written(model_of(templates()), folder / "templates.pt2", **options)
    batches = [torch.randn(batch, 3, *SIZES[0]) for batch in (1, 3)]
    assert all(difference <= 1e-4 for _, difference in compare(model, exported, batches))


@pytest.mark.parametrize(("name", "opset"), [("segmentation", 18), ("upscaler", 19)])
def test_standard_operators_of_the_lowest_opset(name, opset, request):
    written = onnx.load(request.getfixturevalue(name)[1])
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", opset)]
    assert {node.domain for node in written.graph.node} == {""}
    assert not written.functions
    dims = written.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]


def test_an_archive_needs_torch_alone(program):
    with zipfile.ZipFile(program[1]) as archive:
        (graph,) = [name for name in archive.namelist() if name.endswith("models/model.json")]
        text = archive.read(graph).decode()
    assert "torch.ops.aten.gather" in text  # of the deformable convolution
    assert "torch.ops.nasfast" not in text


def test_the_file_says_what_it_is(segmentation):
    model, path, exported = segmentation
    text = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["nasfast"]
    said = json.loads(text)["export"]
    assert (said["task"], said["classes"]) == ("segmentation", ["sky", "road", "[post]"])
    assert said["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert (said["scale"], said["argmax"], said["dtype"]) == (1, False, "float32")
    assert (exported.genotype, exported.classes) == (model.genotype, model.classes)
    assert (exported.task, exported.device) == ("segmentation", torch.device("cpu"))


def test_classes_of_one_size(folder):
    description = segmenter()[1]
    network = nn.Conv2d(3, 3, 3, stride=2, padding=1)
    made = Model(network, processor_of(description), description)
    model, path, exported = written(made, folder / "classes.onnx", size=(36, 53), argmax=True)
    images = torch.randn(2, 3, 36, 53)
    (_, equal), *_ = compare(model, exported, [images])
    assert equal > 0.999
    assert agrees(exported, equal)
    assert not agrees(exported, 0.99)
    assert exported(images).shape == (2, 3, 36, 53)
    session = onnxruntime.InferenceSession(path)
    (mask,) = session.run(None, {"images": images.numpy()})
    assert (mask.shape, mask.dtype) == ((2, 36, 53), "uint8")
    pixels = torch.randint(256, (3, 36, 53), dtype=torch.uint8)
    prediction, expected = (each.predict(pixels) for each in (exported, model))
    assert isinstance(prediction, Segmentation)
    assert (prediction.mask == expected.mask).float().mean() > 0.999
    with pytest.raises(UserError) as error:
        exported(torch.zeros(1, 3, 36, 52))
    assert str(error.value) == (
        f"{path}: expected images of 36x53 (height x width), which it was exported for, got "
        "36x52; resize them, or export it with --size dynamic"
    )


def test_scores_of_one_size_that_is_no_multiple_of_the_stride(folder):
    frames = SyntheticStreets(3, size=(36, 53), cache_in_memory=True)
    task, runtime = (
        SegmentationTask(split_for_search(frames, frames, seed=0)),
        Runtime(torch.device("cpu")),
    )
    description = {**segmenter()[1], "classes": list(frames.classes), "colors": list(frames.colors)}
    network = nn.Conv2d(3, len(frames.classes), 3, stride=2, padding=1)
    made = Model(network, processor_of(description), description)
    model, _, exported = written(made, folder / "fixed.pt2", format="pt2", size=(36, 53))
    scores = [
        scores_of(each, task, frames, ValTransform(None), runtime).miou
        for each in (model, exported)
    ]
    padded = task.batches(frames, in_order(3, 1), ValTransform(None), runtime)
    scores.append(task.score(padded, model, runtime).miou)
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert scores[0] == pytest.approx(scores[2], abs=1e-3)


def test_int8(segmentation, folder):
    model, path, _ = segmentation
    small = folder / "int8.onnx"
    images = [torch.randn(1, 3, 32, 48) for _ in range(3)]
    quantize(path, small, images)
    written = onnx.load(small)
    convolutions = [n for n in written.graph.node if n.op_type == "Conv"]
    producers = {output: n.op_type for n in written.graph.node for output in n.output}
    assert all(producers[n.input[1]] == "DequantizeLinear" for n in convolutions)
    scales = {t.name: t.dims for t in written.graph.initializer if t.name.endswith("weight_scale")}
    assert any(list(dims) == [8] for dims in scales.values())  # one a channel
    exported = load(small, "cpu")
    assert exported.network.precision == "int8"
    (_, difference), *_ = compare(model, exported, images)
    spread = model(images[0]).std()
    assert 1e-4 < difference < spread


def test_too_small_for_an_archive(program):
    exported = program[2]
    least = exported.network.export["least"]
    with pytest.raises(UserError) as error:
        exported(torch.zeros(1, 3, least - 1, 40))
    assert str(error.value) == (
        f"{program[1]}: expected images of at least {least}x{least} pixels, got {least - 1}x40; "
        "enlarge them, or export it with --format onnx"
    )


def test_an_archive_takes_its_least_side_beside_any_other(segmentation, folder):
    """Its encoder pads, which gives the archive conditions on both sides."""
    model = segmentation[0]
    _, _, exported = written(model, folder / "segmenter.pt2", format="pt2")
    least = exported.network.export["least"]
    assert least <= 33
    batches = [torch.randn(1, 3, *size) for size in ((least, least), (least, 150), (150, least))]
    assert all(difference <= 1e-4 for _, difference in compare(model, exported, batches))
    thin = torch.zeros(3, 3, 150, dtype=torch.uint8)
    assert exported.predict(thin).mask.shape == (3, 150)


def test_an_archive_with_other_bytes_than_were_written(program, tmp_path):
    data = bytearray(program[1].read_bytes())
    with zipfile.ZipFile(program[1]) as archive:
        weights = max(archive.infolist(), key=lambda entry: entry.file_size)
    middle = weights.header_offset + weights.file_size // 2
    data[middle : middle + 64] = bytes(255 - byte for byte in data[middle : middle + 64])
    path = tmp_path / "net.pt2"
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(error.value) == (
        f"{path}: expected a network as nasfast export wrote it, got a damaged file: the checksum "
        f"of {weights.filename} is another; export it again"
    )


def test_what_cannot_be_exported(folder, program):
    with pytest.raises(UserError) as error:
        export(program[0], folder / "x.onnx", argmax=True)
    assert str(error.value) == (
        "argmax: expected a network of 1 to 256 classes of pixels, got 0 of a network for "
        "denoising; leave it out"
    )
    with pytest.raises(UserError) as error:
        export(program[2], folder / "x.onnx")
    assert str(error.value) == (
        f"export: expected a model.safetensors, got {program[1]}, which is an export; give the "
        "file that it was made from"
    )
    assert not (folder / "x.onnx").exists()


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_damaged_file(suffix, tmp_path):
    path = tmp_path / f"net.{suffix}"
    path.write_bytes(b"no network")
    with pytest.raises(UserError) as error:
        load(path)
    start = f"{path}: expected a network as nasfast export wrote it, got a damaged file: "
    assert str(error.value).startswith(start)
    assert str(error.value).endswith("; export it again")


@pytest.mark.parametrize("text", ["[]", "{}", '{"export": {"argmax": false}}', "{"])
def test_other_metadata(text, segmentation, tmp_path):
    other = onnx.load(segmentation[1])
    onnx.helper.set_model_props(other, {"nasfast": text})
    path = tmp_path / "other.onnx"
    onnx.save(other, path)
    with pytest.raises(UserError) as error:
        load(path)
    start = f"{path}: expected a network as nasfast export wrote it, got a damaged file: "
    assert str(error.value).startswith(start)
    assert str(error.value).endswith("; export it again")


def test_a_file_of_another_program(segmentation, tmp_path):
    written = onnx.load(segmentation[1])
    del written.metadata_props[:]
    onnx.save(written, tmp_path / "other.onnx")
    with pytest.raises(UserError) as error:
        load(tmp_path / "other.onnx")
    assert str(error.value) == (
        f"{tmp_path / 'other.onnx'}: expected a network that nasfast export wrote, got a file "
        "without its metadata; export it from the model.safetensors"
    )


def test_without_onnxruntime(segmentation, monkeypatch, tmp_path):
    model, path, _ = segmentation
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for call, subject in (
        (lambda: load(path), path),
        (lambda: export(model, tmp_path / "net.onnx"), "export --format onnx"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).startswith(f"{subject}: expected onnxruntime to be installed, got")
        assert str(error.value).endswith("; pip install 'nasfast[export]'")


def test_without_onnxscript(segmentation, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'nasfast\[export\]'$"):
        export(segmentation[0], tmp_path / "net.onnx")


def test_a_gpu_that_onnxruntime_does_not_know(segmentation, monkeypatch):
    for module in (nasfast.inference.exported, nasfast.inference.model):
        monkeypatch.setattr(module, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert load(segmentation[1]).device == torch.device("cpu")
    with pytest.raises(UserError) as error:
        load(segmentation[1], "cuda")
    assert str(error.value) == (
        f"{segmentation[1]}: expected an onnxruntime that computes on cuda, got one of "
        "CPUExecutionProvider; pip install onnxruntime-gpu, or use --device cpu"
    )


def test_a_gpu_whose_libraries_onnxruntime_does_not_find(segmentation, monkeypatch):
    """It says nothing and goes on with the CPU: the name of what computes would be wrong."""
    asked = []
    session = onnxruntime.InferenceSession

    def made(data, options, providers):
        asked.append(providers)
        return session(data, options, providers=["CPUExecutionProvider"])

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    for module in (nasfast.inference.exported, nasfast.inference.model):
        monkeypatch.setattr(module, "resolve_device", lambda _: torch.device("cuda:1"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    with pytest.raises(UserError) as error:
        load(segmentation[1], "cuda:1")
    assert asked[-1][0] == ("CUDAExecutionProvider", {"device_id": 1})
    assert str(error.value) == (
        f"{segmentation[1]}: expected onnxruntime to compute on cuda:1, got CPUExecutionProvider, "
        "as its CUDA libraries could not be loaded; install those of its version, or use "
        "--device cpu"
    )
    assert load(segmentation[1]).device == torch.device("cpu")


def test_batches_to_check():
    images = [torch.rand(1, 3, 40, 60), torch.rand(1, 3, 30, 60)]
    shapes = [tuple(batch.shape) for batch in check_batches(images, None)]
    assert {shape[0] for shape in shapes} == {1, 3}
    assert len({shape[2:] for shape in shapes}) == 3
    assert {tuple(batch.shape[2:]) for batch in check_batches(images, (8, 9))} == {(8, 9)}
