"""The benchmarks' tools: what they measure is right, and one failure does not lose the rest."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
if not BENCH.is_dir():
    pytest.skip("needs the folder bench of the checkout", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import bench_nms  # noqa: E402
import bench_sep_conv  # noqa: E402
import candidates  # noqa: E402
import deform_conv2d_baselines as deform  # noqa: E402
import dncnn  # noqa: E402
import feature_cache_baselines as features  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402
import harness  # noqa: E402
import mixed_op_baselines as mixed  # noqa: E402
import plain  # noqa: E402
import readme_pictures  # noqa: E402
import search_cost  # noqa: E402
import search_quality  # noqa: E402
from candidates import Scale, Timed  # noqa: E402

import nasfast  # noqa: E402
from nasfast.models.decoders import Decoder  # noqa: E402
from nasfast.models.supernet import SupernetConfig  # noqa: E402
from nasfast.runs.records import Evaluation, Record  # noqa: E402
from nasfast.runs.study import Study  # noqa: E402
from nasfast.searches.sampling import SamplingSettings  # noqa: E402
from nasfast.spaces import FastNASSpace  # noqa: E402
from nasfast.strategies import PredictorConfig, RandomSearch  # noqa: E402
from nasfast.tasks.detection.nms import nms  # noqa: E402
from nasfast.utils.memory import keep_freed_memory  # noqa: E402

PROBLEM = deform.Problem(2, 6, 7, 9, 4, spread=3.0)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code in the checkout."""
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)


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
        pytest.skip("the system does not report it")
    assert abs(extra / harness.MIB - temporary) < 0.5


def test_rounds() -> None:
    order = ""

    def make(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal order
            order += name

        return call

    def clock(call: harness.Call) -> float:
        call()
        return len(order) * {"a": 2.0, "b": 3.0}[order[-1]]

    rounds = harness.Rounds({"a": make("a"), "b": make("b")}, clock)
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
def test_baselines_compute_the_same(name: str, backward: bool) -> None:
    if name == "compiled gather":
        pytest.skip("takes long to compile; its source is the reference")
    calls, skipped = deform.calls(["nasfast", name], PROBLEM, backward)
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


def test_a_baseline_that_fails_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: deform.Problem) -> deform.Implementation:
        raise RuntimeError("no kernel\nsecond line")

    monkeypatch.setitem(deform.IMPLEMENTATIONS, "torchvision", broken)
    calls, skipped = deform.calls(["conv2d", "torchvision", "nasfast"], PROBLEM, False)
    assert list(calls) == ["conv2d", "nasfast"]
    assert skipped == {"torchvision": "RuntimeError: no kernel"}


def test_pictures_of_the_readme_need_a_browser_and_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ROOT / "tests" / "fixtures" / "version1" / "segmentation"
    run = str(shutil.copytree(old, tmp_path / "run"))
    monkeypatch.setattr(shutil, "which", {"chromium": "/bin/false"}.get)
    assert readme_pictures.main([run]) == 2
    assert capsys.readouterr().err == (
        f"error: readme_pictures: expected pictures of the best architecture in {run}, got none; "
        "search again with this version\n"
    )
    monkeypatch.setattr(shutil, "which", {}.get)
    assert readme_pictures.main([run]) == 2
    assert capsys.readouterr().err == (
        "error: readme_pictures: expected one of chromium, chromium-browser, google-chrome, "
        "google-chrome-stable on the PATH, got none; install Chromium\n"
    )


def test_flops_are_those_that_pytorch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for backward in (False, True):
        call = deform.nasfast(PROBLEM).call(backward)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == PROBLEM.flops(backward)


MIXED = mixed.Problem(6, 2, 7, 9)


@pytest.mark.parametrize("name", ["save", "recompute", "grid_sample", "save bfloat16"])
@pytest.mark.parametrize("backward", [False, True], ids=["evaluation", "training"])
def test_mixed_baselines_compute_the_same(name: str, backward: bool) -> None:
    calls, skipped = deform.calls(
        [mixed.EAGER, name], MIXED, backward, mixed.IMPLEMENTATIONS, mixed.OWN
    )
    assert not skipped
    expected, got = calls[mixed.EAGER](), calls[name]()
    assert len(expected) == len(got)
    tolerance = 0.1 if "bfloat16" in name else 1e-3
    for ours, reference in zip(got[:3], expected[:3]):  # output, gradients of state and factors
        error = (ours.float() - reference).norm() / reference.norm()
        assert error < tolerance


def test_flops_of_a_mixed_operation() -> None:
    """Those that PyTorch counts, of ours and of the floor."""
    from torch.utils.flop_counter import FlopCounterMode

    state, factors = torch.randn(2, 6, 7, 9), torch.rand(6)
    for name in ("save", mixed.FLOOR):
        module = mixed.IMPLEMENTATIONS[name](MIXED).module
        with FlopCounterMode(display=False) as counter:
            module(state, factors)
        assert counter.get_total_flops() == MIXED.flops(False) == MIXED.flops(True) / 3


def test_memory_that_a_mixed_operation_keeps() -> None:
    """On meta tensors as on real ones."""
    config, real, meta = SupernetConfig(layers=2, nodes=2, width=4), [], []
    for way in mixed.WAYS:
        options = vars(config) | mixed.WAYS[way]
        for device, sizes in (("cpu", real), ("meta", meta)):
            with torch.device(device):
                net = mixed.Supernet(SupernetConfig(**options), 1)
                net.to(memory_format=torch.channels_last)
            sizes.append(mixed.kept(net, mixed.empty(device, 2, 1, 16, 12)))
    assert meta == pytest.approx(real, rel=0.01)
    assert real[0] > 1.5 * real[1] > 5 * real[2]


def test_bench_mixed_op() -> None:
    """All of it on small sizes, as pytest runs it."""
    code = (
        "import sys; sys.path.insert(0, 'bench'); import mixed_op_baselines as mixed, pytest\n"
        "mixed.CONFIG = (1, 1, 4)\n"
        "mixed.CHANNELS, mixed.BATCH, mixed.SIZE = (4,), 1, 8\n"
        "mixed.Problem.__init__.__defaults__ = (\n"
        "    1, 8, 6, *mixed.Problem.__init__.__defaults__[3:])\n"
        "sys.exit(pytest.main(['-q', '--seconds', '0.01', 'bench/bench_mixed_op.py']))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| C=4, 1x8x6 | 1.00x, " in done.stdout
    assert "| recompute | " in done.stdout


SMALL = candidates.TINY
GENOTYPES = candidates.architectures(5)


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> candidates.Problem:
    return candidates.Problem(SMALL, torch.device("cpu"), tmp_path_factory.mktemp("problem"))


@pytest.fixture(scope="module")
def baseline(problem: candidates.Problem) -> Iterator[candidates.Plain]:
    with contextlib.closing(candidates.Plain(problem)) as baseline:
        yield baseline


@pytest.mark.parametrize("name", GENOTYPES)
def test_the_plain_formulation_trains_the_same_network(
    problem: candidates.Problem, baseline: candidates.Plain, name: str
) -> None:
    """In float32: the same reward, from weights, order, losses, optimizer and averages alike."""
    ours = candidates.Ours(problem, candidates.Variant(candidates.Float32))
    expected, got = (kind(GENOTYPES[name], 3) for kind in (ours, baseline))
    assert got.reward == pytest.approx(expected.reward, rel=1e-3)
    assert got.reward > 0
    for timed in (expected, got):
        assert timed.seconds.keys() == {"build", "stage0_train", "stage0_validate"}
        assert all(seconds > 0 for seconds in timed.seconds.values())


def test_plain_candidates_run_with_the_memory_of_the_c_library() -> None:
    assert not keep_freed_memory({"GLIBC_TUNABLES": candidates.DEFAULT_MEMORY})


def test_weights_of_the_plain_formulation(problem: candidates.Problem) -> None:
    info = problem.encoder.feature_info
    for genotype in GENOTYPES.values():
        torch.manual_seed(5)
        ours = Decoder(genotype, info, 8, SMALL.decoder).state_dict()
        torch.manual_seed(5)
        channels = [tap.channels for tap in info]
        baseline = plain.PlainDecoder(genotype, channels, 8, SMALL.decoder)
        assert {type(m) for m in baseline.modules() if "Conv" in type(m).__name__} == {
            torch.nn.Conv2d
        }
        torch.testing.assert_close(dict(baseline.state_dict()), dict(ours), rtol=0, atol=0)


@pytest.fixture(scope="module")
def reward(problem: candidates.Problem) -> float:
    float32 = candidates.Variant(candidates.Float32)
    return candidates.Ours(problem, float32)(GENOTYPES["arch2"], 3).reward


@pytest.mark.parametrize("name", candidates.ABLATIONS)
def test_what_is_taken_away_costs_time_alone(
    problem: candidates.Problem, reward: float, name: str
) -> None:
    """The reward is the same, but for rounding: here all is in float32."""
    variant = candidates.ABLATIONS[name]
    nchw = "NCHW" in name
    runtime = candidates.ContiguousFloat32 if nchw else candidates.Float32
    ours = candidates.Ours(problem, dataclasses.replace(variant, runtime=runtime))
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
    peaks = harness.Peaks(flops=100, bandwidth=10)
    work = search_cost.Work(200, 10) + search_cost.Work(100, 5) * 2
    assert work == search_cost.Work(400, 20)
    assert work.floor(peaks) == 4
    assert search_cost.Work(1, 100).floor(peaks) == 10
    measured = harness.measure_peaks(
        torch.device("cpu"), torch.float32, 32, lambda call: call() is None or 2.0
    )
    assert measured == harness.Peaks(32**3, 64 * 32 * 32)


def test_candidates_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    order = ""

    def make(name: str, seconds: float) -> Callable[[], Timed]:
        def call() -> Timed:
            nonlocal clock, order
            clock, order = clock + seconds, order + name
            return Timed(0.5, {"build": seconds + len(order)})

        return call

    monkeypatch.setattr(search_cost.time, "perf_counter", lambda: clock)
    cases = {
        "x": {"ours": make("a", 1), "plain": make("b", 2)},
        "y": {"ours": make("c", 1)},
    }
    found = search_cost.in_turn(cases, 11)  # a round takes 4
    assert order == "abcabc"
    assert [timed.total for timed in found["x"]["plain"]] == [4, 7]
    assert search_cost.ratio(found["x"], "plain", "ours") == (4 / 2 + 7 / 5) / 2
    search_cost.in_turn(cases, 0)
    assert order == "abcabcabc"


def test_search_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The whole of it on small sizes."""
    monkeypatch.setattr(Scale, "of", lambda samples, **_: SMALL)
    monkeypatch.setattr(harness, "measure_peaks", lambda *_: harness.Peaks(1e12, 1e10))
    monkeypatch.setattr(mixed, "CONFIG", (1, 1, 4))
    monkeypatch.setattr(mixed, "SIZE", 8)
    for name in list(candidates.ABLATIONS)[1:-1]:
        monkeypatch.delitem(candidates.ABLATIONS, name)
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
    assert case["ratios"].keys() == {"plain", *(f"without: {n}" for n in candidates.ABLATIONS)}
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


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> features.Store:
    """Batches of 8, 8 and 4 samples."""
    return features.Store(tmp_path_factory.mktemp("store"), 20, features.SMALL)


@pytest.mark.parametrize("name", [*features.IMPLEMENTATIONS])
def test_forms_of_features_give_the_same(store: features.Store, name: str) -> None:
    given = features.IMPLEMENTATIONS[name](store)
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
            words = [features.total(store.cache.sample(i)) for i in store.order[0].tolist()]
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


def test_readers_together(store: features.Store) -> None:
    rates = [features.together(store, "batches", n, 0.2) for n in (1, 2)]
    assert min(rates) > 100


def test_a_reader_that_fails(tmp_path: Path) -> None:
    store = features.Store(tmp_path / "absent", 4, features.SMALL)
    with pytest.raises(RuntimeError) as info:
        features.together(store, "torch.save files", 1, 0.1)
    assert str(info.value) == "torch.save files: expected 1 readers, got exit codes [1]"


def test_private_memory_of_a_reader(store: features.Store) -> None:
    alone, reader = (features.private_memory(store, name) for name in (None, "batches"))
    assert 0 < alone < reader < alone + 100 * harness.MIB


def test_bench_feature_cache() -> None:
    """All of it on small sizes, as pytest runs it."""
    code = (
        "import sys; sys.path.insert(0, 'bench')\n"
        "import feature_cache_baselines as features, pytest\n"
        "features.SAMPLES, features.SHAPES = 16, features.SMALL\n"
        "features.REPEATS = 1\n"
        "sys.exit(pytest.main(['-q', '--seconds', '0.1', 'bench/bench_feature_cache.py']))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| memory copy | " in done.stdout
    assert "| DataLoader(2), files | " in done.stdout
    assert " MiB |" in done.stdout


def test_gathers_on_a_device_give_the_same() -> None:
    calls, size = features.gather_calls("cpu", 3, 2, torch.float32, features.SMALL)
    given = {name: call() for name, call in calls.items()}
    assert given.pop("copy").nbytes == size == sum(x.nbytes for x in given["nasfast"])
    torch.testing.assert_close(given["indexing"], given["nasfast"], rtol=0, atol=0)


COMMANDS = ("tyro", "tomli_w", "rich", "docstring_parser", "typeguard", "safetensors", "PIL")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find neither a GPU nor what a machine that is lent for its GPU lacks."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {(*COMMANDS, 'pytest', 'hypothesis')}:\n"
        "            raise ModuleNotFoundError(f'blocked: {name}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("bare")
def test_each_part_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'bench'); import gpu_report\n"
        "print(*(gpu_report.main(['--out', sys.argv[1], '--only', p]) for p in gpu_report.PARTS))"
    )
    done = python(code, str(tmp_path / "out"))
    count = len(gpu_report.PARTS)
    assert done.stdout.split() == ["2"] * count
    assert done.stderr.splitlines() == count * [
        f"gpu_report: expected a CUDA device, but torch {torch.__version__} finds none; run it on "
        "a machine with a GPU and a torch built for CUDA, or with --rehearse"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("bare")
def test_gpu_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Parts on the CPU where packages are missing; a rerun of one keeps the others."""
    options = ["--rehearse", "--seconds", "0.01", "--out", str(tmp_path / "out"), "--only"]
    measured = ("smoke", "deform_conv2d", "mixed_op", "gather")
    assert gpu_report.main([*options, *measured, "tests", "candidate", "search"]) == 0
    report = json.loads((tmp_path / "out" / "rehearsal.json").read_text())
    for name in measured:
        assert report[name]["status"] == "ok"
        assert report[name]["machine"].startswith(harness.machine_line().partition(",")[0])
    install = "(without a network: --no-index --find-links FOLDER, where its wheels are)"
    for name, modules, packages in (
        ("tests", "pytest, hypothesis", "pytest hypothesis"),
        ("candidate", "safetensors, PIL", "safetensors pillow"),
        ("search", "tyro, rich, tomli_w, safetensors, PIL", "tyro rich tomli-w safetensors pillow"),
    ):
        expected = f"skipped: needs {modules}; pip install {packages} {install}"
        assert report[name]["status"] == expected
    found = report["deform_conv2d"]["result"]["1,4,6,5,4 bfloat16, offsets of 1.0 px"]
    assert len(found["forward and backward"]["rows"]["nasfast"]["times"]) >= 7
    text = (tmp_path / "out" / "rehearsal.md").read_text()
    assert text in capsys.readouterr().out
    assert "| 1,4,6,5,4 bfloat16, offsets of 1.0 px | 1.00x, " in text
    assert "| 3,2 bfloat16 | 1.00x, " in text

    late = dataclasses.replace(gpu_report.PARTS["gather"], limit=0.1)
    monkeypatch.setitem(gpu_report.PARTS, "gather", late)
    assert gpu_report.main([*options, "gather"]) == 1
    changed = json.loads((tmp_path / "out" / "rehearsal.json").read_text())
    assert changed.pop("gather")["status"] == "stopped after 0 s"
    assert changed == {name: found for name, found in report.items() if name != "gather"}


def test_a_case_that_fails_does_not_lose_the_others(tmp_path: Path) -> None:
    run = gpu_parts.Run("cpu", 1, True, tmp_path / "result", tmp_path / "log")

    def broken() -> dict[str, Any]:
        raise ValueError("no such shape\nsecond line")

    with pytest.raises(RuntimeError, match=r"^1 of 2 cases failed: a$"):
        run.cases({"a": broken, "b": lambda: {"ms": 3, "tables": {"times": {"ours": "3 ms"}}}})
    found = json.loads(run.file.read_text())
    assert found["result"]["a"] == {"failed": "ValueError: no such shape"}
    assert found["result"]["b"]["ms"] == 3
    part = found | {"status": "exit code 1", "seconds": 1.0, "last line": "RuntimeError"}
    text = gpu_report.markdown({"gather": part})
    assert "- gather, a: ValueError: no such shape" in text
    assert "| b | 3 ms |" in text


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Commands end at Ctrl-C, also where a shell runs the tests in the background and ignores it,
    which commands would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_command_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_parts.Run("cpu", 1, True, tmp_path / "result", tmp_path / "log")
    run.log.write_text("begun\nthe end\n")
    assert run.command(["true"], 9) == "the end"
    assert run.command(["sleep", "60"], 0.1, ends=False) == "the end"
    for words, message in (
        (["false"], "false: exit code 1; the end"),
        (["sleep", "60"], "sleep did not end within 0 s"),
    ):
        with pytest.raises(RuntimeError) as info:
            run.command(words, 0.1 if words[0] == "sleep" else 9)
        assert str(info.value) == message
    monkeypatch.setenv("PATH", "")
    with pytest.raises(gpu_parts.Skip, match=r"^needs no-tool; it comes with the CUDA toolkit$"):
        gpu_parts.program("no-tool", "the CUDA toolkit")


PART = """
import subprocess
child = subprocess.Popen(["sleep", "60"])
print(child.pid, flush=True)
child.wait()
"""
WATCHING = """
import sys
sys.path.insert(0, "bench")
import gpu_report
gpu_report.end_with_parent()
"""
REPORT = """
import pathlib, sys
sys.path.insert(0, "bench")
import gpu_report
gpu_report.__file__ = sys.argv[1]
gpu_report.start_part("gather", [], pathlib.Path(sys.argv[2]), 90)
"""


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_nothing_of_a_part_survives_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, file = tmp_path / "part.py", tmp_path / "report.json"
    script.write_text(PART)
    monkeypatch.setattr(gpu_report, "__file__", str(script))
    assert gpu_report.start_part("gather", [], file, 2)["status"] == "stopped after 2 s"
    assert gone(int(file.with_suffix(".gather.log").read_text()))


def test_nothing_of_a_part_survives_a_kill_of_the_report(tmp_path: Path) -> None:
    script, file = tmp_path / "part.py", tmp_path / "report.json"
    script.write_text(WATCHING + PART)
    log = file.with_suffix(".gather.log")
    report = subprocess.Popen(
        [sys.executable, "-c", REPORT, script, file], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    while not (log.exists() and log.read_text().endswith("\n")):
        assert report.poll() is None
        time.sleep(0.05)
    report.kill()
    report.wait()
    assert gone(int(log.read_text()))


def test_a_benchmark_requires_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = harness.require_kernels(deform.nasfast(PROBLEM).call(True), "cpu")
    assert entries == {"deform_conv2d_forward", "deform_conv2d_backward"}
    start = "expected kernels of nasfast on cpu, got "
    with pytest.raises(RuntimeError) as info:
        harness.require_kernels(deform.convolution(PROBLEM).call(True), "cpu")
    remedy = "; build with NASFAST_CUDA=on"
    assert str(info.value) == f"{start}a call that runs none{remedy}"
    monkeypatch.setattr(harness, "backends", lambda: {"mixed_op": {"cpu": "reference: no nvcc"}})
    with pytest.raises(RuntimeError) as info:
        harness.require_kernels(deform.nasfast(PROBLEM).call(False), "cpu")
    assert str(info.value) == f"{start}mixed_op: reference: no nvcc{remedy}"


@pytest.mark.parametrize("scene", bench_nms.SCENES)
def test_the_plain_loop_suppresses_the_same(scene: str) -> None:
    boxes, scores, labels = found = bench_nms.SCENES[scene](500)
    kept = bench_nms.loop(boxes[0], scores[0], labels[0], bench_nms.THRESHOLD)
    ours = nms(*found, bench_nms.THRESHOLD, None)[0]
    assert ours[ours >= 0].tolist() == kept.tolist()


def test_a_separable_convolution_and_its_modules() -> None:
    """The bench compares what computes the same."""
    case = bench_sep_conv.Case(2, 5, 9, 3, half=False)
    calls = bench_sep_conv.calls(case)
    torch.testing.assert_close(calls["nasfast"](), calls["modules"](), rtol=1e-3, atol=1e-4)
    found = bench_sep_conv.measure(case, 3, bench_sep_conv.thread_clock)
    assert [*found] == ["modules, ms", "nasfast, ms", "of the modules"]
    assert float(str(found["of the modules"]).rstrip("x")) > 0


# What strategies find


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rewards of three searches whose levels differ: less for pooling, more for later taps."""
    space, rng, rows = FastNASSpace(), random.Random(0), []
    for index in range(90):
        seed = index % 80 % 3
        genotype = space.sample(rng) if index < 80 else space.decode(rows[index - 80]["choices"])
        features = space.features(genotype)
        taps = sum(i for pair in genotype.connections for i in pair)
        worth = 0.01 * taps + 0.1 * features["share that sees"]
        rows.append(
            {
                "choices": list(space.encode(genotype)),
                "seed": seed,
                "index": index,
                "uniform": True,
                "reward": worth + 0.1 * seed + rng.gauss(0, 0.003),
                "params": 1,
                "macs": 1 + taps,
                "seconds": 1.0,
            }
        )
    path: Path = tmp_path_factory.mktemp("table") / "table.json"
    path.write_text(json.dumps({"space": "fast_nas", "rows": rows}))
    return path


def test_a_surrogate_predicts_what_it_has_not_seen(table: Path) -> None:
    found = search_quality.fit(table, repeats=1)
    assert found["Spearman"] > 0.4
    assert found["Spearman of the multiply-adds"] > 0.8
    assert (found["evaluations"], found["architectures"]) == (90, 80)
    assert 0.002 < found["standard deviation of the noise"] < 0.005


def test_replays_of_strategies(table: Path) -> None:
    settings = SamplingSettings(predictor=PredictorConfig(initial=4, pool=60))
    run = functools.partial(search_quality.replay, table, ["predictor"], 24, 8, 4, settings)
    found = run()
    assert found == run()
    random_search, predictor = (found["strategies"][name] for name in ("random", "predictor"))
    assert random_search["best true reward after"][24]["lead"] == [0, 0]
    assert sum(predictor["best true reward after"][24]["lead"]) > 0
    assert 4 < predictor["evaluations to the goal"]["median"] <= 24


def test_curves_of_a_replay() -> None:
    replay = search_quality.Replay(RandomSearch(FastNASSpace(), 0), np.random.default_rng(0))
    for true in (1.0, 3.0, 2.0):
        replay.tell(replay.ask(FastNASSpace()), true, 10.0 * true, noise=0.0)
    curves = [curve.tolist() for curve in replay.curves(3)]
    assert curves == [[1, 3, 3], [1, 3, 3], [10, 30, 20], [1, 3, 2]]


def test_a_front_on_the_surrogate(table: Path) -> None:
    settings = SamplingSettings(predictor=PredictorConfig(initial=4, pool=40))
    found = search_quality.replay_fronts(table, ["predictor"], 12, 2, 4, settings)
    volumes = found["hypervolume after"]
    assert volumes["random"][12]["lead"] == [0, 0]
    assert 0 < volumes["random"][12]["mean"] < 1
    assert volumes["predictor"][12]["mean"] > 0


def test_fronts_of_runs(tmp_path: Path) -> None:
    def run(seed: int, shift: float) -> Path:
        config = {"objective": ["score", "params"], "seed": seed}
        with Study.create(tmp_path, "made", "run", config, {}) as study:
            for index in range(6):
                reward, costs = 0.1 * index + shift, {"params": 2.0**index, "macs": 1.0}
                found = Evaluation({"stage0": reward}, {}, costs, None, {}, "stage0")
                form = {"index": index}
                study.append(Record(index, form, form, 0, found, None, "2026"))
        return study.path

    pairs = [(run(seed, 0.05 + seed / 100), run(seed, 0.0)) for seed in range(3)]
    ours, theirs = zip(*pairs, strict=True)
    found = search_quality.fronts(ours, theirs)
    low, high = found["95 % interval of the lead"]
    assert 0 < low < found["lead"] < high
    with pytest.raises(SystemExit, match=r"two seeds or more on both sides, got \[0\] and \[0, 1"):
        search_quality.fronts(ours[:1], theirs)
    same = search_quality.fronts(theirs, theirs)
    assert same["lead"] == 0


def test_recorded_evaluations(tmp_path: Path) -> None:
    """Of the committed tables: each is of its space, by uniform draws for the most part."""
    for path in (Path(search_quality.__file__).parent / "search_tables").glob("*.json"):
        space, rows = search_quality.read(path)
        assert len(rows) > 100
        assert all(space.encode(space.decode(row["choices"])) for row in rows)
        assert 0.003 < search_quality.noise_of(space, rows) < 0.03


def test_recording_continues_and_takes_runs(tmp_path: Path) -> None:
    stage0 = "--stage0.samples 8 --stage0.epochs 1 --stage0.crop 32 --stage0.shorter-side 32"
    others = "--workers 1 --stage1.epochs 0 --stage0.batch-size 8 --decoder.agg-size 4"
    flags = [*stage0.split(), *others.split()]
    path = tmp_path / "table.json"
    search_quality.record("segmentation", path, 1, (1, 1), flags)
    first = json.loads(path.read_text())["rows"]
    search_quality.record("segmentation", path, 2, (1, 2), flags)
    rows = json.loads(path.read_text())["rows"]
    assert rows[0] == first[0]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert rows[0]["choices"] == rows[2]["choices"] != rows[1]["choices"]
    study = nasfast.search(
        "segmentation",
        runs=tmp_path,
        budget=2,
        batch=1,
        strategy="random",
        **{"stage1.epochs": 0, "stage0.samples": 8, "stage0.epochs": 1, "stage0.crop": 32},
        **{"stage0.shorter_side": 32, "stage0.batch_size": 8, "decoder.agg_size": 4},
    )
    search_quality.add(path, [study.path])
    assert len(json.loads(path.read_text())["rows"]) == 3  # the same two, and the repeated one


# A denoiser that nobody searched


def test_dncnn_has_its_published_size_and_predicts_noise() -> None:
    model = dncnn.DnCNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 556_097
    images = torch.rand(2, 1, 12, 16)
    noise = model.noise(images)
    assert torch.equal(model.eval()(images), images - model.noise(images))
    assert noise.shape == images.shape


def test_dncnn_is_trained_and_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ["--data", "synthetic", "--steps", "2", "--batch-size", "1", "--crop", "16"]
    found = tmp_path / "found.json"
    flags += ["--threads", str(torch.get_num_threads()), "--json", str(found)]
    monkeypatch.setattr(sys, "argv", ["dncnn.py", *flags])
    monkeypatch.setattr(dncnn, "DnCNN", functools.partial(dncnn.DnCNN, depth=3, width=4))
    dncnn.main()
    result = json.loads(found.read_text())
    assert result["recipe"]["steps"] == 2
    assert 5 < result["scores"]["test"]["psnr"] < 60
