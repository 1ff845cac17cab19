"""What bench/gpu_report.py does: a function for each part, which runs in a process of its own.

A part imports what it needs when it runs: kernels, their tests and benchmarks need no package
beside torch, numpy and those of the baselines.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}
DIRECTIONS = {"forward": False, "forward and backward": True}
# of the published search for denoising: 100 epochs of 13 batches, the architecture in the last 80
STEPS = {"weights": 1300, "architecture": 1040}


class Skip(Exception):
    """The part cannot run here; says what it needs."""


@dataclass
class Run:
    """How a part runs, and what it found."""

    device: str
    seconds: float
    """Of each case, about."""
    rehearse: bool
    """Small sizes, to try the report itself."""
    file: Path
    """JSON of the result so far."""
    log: Path
    """Where standard output and error go."""
    machine: str = ""
    result: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By case; its "tables" (a row of each), "text" and "notes" are shown in the short form."""

    def save(self) -> None:
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps({"machine": self.machine, "result": self.result}))
        part.replace(self.file)

    def sizes(self, full: Iterable[Any], small: Iterable[Any]) -> Iterable[Any]:
        return small if self.rehearse else full

    def cases(self, cases: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
        """Measures every case; one that fails does not lose the others."""
        failed = []
        for name, measure in cases.items():
            print(name, flush=True)
            try:
                self.result[name] = measure()
            except Exception as error:
                traceback.print_exc()
                failed.append(name)
                self.result[name] = {"failed": first_line(error)}
            self.save()
            if failed and self.device == "cuda":
                torch.cuda.synchronize()  # an error that the device does not recover from ends it
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(cases)} cases failed: {', '.join(failed)}")

    def command(
        self, words: Sequence[str | Path], limit: float, *, ends: bool = True, **variables: str
    ) -> str:
        """Runs a command in the checkout, in this process group: the last line of its output.

        Args:
            words: the command.
            limit: seconds; then it is interrupted as by Ctrl-C.
            ends: whether that is an error.
            variables: of the environment.

        Raises:
            RuntimeError: it failed.
        """
        print("$", shlex.join(map(str, words)), flush=True)
        path = [ROOT, ROOT / "bench", *filter(None, [os.environ.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(map(str, path))
        process = subprocess.Popen(
            words, cwd=ROOT, env=os.environ | variables, stdin=subprocess.DEVNULL
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
            if ends:
                raise RuntimeError(f"{words[0]} did not end within {limit:.0f} s") from None
        else:
            if process.returncode:
                raise RuntimeError(f"{words[0]}: exit code {process.returncode}; {self.last()}")
        return self.last()

    def last(self) -> str:
        """The last line of the log."""
        return self.log.read_text(errors="replace").strip().rpartition("\n")[2]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def program(name: str, source: str) -> str:
    """Path of a program, looked for in CUDA's folder as well."""
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if path is None:
        raise Skip(f"needs {name}; it comes with {source}")
    return path


def set_precision(precision: str) -> torch.dtype:
    tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # the best of cuDNN
    return PRECISIONS[precision]


def build(run: Run) -> None:
    """versions, then pip install with the CUDA kernels for this device"""
    for name, words in {
        "nvidia-smi": ["nvidia-smi"],
        "nvcc": ["nvcc", "--version"],
        "cmake": ["cmake", "--version"],
    }.items():
        if path := shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin"):
            run.command([path, *words[1:]], 30)
        else:
            print(f"{name}: not found", flush=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["CUDA of torch"] = str(torch.version.cuda)
    run.result["versions"] = versions
    print(versions, flush=True)
    if run.rehearse:
        return
    program("nvcc", "the CUDA toolkit")
    major, minor = torch.cuda.get_device_capability()
    archs = os.environ.get("NASFAST_CUDA_ARCHS", f"{major}{minor}{'a' * (major == 9)}-real")
    options = ["--no-build-isolation", "--no-deps", "-v", "."]
    run.command(
        [sys.executable, "-m", "pip", "install", *options],
        220,
        NASFAST_CUDA="on",
        NASFAST_CUDA_ARCHS=archs,
    )


TOLERANCES = {"float32": 1e-4, "tf32": 3e-3, "bfloat16": 2e-2, "float16": 4e-3}


def smoke(run: Run) -> None:
    """what runs each op, and each large tile in each precision against the reference"""
    import deform_conv2d_baselines as deform
    import harness

    from nasfast.ops import deform_conv2d_reference

    for op, by_device in harness.backends().items():
        print(f"{op}: {by_device.get(run.device)}", flush=True)

    def compare(precision: str, channels: int, out_channels: int, size: int) -> dict[str, Any]:
        dtype = set_precision(precision)
        sizes = (4, channels, size, size, out_channels)
        problem = deform.Problem(*sizes, dtype=dtype, device=run.device, spread=2.0)
        got: list[torch.Tensor] = []
        call = deform.nasfast(problem).call(True)
        entries = harness.require_kernels(lambda: got.extend(call()), run.device)
        set_precision("float32")

        def reference(x: Any, offset: Any, weight: Any, mask: Any) -> Any:
            return deform_conv2d_reference(x, offset, weight, padding=1, mask=mask)

        tensors = deform.Tensors(*(tensor.float() for tensor in problem.tensors()))
        expected = deform.Implementation(tensors, reference).call(True)()
        errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(got, expected)]
        if not max(errors) < TOLERANCES[precision]:
            raise AssertionError(f"expected errors below {TOLERANCES[precision]}, got {errors}")
        cells = {"largest relative error": f"{max(errors):.1e}"}
        return {"errors": errors, "entries": sorted(entries), "tables": {"smoke": cells}}

    def case(precision: str, channels: int, out_channels: int) -> Callable[[], dict[str, Any]]:
        return lambda: compare(precision, channels, out_channels, 8 if run.rehearse else 64)

    shapes = [(c, o) for c in (72, 256) for o in (64, 128, 256, 320)]
    run.cases(
        {
            f"{c} to {o}, {precision}": case(precision, c, o)
            for c, o in run.sizes(shapes, [(6, 4)])
            for precision in PRECISIONS
            if run.device == "cuda" or precision != "float16"
        }
    )


def tests(run: Run) -> None:
    """pytest -m cuda"""
    files = [
        path.relative_to(ROOT)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.parent.name == "ops" or "mark.cuda" in path.read_text()
    ]
    options = ["-q", "-m", "cuda", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    try:
        run.command([sys.executable, "-m", "pytest", *options, *files], 240)
    finally:
        run.result["pytest"] = {"tables": {"summary": {"": run.last()}}}
        run.save()


def every_op(device: str) -> None:
    """Every kernel once, on small shapes whose tiles are cut off."""
    import deform_conv2d_baselines as deform
    import feature_cache_baselines as features
    import harness
    import mixed_op_baselines as mixed

    for dtype in (torch.float32, torch.bfloat16):
        problem = deform.Problem(2, 10, 9, 11, 24, dtype=dtype, device=device)
        operation = mixed.Problem(10, 2, 9, 11, dtype=dtype, device=device)
        gathers, _ = features.gather_calls(device, 3, 2, dtype, features.SMALL)
        for call in (
            deform.nasfast(problem).call(True),
            *(mixed.IMPLEMENTATIONS[way](operation).call(True) for way in ("save", "recompute")),
            mixed.save(operation).call(False),
            gathers["nasfast"],
        ):
            print(*sorted(harness.require_kernels(call, device)), flush=True)


def sanitizer(run: Run) -> None:
    """compute-sanitizer's memcheck, racecheck and synccheck on every kernel"""
    code = [sys.executable, "-c", f"import gpu_parts; gpu_parts.every_op({run.device!r})"]
    if run.rehearse:
        run.command(code, 120)
        return
    tool = program("compute-sanitizer", "the CUDA toolkit")

    def check(name: str) -> Callable[[], dict[str, Any]]:
        options = ["--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        # no cache of PyTorch's, so that each tensor is an allocation of its own
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

        def of_case() -> dict[str, Any]:
            last = run.command([tool, *options, *code], 75, **variables)
            return {"tables": {"compute-sanitizer": {"": last}}}

        return of_case

    run.cases({name: check(name) for name in ("memcheck", "racecheck", "synccheck")})


def time_calls(
    run: Run, calls: Mapping[str, Callable[[], Any]], graphs: bool = True, least: int = 7
) -> tuple[Any, dict[str, int], dict[str, str]]:
    """Times, bytes beyond the results, and the reasons why a call is not in a CUDA graph."""
    import harness

    memory, reasons, clock = {}, {}, harness.clock_of(torch.device(run.device))
    if run.device == "cuda":
        memory = {name: harness.cuda_extra_memory(call) for name, call in calls.items()}
        if graphs:
            calls, reasons = harness.cuda_graphs(calls)
    rounds = harness.Rounds(calls, clock)
    for _ in range(rounds.warm_up(run.seconds, least)):
        rounds.time(*calls)
    return rounds, memory, reasons


def kernels(run: Run, call: Callable[[], Any], most: int = 12) -> dict[str, Any]:
    """Launches and milliseconds of the kernels in a call: all, and the longest."""
    import harness

    times = harness.kernel_times(call) if run.device == "cuda" else {}
    if not times:
        return {}
    launches, ms = (sum(values) for values in zip(*times.values()))
    return {"launches": launches, "ms": ms, "longest": dict(list(times.items())[:most])}


def measure(
    run: Run,
    problem: Any,
    names: Sequence[str],
    ours: str,
    base: str,
    implementations: Mapping[str, Callable[[Any], Any]],
    own: Sequence[str],
) -> dict[str, Any]:
    """Both directions of an op beside its baselines, as multiples of ``base``."""
    import deform_conv2d_baselines as deform
    import harness

    result: dict[str, Any] = {"tables": {}, "notes": []}
    for direction, backward in DIRECTIONS.items():
        calls, skipped = deform.calls(names, problem, backward, implementations, own)
        harness.require_kernels(calls[ours], run.device)
        profile = kernels(run, calls[ours])
        rounds, memory, reasons = time_calls(run, calls)
        rows = harness.rows(rounds, base, problem.flops(backward), memory)
        others = [name for name in calls if name not in (ours, deform.FLOOR)]
        speeds = {f"speed over {name}": rounds.multiple(name, ours) for name in others}
        result[direction] = {
            "rows": {name: asdict(row) for name, row in rows.items()},
            "kernels": profile,
            **speeds,
        }
        cells = {name: str(row) for name, row in rows.items()}
        result["tables"][direction] = cells | {k: f"{v:.2f}x" for k, v in speeds.items()}
        result["notes"] += [f"{name} skipped: {reason}" for name, reason in skipped.items()]
        result["notes"] += [f"{name} without a graph: {why}" for name, why in reasons.items()]
    return result


def deform_conv2d(run: Run) -> None:
    """ceilings of the device, then deform_conv2d beside torchvision and a plain convolution"""
    import deform_conv2d_baselines as deform
    import harness

    device = torch.device(run.device)
    names = (deform.FLOOR, "nasfast", "torchvision", "torchvision float32")

    def ceiling(precision: str) -> Callable[[], dict[str, Any]]:
        def of_case() -> dict[str, Any]:
            size = 64 if run.rehearse else None
            peaks = harness.measure_peaks(device, set_precision(precision), size)
            cells = {"TFLOP/s": f"{peaks.flops / 1e12:.3g}", "GB/s": f"{peaks.bandwidth / 1e9:.0f}"}
            return asdict(peaks) | {"tables": {"ceilings": cells}}

        return of_case

    def case(sizes: Sequence[int], precision: str, spread: float) -> Callable[[], dict[str, Any]]:
        def of_case() -> dict[str, Any]:
            dtype = set_precision(precision)
            problem = deform.Problem(*sizes, dtype=dtype, device=run.device, spread=spread)
            here = names if dtype != torch.float32 else names[:-1]
            kinds = deform.IMPLEMENTATIONS
            return measure(run, problem, here, "nasfast", deform.FLOOR, kinds, names[:2])

        return of_case

    shapes = [(4, 64, 64, 64, 64), (2, 256, 25, 34, 256), (8, 256, 100, 136, 256)]
    precisions = ("bfloat16", "tf32", "float32")
    run.cases(
        {f"ceiling {precision}": ceiling(precision) for precision in precisions}
        | {
            f"{','.join(map(str, sizes))} {precision}, offsets of {spread} px": case(
                sizes, precision, spread
            )
            for sizes in run.sizes(shapes, [(1, 4, 6, 5, 4)])
            for precision in run.sizes(precisions, ["bfloat16"])
            for spread in run.sizes((0.0, 1.0, 4.0), [1.0])
        }
    )


def profiled(device: str, *sizes: int) -> None:
    """Each kernel of deform_conv2d once, in bfloat16."""
    import deform_conv2d_baselines as deform

    deform.nasfast(deform.Problem(*sizes, dtype=torch.bfloat16, device=device)).call(True)()


def ncu(run: Run) -> None:
    """Nsight Compute's full set of each kernel of deform_conv2d, in the log"""
    sizes = (1, 4, 6, 5, 4) if run.rehearse else (8, 256, 100, 136, 256)
    code = f"import gpu_parts; gpu_parts.profiled({run.device!r}, *{sizes})"
    tool: list[str] = []
    if not run.rehearse:
        tool = [program("ncu", "the CUDA toolkit"), "--set", "full"]
        tool += ["--kernel-name-base", "demangled", "-k", "regex:nasfast"]
    run.command([*tool, sys.executable, "-c", code], 220)


def mixed_op(run: Run) -> None:
    """a mixed operation beside the eager formulation"""
    import mixed_op_baselines as mixed

    names = (mixed.FLOOR, mixed.EAGER, "save", "recompute", "grid_sample")

    def case(sizes: Sequence[int], precision: str) -> Callable[[], dict[str, Any]]:
        def of_case() -> dict[str, Any]:
            dtype = set_precision(precision)
            problem = mixed.Problem(*sizes, dtype=dtype, device=run.device)
            kinds = mixed.IMPLEMENTATIONS
            return measure(run, problem, names, "save", mixed.EAGER, kinds, mixed.OWN)

        return of_case

    shapes = [(channels, 12, 64, 64) for channels in mixed.CHANNELS]
    run.cases(
        {
            f"{','.join(map(str, sizes))} {precision}": case(sizes, precision)
            for sizes in run.sizes(shapes, [(4, 1, 6, 5)])
            for precision in run.sizes(("bfloat16", "tf32", "float32"), ["bfloat16"])
        }
    )


def supernet(run: Run) -> None:
    """the halves of a search step of the published supernet, launched and as CUDA graphs"""
    import harness
    import mixed_op_baselines as mixed

    sizes = (1, 1, 4, 2, 8) if run.rehearse else (*mixed.CONFIG, mixed.BATCH, mixed.SIZE)
    *config, batch, size = sizes

    def halves(precision: str, way: str) -> dict[str, Callable[[], Any]]:
        dtype = set_precision(precision)
        return mixed.search_calls(way, config, batch, size, run.device, dtype)

    def case(precision: str, way: str, graphs: bool) -> Callable[[], dict[str, Any]]:
        def of_case() -> dict[str, Any]:
            calls = halves(precision, way)
            if way != mixed.EAGER:
                harness.require_kernels(calls["weights"], run.device)
            rounds, memory, reasons = time_calls(run, calls, graphs, least=3)
            seconds = {name: statistics.median(times) for name, times in rounds.times.items()}
            minutes = sum(seconds[name] * STEPS[name] for name in STEPS) / 60
            cells = {f"{name}, ms": f"{1e3 * value:.0f}" for name, value in seconds.items()}
            cells["whole search, min"] = f"{minutes:.1f}"
            return {
                "seconds": seconds,
                "whole search, minutes": minutes,
                "extra MiB": {name: size / harness.MIB for name, size in memory.items()},
                "tables": {"half steps": cells},
                "notes": [f"{name} without a graph: {why}" for name, why in reasons.items()],
            }

        return of_case

    def profile(precision: str, way: str, half: str) -> Callable[[], dict[str, Any]]:
        def of_case() -> dict[str, Any]:
            call = halves(precision, way)[half]
            call()
            found = kernels(run, call, most=30)
            if not found:  # on a CPU
                return {}
            cells = {"kernels": f"{found['launches']} in {found['ms']:.0f} ms"}
            return {"kernels": found, "tables": {"kernels of a half step": cells}}

        return of_case

    ways = [
        *(("bfloat16", way, graphs) for way in ("save", "recompute") for graphs in (True, False)),
        *((precision, "save", True) for precision in ("tf32", "float32")),
        ("bfloat16", mixed.EAGER, False),
    ]
    name = ",".join(map(str, sizes))
    run.cases(
        {
            f"{name} {precision}, {way}{', graphs' if graphs else ''}": case(precision, way, graphs)
            for precision, way, graphs in run.sizes(ways, [("bfloat16", "save", False)])
        }
        | {f"{name} bfloat16, save, weights": profile("bfloat16", "save", "weights")}
    )


def gather(run: Run) -> None:
    """batches from samples that lie on the device"""
    import feature_cache_baselines as features
    import harness

    def case(samples: int, batch: int, precision: str) -> Callable[[], dict[str, Any]]:
        def of_case() -> dict[str, Any]:
            dtype = set_precision(precision)
            shapes = features.SMALL if run.rehearse else features.SHAPES
            calls, size = features.gather_calls(run.device, samples, batch, dtype, shapes)
            harness.require_kernels(calls["nasfast"], run.device)
            rounds, memory, reasons = time_calls(run, calls)
            cells = {
                name: f"{rounds.multiple(name, 'copy'):.2f}x, {1e3 * median:.3f} ms, "
                f"{2 * size / median / 1e9:.0f} GB/s"
                for name, times in rounds.times.items()
                for median in [statistics.median(times)]
            }
            return {
                "bytes": size,
                "extra bytes": memory,
                "times": rounds.times,
                "tables": {"as multiples of a copy of the same bytes": cells},
                "notes": [f"{name} without a graph: {why}" for name, why in reasons.items()],
            }

        return of_case

    run.cases(
        {
            f"{samples},{batch} {precision}": case(samples, batch, precision)
            for samples, batch in run.sizes([(2048, 64), (2048, 8)], [(3, 2)])
            for precision in ("bfloat16", "float16", "float32")
        }
    )


class Replays:
    """Replays of recorded training steps while this is entered."""

    def __init__(self, run: Run, profile: bool) -> None:
        self._run, self._profile = run, profile
        self._events: list[tuple[Any, Any]] = []
        self.kernels: dict[str, Any] = {}
        """Of the first one, if ``profile``."""

    def __enter__(self) -> Replays:
        from nasfast.training.graphs import CudaGraph

        repeat = CudaGraph.repeat

        def watched(graph: CudaGraph) -> None:
            if self._profile and not self.kernels:
                self.kernels = kernels(self._run, lambda: repeat(graph))
                return
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            repeat(graph)
            end.record()
            self._events.append((start, end))

        self._patch = mock.patch.object(CudaGraph, "repeat", watched)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()

    @property
    def ms(self) -> float | None:
        """Median of those that were not profiled; None: there were none."""
        times = [start.elapsed_time(end) for start, end in self._events]
        return statistics.median(times) if times else None


def candidate(run: Run) -> None:
    """a candidate of Fast NAS on 1,000 samples: time of a step, replays, kernels of one"""
    import candidates
    import harness

    scale = candidates.TINY if run.rehearse else candidates.Scale.of(1000)
    title = f"{scale.samples} samples, {scale.steps} steps"
    with tempfile.TemporaryDirectory() as folder:
        problem = candidates.Problem(scale, torch.device(run.device), Path(folder))
        found: list[Any] = []

        def features() -> dict[str, Any]:
            start = time.perf_counter()
            found.append(candidates.Ours(problem, with_files=False))
            seconds = time.perf_counter() - start
            cells = {"seconds": f"{seconds:.1f}"}
            return {"seconds": seconds, "tables": {"features of the encoder": cells}}

        def first() -> dict[str, Any]:
            start = time.perf_counter()
            harness.require_kernels(lambda: found[0](candidates.CHEAP, 0), run.device)
            seconds = time.perf_counter() - start
            return {"seconds": seconds, "tables": {title: {"seconds": f"{seconds:.1f}"}}}

        def case(genotype: Any, profile: bool = False) -> Callable[[], dict[str, Any]]:
            def of_case() -> dict[str, Any]:
                with Replays(run, profile) as replays:
                    timed = found[0](genotype, 1)
                cells = {"seconds": f"{timed.total:.1f}", "reward": f"{timed.reward:.3f}"}
                for stage, seconds in timed.seconds.items():
                    cells[f"{stage}, s"] = f"{seconds:.2f}"
                ms = 1e3 * timed.seconds["stage0_train"] / scale.steps
                cells["ms of a step"] = f"{ms:.2f}"
                if replays.ms is not None:
                    cells["ms of a replay"] = f"{replays.ms:.2f}"
                if replays.kernels:
                    launches, ms = replays.kernels["launches"], replays.kernels["ms"]
                    cells["kernels of a replay"] = f"{launches} in {ms:.2f} ms"
                result = asdict(timed) | {"replay ms": replays.ms, "kernels": replays.kernels}
                return result | {"tables": {title: cells}}

            return of_case

        genotypes = candidates.architectures(1 if run.rehearse else 3)
        name, genotype = next(iter(genotypes.items()))
        run.cases(
            {"features": features, "skips alone, the first of the process": first}
            | {name: case(genotype) for name, genotype in genotypes.items()}
            | {f"{name} again": case(genotype), f"{name}, profiled": case(genotype, profile=True)}
        )


def search_cost(run: Run) -> None:
    """bench/search_cost.py: a candidate of Fast NAS beside the plain formulation"""
    few = ["--samples", "1000", "--candidates", "1", "--seconds", "1"]
    methods = [] if run.rehearse else ["segmentation", *few]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cost.json")
        script = [sys.executable, "bench/search_cost.py", "--device", run.device]
        run.command([*script, "--json", file, "--methods", *methods], 460)
        text = file.with_suffix(".md").read_text()
        run.result["search_cost"] = json.loads(file.read_text()) | {"text": text}


def search(run: Run, method: str = "segmentation", limit: float = 280) -> None:
    """a search for segmentation with two workers"""
    words = [sys.executable, "-m", "nasfast.search", method]
    with tempfile.TemporaryDirectory() as folder:
        ends = method == "segmentation"
        own = ["--workers", "2", "--budget", "4"] if ends else ["--strategy", "darts"]
        flags = ["--device", run.device, "--runs", folder, *own]
        run.command([*words, *(["--help"] if run.rehearse else flags)], limit, ends=ends)


def restoration(run: Run) -> None:
    """a search for restoration by gradient, interrupted after 160 seconds"""
    search(run, "restoration", 160)


@dataclass(frozen=True)
class Part:
    run: Callable[[Run], None]
    limit: float
    """Seconds."""
    needs: tuple[str, ...] = ()
    """Modules beside those of kernels."""


COMMANDS = ("tyro", "rich", "tomli_w", "safetensors", "PIL")
# in the order in which a first session on a new device wants them
PARTS = {
    "build": Part(build, 300, ("pip", "setuptools", "pybind11")),
    "smoke": Part(smoke, 180),
    "tests": Part(tests, 260, ("pytest", "hypothesis")),
    "sanitizer": Part(sanitizer, 260),
    "deform_conv2d": Part(deform_conv2d, 470),
    "ncu": Part(ncu, 240),
    "mixed_op": Part(mixed_op, 300),
    "supernet": Part(supernet, 300),
    "gather": Part(gather, 180),
    "candidate": Part(candidate, 300, ("safetensors", "PIL")),
    "search_cost": Part(search_cost, 470, ("safetensors", "PIL")),
    "search": Part(search, 300, COMMANDS),
    "restoration": Part(restoration, 200, COMMANDS),
}
