"""What a search costs on this machine: its arithmetic, ours, and the plain formulation.

    python bench/search_cost.py [--methods segmentation restoration] [--json search_cost.json]
    python bench/search_cost.py --methods segmentation [--ablate] [--workers 2]

Measured are candidates of the published schedule on fewer samples, ours and plain in turn; their
cost on all samples follows from the number of steps. A floor is what the operations of the plain
formulation take at the speed of this machine's matrix product, or of its memory where each reads
its inputs and writes its outputs once, whichever is longer; fusing operations can go below it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is measured

import nasfast  # noqa: E402, F401  before torch: OpenMP's waiting threads then yield the cores

DAY = 86400  # seconds

import candidates  # noqa: E402
import harness  # noqa: E402
import mixed_op_baselines as mixed  # noqa: E402
import plain  # noqa: E402
import torch  # noqa: E402
from candidates import Ours, Plain, Problem, Scale, Timed  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from nasfast.device import resolve_device  # noqa: E402
from nasfast.models.supernet import Supernet, SupernetConfig  # noqa: E402
from nasfast.spaces.fast_nas import FastNASGenotype  # noqa: E402
from nasfast.training.loop import Runtime  # noqa: E402
from nasfast.workers import Job, WorkerConfig  # noqa: E402

TAPS = ((24, 4), (32, 8), (96, 16), (320, 32))  # channels, stride, at width 1.0
# steps of the published search for denoising: 100 epochs of 13 batches, the architecture in 80
STEPS = {"weights": 1300, "architecture": 1040}


@dataclass(frozen=True)
class Published:
    paper: str
    gpu_days: str
    candidates: int | None
    """How many the cost here is projected to."""
    note: str


METHODS = {
    "segmentation": Published(
        "Fast NAS (CVPR 2019)",
        "8",
        2100,
        "The number of candidates is not published: 2,100 follows from the times that a user of "
        "the published code reports. Here is stage 0 alone; in the published search most "
        "candidates went on to stage 1, which the 8 GPU-days (two GPUs for four days) include.",
    ),
    "restoration": Published(
        "IR-NAS (CVPR 2020)",
        "0.25",
        1,
        "6 hours on a GTX 1080 Ti, 4.5 with early stopping. One supernet is the candidate: "
        f"{STEPS['weights']:,} steps of the weights and {STEPS['architecture']:,} of the "
        "architecture, without the optimizers and the scores after each epoch. The plain one, too, "
        "computes with nasfast's deformable and depthwise convolutions.",
    ),
    "templates": Published(
        "Template-based NAS (WACV 2020)", "", None, "GPU-days and candidates are not published."
    ),
    "detection": Published(
        "NAS-FCOS (CVPR 2020)", "28", 3000, "V100: 806 seconds of a GPU for a candidate."
    ),
}
BUILT = ("segmentation", "restoration")


class Traffic(TorchDispatchMode):
    """Bytes of the inputs and outputs of every operation, each counted once an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func.__name__):
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if is_tensor(t)}
            self.bytes += sum(occupied(t) for t in tensors.values())
        return result


def is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def occupied(tensor: Tensor) -> int:
    """Bytes of the elements; an expanded dimension holds one."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


@dataclass(frozen=True)
class Work:
    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Work:
        return Work(factor * self.flops, factor * self.bytes)

    def floor(self, peaks: harness.Peaks) -> float:
        """Seconds."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


def work_of(forward: Callable[[], Tensor], backward: bool) -> Work:
    """Of a forward pass on meta tensors, or of that and its gradients.

    FLOPs of the backward pass are twice the forward's: PyTorch's counter takes depthwise
    convolutions for dense ones there.
    """
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        forward()
    flops = counter.get_total_flops()
    with torch.set_grad_enabled(backward), Traffic() as traffic:
        result = forward()
        if backward:
            result.backward()  # type: ignore[no-untyped-call]
    return Work(flops * (3 if backward else 1), traffic.bytes)


def segmentation_work(
    genotype: FastNASGenotype, scale: Scale, dtype: torch.dtype
) -> tuple[Work, Work]:
    """Of a training step of stage 0, and of scoring one crop."""
    with torch.device("meta"):
        decoder = plain.PlainDecoder(genotype, [c for c, _ in TAPS], scale.classes, scale.decoder)
        decoder.to(dtype)
        config, (n, crop) = scale.stage0, (scale.batch_size, scale.crop // 4)
        labels = torch.empty(n, crop, crop, dtype=torch.int64)
        teacher = torch.empty(n, scale.classes, crop, crop)

        def taps(count: int, side: int) -> list[Tensor]:
            sizes = ((c, -(-side // stride)) for c, stride in TAPS)
            return [torch.empty(count, c, size, size, dtype=dtype) for c, size in sizes]

        def step() -> Tensor:
            logits, aux = decoder(taps(n, scale.crop))
            sample = {"labels": labels, "teacher": teacher}
            return plain.loss_of(logits.float(), [x.float() for x in aux], sample, config)

        def scores() -> Tensor:
            logits, _ = decoder(taps(1, scale.val_crop))
            return plain.upsample(logits.float(), (scale.val_crop,) * 2).argmax(1)

        training = work_of(step, True)
        decoder.eval()
        return training, work_of(scores, False)


def candidate_work(training: Work, scoring: Work, scale: Scale) -> Work:
    return training * scale.steps + scoring * scale.val_samples


def in_turn(
    cases: Mapping[str, Mapping[str, Callable[[], Timed]]], seconds: float
) -> dict[str, dict[str, list[Timed]]]:
    """Rounds of all kinds on all cases, as many as fit into the time, at least one."""
    found: dict[str, dict[str, list[Timed]]] = {
        case: {kind: [] for kind in kinds} for case, kinds in cases.items()
    }
    start = time.perf_counter()
    for rounds in itertools.count(1):
        for case, kinds in cases.items():
            for kind, call in kinds.items():
                found[case][kind].append(call())
                print(f"{case}, {kind}: {found[case][kind][-1].total:.1f} s", file=sys.stderr)
        spent = time.perf_counter() - start
        if spent + spent / rounds > seconds:
            return found
    raise AssertionError


def ratio(times: Mapping[str, Sequence[Timed]], kind: str, of: str) -> float:
    """Median over the rounds of a kind's time by that of another."""
    return statistics.median(a.total / b.total for a, b in zip(times[kind], times[of]))


def measure_segmentation(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Ours and plain on each architecture, or ours with one thing taken away each."""
    scale, published = options.scale, Scale()
    genotypes = candidates.architectures(options.candidates)
    dtype = Runtime(device).dtype
    peaks = harness.measure_peaks(device, dtype)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, contextlib.ExitStack() as stack:
        problem = Problem(scale, device, Path(folder))
        kinds: dict[str, Callable[[FastNASGenotype, int], Timed]] = {"ours": Ours(problem)}
        if options.ablate:
            for name, variant in candidates.ABLATIONS.items():
                kinds[f"without: {name}"] = Ours(problem, variant)
        kinds["plain"] = stack.enter_context(contextlib.closing(Plain(problem)))
        cases = {
            name: {kind: bind(call, genotype, i) for kind, call in kinds.items()}
            for i, (name, genotype) in enumerate(genotypes.items())
        }
        for call in kinds.values():  # imports, pools, pages
            call(candidates.CHEAP, 0)
        times = in_turn(cases, options.seconds)
    result: dict[str, Any] = {"scale": asdict(scale), "dtype": str(dtype), "peaks": asdict(peaks)}
    result["architectures"] = {}
    for name, genotype in genotypes.items():
        training, scoring = segmentation_work(genotype, published, dtype)
        work = candidate_work(training, scoring, published)
        seconds = {
            kind: statistics.median(scale.extrapolate(t.seconds) for t in timed)
            for kind, timed in times[name].items()
        }
        result["architectures"][name] = {
            "genotype": genotype.to_json(),
            "forward GFLOP of a step": training.flops / 3e9,
            "GB of a step": training.bytes / 1e9,
            "floor": work.floor(peaks),
            "seconds": seconds,
            "ratios": {kind: ratio(times[name], kind, "ours") for kind in kinds if kind != "ours"},
            "measured": {kind: [asdict(t) for t in timed] for kind, timed in times[name].items()},
        }
    return result


def bind(
    call: Callable[[FastNASGenotype, int], Timed], genotype: FastNASGenotype, index: int
) -> Callable[[], Timed]:
    return lambda: call(genotype, index)


def measure_restoration(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Both halves of a step of the published supernet, ours and plain."""
    runtime = Runtime(device)
    peaks = harness.measure_peaks(device, runtime.dtype)
    batch, config, size = options.patches, mixed.CONFIG, mixed.SIZE
    ways = {
        "save": ("save", runtime.dtype),
        "recompute": ("recompute", runtime.dtype),
        "plain": ("eager", torch.float32),
    }
    calls = {
        f"{kind}, {half}": call
        for kind, (way, dtype) in ways.items()
        for half, call in mixed.search_calls(
            way, config, batch, size, device.type, dtype, nchw=kind == "plain"
        ).items()
    }
    rounds = harness.Rounds(calls, harness.clock_of(device))
    for call in calls.values():
        call()
    start, count = time.perf_counter(), 0
    while not count or (time.perf_counter() - start) * (count + 1) / count < options.seconds / 4:
        for name in calls:
            rounds.time_warm(name)
        count += 1
    factor = mixed.BATCH / batch
    searches = {
        kind: [
            factor * sum(STEPS[half] * seconds for half, seconds in zip(STEPS, halves))
            for halves in zip(*(rounds.times[f"{kind}, {half}"] for half in STEPS))
        ]
        for kind in ways
    }
    with torch.device("meta"):
        net = Supernet(SupernetConfig(*config, **mixed.WAYS["eager"]), 1).to(runtime.dtype)
        images = torch.empty(mixed.BATCH, 1, size, size, dtype=runtime.dtype)
    work = work_of(lambda: net(images).float().square().mean(), True) * sum(STEPS.values())
    best = min(("save", "recompute"), key=lambda kind: statistics.median(searches[kind]))
    return {
        "batch": batch,
        "dtype": str(runtime.dtype),
        "peaks": asdict(peaks),
        "floor": work.floor(peaks),
        "ours": best,
        "seconds": {kind: statistics.median(found) for kind, found in searches.items()},
        "ratios": {
            kind: statistics.median(a / b for a, b in zip(searches[kind], searches[best]))
            for kind in ways
        },
        "measured": rounds.times,
    }


def measure_workers(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Candidates a minute of several workers and of one, each with one thread.

    The candidates are the same architecture in small batches, so that no worker waits at the end.
    """
    scale = options.workers_scale
    genotype = candidates.architectures(2)["arch1"]
    minutes: dict[int, list[float]] = {1: [], options.workers: []}
    count = 2 * options.workers
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, contextlib.ExitStack() as stack:
        build = functools.partial(candidates.evaluator_of, scale, Path(folder))
        evaluator = build(str(device))
        engines = {
            workers: stack.enter_context(
                contextlib.closing(WorkerConfig(workers, (str(device),)).engine_for(build))
            )
            for workers in minutes
        }

        def evaluate(workers: int, number: int) -> float:
            jobs = [Job(index, genotype, {}) for index in range(number)]
            start = time.perf_counter()
            for evaluation in engines[workers].evaluate(evaluator, jobs, lambda _: None):
                if evaluation.failure:
                    raise RuntimeError(evaluation.failure)
            return (time.perf_counter() - start) / 60

        for workers in minutes:  # starts them
            evaluate(workers, workers)
        start = time.perf_counter()
        while not minutes[1] or time.perf_counter() - start < options.seconds / 4:
            for workers, found in minutes.items():
                found.append(evaluate(workers, count))
    torch.set_num_threads(threads)
    rates = {
        workers: statistics.median(count / m for m in found) for workers, found in minutes.items()
    }
    ratios = [one / several for one, several in zip(minutes[1], minutes[options.workers])]
    return {
        "workers": options.workers,
        "candidates a minute": rates,
        "ratio": statistics.median(ratios),
        "minutes": minutes,
    }


MEASURES = {"segmentation": measure_segmentation, "restoration": measure_restoration}


def number(value: float) -> str:
    """Three digits, and no exponent where it is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    text = number(statistics.median(values))
    return text if len(values) == 1 else f"{text} ({number(min(values))} to {number(max(values))})"


def summary(method: str, found: dict[str, Any] | None) -> dict[str, str]:
    """A line of the table of methods."""
    published = METHODS[method]
    line = {
        "published GPU-days": published.gpu_days or "not published",
        "candidates": f"{published.candidates:,}" if published.candidates else "not published",
    }
    if method not in BUILT:
        return line | {"ours, s a candidate": "not built yet"}
    if found is None:
        return line | {"ours, s a candidate": "not measured"}
    if method == "segmentation":
        cases = found["architectures"].values()
        floors = [case["floor"] for case in cases]
        ours, plain_ = ([case["seconds"][kind] for case in cases] for kind in ("ours", "plain"))
        ratios = [case["ratios"]["plain"] for case in cases]
    else:
        floors, ours = [found["floor"]], [found["seconds"][found["ours"]]]
        plain_, ratios = [found["seconds"]["plain"]], [found["ratios"]["plain"]]
    assert published.candidates is not None
    days = {
        kind: published.candidates * statistics.median(values) / DAY
        for kind, values in (("ours", ours), ("plain", plain_))
    }
    return line | {
        "ours, s a candidate": spread(ours),
        "floor, s": spread(floors),
        "an hour": number(3600 / statistics.median(ours)),
        "search, days": number(days["ours"]),
        "plain, s a candidate": spread(plain_),
        "plain search, days": number(days["plain"]),
        "plain / ours": spread(ratios),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Tables of methods, of architectures, and of what each part saves."""
    found = report["methods"]
    lines = {METHODS[m].paper: summary(m, found.get(m)) for m in METHODS}
    parts = [report["machine"], harness.table("method", lines)]
    parts.append("\n".join(f"- {p.paper}: {p.note}" for p in METHODS.values()))
    if "segmentation" in found:
        parts += segmentation_tables(found["segmentation"])
    if "restoration" in found:
        result, whole = found["restoration"], mixed.BATCH
        halves = {
            name: {"ms": f"{1e3 * statistics.median(times):.0f}"}
            for name, times in result["measured"].items()
        }
        parts.append(
            f"Halves of a step of the supernet at batch {result['batch']}; a search has batches "
            f"of {whole}, extrapolated by their size."
        )
        parts.append(harness.table("half", halves))
    if "workers" in report:
        result = report["workers"]
        rates = ", ".join(f"{n}: {rate:.2f}" for n, rate in result["candidates a minute"].items())
        parts.append(
            f"Candidates a minute by the number of workers, each with one thread: {rates}; "
            f"{result['ratio']:.2f}x."
        )
    return "\n\n".join(parts) + "\n"


def segmentation_tables(result: Mapping[str, Any]) -> list[str]:
    scale, whole = Scale(**result["scale"]), Scale()
    lines, without = {}, {}
    for name, case in result["architectures"].items():
        seconds, measured = case["seconds"], case["measured"]
        totals = {
            kind: statistics.median(sum(t["seconds"].values()) for t in measured[kind])
            for kind in ("ours", "plain")
        }
        lines[name] = {
            "forward GFLOP, GB a step": f"{case['forward GFLOP of a step']:.1f}, "
            f"{case['GB of a step']:.1f}",
            "ours, s here": f"{totals['ours']:.1f}",
            "plain, s here": f"{totals['plain']:.1f}",
            "plain / ours": f"{case['ratios']['plain']:.2f}",
            "floor, s": f"{case['floor']:.1f}",
            "ours, s": f"{seconds['ours']:.1f}",
            "plain, s": f"{seconds['plain']:.1f}",
        }
        if len(case["ratios"]) > 1:
            without[name] = {kind: f"{x:.2f}" for kind, x in case["ratios"].items()}
    rounds = len(next(iter(result["architectures"].values()))["measured"]["ours"])
    parts = [
        f"Candidates of Fast NAS, stage 0, {rounds} round{'s' if rounds > 1 else ''}: "
        f'"here" on {scale.samples} crops in {scale.steps} steps and {scale.val_samples} crops to '
        f"score on, else extrapolated to {whole.samples}, {whole.steps} and {whole.val_samples:,}. "
        f"Ours computes in {result['dtype'].removeprefix('torch.')}, "
        f"peak {result['peaks']['flops'] / 1e9:,.0f} GFLOP/s and "
        f"{result['peaks']['bandwidth'] / 1e9:,.0f} GB/s; plain in float32.",
        harness.table("architecture", lines),
    ]
    if without:
        parts += ["Time as a multiple of ours.", harness.table("architecture", without)]
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="*", choices=BUILT, default=BUILT)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--samples", type=int, help="crops of a segmentation candidate; 256, on CUDA all 4000"
    )
    parser.add_argument("--candidates", type=int, default=4, help="three are the published ones")
    parser.add_argument(
        "--patches", type=int, help="batch of the supernet; 2, on CUDA the published 12"
    )
    parser.add_argument(
        "--seconds", type=float, default=400, help="of segmentation; no less than one round"
    )
    parser.add_argument("--ablate", action="store_true", help="also ours without each of its parts")
    parser.add_argument(
        "--workers", type=int, help="also candidates a minute of so many workers against one"
    )
    parser.add_argument("--json", type=Path, help="file of all numbers; its table lies beside it")
    parser.add_argument("--folder", type=Path, help="where files of features go, for the time")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    cuda = device.type == "cuda"
    options.scale = Scale.of(options.samples or (4000 if cuda else 256))
    options.patches = options.patches or (mixed.BATCH if cuda else 2)
    options.workers_scale = Scale.of(64, batch_size=16)
    report = {
        "machine": harness.machine_line(),
        "methods": {method: MEASURES[method](options, device) for method in options.methods},
    }
    if options.workers:
        report["workers"] = measure_workers(options, device)
    text = markdown(report)
    print(text, end="")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
