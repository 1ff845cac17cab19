"""Files that somebody made to harm: each is refused by one line, at once, and in little memory."""

import json
import resource
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from commands import call
from safetensors.torch import save_file

import nasfast
from nasfast.encoders import MobileNetV2, load_encoder
from nasfast.inference.model import load
from nasfast.latency.profile import Profile
from nasfast.methods.registry import method_of_genotype, read_genotype
from nasfast.runs.study import Study
from nasfast.utils.config import from_mapping
from nasfast.utils.files import read_json, read_toml

GIB = 2**30


def deep(times, inner=()):
    """Text of lists within lists."""
    return "[" * times + json.dumps(list(inner))[1:-1] + "]" * times


def within(function, *arguments):
    """A call with 1 GiB more memory than the process has, as in a child of a test."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, used + GIB))
    function(*arguments)
    return 0


@pytest.fixture
def refused(tmp_path):
    """The line by which a reader refuses what it is given, soon even on a busy machine."""

    def read(function, *arguments):
        begun = time.monotonic()
        status, text = call(within, tmp_path / "errors", function, *arguments).end()
        assert time.monotonic() - begun < 120
        (tmp_path / "errors").unlink()
        assert (status, text.count("\n"), text[:7]) == (2, 1, "error: "), text
        assert len(text) < 1000
        return text

    return read


@pytest.mark.parametrize("times", [65, 400, 900, 990, 100_000])
def test_nesting(times, own_run, tmp_path, refused, nightly):
    """Some depths can be read, and not be written or shown."""
    if times != 990 and not nightly:
        pytest.skip("one depth is enough: --nightly")
    path = tmp_path / "genotype.json"
    path.write_text('{"space": "ir_nas", "levels": [0], "nodes": ' + deep(times) + "}")
    assert f"{path}: expected JSON, got" in refused(read_json, path)
    assert f"{path}: expected JSON, got" in refused(read_genotype, path)
    if times < 1000:  # beyond, the reader of TOML takes its time
        path = tmp_path / "config.toml"
        path.write_text("a = " + deep(times))
        assert f"{path}: expected TOML, got" in refused(read_toml, path)
    records = own_run / "records.jsonl"
    first, *others = records.read_text().splitlines(keepends=True)
    records.write_text(first.replace('"index":0', f'"index":{deep(times)}') + "".join(others))
    assert f"{records}, line 1: expected one JSON record" in refused(Study.open, own_run)
    path = tmp_path / "encoder.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"nasfast.encoder": deep(times)})
    assert f"weights {path}: expected the metadata nasfast.encoder" in refused(load_encoder, path)
    save_file({"x": torch.zeros(1)}, path, {"nasfast.segmenter": deep(times)})
    assert f"{path}: expected a network as nasfast train wrote it" in refused(load, path)
    path = tmp_path / "table.json"
    path.write_text(deep(times))
    assert f"{path}: expected" in refused(Profile.read, path)


def build(path):
    nasfast.create_model(str(path))


def decode(path):
    form = read_genotype(path)
    method_of_genotype(form).genotype(form)


NODE = [["conv3x3", 0], ["conv3x3", 1]]
GENOTYPES = {
    "nodes": {"nodes": [NODE] * 3000, "levels": [0]},
    "nine nodes": {"nodes": [NODE] * 9, "levels": [0]},
    "layers": {"nodes": [NODE], "levels": [0] * 100_000},
    "level": {"nodes": [NODE], "levels": [0, 1, 40]},
    "state": {"nodes": [[["conv3x3", 0], ["conv3x3", 10**30]]], "levels": [0]},
    "text": {"nodes": "x" * 10**6, "levels": [0]},
}


@pytest.mark.parametrize("name", GENOTYPES)
@pytest.mark.parametrize("read", [decode, build])
def test_genotypes(name, read, tmp_path, refused):
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps({"space": "ir_nas", **GENOTYPES[name]}))
    assert "expected" in refused(read, path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ['"rewards":{"stage0":', '"costs":{"params":', '"gate":'])
def test_a_record_without_a_number(number, field, own_run, refused):
    records = own_run / "records.jsonl"
    forms = [json.loads(line) for line in records.read_text().splitlines()]
    del forms[0]["checksum"]
    first = json.dumps(forms[0], separators=(",", ":"))
    value = first.partition(field)[2].partition(",")[0].rstrip("}")
    records.write_text(first.replace(field + value, field + number) + "\n")
    name = field.replace('"', "").replace(":{", ".").strip(":")
    shown = number.lower().removesuffix("inity").replace("1e999", "inf")
    assert f"evaluation.{name}: expected a finite number, got {shown}" in refused(
        Study.open, own_run
    )


@pytest.mark.parametrize("width", [1e6, 1e30, float("inf"), float("nan"), -1, 0, "wide", None, []])
def test_encoders(width, tmp_path, refused):
    """3.4 TB would be asked for."""
    path = tmp_path / "encoder.safetensors"
    described = json.dumps({"name": "mobilenet_v2", "width": width})
    save_file(MobileNetV2(0.1).state_dict(), path, {"nasfast.encoder": described})
    assert f"weights {path}: " in refused(load_encoder, path)


@pytest.mark.parametrize("value", [10**6, 10**12, 10**30, 1e300, float("nan")])
def test_networks(value, tiny_model, tmp_path, refused, nightly):
    if value != 10**30 and not nightly:
        pytest.skip("one value is enough: --nightly")
    from safetensors import safe_open

    path = tmp_path / "model.safetensors"
    with safe_open(tiny_model / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["nasfast.segmenter"])
    for change in (
        {"decoder": described["decoder"] | {"agg_size": value}},
        {"decoder": described["decoder"] | {"sep_repeats": value}},
        {"encoder": described["encoder"] | {"width": value}},
        {"outputs": value},
    ):
        save_file(tensors, path, {"nasfast.segmenter": json.dumps(described | change)})
        assert str(path) in refused(load, path)


def settings(path):
    method = nasfast.methods.registry.METHODS["segmentation"]
    from_mapping(method.search_settings, read_toml(path), str(path))


@pytest.mark.parametrize("value", [10**12, -(10**30), float("inf"), float("nan"), "x" * 10**6])
def test_settings(value, tmp_path, refused, nightly):
    if value != 10**12 and not nightly:
        pytest.skip("one value is enough: --nightly")
    path = tmp_path / "config.toml"
    for name in ("budget", "batch", "seed", "threads"):
        path.write_text(tomli_w.dumps({name: value}))
        if (name, value) != ("seed", 10**12):
            assert str(path) in refused(settings, path)
    path.write_text(tomli_w.dumps({"decoder": {"agg_size": value}}))
    assert str(path) in refused(settings, path)
