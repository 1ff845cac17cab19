import dataclasses
import json
import re

import pytest
import torch
from small_networks import SPACES, deployed

from nasfast.latency import Latencies, Profile, UndeployableError
from nasfast.latency import meter as module
from nasfast.latency.profile import operators_on
from nasfast.utils.errors import UserError

SPACE, *_ = SPACES["ir_nas"]
REFERENCE = 8.0
"""Milliseconds that the profile has of its first network."""


@pytest.fixture
def builds():
    """Devices of the networks that were built."""
    return []


@pytest.fixture
def latencies(target, builds, monkeypatch):
    """Makes the latencies of a search on a machine that is twice as slow as it was."""

    def build(genotype):
        model = deployed("ir_nas", genotype)
        builds.append(model.device.type)
        return model

    def measured(target, space, draw, heartbeat):
        heartbeat()
        rng = module.random.Random(0)
        with torch.device("meta"):
            first, *others = (operators_on(target, draw(rng)) for _ in range(4))
        times = dict.fromkeys([*first, *(o for each in others for o in each)], 0.1)
        return Profile(target, space, ((first, REFERENCE),), times)

    def rounds(runs, seconds, least):
        assert [run() for run in runs] == ["cpu"] * 2
        return [(16.0, 4.0), (16.0, 400.0), (8.0, 2.0)]  # the reference, the network

    monkeypatch.setattr(module, "measured_profile", measured)
    monkeypatch.setattr(module, "deployed", lambda model, target: lambda: model.device.type)
    monkeypatch.setattr(module, "rounds", rounds)

    def make(profile=None):
        return Latencies(target, SPACE, build, profile)

    return make


@pytest.fixture
def genotypes():
    rng = module.random.Random(1)
    return [SPACE.sample(rng) for _ in range(3)]


def prepared(latencies, folder):
    said = []
    latencies.prepare(folder, said.append)
    return said


def test_times_by_the_pace_of_the_references(target):
    networks = tuple(({}, time) for time in (2.0, 8.0, 5.0, 99.0))
    found = Latencies(target, SPACE, None, Profile(target, "ir_nas", networks, {}))
    # a machine that is as fast, twice as slow, and twice as slow for one of the three
    turns = [(2, 8, 5, 3, 7), (4, 16, 10, 6, 14), (4, 8, 5, 3 * 2 ** (1 / 3), 7 * 2 ** (1 / 3))]
    assert found.comparable(turns) == pytest.approx([3.0, 7.0])
    assert found.comparable(turns[2:]) == pytest.approx([3.0, 7.0])


def test_the_reference_and_what_it_took(latencies, genotypes, tmp_path, builds):
    found = latencies()
    prepared(found, tmp_path / "latency")
    threads = torch.get_num_threads()
    assert found.of(genotypes[0]) == pytest.approx(REFERENCE / 4 / 1e3)
    assert torch.get_num_threads() == threads
    (line,) = (tmp_path / "latency/latencies.jsonl").read_text().splitlines()
    assert json.loads(line)["rounds"] == 3
    assert builds == ["meta"] * 4 + ["cpu"] * 2
    found.of(genotypes[1])
    assert builds == ["meta"] * 4 + ["cpu"] * 3, "the reference is built once"


def test_measured_once(latencies, genotypes, tmp_path, monkeypatch, builds):
    first = latencies()
    assert "networks and operators are timed .." in prepared(first, tmp_path)[0]
    expected = [first.of(genotype) for genotype in genotypes]
    predicted = first.predict(genotypes[0])
    for name in ("measured_profile", "deployed", "rounds"):
        monkeypatch.setattr(module, name, None)
    builds.clear()
    again = latencies()
    (line,) = prepared(again, tmp_path)
    assert line.startswith("latency  torch 2.13, float32, machine, 1 threads, batch 1, 64x96: ")
    assert [again.of(genotype) for genotype in genotypes] == expected
    assert not builds
    assert again.predict(genotypes[0]) == predicted
    assert builds == ["meta"], "predictions build no network on the CPU"


def test_resumed_on_another_machine(latencies, genotypes, tmp_path, target):
    first = latencies()
    prepared(first, tmp_path)
    again = latencies()
    again.target = dataclasses.replace(target, machine="other", precision="bfloat16")
    note, _ = prepared(again, tmp_path)
    assert note == (
        "note: the run's latencies are of torch 2.13, float32, machine, 1 threads, batch 1, 64x96; "
        "from here on they are predicted for it, as this is torch 2.13, bfloat16, other, 1 "
        "threads, batch 1, 64x96"
    )
    assert not again.measures
    assert again.predict(genotypes[0]) == first.predict(genotypes[0])
    latency = again.of(genotypes[0])
    assert latency == first.predict(genotypes[0])
    home = latencies()
    prepared(home, tmp_path)
    assert home.measures
    assert home.of(genotypes[0]) == latency, "what was decided with stays"
    assert home.of(genotypes[1]) == pytest.approx(REFERENCE / 4 / 1e3)


FAILURES = [
    (RuntimeError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory. Tried)"),
    (MemoryError(), "out of memory (MemoryError)"),
    (torch.onnx.OnnxExporterError("no translation\nof that"), "no export (no translation)"),
    (UserError("latency-backend compiled: expected"), "latency-backend compiled: expected"),
]


@pytest.mark.parametrize(("error", "text"), FAILURES)
@pytest.mark.parametrize("name", ["deployed", "rounds"])
def test_a_network_that_does_not_run(
    latencies, genotypes, tmp_path, monkeypatch, error, text, name
):
    found = latencies()
    prepared(found, tmp_path)
    found.references()

    def fails(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(UndeployableError, match=f"^{re.escape(text)}$"):
            found.of(genotypes[0])
    again = latencies()
    prepared(again, tmp_path)
    with pytest.raises(UndeployableError, match=f"^{re.escape(text)}$"):
        again.of(genotypes[0])
    assert again.of(genotypes[1]) > 0


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyboardInterrupt()])
def test_what_is_no_failure_of_a_network(latencies, genotypes, tmp_path, monkeypatch, error):
    found = latencies()
    prepared(found, tmp_path)

    def fails(*args):
        raise error

    monkeypatch.setattr(module, "rounds", fails)
    with pytest.raises(type(error)):
        found.of(genotypes[0])
    assert not (tmp_path / "latencies.jsonl").exists()


def test_full_disk(latencies, genotypes, tmp_path):
    """The error names the file, by which a person sees what to do."""
    found = latencies()
    prepared(found, tmp_path)
    (tmp_path / "latencies.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        found.of(genotypes[0])
    assert error.value.filename == str(tmp_path / "latencies.jsonl")


def test_killed_after_the_profile(latencies, genotypes, tmp_path, monkeypatch):
    first = latencies()
    prepared(first, tmp_path)
    monkeypatch.setattr(module, "measured_profile", None)
    second = latencies()
    prepared(second, tmp_path)
    assert second.profile == first.profile
    assert second.of(genotypes[0]) == pytest.approx(REFERENCE / 4 / 1e3)


def test_a_torn_line_is_cut_off(latencies, genotypes, tmp_path):
    first = latencies()
    prepared(first, tmp_path)
    first.of(genotypes[0])
    path = tmp_path / "latencies.jsonl"
    whole = path.read_bytes()
    first.of(genotypes[1])
    line = path.read_bytes()[len(whole) :]
    for torn in (line[:1], line[:20], line[:-1]):
        path.write_bytes(whole + torn)
        again = latencies()
        prepared(again, tmp_path)
        assert path.read_bytes() == whole
        again.of(genotypes[1])
        assert path.read_bytes() == whole + line, "measured and kept again"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"key": "a"}',
        '{"key": "a", "latency": NaN}',
        '{"key": "a", "latency": -0.1}',
        '{"key": "a", "latency": 0}',
        '{"key": "a", "latency": Infinity}',
        '{"key": "a", "latency": null}',
        '{"latency": 0.1}',
    ],
)
@pytest.mark.parametrize("after", ["", '{"key": "b", "latency": 0.1}\n'])
def test_damaged_line(latencies, tmp_path, line, after):
    prepared(latencies(), tmp_path)
    path = tmp_path / "latencies.jsonl"
    path.write_text('{"key": "c", "latency": 0.1}\n' + line + "\n" + after)
    text = f"{path}, line 2: expected the latency of a network, got {line.encode()!r}; restore"
    with pytest.raises(UserError, match=f"^{re.escape(text)} the file from a copy$"):
        prepared(latencies(), tmp_path)


def test_table_of_another_machine(latencies, genotypes, tmp_path, monkeypatch):
    first = latencies()
    prepared(first, tmp_path / "first")
    monkeypatch.setattr(module, "measured_profile", None)
    found = latencies(first.profile)
    assert not found.measures
    found.require_known()
    prepared(found, tmp_path / "latency")
    assert Profile.read(tmp_path / "latency/latency.json") == first.profile
    assert found.predict(genotypes[0]) == first.predict(genotypes[0])


def test_table_of_other_images(latencies, tmp_path):
    first = latencies()
    prepared(first, tmp_path / "first")
    target = dataclasses.replace(first.target, size=(96, 64))
    found = latencies(dataclasses.replace(first.profile, target=target))
    found.target = target
    expected = (
        "^latency-table: expected times of the operators of the networks that are searched, got "
        "[0-9]% of their work, as of another space, width or image size; make it with nasfast "
        "profile and the settings of this search$"
    )
    with pytest.raises(UserError, match=expected):
        found.require_known()
