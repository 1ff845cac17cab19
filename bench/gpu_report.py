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
SHAPES = [
    (1, 64, 64, 64, 64),
    (4, 64, 64, 64, 64),
    (8, 48, 32, 32, 48),
    (2, 256, 25, 34, 256),
    (1, 256, 100, 136, 256),
    (8, 256, 100, 136, 256),
]
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DIRECTIONS = {"forward": False, "forward and backward": True}
LEGS = (rivals.FLOOR, "nasfast", "torchvision")
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
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    text = markdown(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(text)
    print(f"\nwrote {options.out / name}.json\n\n{text}")
    return int(any(step["status"] != "ok" for step in report["steps"].values()))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All steps, one after the other."""
    python = sys.executable
    steps: dict[str, dict[str, Any]] = {}
    cases: dict[str, Any] = {}
    if not options.no_build:
        install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
        steps["build"] = step("build", install, LIMITS["build"])
    if not options.no_tests:
        tests = [python, "-m", "pytest", "-q", "-m", "cuda"]
        steps["tests"] = step("pytest -m cuda", tests, LIMITS["tests"])
    options.out.mkdir(parents=True, exist_ok=True)
    part = options.out / "case.json"
    for shape in (",".join(map(str, sizes)) for sizes in SHAPES):
        for precision in PRECISIONS:
            part.unlink(missing_ok=True)
            command = [python, __file__, "--seconds", str(options.seconds)]
            command += ["--case", DEVICE, shape, precision, str(part)]
            name = f"{shape} {precision}"
            steps[name] = step(name, command, LIMITS["case"])
            if part.exists():  # also of a step that ended early: the directions it finished
                cases[name] = json.loads(part.read_text())
    part.unlink(missing_ok=True)
    return {"machine": harness.machine_line(), "steps": steps, "deform_conv2d": cases}


def step(name: str, command: list[str], limit: float) -> dict[str, Any]:
    """Runs a command in the checkout; never raises."""
    print(f"{name} ... ", end="", flush=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
            check=False,
        )
        status = "ok" if done.returncode == 0 else f"exit code {done.returncode}"
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        status = f"stopped after {limit:.0f} s"
        output = (error.stdout or b"").decode(errors="replace")
    result = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    result["output"] = output[-4000:]
    print(status, f"({result['seconds']} s)", flush=True)
    return result


def measure(device: str, sizes: Sequence[int], precision: str, seconds: float, file: Path) -> None:
    """Times a shape in both directions; rewrites ``file`` after each."""
    tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    problem = rivals.Problem(*sizes, dtype=PRECISIONS[precision], device=device)
    result: dict[str, Any] = {}
    for direction, backward in DIRECTIONS.items():
        calls, skipped = rivals.calls(LEGS, problem, backward)
        memory = {}
        if device == "cuda":
            memory = {name: harness.cuda_extra_memory(call) for name, call in calls.items()}
            calls, eager = harness.cuda_graphs(calls)
            rounds = harness.Rounds(calls, harness.CudaClock())
        else:
            eager = {}
            rounds = harness.Rounds(calls)
        for _ in range(rounds.warm_up(seconds)):
            rounds.time(*calls)
        rows = harness.rows(rounds, rivals.FLOOR, problem.flops(backward), memory)
        result[direction] = {
            "rows": {name: asdict(row) for name, row in rows.items()},
            "text": {name: str(row) for name, row in rows.items()},
            "speed over torchvision": (
                rounds.multiple("torchvision", "nasfast") if "torchvision" in calls else None
            ),
            "skipped": skipped,
            "without CUDA graph": eager,
        }
        file.write_text(json.dumps(result))


def markdown(report: dict[str, Any]) -> str:
    """The short form: a table per direction, then what went wrong."""
    parts = [report["machine"]]
    for direction in DIRECTIONS:
        lines = {}
        for case, result in report["deform_conv2d"].items():
            if direction in result:
                found = result[direction]
                speed = found["speed over torchvision"]
                over = {"over torchvision": "" if speed is None else f"{speed:.2f}x"}
                lines[case] = {**found["text"], **over}
        if lines:
            parts.append(f"deform_conv2d, {direction}\n\n{harness.table('case', lines)}")
    troubles = [
        f"- {name}: {result['status']}"
        for name, result in report["steps"].items()
        if result["status"] != "ok"
    ]
    reasons = {
        f"- {leg} {what}: {reason}"
        for result in report["deform_conv2d"].values()
        for found in result.values()
        for what in ("skipped", "without CUDA graph")
        for leg, reason in found[what].items()
    }
    return "\n\n".join([*parts, *filter(None, ["\n".join([*troubles, *sorted(reasons)])])]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
