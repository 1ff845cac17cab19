"""``nasfast export``, and ``nasfast evaluate`` of what it wrote."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from nasfast.commands import evaluate, export
from nasfast.models.io import load_model, save_model
from nasfast.models.restorer import Restorer, RestorerConfig
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.tasks.restoration import task_from_json

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def make_model(folder, data, seed):
    torch.manual_seed(seed)
    genotype = IRNASGenotype(((("conv3x3", 0), ("sep3x3", 1)),), (0,))
    network = Restorer(genotype, RestorerConfig(4, 4, 4, 4, residual=True, atrous=False), 1)
    task = task_from_json({"task": "denoising"}).describe()
    description = {"task": task, "data": str(data), "method": "restoration"}
    folder.mkdir(exist_ok=True)
    save_model(folder / "model.safetensors", network.eval(), description)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a network, and of the images that it was trained on."""
    root = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        (root / "data" / part).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (40, 48)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "data" / part / f"{i}.png")
    return make_model(root / "net", root / "data", seed=0)


@pytest.fixture(scope="module")
def exported(trained):
    """What was printed; the file is model.onnx beside the network."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert export.main([str(trained)]) == 0
    return printed.getvalue()


@pytest.fixture
def copied(monkeypatch, trained, exported):
    """Exporting writes the file that there is, whatever the network."""
    monkeypatch.setattr(
        export, "export", lambda _, path, **options: shutil.copy(trained / "model.onnx", path)
    )


def test_it_prints_the_greatest_difference_of_each_size_and_batch(exported, trained):
    lines = [line.split() for line in exported.splitlines() if "greatest difference" in line]
    assert [line[0] for line in lines] == [
        f"{batch}x1x{size}" for size in ("40x48", "31x33", "23x48") for batch in (1, 3)
    ]
    assert all(float(line[-1]) <= 1e-4 for line in lines)
    assert f"wrote {trained / 'model.onnx'}, " in exported


def test_evaluate_measures_the_export_beside_its_network(exported, trained, capsys):
    (trained / "evaluation.json").write_text("{}")
    path = trained / "model.onnx"
    flags = ["--device", "cpu", "--seconds", "0.05", "--pictures", "0"]
    assert evaluate.main([str(path), *flags]) == 0
    assert (trained / "evaluation.json").read_text() == "{}"
    result = json.loads((trained / "model.onnx.evaluation.json").read_text())
    assert result["latency_ms"]["backend"].startswith("onnxruntime ")
    assert result["latency_ms"]["backend"].endswith(", CPUExecutionProvider")
    assert result["latency_ms"]["dtype"] == "float32"
    original = result["latency_ms_of_original"]
    assert original["backend"] == f"torch {torch.__version__}"
    assert original["runs"] == result["latency_ms"]["runs"]
    assert result["bytes"] == path.stat().st_size
    printed = capsys.readouterr().out
    assert "the export against torch" in printed
    assert evaluate.main([str(trained), *flags]) == 0
    (ours,) = result["scores"].values()
    (theirs,) = json.loads((trained / "evaluation.json").read_text())["scores"].values()
    assert ours["model.onnx"]["psnr"] == pytest.approx(theirs["net"]["psnr"], abs=0.02)


def test_an_export_without_its_network_is_measured_alone(exported, trained, tmp_path):
    shutil.copy(trained / "model.onnx", tmp_path)
    make_model(tmp_path, trained, seed=1)  # of other weights
    flags = ["--device", "cpu", "--seconds", "0.05", "--pictures", "0", "--split", "train"]
    assert evaluate.main([str(tmp_path / "model.onnx"), *flags]) == 0
    result = json.loads((tmp_path / "model.onnx.evaluation.json").read_text())
    assert (result["images"], result["split"]) == (3, "train")
    assert "latency_ms_of_original" not in result


def test_a_place_that_cannot_be_written_to_is_known_before(trained, capsys):
    assert export.main([str(trained), "--out", "/proc/a.onnx"]) == 2
    printed = capsys.readouterr()
    assert "exporting" not in printed.out
    assert printed.err == (
        "error: /proc: expected a directory that can be made and written to, got no such file or "
        "directory; give another --out\n"
    )


def test_int8_says_what_is_lost(trained, capsys):
    assert export.main([str(trained), "--int8", "--size", "40x48"]) == 0
    printed = capsys.readouterr().out
    assert "calibrating on 3 training images" in printed
    (line,) = [line for line in printed.splitlines() if "PSNR" in line]
    assert " in float32, " in line
    assert line.endswith(" lost")
    assert (trained / "model-int8-40x48.onnx").is_file()


def test_no_file_where_it_differs(trained, copied, tmp_path, capsys):
    other = make_model(tmp_path / "other", trained.parent / "data", seed=1)
    assert export.main([str(other)]) == 1
    error = capsys.readouterr().err
    start = f"error: export {other / 'model.safetensors'}: expected greatest difference from "
    assert error.startswith(start + "PyTorch of at most 1e-04, got ")
    assert error.endswith("; no file was written; please report it\n")
    assert [path.name for path in other.iterdir()] == ["model.safetensors"]


def test_data_that_is_gone(trained, copied, tmp_path, capsys):
    shutil.copy(trained / "model.safetensors", tmp_path)
    gone = trained.parent / "data"
    gone.rename(trained.parent / "moved")
    try:
        assert export.main([str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "checking on drawn images, as the data cannot be read: data: expected 'synth" in (
            printed
        )
        assert "  3x1x192x256     greatest difference" in printed
        assert export.main([str(tmp_path), "--int8"]) == 2
        assert capsys.readouterr().err.startswith("error: data: expected 'synthetic' or a folder")
    finally:
        (trained.parent / "moved").rename(gone)


def test_a_model_file_without_data(trained, tmp_path, capsys):
    network, description = load_model(trained / "model.safetensors")
    description.pop("data")
    save_model(tmp_path / "model.safetensors", network, description)
    assert export.main([str(tmp_path), "--int8"]) == 2
    assert capsys.readouterr().err == (
        "error: data: expected a model file that names its data, got one without; give --data DIR\n"
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--format", "pt2", "--int8"],
            "int8: expected --format onnx, got pt2; leave out either",
        ),
        (
            ["--size", "360"],
            "size: expected HxW such as 360x480, or dynamic, got '360'; change it",
        ),
        (
            ["--size", "100000x100000"],
            "size: expected at most 268,435,456 pixels, got 100000x100000; make it smaller",
        ),
        (
            ["--size", "0x480"],
            "size: expected HxW such as 360x480, or dynamic, got '0x480'; change it",
        ),
        (
            ["--out", "net.pt2"],
            "out: expected a name that ends in .onnx, got net.pt2; rename it, or give another "
            "--format",
        ),
        (
            ["--out", "nowhere/net.onnx"],
            "out: expected an existing folder, got nowhere; make it first",
        ),
        (
            ["--argmax"],
            "argmax: expected a network of 1 to 256 classes of pixels, got 0 of a network for "
            "denoising; leave it out",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_errors(trained, flags, text, capsys):
    assert export.main([str(trained), *flags]) == 2
    assert capsys.readouterr().err == f"error: {text}\n"
