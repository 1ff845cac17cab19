"""Builds, tests and times everything on a machine with a CUDA GPU.

    python bench/gpu_report.py

Every step is a process of its own with a time limit, so that one failure does not lose the rest.
Writes bench/results/<device>.json, with all times and the output of what failed, and a short table
beside it, <device>.md. Exits 1 where a step failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is built and measured

import feature_rivals  # noqa: E402
import harness  # noqa: E402
import mixed_rivals  # noqa: E402
import rivals  # noqa: E402
import search_cost  # noqa: E402

DEVICE = "cuda"
SHAPES = [*rivals.SHAPES, (8, 256, 100, 136, 256)]
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DIRECTIONS = {"forward": False, "forward and backward": True}
LEGS = (rivals.FLOOR, "nasfast", "torchvision", "torchvision float32")
MIXED_LEGS = (mixed_rivals.FLOOR, mixed_rivals.EAGER, "save", "recompute", "grid_sample")
MIXED_SHAPES = [(c, 12, 64, 64) for c in mixed_rivals.CHANNELS]
# layers, nodes, width, batch, and height and width: the published search for denoising
SEARCHES = [(*mixed_rivals.CONFIG, mixed_rivals.BATCH, mixed_rivals.SIZE)]
# of that search: 100 epochs of 13 batches, the architecture in the last 80
STEPS = {"weights": 1300, "architecture": 1040}
GATHERS = [(2048, 64), (2048, 8)]  # samples on the device, samples of a batch
SEARCH_COST: tuple[str, ...] = ()  # its arguments: the published sizes
LIMITS = {"build": 1500, "tests": 900, "case": 180, "search_cost": 1800}  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--no-build", action="store_true", help="measure the build that is there")
    parser.add_argument("--no-tests", action="store_true", help="leave out pytest -m cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case, about")
    parser.add_argument(
        "--no-search-cost", action="store_true", help="leave out candidates of Fast NAS in full"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    parser.add_argument("--compile", action="store_true", help="also what inductor makes of eager")
    # kind device sizes precision file
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        kind, device, shape, precision, file = options.case
        torch.backends.cudnn.benchmark = True  # the rivals are cuDNN's best
        tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        sizes = [int(size) for size in shape.split(",")]
        MEASURES[kind](device, sizes, precision, options, Path(file))
        return 0
    if not torch.cuda.is_available():
        print(
            f"gpu_report: torch {torch.__version__} must find a CUDA device, got none; run it on a "
            "machine with a GPU and a torch built for CUDA",
            file=sys.stderr,
        )
        return 2
    report = run(options)
    return int(any(result["status"] != "ok" for result in report["steps"].values()))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All steps, one after the other; the files are written anew after each."""
    options.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    file, part = options.out / f"{name}.json", options.out / f"{name}.part"
    steps: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {"machine": harness.machine_line(), "steps": steps}
    report |= {kind: {} for kind in (*MEASURES, "search_cost")}

    def run_step(name: str, command: list[str], limit: float, kind: str = "") -> None:
        part.unlink(missing_ok=True)
        steps[name] = step(name, [sys.executable, *command], limit)
        if part.exists():  # also of a step that ended early: what it finished
            report[kind][name.removeprefix(f"{kind} ")] = json.loads(part.read_text())
            part.unlink()
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text(markdown(report))

    if not options.no_build:
        install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
        run_step("build", install, LIMITS["build"])
    if not options.no_tests:
        run_step("tests", ["-m", "pytest", "-q", "-m", "cuda"], LIMITS["tests"])
    shapes = {
        "deform_conv2d": SHAPES,
        "mixed_op": MIXED_SHAPES,
        "search": SEARCHES,
        "feature_gather": GATHERS,
    }
    flags = ["--seconds", str(options.seconds), *(["--compile"] if options.compile else [])]
    for kind, cases in shapes.items():
        for shape in (",".join(map(str, sizes)) for sizes in cases):
            for precision in PRECISIONS:
                if (kind, precision) == ("feature_gather", "tf32"):
                    continue  # no arithmetic
                case = ["--case", kind, DEVICE, shape, precision, str(part)]
                name = f"{kind} {shape} {precision}"
                run_step(name, [__file__, *flags, *case], LIMITS["case"], kind)
    if not options.no_search_cost:
        script = str(Path(search_cost.__file__))
        command = [script, "--device", DEVICE, "--json", str(part), *SEARCH_COST]
        run_step("search_cost", command, LIMITS["search_cost"], "search_cost")
    print(f"\nwrote {file}\n\n{markdown(report)}")
    return report


def step(name: str, command: list[str], limit: float) -> dict[str, Any]:
    """Runs a command in the checkout, whatever becomes of it."""
    print(f"{name} ... ", end="", flush=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = f"exit code {process.returncode}" if process.returncode else "ok"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers that it started, too
        output, _ = process.communicate()
        status = f"stopped after {limit:.0f} s"
    result = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    result["output"] = output[-4000:]
    print(status, f"({result['seconds']} s)", flush=True)
    return result


def time_calls(
    calls: dict[str, harness.Call], device: str, seconds: float, graphs: bool = True
) -> tuple[harness.Rounds, dict[str, int], dict[str, str]]:
    """Times, bytes beyond the results, and the reasons why a call is not in a CUDA graph."""
    memory, reasons, clock = {}, {}, harness.cpu_clock
    if device == "cuda":
        memory = {name: harness.cuda_extra_memory(call) for name, call in calls.items()}
        clock = harness.CudaClock()
        if graphs:
            calls, reasons = harness.cuda_graphs(calls)
    rounds = harness.Rounds(calls, clock)
    for _ in range(rounds.warm_up(seconds)):
        rounds.time(*calls)
    return rounds, memory, reasons


def measure_deform_conv2d(
    device: str, sizes: Sequence[int], precision: str, options: argparse.Namespace, file: Path
) -> None:
    """Times a shape in both directions; rewrites ``file`` after each."""
    problem = rivals.Problem(*sizes, dtype=PRECISIONS[precision], device=device)
    legs = LEGS if problem.dtype != torch.float32 else LEGS[:-1]
    measure(problem, legs, "nasfast", rivals.FLOOR, rivals.LEGS, LEGS[:2], options, file)


def measure_mixed_op(
    device: str, sizes: Sequence[int], precision: str, options: argparse.Namespace, file: Path
) -> None:
    """The same of a mixed operation: evaluation forward, training forward and backward."""
    problem = mixed_rivals.Problem(*sizes, dtype=PRECISIONS[precision], device=device)
    legs = (*MIXED_LEGS, *(("compiled eager",) if options.compile else ()))
    own = mixed_rivals.OWN
    measure(problem, legs, "save", mixed_rivals.EAGER, mixed_rivals.LEGS, own, options, file)


def measure(
    problem: Any,
    names: Sequence[str],
    ours: str,
    base: str,
    legs: Mapping[str, Callable[[Any], Any]],
    own: Sequence[str],
    options: argparse.Namespace,
    file: Path,
) -> None:
    result: dict[str, Any] = {}
    for direction, backward in DIRECTIONS.items():
        calls, skipped = rivals.calls(names, problem, backward, legs, own)
        rounds, memory, reasons = time_calls(calls, problem.device, options.seconds)
        rows = harness.rows(rounds, base, problem.flops(backward), memory)
        others = [name for name in calls if name not in (ours, rivals.FLOOR)]
        result[direction] = {
            "rows": {name: asdict(row) for name, row in rows.items()},
            "text": {name: str(row) for name, row in rows.items()},
            "speed over": {name: rounds.multiple(name, ours) for name in others},
            "skipped": skipped,
            "without CUDA graph": reasons,
        }
        file.write_text(json.dumps(result))


def measure_search(
    device: str, sizes: Sequence[int], precision: str, options: argparse.Namespace, file: Path
) -> None:
    """Times the two halves of a search step; rewrites ``file`` after each way to compute it."""
    *config, batch, size = sizes
    result: dict[str, Any] = {}
    for way in mixed_rivals.SEARCH_WAYS:
        try:
            halves = mixed_rivals.search_calls(
                way, config, batch, size, device, PRECISIONS[precision]
            )
            rounds, memory, _ = time_calls(halves, device, options.seconds, graphs=False)
        except torch.OutOfMemoryError as error:
            result[way] = {"skipped": str(error).partition(chr(10))[0]}
        else:
            seconds = {name: statistics.median(times) for name, times in rounds.times.items()}
            result[way] = {
                "seconds": seconds,
                "whole search, minutes": sum(seconds[n] * STEPS[n] for n in STEPS) / 60,
                "extra MiB": {name: size / harness.MIB for name, size in memory.items()},
            }
        file.write_text(json.dumps(result))


def measure_feature_gather(
    device: str, sizes: Sequence[int], precision: str, options: argparse.Namespace, file: Path
) -> None:
    """Times batches from samples on the device, with their maps in the precision."""
    samples, batch = sizes
    calls, size = feature_rivals.gather_calls(device, samples, batch, PRECISIONS[precision])
    rounds, memory, reasons = time_calls(calls, device, options.seconds)
    result: dict[str, Any] = {"bytes": size, "extra bytes": memory, "without CUDA graph": reasons}
    result["times"] = rounds.times
    result["text"] = {
        name: f"{rounds.multiple(name, 'copy'):.2f}x, {1e3 * median:.3f} ms, "
        f"{2 * size / median / 1e9:.0f} GB/s"
        for name, times in rounds.times.items()
        for median in [statistics.median(times)]
    }
    file.write_text(json.dumps(result))


MEASURES: dict[str, Callable[..., None]] = {
    "deform_conv2d": measure_deform_conv2d,
    "mixed_op": measure_mixed_op,
    "search": measure_search,
    "feature_gather": measure_feature_gather,
}


def search_line(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return str(found["skipped"])
    halves = ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in found["seconds"].items())
    memory = max(found["extra MiB"].values(), default=None)
    peak = "" if memory is None else f", +{memory:.0f} MiB"
    return f"{halves}{peak}, whole search {found['whole search, minutes']:.1f} min"


def markdown(report: dict[str, Any]) -> str:
    """The short form: a table per direction, then how the steps went that are worth a line."""
    parts = [report["machine"]]
    for kind, direction in itertools.product(("deform_conv2d", "mixed_op"), DIRECTIONS):
        lines = {}
        for case, result in report[kind].items():
            if direction in result:
                speeds = result[direction]["speed over"].items()
                over = {f"speed over {name}": f"{speed:.2f}x" for name, speed in speeds}
                lines[case] = result[direction]["text"] | over
        if lines:
            parts.append(f"{kind}, {direction}\n\n{harness.table('case', lines)}")
    if report["search"]:
        lines = {
            case: {way: search_line(found) for way, found in result.items()}
            for case, result in report["search"].items()
        }
        parts.append(f"search, layers,nodes,width,batch,size\n\n{harness.table('case', lines)}")
    if report["feature_gather"]:
        lines = {case: result["text"] for case, result in report["feature_gather"].items()}
        head = "feature_gather, samples,batch, GB/s read and written as if by the copy"
        parts.append(f"{head}\n\n{harness.table('case', lines)}")
    parts += [search_cost.markdown(found) for found in report["search_cost"].values()]
    notes = [
        f"- {name}: {result['status']}; {result['output'].strip().rpartition(chr(10))[2]}"
        for name, result in report["steps"].items()
        if result["status"] != "ok" or name == "tests"
    ]
    reasons = {
        f"- {leg} {what}: {reason}"
        for kind in ("deform_conv2d", "mixed_op")
        for result in report[kind].values()
        for found in result.values()
        for what in ("skipped", "without CUDA graph")
        for leg, reason in found[what].items()
    }
    return "\n\n".join([*parts, "\n".join([*notes, *sorted(reasons)])]).strip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
