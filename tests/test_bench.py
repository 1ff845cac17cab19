"""The benchmarks' tools: what they measure is right, and one failure does not lose the rest."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
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

import feature_rivals  # noqa: E402
import gpu_report  # noqa: E402
import harness  # noqa: E402
import mixed_rivals  # noqa: E402
import plain  # noqa: E402
import rivals  # noqa: E402
import search_cost  # noqa: E402
import search_legs  # noqa: E402
from search_legs import Scale, Timed  # noqa: E402

from nasfast.models.segmenter import Decoder  # noqa: E402
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


SMALL = Scale(8, 3, crop=32, val_crop=48, batch_size=4, epochs=2, agg_size=8, width=0.35, classes=8)
GENOTYPES = search_legs.architectures(5)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> search_legs.Problem:
    return search_legs.Problem(SMALL, torch.device("cpu"), tmp_path_factory.mktemp("problem"))


@pytest.mark.parametrize("name", GENOTYPES)
def test_the_plain_formulation_trains_the_same_network(
    problem: search_legs.Problem, name: str
) -> None:
    """In float32: the same reward, from weights, order, losses, optimizer and averages alike."""
    ours = search_legs.Ours(problem, search_legs.Variant(search_legs.Float32))
    rival = search_legs.Plain(problem)
    expected, got = (leg(GENOTYPES[name], 3) for leg in (ours, rival))
    assert got.reward == pytest.approx(expected.reward, rel=1e-3)
    assert got.reward > 0
    for timed in (expected, got):
        assert timed.seconds.keys() == {"build", "stage0_train", "stage0_validate"}
        assert all(seconds > 0 for seconds in timed.seconds.values())


def test_weights_of_the_plain_formulation(problem: search_legs.Problem) -> None:
    info = problem.encoder.feature_info
    for genotype in GENOTYPES.values():
        torch.manual_seed(5)
        ours = Decoder(genotype, info, 8, SMALL.decoder).state_dict()
        torch.manual_seed(5)
        channels = [tap.channels for tap in info]
        rival = plain.PlainDecoder(genotype, channels, 8, SMALL.decoder)
        assert {type(m) for m in rival.modules() if "Conv" in type(m).__name__} == {torch.nn.Conv2d}
        torch.testing.assert_close(dict(rival.state_dict()), dict(ours), rtol=0, atol=0)


@pytest.fixture(scope="module")
def reward(problem: search_legs.Problem) -> float:
    float32 = search_legs.Variant(search_legs.Float32)
    return search_legs.Ours(problem, float32)(GENOTYPES["arch2"], 3).reward


@pytest.mark.parametrize("name", search_legs.ABLATIONS)
def test_what_is_taken_away_costs_time_alone(
    problem: search_legs.Problem, reward: float, name: str
) -> None:
    """The reward is the same, but for rounding: here all is in float32."""
    variant = search_legs.ABLATIONS[name]
    nchw = "NCHW" in name
    runtime = search_legs.ContiguousFloat32 if nchw else search_legs.Float32
    ours = search_legs.Ours(problem, dataclasses.replace(variant, runtime=runtime))
    assert (
        variant.runtime(problem.device)
        .place(torch.nn.Conv2d(2, 2, 3))
        .weight.is_contiguous(
            memory_format=torch.contiguous_format if nchw else torch.channels_last
        )
    )
    assert ours(GENOTYPES["arch2"], 3).reward == pytest.approx(reward, rel=1e-3)
    assert reward > 0.01


def test_files_of_the_plain_formulation(tmp_path: Path) -> None:
    tap = torch.randn(1, 4, 3, 5).to(torch.bfloat16, memory_format=torch.channels_last)[0]
    sample = {"tap0": tap, "labels": torch.full((3, 5), 255, dtype=torch.uint8)}
    files = plain.Files.write(tmp_path, [sample, {"tap0": -tap, "labels": sample["labels"]}])
    assert len(files) == 2
    read = files[1]
    assert read["tap0"].is_contiguous()
    torch.testing.assert_close(read["tap0"], -tap.float(), rtol=0, atol=0)
    torch.testing.assert_close(read["labels"], sample["labels"].long())


def test_scale_of_a_search() -> None:
    scale = Scale.of(256)
    assert (scale.val_samples, scale.steps, Scale().steps) == (66, 20, 310)
    seconds = {"build": 1.0, "stage0_train": 20.0, "stage0_validate": 66.0}
    assert scale.extrapolate(seconds) == 1 + 310 + 1024
    assert Scale().extrapolate(seconds) == 87


def test_work_of_a_published_architecture() -> None:
    """FLOPs as counted by hand, bytes within what copies of an implementation may add."""
    genotype = GENOTYPES["arch2"]
    training, scoring = search_cost.segmentation_work(genotype, Scale(), torch.float32)
    assert training.flops / 3e9 == pytest.approx(62.3, abs=0.05)  # GFLOP of the forward pass
    assert training.bytes / 1e9 == pytest.approx(11.2, rel=0.06)
    assert 0 < scoring.bytes < training.bytes / 64
    half, _ = search_cost.segmentation_work(genotype, Scale(), torch.bfloat16)
    assert half.flops == training.flops
    assert 0.5 < half.bytes / training.bytes < 0.6


def test_bytes_of_operations() -> None:
    x = torch.empty(3, 4, device="meta")
    with search_cost.Traffic() as traffic:
        y = x.relu()  # 48 in, 48 out
        y.view(12).add_(1)  # 48, read and written at one place
        torch.empty_like(x)
        torch.empty(4, device="meta").expand(3, 4) + x  # 16 and 48 in, 48 out
    assert traffic.bytes == 96 + 48 + 112


def test_floor() -> None:
    peaks = search_cost.Peaks(flops=100, bandwidth=10)
    work = search_cost.Work(200, 10) + search_cost.Work(100, 5) * 2
    assert work == search_cost.Work(400, 20)
    assert work.floor(peaks) == 4
    assert search_cost.Work(1, 100).floor(peaks) == 10
    measured = search_cost.measure_peaks(
        torch.device("cpu"), torch.float32, 32, lambda call: call() is None or 2.0
    )
    assert measured == search_cost.Peaks(32**3, 64 * 32 * 32)


def test_candidates_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    order = ""

    def leg(name: str, seconds: float) -> Callable[[], Timed]:
        def call() -> Timed:
            nonlocal clock, order
            clock, order = clock + seconds, order + name
            return Timed(0.5, {"build": seconds + len(order)})

        return call

    monkeypatch.setattr(search_cost.time, "perf_counter", lambda: clock)
    cases = {"x": {"ours": leg("a", 1), "plain": leg("b", 2)}, "y": {"ours": leg("c", 1)}}
    found = search_cost.in_turn(cases, 11)  # a round takes 4
    assert order == "abcabc"
    assert [timed.total for timed in found["x"]["plain"]] == [4, 7]
    assert search_cost.ratio(found["x"], "plain", "ours") == (4 / 2 + 7 / 5) / 2
    search_cost.in_turn(cases, 0)
    assert order == "abcabcabc"


def test_search_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The whole of it on small sizes."""
    monkeypatch.setattr(Scale, "of", lambda samples, **_: SMALL)
    monkeypatch.setattr(search_cost, "measure_peaks", lambda *_: search_cost.Peaks(1e12, 1e10))
    monkeypatch.setattr(mixed_rivals, "CONFIG", (1, 1, 4))
    monkeypatch.setattr(mixed_rivals, "SIZE", 8)
    for name in list(search_legs.ABLATIONS)[1:-1]:
        monkeypatch.delitem(search_legs.ABLATIONS, name)
    file = tmp_path / "cost.json"
    options = ["--seconds", "0", "--candidates", "1", "--device", "cpu", "--folder", str(tmp_path)]
    assert search_cost.main([*options, "--ablate", "--json", str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    assert text == capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    report = json.loads(file.read_text())
    found = report["methods"]["segmentation"]
    case = found["architectures"]["arch0"]
    assert case["genotype"] == GENOTYPES["arch0"].to_json()
    assert case["forward GFLOP of a step"] == pytest.approx(79.2, abs=0.05)
    assert case["ratios"].keys() == {"plain", *(f"without: {n}" for n in search_legs.ABLATIONS)}
    measured = case["measured"]["ours"]
    assert len(measured) == 1
    assert case["seconds"]["ours"] == pytest.approx(SMALL.extrapolate(measured[0]["seconds"]))
    restoration = report["methods"]["restoration"]
    seconds = [restoration["measured"][f"plain, {half}"] for half in search_cost.STEPS]
    steps = [1300 * a + 1040 * b for a, b in zip(*seconds)]
    assert restoration["seconds"]["plain"] == pytest.approx(6 * sum(steps) / len(steps), rel=0.5)
    assert restoration["ours"] in ("save", "recompute")
    assert restoration["ratios"][restoration["ours"]] == 1
    lines = text.splitlines()
    for start in (
        "| Fast NAS (CVPR 2019) | 8 | 2,100 | ",
        "| Template-based NAS (WACV 2020) | not published | not published | not built yet | ",
        "| NAS-FCOS (CVPR 2020) | 28 | 3,000 | not built yet | ",
        "| arch0 | 79.2, ",
        "| plain, weights | ",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert text.count("not built yet") == 2


def test_workers_against_one(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(Scale, "of", lambda samples, **_: SMALL)
    options = ["--methods", "--workers", "2", "--seconds", "0", "--device", "cpu"]
    threads = torch.get_num_threads()
    assert search_cost.main(options) == 0
    assert torch.get_num_threads() == threads
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"Candidates a minute by the number of workers, each with one thread: "
        r"1: \d+\.\d\d, 2: \d+\.\d\d; \d\.\d\dx\.",
        line,
    )


def test_spread_of_numbers() -> None:
    assert search_cost.spread([2.0]) == "2"
    assert search_cost.spread([12345.6, 0.01234, 999.4]) == "999 (0.0123 to 12,346)"


def test_search_cost_of_one_method(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    result = {"batch": 2, "floor": 1.0, "ours": "save", "measured": {"save, weights": [0.25]}}
    result |= {"seconds": {"save": 86.4, "plain": 172.8}, "ratios": {"plain": 2.0}}
    monkeypatch.setitem(search_cost.MEASURES, "restoration", lambda *_: result)
    assert search_cost.main(["--methods", "restoration", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "| IR-NAS (CVPR 2020) | 0.25 | 1 | 86.4 | 1 | " in text
    assert "| 41.7 | 0.001 | 173 | 0.002 | 2 |" in text
    assert "not measured" in text
    assert "| save, weights | 250 |" in text


TINY: dict[str, tuple[int, ...]] = {"tap0": (8, 4, 6), "teacher": (16, 2, 2), "labels": (4, 6)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> feature_rivals.Store:
    return feature_rivals.Store(tmp_path_factory.mktemp("store"), 20, TINY)  # batches of 8, 8, 4


@pytest.mark.parametrize("name", [*feature_rivals.LEGS])
def test_forms_of_features_give_the_same(store: feature_rivals.Store, name: str) -> None:
    given = feature_rivals.LEGS[name](store)
    expected = [store.encode(indices) for indices in store.order]
    for _ in range(2):  # a pass can be repeated
        got = [copy.deepcopy(item) for item in given()]
        assert len(got) == 3
        if name in ("memory copy", "memory copy, float32"):
            assert [len(chunk) for chunk in got] == [8, 8, 4]
            raw = store.blocks if name == "memory copy" else store.blocks.view(torch.half).float()
            torch.testing.assert_close(torch.cat(got), raw, rtol=0, atol=0, equal_nan=True)
        elif name == "memory copy, NumPy":
            assert got == [None] * 3
        elif name == "views, read":
            words = [feature_rivals.total(store.cache.sample(i)) for i in store.order[0].tolist()]
            assert got[0] == words
        else:
            for batch, samples in zip(got, expected):
                if name == "views":
                    batch = {key: torch.stack([s[key] for s in batch]) for key in samples}
                dtype = torch.float32 if "float32" in name else torch.float16
                assert batch.keys() == samples.keys()
                assert batch["tap0"].dtype == batch["teacher"].dtype == dtype
                for key, x in samples.items():
                    assert torch.equal(batch[key].to(x.dtype), x)


def test_readers_together(store: feature_rivals.Store) -> None:
    rates = [feature_rivals.together(store, "batches", n, 0.2) for n in (1, 2)]
    assert min(rates) > 100


def test_a_reader_that_fails(tmp_path: Path) -> None:
    store = feature_rivals.Store(tmp_path / "absent", 4, TINY)
    with pytest.raises(RuntimeError) as info:
        feature_rivals.together(store, "torch.save files", 1, 0.1)
    assert str(info.value) == "torch.save files: expected 1 readers, got exit codes [1]"


def test_private_memory_of_a_reader(store: feature_rivals.Store) -> None:
    alone, reader = (feature_rivals.private_memory(store, leg) for leg in (None, "batches"))
    assert 0 < alone < reader < alone + 100 * harness.MIB


def test_bench_feature_cache() -> None:
    """All of it on small sizes, as pytest runs it."""
    code = (
        "import sys; sys.path.insert(0, 'bench'); import feature_rivals, pytest\n"
        f"feature_rivals.SAMPLES, feature_rivals.SHAPES = 16, {TINY}\n"
        "feature_rivals.REPEATS = 1\n"
        "sys.exit(pytest.main(['-q', '--seconds', '0.1', 'bench/bench_feature_cache.py']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| memory copy | " in done.stdout
    assert "| DataLoader(2), files | " in done.stdout
    assert " MiB |" in done.stdout


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
    monkeypatch.setattr(gpu_report, "GATHERS", [(3, 2)])
    monkeypatch.setattr(gpu_report, "SEARCH_COST", ("--methods", "restoration", "--patches", "x"))
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
    found = report["feature_gather"]["3,2 bfloat16"]
    assert found["bytes"] == 2 * 1_404_928  # 1.34 MiB a sample
    assert found["times"].keys() == {"copy", "indexing", "nasfast"}
    assert report["steps"]["search_cost"]["status"] == "exit code 2"
    text = (tmp_path / "nvidia-b300-sxm.md").read_text()
    assert text in capsys.readouterr().out
    assert "| 1,4,6,5,4 bfloat16 | 1.00x, " in text
    assert "| 1,1,4,2,8 bfloat16 | weights " in text
    assert "| 3,2 bfloat16 | 1.00x, " in text
    assert "- search_cost: exit code 2; " in text
    assert (
        "- deform_conv2d 1,4,-6,5,4 bfloat16: exit code 1; RuntimeError: Trying to create" in text
    )


def test_gpu_report_shows_the_cost_of_a_search() -> None:
    found = {"machine": "a machine", "methods": {}}
    report: dict[str, Any] = {kind: {} for kind in gpu_report.MEASURES}
    report |= {"machine": "another", "steps": {}, "search_cost": {"search_cost": found}}
    assert search_cost.markdown(found).strip() in gpu_report.markdown(report)


def test_gathers_on_a_device_give_the_same() -> None:
    calls, size = feature_rivals.gather_calls("cpu", 3, 2, torch.float32, TINY)
    given = {name: call() for name, call in calls.items()}
    assert given.pop("copy").nbytes == size == sum(x.nbytes for x in given["nasfast"])
    torch.testing.assert_close(given["indexing"], given["nasfast"], rtol=0, atol=0)


def test_gpu_report_stops_a_step() -> None:
    result = gpu_report.step("sleep", ["bash", "-c", "echo begun; sleep 60; echo done"], 1)
    assert result["status"] == "stopped after 1 s"
    assert result["output"] == "begun\n"
    assert result["seconds"] < 30
