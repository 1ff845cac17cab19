"""Builds, tests and times everything on a machine with a CUDA GPU.

    python bench/gpu_report.py

Every step is a process of its own with a time limit, so that one failure does not lose the rest.
Writes bench/results/<device>.json, with all times and the output of what failed, and a short table
beside it, <device>.md. Exits 1 where a step failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is built and measured

import harness  # noqa: E402
import rivals  # noqa: E402

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
LIMITS = {"build": 1500, "tests": 900, "case": 180}  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--no-build", action="store_true", help="measure the build that is there")
    parser.add_argument("--no-tests", action="store_true", help="leave out pytest -m cuda")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each case, about")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    parser.add_argument("--case", nargs=4, help=argparse.SUPPRESS)  # device shape precision file
    options = parser.parse_args(arguments)
    if options.case:
        device, shape, precision, file = options.case
        sizes = [int(size) for size in shape.split(",")]
        measure(device, sizes, precision, options.seconds, Path(file))
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
    cases: dict[str, Any] = {}
    report = {"machine": harness.machine_line(), "steps": steps, "deform_conv2d": cases}

    def run_step(name: str, command: list[str], limit: float) -> None:
        part.unlink(missing_ok=True)
        steps[name] = step(name, [sys.executable, *command], limit)
        if part.exists():  # also of a step that ended early: the directions that it finished
            cases[name] = json.loads(part.read_text())
            part.unlink()
        file.write_text(json.dumps(report, indent=1) + "\n")
        file.with_suffix(".md").write_text(markdown(report))

    if not options.no_build:
        install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
        run_step("build", install, LIMITS["build"])
    if not options.no_tests:
        run_step("tests", ["-m", "pytest", "-q", "-m", "cuda"], LIMITS["tests"])
    for shape in (",".join(map(str, sizes)) for sizes in SHAPES):
        for precision in PRECISIONS:
            command = [__file__, "--seconds", str(options.seconds)]
            command += ["--case", DEVICE, shape, precision, str(part)]
            run_step(f"{shape} {precision}", command, LIMITS["case"])
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


def measure(device: str, sizes: Sequence[int], precision: str, seconds: float, file: Path) -> None:
    """Times a shape in both directions; rewrites ``file`` after each."""
    torch.backends.cudnn.benchmark = True  # the floor is cuDNN's best
    tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    problem = rivals.Problem(*sizes, dtype=PRECISIONS[precision], device=device)
    result: dict[str, Any] = {}
    for direction, backward in DIRECTIONS.items():
        half = problem.dtype != torch.float32
        calls, skipped = rivals.calls(LEGS if half else LEGS[:-1], problem, backward)
        memory, eager, clock = {}, {}, harness.cpu_clock
        if device == "cuda":
            memory = {name: harness.cuda_extra_memory(call) for name, call in calls.items()}
            calls, eager = harness.cuda_graphs(calls)
            clock = harness.CudaClock()
        rounds = harness.Rounds(calls, clock)
        for _ in range(rounds.warm_up(seconds)):
            rounds.time(*calls)
        rows = harness.rows(rounds, rivals.FLOOR, problem.flops(backward), memory)
        result[direction] = {
            "rows": {name: asdict(row) for name, row in rows.items()},
            "text": {name: str(row) for name, row in rows.items()},
            "speed over": {
                name: rounds.multiple(name, "nasfast") for name in LEGS[2:] if name in calls
            },
            "skipped": skipped,
            "without CUDA graph": eager,
        }
        file.write_text(json.dumps(result))


def markdown(report: dict[str, Any]) -> str:
    """The short form: a table per direction, then how the steps went that are worth a line."""
    parts = [report["machine"]]
    for direction in DIRECTIONS:
        lines = {}
        for case, result in report["deform_conv2d"].items():
            if direction in result:
                speeds = result[direction]["speed over"].items()
                over = {f"speed over {name}": f"{speed:.2f}x" for name, speed in speeds}
                lines[case] = result[direction]["text"] | over
        if lines:
            parts.append(f"deform_conv2d, {direction}\n\n{harness.table('case', lines)}")
    notes = [
        f"- {name}: {result['status']}; {result['output'].strip().rpartition(chr(10))[2]}"
        for name, result in report["steps"].items()
        if result["status"] != "ok" or name == "tests"
    ]
    reasons = {
        f"- {leg} {what}: {reason}"
        for result in report["deform_conv2d"].values()
        for found in result.values()
        for what in ("skipped", "without CUDA graph")
        for leg, reason in found[what].items()
    }
    return "\n\n".join([*parts, "\n".join([*notes, *sorted(reasons)])]).strip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
