"""Who is responsible for a name, a genotype, a run and a model file; never a guess."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nasfast.inference.exported import NEEDED
from nasfast.methods.registry import (
    METHODS,
    method_named,
    method_of_genotype,
    method_of_model,
    method_of_source,
)
from nasfast.models.io import load_model, save_model
from nasfast.utils.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "version1"


def test_by_name():
    for name, method in METHODS.items():
        assert method_named(name) is method
        assert method.name == name


@pytest.mark.parametrize("name", ["depth", "", None, 3])
def test_unknown_names(name):
    with pytest.raises(UserError) as caught:
        method_named(name)
    assert str(caught.value) == (
        f"method: expected one of segmentation, templates, detection, restoration, got {name!r}; "
        "a later version of nasfast may know it"
    )


@pytest.mark.parametrize(
    ("genotype", "name"),
    [
        ({"space": "fast_nas"}, "segmentation"),
        ({"space": "ir_nas"}, "restoration"),
        ([[8, [0, 0, 5, 2]], [[3, 3]]], "segmentation"),  # as published
    ],
)
def test_by_genotype(genotype, name):
    assert method_of_genotype(genotype).name == name


@pytest.mark.parametrize("genotype", [{"space": "darts"}, {}, {"cell": []}, 7, None, "fast_nas_"])
def test_genotypes_of_no_method(genotype):
    with pytest.raises(
        UserError, match='"space" is one of fast_nas, template_nas, nas_fcos, ir_nas, got '
    ):
        method_of_genotype(genotype)


@pytest.mark.parametrize("name", ["segmentation", "restoration"])
def test_by_run_and_model(name):
    method, settings = method_of_source(["--rank", "2", str(FIXTURES / name)])
    assert method.name == settings["method"] == name
    training = FIXTURES / f"{name}_training"
    assert method_of_source([str(training / "genotype.json")]) == (method, {})
    for path in (training, training / "model.safetensors"):
        assert method_of_model(["--batch", "1", str(path)]) is method


@pytest.mark.parametrize("name", ["restoration", "segmentation"])
def test_a_model_file_says_its_method(name: str, tmp_path: Path) -> None:
    """Before the kind of its network, which methods may share."""
    model, description = load_model(FIXTURES / "segmentation_training" / "model.safetensors")
    path = tmp_path / "model.safetensors"
    save_model(path, model, description | {"method": name})
    assert method_of_model([str(path)]).name == name
    save_model(path, model, description | {"method": "depth"})
    with pytest.raises(
        UserError,
        match="expected one of segmentation, templates, detection, restoration, got 'depth'",
    ):
        method_of_model([str(path)])


@pytest.mark.parametrize("name", ["restoration", "segmentation"])
def test_an_export_of_a_network_of_version_1_says_its_genotype_alone(name, tmp_path):
    _, description = load_model(FIXTURES / f"{name}_training" / "model.safetensors")
    assert "method" not in description
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        export = {"export": dict.fromkeys(NEEDED)}
        archive.writestr("model/extra/nasfast.json", json.dumps(description | export))
    assert method_of_model([str(path)]).name == name


def test_by_the_name_of_an_architecture():
    method, settings = method_of_source(["irnas-derain"])
    assert method.name == "restoration"
    assert settings["channels"] == 3


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        (
            "config.toml",
            'method = "depth"',
            "segmentation, templates, detection, restoration, got 'depth'",
        ),
        (
            "best.json",
            '{"genotype": {"space": "darts"}}',
            "fast_nas, template_nas, nas_fcos, ir_nas, got 'darts'",
        ),
    ],
)
def test_runs_and_genotype_files_of_no_method(name, content, text, tmp_path):
    (tmp_path / "records.jsonl").touch()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"one of {text}"):
        method_of_source([str(tmp_path if name == "config.toml" else tmp_path / name)])


def test_the_value_of_another_flag_is_passed_over(tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, weights)
    argv = ["--encoder-weights", str(weights), str(FIXTURES / "restoration")]
    assert method_of_source(argv)[0].name == "restoration"
    with pytest.raises(UserError, match="expected a model"):
        method_of_model([str(weights)])
