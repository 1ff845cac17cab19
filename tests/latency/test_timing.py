import contextlib
import dataclasses
import functools
import sys
import time
import types

import pytest
import torch
from small_networks import samples

from nasfast.latency import Target, timing
from nasfast.latency.operators import Operator
from nasfast.training.loop import Runtime
from nasfast.utils.errors import UserError

SIZES = {"threads": 2, "batch": 3, "size": (8, 16), "channels": 1}
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def runtime(monkeypatch):
    """Stands in for onnxruntime."""
    fake = types.ModuleType("onnxruntime")
    fake.__version__ = "1.2"
    fake.get_available_providers = lambda: ["CPUExecutionProvider"]
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(timing, "device_name", lambda device: f"name of {device}")


def test_this_machine(runtime):
    plain = Target.of("torch", Runtime(CPU, choice="bfloat16"), **SIZES)
    assert (plain.precision, plain.version) == ("bfloat16", torch.__version__)
    assert plain.machine == "name of cpu"
    assert plain.shape == (3, 1, 8, 16)
    onnx = Target.of("onnxruntime", Runtime(CPU, choice="bfloat16"), **SIZES)
    assert str(onnx) == "onnxruntime 1.2, float32, name of cpu, 2 threads, batch 3, 8x16"
    assert Target.from_json(onnx.to_json()) == onnx


def test_missing_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    expected = (
        r"^latency-backend onnxruntime: expected onnxruntime to be installed, got '.*'; "
        r"pip install 'nasfast\[export\]'$"
    )
    with pytest.raises(UserError, match=expected):
        Target.of("onnxruntime", Runtime(CPU), **SIZES)


def test_missing_provider(runtime):
    expected = (
        "^latency-backend: expected an onnxruntime that computes on cuda:0, got one of "
        "CPUExecutionProvider; pip install onnxruntime-gpu, or use --latency-backend torch$"
    )
    with pytest.raises(UserError, match=expected):
        Target.of("onnxruntime", Runtime(CUDA, choice="float32"), **SIZES)


def test_no_compiler(target, monkeypatch):
    def fails(network, dynamic):
        def compiled(images):
            raise RuntimeError("no g++\nat all")

        return compiled

    monkeypatch.setattr(torch, "compile", fails)
    expected = (
        "^latency-backend compiled: expected torch.compile to work here, got '.*g.*'; "
        r"install a C\+\+ compiler, or use --latency-backend torch$"
    )
    (model,) = samples("ir_nas", 1, "cpu")
    with pytest.raises(UserError, match=expected):
        timing.deployed(model, dataclasses.replace(target, backend="compiled"))


class Seen(torch.nn.Module):
    """Stands in for a network."""

    def forward(self, images):
        self.seen.append((torch.mm(torch.eye(2), torch.eye(2)).dtype, tuple(images.shape)))
        return images


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_the_target_s(target, precision):
    Seen.seen = []
    timing.deployed(Seen(), dataclasses.replace(target, precision=precision))()
    assert Seen.seen == [(getattr(torch, precision), (1, 3, 64, 96))]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_operator_alone(target, precision, monkeypatch):
    monkeypatch.setattr(timing, "torch_operator", lambda _: both)
    both = torch.nn.Module()
    both.forward = lambda *maps: seen.append([each.dtype for each in maps])
    seen = []
    operator = Operator("add", ((1, 2, 3, 4), (1, 2, 1, 1)), (1, 2, 3, 4), wide=(False, True))
    timing.single(operator, dataclasses.replace(target, precision=precision))()
    assert seen == [[getattr(torch, precision), torch.float32]]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_operator_that_is_not_known(target, backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnx")
    operator = Operator("fft", ((1, 2, 3, 4),), (1, 2, 3, 4))
    assert timing.single(operator, dataclasses.replace(target, backend=backend)) is None


def test_operator_by_onnxruntime(target):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    operator = Operator("add", ((1, 2, 3, 4), (1, 2, 1, 1)), (1, 2, 3, 4))
    timing.single(operator, dataclasses.replace(target, backend="onnxruntime"))()


def test_threads_are_restored():
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_rounds_take_turns(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def run(name, seconds):
        order.append(name)
        clock[0] += seconds

    runs = [lambda: run("a", 0.25), lambda: run("b", 0.5)]
    found = timing.rounds(runs, 0.0, least=3)
    assert found == [(250.0, 500.0)] * 3
    assert order == ["a", "a", "b", "b"] * 3, "the first of two is not timed"
    assert len(timing.rounds(runs, 3.0, least=1)) == 4  # of 1.5 s
    assert timing.median_time(runs[0], 0.0) == 250.0


def test_every_network_is_compiled(monkeypatch):
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    images, runtime = torch.rand(1, 1, 4, 4), Runtime(torch.device("cpu"))
    try:
        for channels in range(2, 14):
            network = torch.nn.Sequential(torch.nn.Conv2d(1, channels, 1), torch.nn.ReLU())
            compiled = timing._compiled(network.eval(), images, runtime)
            before = len(found)
            assert before == channels - 1, "one graph for each"
            with torch.inference_mode(), runtime.autocast():
                compiled(images)
            assert len(found) == before
    finally:
        torch._dynamo.reset()


def test_memory_that_runs_out_is_no_reason_to_run_without_a_graph(monkeypatch):
    """Of a GPU that is not there: the calls that record a graph are stood in for."""
    messages = iter(
        ["operation not permitted when stream is capturing", "CUDA out of memory. Tried"]
    )

    def record(graph):
        raise RuntimeError(next(messages))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", record)
    fake = types.SimpleNamespace(device=CUDA, autocast=contextlib.nullcontext)
    run = timing._forward(torch.nn.ReLU(), (torch.ones(1),), fake)
    run()
    with pytest.raises(RuntimeError, match="out of memory"):
        timing._forward(torch.nn.ReLU(), (torch.ones(1),), fake)
