import dataclasses
import importlib
import json
import re
import sys
import types

import pytest
from small_networks import SPACES, deployed, samples

from nasfast.latency import Profile, Target, measured_profile
from nasfast.latency import profile as module
from nasfast.latency.operators import Operator
from nasfast.spaces import IRNASSpace
from nasfast.utils.errors import UserError

ADD = Operator("add", ((1, 4, 8, 8), (1, 4, 8, 8)), (1, 4, 8, 8))
CONV = Operator(
    "conv", ((1, 4, 8, 8),), (1, 4, 8, 8), (4, 4, 3, 3), (1, 1, 1, 1, 1, 1, 1), True, wide=(True,)
)
ODD = Operator("fft", ((1, 4, 8, 8),), (1, 4, 8, 8))


@pytest.fixture
def profile(target):
    networks = [({ADD: 1 + i, CONV: 2, ODD: 1}, 0.7 + i / 3) for i in range(5)]
    return Profile(target, "a_space", tuple(networks), {CONV: 0.1 + 0.2, ADD: 0.01})


@pytest.fixture
def path(profile, tmp_path):
    profile.write(tmp_path / "table.json")
    return tmp_path / "table.json"


def test_round_trip_is_exact(profile, path):
    found = Profile.read(path)
    assert found == profile
    assert list(found.times) == list(profile.times)
    assert found.table.predict(profile.networks[0][0]) == profile.table.predict(
        profile.networks[0][0]
    )
    assert found.error == profile.error
    assert str(found).startswith("2 operators and 5 networks; median error ")


def test_error_that_is_not_known(profile):
    assert str(dataclasses.replace(profile, networks=profile.networks[:3])) == (
        "2 operators and 3 networks"
    )


DAMAGE = {
    "version": (["version"], 99, '"version" 2, got 99; make it with nasfast profile'),
    "no version": (["version"], None, '"version" 2, got None; make it'),
    "no target": (["target"], ..., "got a damaged one (KeyError: 'target'); make it with"),
    "no space": (["space"], ..., "got a damaged one (KeyError: 'space'); make it with"),
    "space": (["space"], 3, "got a damaged one (TypeError: space 3); make it with"),
    "no networks": (["networks"], [], "(ValueError: 2 times, 0 networks); make it with nasfast"),
    "no operators": (["operators"], ..., "(KeyError: 'operators')"),
    "operators": (["operators"], 3, "got a damaged one (TypeError"),
    "operator": (["operators", 0], "conv", "got a damaged one (AttributeError"),
    "kind": (["operators", 0, "makes"], [0], "operator: expected one of nasfast, got {'kind': "),
    "NaN": (["operators", 0, "ms"], float("nan"), "expected milliseconds above 0, got nan"),
    "negative": (["operators", 0, "ms"], -1.0, "expected milliseconds above 0, got -1.0"),
    "text": (["operators", 0, "ms"], "1", "expected milliseconds above 0, got '1'"),
    "true": (["operators", 0, "ms"], True, "expected milliseconds above 0, got True"),
    "infinite": (["networks", 0, "ms"], float("inf"), "expected milliseconds above 0, got inf"),
    "huge": (["networks", 0, "ms"], 10**400, "expected milliseconds above 0, got 1000"),
    "no ms": (["networks", 0, "ms"], ..., "(KeyError: 'ms')"),
    "beyond": (["networks", 0, "operators", 0], [3, 1], "(KeyError: 3)"),
    "negative index": (["networks", 0, "operators", 0], [-1, 1], "(KeyError: -1)"),
    "pair": (["networks", 0, "operators", 0], [1], "got a damaged one (ValueError: not enough"),
    "count": (["networks", 0, "operators", 0], [1, -2], "expected a count from 1, got -2"),
    "half": (["networks", 0, "operators", 0], [1, 1.5], "expected a count from 1, got 1.5"),
    "backend": (["target", "backend"], "tvm", "target, backend: expected one of 'torch', "),
    "device": (["target", "device"], "abacus", "device: expected cpu, cuda or cuda:NUMBER, got"),
    "precision": (["target", "precision"], "int8", "expected one of 'float32', 'bfloat16', got"),
    "threads": (["target", "threads"], 0, "Target.threads: expected a value from 1 to 1,024, got"),
    "size": (["target", "size"], [-1, 8], "Target.size: expected a value from 1 to 65,536, got -1"),
    "large": (["target", "size"], [8, 10**9], "Target.size: expected a value from 1 to 65,536"),
    "sides": (["target", "size"], [8], "target, size: expected a list of 2, got [8]"),
    "batch": (["target", "batch"], 10**9, "Target.batch: expected a value from 1 to 65,536, got"),
    "channels": (["target", "channels"], 0, "Target.channels: expected a value from 1 to"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged(path, name):
    (*places, last), value, text = DAMAGE[name]
    form = part = json.loads(path.read_text())
    del form["checksum"]
    for place in places:
        part = part[place]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    path.write_text(json.dumps(form))
    with pytest.raises(UserError, match=rf"^{path}: .*{re.escape(text)}") as error:
        Profile.read(path)
    assert "\n" not in str(error.value)


def test_another_time(path):
    """No value of it looks damaged."""
    form = json.loads(path.read_text())
    form["networks"][0]["ms"] *= 2
    path.write_text(json.dumps(form))
    text = f"{path}: expected what nasfast wrote, with the checksum {form['checksum']}, got other"
    with pytest.raises(UserError, match=f"^{re.escape(text)}"):
        Profile.read(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", "expected JSON, got ''"), ("[]", "expected a JSON object"), ('{"version":', "JSON")],
)
def test_no_table(path, text, expected):
    path.write_text(text)
    with pytest.raises(UserError, match=rf"^{path}: .*{re.escape(expected)}"):
        Profile.read(path)


def test_too_much_is_not_known(profile):
    profile.require_known("a_space", {ADD: 1, CONV: 1}, "table")
    other = Operator("add", ((1, 9, 80, 80),), (1, 9, 80, 80))
    for unknown in ({other: 1}, {CONV: 1, other: 100000}, {}):
        with pytest.raises(
            UserError, match=r"^table: expected times of the operators .*, got [0-9]%"
        ):
            profile.require_known("a_space", unknown, "table")


def test_a_table_of_another_space(profile):
    """Although the encoder, and with it most of the work, is the same."""
    expected = (
        "^table: expected times of networks of fast_nas, got those of a_space; make another with "
        "nasfast profile METHOD$"
    )
    with pytest.raises(UserError, match=expected):
        profile.require_known("fast_nas", {ADD: 1, CONV: 1}, "table")


def test_measured(target, monkeypatch):
    monkeypatch.setattr(module, "NETWORKS", 2)
    monkeypatch.setattr(module, "TRACED", 1)
    monkeypatch.setattr(module, "rounds", lambda runs, _: [range(1, 1 + len(runs))] * 3)
    monkeypatch.setattr(module, "median_time", lambda run, _: 0.5)
    space, *_ = SPACES["ir_nas"]
    beats = []
    profile = measured_profile(
        target, "ir_nas", lambda rng: deployed("ir_nas", space.sample(rng)), lambda: beats.append(1)
    )
    assert profile.space == "ir_nas"
    assert [time for _, time in profile.networks] == [1, 2]
    model = samples("ir_nas", 1)[0]  # the first that random.Random(0) draws
    assert profile.networks[0][0] == module.operators_on(target, model)
    assert set(profile.times.values()) == {0.5}
    assert all(operators.keys() <= profile.times.keys() for operators, _ in profile.networks)
    assert len(beats) == 2 + len(profile.times)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_operators_are_of_the_target(target, precision):
    object.__setattr__(target, "precision", precision)
    model = samples("ir_nas", 1)[0]
    wide = any(operator.wide for operator in module.operators_on(target, model))
    assert wide is (precision == "bfloat16")


def test_a_bundle_that_comes_back_is_a_profile(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "NETWORKS", 2)
    monkeypatch.setattr(module, "TRACED", 1)
    monkeypatch.setattr(module, "exported_bytes", lambda model, size: b"network")
    space, folder = IRNASSpace(1, 3), tmp_path / "bundle"
    target = Target("onnxruntime", "cpu", 1, 1, (16, 24), 3, "float32", "machine", "1")
    module.write_bundle(folder, target, "ir_nas", lambda rng: deployed("ir_nas", space.sample(rng)))
    form = json.loads((folder / "profile.json").read_text())
    assert set(form.pop("seconds")) == {"operator", "network"}
    entries = [*form["operators"], *form["networks"]]
    files = [entry.pop("file") for entry in entries]
    assert {path.name for path in folder.iterdir()} == {*files, "profile.json", "on_target.py"}
    for entry in entries:
        entry["ms"] = 2.0
    table = tmp_path / "table.json"
    table.write_text(json.dumps(form))
    profile = Profile.read(table)
    assert (profile.target, len(profile.networks)) == (target, 2)
    profile.write(table)
    assert Profile.read(table) == profile


@pytest.fixture
def on_target(monkeypatch):
    """The script of bundles, on a machine whose onnxruntime refuses some files."""
    runtime = types.ModuleType("onnxruntime")
    runtime.__version__, runtime.refused = "1.0", "operator-0001"

    class Session:
        def __init__(self, path, options, providers):
            if runtime.refused in path:
                raise ValueError("opset 20 is not known")

        def get_inputs(self):
            return [types.SimpleNamespace(name="x")]

        def run(self, outputs, inputs):
            pass

    runtime.InferenceSession, runtime.SessionOptions = Session, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.delitem(sys.modules, "nasfast.latency.on_target", raising=False)
    script = importlib.import_module("nasfast.latency.on_target")
    yield script, runtime
    del sys.modules["nasfast.latency.on_target"]


def test_an_operator_that_another_onnxruntime_refuses(on_target, profile, monkeypatch, tmp_path):
    script, runtime = on_target
    form = module._form(
        profile.target,
        profile.space,
        {ADD: {"file": "operator-0000.onnx"}, CONV: {"file": "operator-0001.onnx"}, ODD: {}},
        [(operators, {"file": "network-00.onnx"}) for operators, _ in profile.networks[:1]],
    )
    form["seconds"] = {"operator": 0.0, "network": 0.0}
    (tmp_path / "profile.json").write_text(json.dumps(form))
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    table = tmp_path / "table.json"
    said = []
    monkeypatch.setattr(script, "print", said.append, raising=False)
    monkeypatch.setattr(sys, "argv", ["on_target.py", str(table), "--threads", "3"])
    script.main()
    assert said[1] == (
        "operator-0001.onnx: left out, as this onnxruntime refuses it: opset 20 is not known"
    )
    found = Profile.read(table)
    assert set(found.times) == {ADD}
    assert (found.target.threads, found.target.version, found.space) == (3, "1.0", "a_space")
    runtime.refused = "network"
    expected = (
        "networks: expected an onnxruntime that runs them, got 1.0, which says 'opset 20 is not "
        "known'; install a newer one"
    )
    with pytest.raises(SystemExit, match=f"^{expected}$"):
        script.main()
    assert script.cores() >= 1
