"""The benchmarks' tools: what they measure is right, and one failure does not lose the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
if not BENCH.is_dir():
    pytest.skip("needs the folder bench of the checkout", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import gpu_report  # noqa: E402
import harness  # noqa: E402
import mixed_rivals  # noqa: E402
import rivals  # noqa: E402

from nasfast.models.supernet import SupernetConfig  # noqa: E402

PROBLEM = rivals.Problem(2, 6, 7, 9, 4, spread=3.0)


def allocate(temporary: int, returned: int) -> tuple[harness.Call, harness.Call]:
    """Calls that fill so many KiB and MiB and, while they hold them, return so many and a view."""

    def call(unit: int) -> list[torch.Tensor]:
        held = torch.ones(temporary * unit // 4)
        result = held.new_ones(returned * unit // 4)
        return [result, result.view(-1)]

    return lambda: call(2**10), lambda: call(harness.MIB)


@pytest.mark.parametrize("temporary", [0, 3, 32])
def test_extra_memory_of_a_known_allocation(temporary: int) -> None:
    extra = harness.extra_memory(allocate, temporary, 8)
    if extra is None:
        pytest.skip("the system does not tell")
    assert abs(extra / harness.MIB - temporary) < 0.5


def test_rounds() -> None:
    order = ""

    def leg(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal order
            order += name

        return call

    def clock(call: harness.Call) -> float:
        call()
        return len(order) * {"a": 2.0, "b": 3.0}[order[-1]]

    rounds = harness.Rounds({"a": leg("a"), "b": leg("b")}, clock)
    for _ in range(3):
        rounds.time("a", "b")
    assert order == 3 * "aabb"  # the first of each pair is not timed
    assert rounds.times == {"a": [4, 12, 20], "b": [12, 24, 36]}
    assert rounds.multiple("b", "a") == 2
    row = harness.rows(rounds, "a", 3e10, {"b": 3 * harness.MIB})["b"]
    assert str(row) == "2.00x, 24000.00 ms, 1 GFLOP/s, +3.0 MiB"


@pytest.mark.parametrize(
    "name", ["torchvision", "mmcv", "grid_sample", "compiled gather", "onnxruntime"]
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_rivals_compute_the_same(name: str, backward: bool) -> None:
    if name == "compiled gather":
        pytest.skip("takes long to compile; its source is the reference")
    calls, skipped = rivals.calls(["nasfast", name], PROBLEM, backward)
    if name in skipped:
        pytest.skip(skipped[name])
    expected, got = calls["nasfast"](), calls[name]()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, check_stride=False)


def test_offset_and_mask_are_those_of_a_channels_last_convolution() -> None:
    tensors = PROBLEM.tensors()
    convolution = torch.nn.Conv2d(6, 27, 3, padding=1).to(memory_format=torch.channels_last)
    offset, mask = convolution(tensors.input).split((18, 9), 1)
    assert tensors.offset.stride() == offset.stride()
    assert tensors.mask.stride() == mask.sigmoid().stride()


def test_a_rival_that_fails_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: rivals.Problem) -> rivals.Leg:
        raise RuntimeError("no kernel\nsecond line")

    monkeypatch.setitem(rivals.LEGS, "torchvision", broken)
    calls, skipped = rivals.calls(["conv2d", "torchvision", "nasfast"], PROBLEM, False)
    assert list(calls) == ["conv2d", "nasfast"]
    assert skipped == {"torchvision": "RuntimeError: no kernel"}


def test_flops_are_those_that_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for backward in (False, True):
        call = rivals.nasfast(PROBLEM).call(backward)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == PROBLEM.flops(backward)


MIXED = mixed_rivals.Problem(6, 2, 7, 9)


@pytest.mark.parametrize("name", ["save", "recompute", "grid_sample", "save bfloat16"])
@pytest.mark.parametrize("backward", [False, True], ids=["evaluation", "training"])
def test_mixed_rivals_compute_the_same(name: str, backward: bool) -> None:
    calls, skipped = rivals.calls(
        [mixed_rivals.EAGER, name], MIXED, backward, mixed_rivals.LEGS, mixed_rivals.OWN
    )
    assert not skipped
    expected, got = calls[mixed_rivals.EAGER](), calls[name]()
    assert len(expected) == len(got)
    tolerance = 0.1 if "bfloat16" in name else 1e-3
    for ours, reference in zip(got[:3], expected[:3]):  # output, gradients of state and factors
        error = (ours.float() - reference).norm() / reference.norm()
        assert error < tolerance


def test_flops_of_a_mixed_operation() -> None:
    """Those that PyTorch counts, of ours and of the floor."""
    from torch.utils.flop_counter import FlopCounterMode

    state, factors = torch.randn(2, 6, 7, 9), torch.rand(6)
    for name in ("save", mixed_rivals.FLOOR):
        module = mixed_rivals.LEGS[name](MIXED).module
        with FlopCounterMode(display=False) as counter:
            module(state, factors)
        assert counter.get_total_flops() == MIXED.flops(False) == MIXED.flops(True) / 3


def test_memory_that_a_mixed_operation_keeps() -> None:
    """On meta tensors as on real ones."""
    config, real, meta = SupernetConfig(layers=2, nodes=2, width=4), [], []
    for way in mixed_rivals.WAYS:
        options = vars(config) | mixed_rivals.WAYS[way]
        for device, sizes in (("cpu", real), ("meta", meta)):
            with torch.device(device):
                net = mixed_rivals.Supernet(SupernetConfig(**options), 1)
                net.to(memory_format=torch.channels_last)
            sizes.append(mixed_rivals.kept(net, mixed_rivals.empty(device, 2, 1, 16, 12)))
    assert meta == pytest.approx(real, rel=0.01)
    assert real[0] > 1.5 * real[1] > 5 * real[2]


def test_bench_mixed_op() -> None:
    """All of it on small sizes, as pytest runs it."""
    code = (
        "import sys; sys.path.insert(0, 'bench'); import mixed_rivals, pytest\n"
        "mixed_rivals.CONFIG = (1, 1, 4)\n"
        "mixed_rivals.CHANNELS, mixed_rivals.BATCH, mixed_rivals.SIZE = (4,), 1, 8\n"
        "mixed_rivals.Problem.__init__.__defaults__ = (\n"
        "    1, 8, 6, *mixed_rivals.Problem.__init__.__defaults__[3:])\n"
        "sys.exit(pytest.main(['-q', '--seconds', '0.01', 'bench/bench_mixed_op.py']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| C=4, 1x8x6 | 1.00x, " in done.stdout
    assert "| recompute | " in done.stdout


def test_gpu_report_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu_report.py"), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"gpu_report: torch {torch.__version__} must find a CUDA device, got none; run it on a "
        "machine with a GPU and a torch built for CUDA\n"
    )
    assert not (tmp_path / "out").exists()


def test_gpu_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The whole of it, with the CPU in the role of the GPU and steps that fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B300 (SXM)")
    monkeypatch.setattr(gpu_report, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_report, "SHAPES", [(1, 4, 6, 5, 4), (1, 4, -6, 5, 4)])
    monkeypatch.setattr(gpu_report, "MIXED_SHAPES", [(4, 1, 6, 5)])
    monkeypatch.setattr(gpu_report, "SEARCHES", [(1, 1, 4, 2, 8)])
    monkeypatch.setattr(gpu_report, "PRECISIONS", {"bfloat16": torch.bfloat16})
    options = ["--no-build", "--no-tests", "--seconds", "0.01", "--out", str(tmp_path)]
    assert gpu_report.main(options) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "nvidia-b300-sxm.json",
        "nvidia-b300-sxm.md",
    ]
    report = json.loads((tmp_path / "nvidia-b300-sxm.json").read_text())
    assert report["steps"]["deform_conv2d 1,4,6,5,4 bfloat16"]["status"] == "ok"
    failed = report["steps"]["deform_conv2d 1,4,-6,5,4 bfloat16"]
    assert failed["status"] == "exit code 1"
    assert "Traceback" in failed["output"]
    found = report["deform_conv2d"]["1,4,6,5,4 bfloat16"]["forward and backward"]
    assert len(found["rows"]["nasfast"]["times"]) >= 7
    found = report["mixed_op"]["4,1,6,5 bfloat16"]["forward and backward"]
    assert found["rows"].keys() == {*gpu_report.MIXED_LEGS}
    found = report["search"]["1,1,4,2,8 bfloat16"]
    assert found.keys() == {"eager", "save", "recompute", "eager, checkpoints"}
    for way in found.values():
        minutes = (1300 * way["seconds"]["weights"] + 1040 * way["seconds"]["architecture"]) / 60
        assert way["whole search, minutes"] == pytest.approx(minutes)
    text = (tmp_path / "nvidia-b300-sxm.md").read_text()
    assert text in capsys.readouterr().out
    assert "| 1,4,6,5,4 bfloat16 | 1.00x, " in text
    assert "| 1,1,4,2,8 bfloat16 | weights " in text
    assert (
        "- deform_conv2d 1,4,-6,5,4 bfloat16: exit code 1; RuntimeError: Trying to create" in text
    )


def test_gpu_report_stops_a_step() -> None:
    result = gpu_report.step("sleep", ["bash", "-c", "echo begun; sleep 60; echo done"], 1)
    assert result["status"] == "stopped after 1 s"
    assert result["output"] == "begun\n"
    assert result["seconds"] < 30
