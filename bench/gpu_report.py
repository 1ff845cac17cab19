"""Builds, tests and times everything on a machine with a CUDA GPU, part by part.

    python bench/gpu_report.py                      # all parts, in order
    python bench/gpu_report.py --only build smoke   # some of them; the report keeps the others
    python bench/gpu_report.py --rehearse           # small sizes on the CPU, to try the report

Each part is a process of its own with a time limit below eight minutes; when it ends, or this
program does, all that it started ends as well. Writes bench/results/<device>.json, a short
<device>.md, and a log of each part. Exits 1 where a part failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # the checkout is what is built and measured

from gpu_parts import PARTS, Run, Skip  # noqa: E402

SKIPPED = 77  # exit code of a part
PACKAGES = {"PIL": "pillow", "tomli_w": "tomli-w"}  # the others are named as their modules


def main(arguments: Sequence[str] | None = None) -> int:
    parts = "\n".join(f"  {name:14}{part.run.__doc__}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=[*PARTS])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each case, about")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # name, result, log
    options = parser.parse_args(arguments)
    if options.part:
        name, file, log = options.part
        device = "cpu" if options.rehearse else "cuda"
        run = Run(device, options.seconds, options.rehearse, Path(file), Path(log))
        return run_part(name, run)
    if not (options.rehearse or torch.cuda.is_available()):
        print(
            f"gpu_report: expected a CUDA device, but torch {torch.__version__} finds none; run it "
            "on a machine with a GPU and a torch built for CUDA, or with --rehearse",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    device_name = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    file = options.out / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    flags = ["--seconds", str(options.seconds), *(["--rehearse"] if options.rehearse else [])]
    statuses = []
    for name in (name for name in PARTS if name in options.only):
        found = start_part(name, flags, file, PARTS[name].limit)
        statuses.append(found["status"])
        report = json.loads(file.read_text()) if file.exists() else {}
        report[name] = found
        ordered = {name: report[name] for name in PARTS if name in report}
        write(file, json.dumps(ordered, indent=1) + "\n")
        write(file.with_suffix(".md"), markdown(ordered))
    print(f"\nwrote {file}\n\n{file.with_suffix('.md').read_text()}")
    return int(any(not status.startswith(("ok", "skipped")) for status in statuses))


def write(file: Path, text: str) -> None:
    part = file.with_suffix(f"{file.suffix}.part")
    part.write_text(text)
    part.replace(file)  # a kill leaves the old file or the new one


def start_part(name: str, flags: Sequence[str], file: Path, limit: float) -> dict[str, Any]:
    """Runs a part in a session of its own, whatever becomes of it: how it ended and what it found.

    Its standard input ends when this process does, in any way: see :func:`end_with_parent`.
    """
    result, log = (file.with_suffix(f".{name}.{suffix}") for suffix in ("result", "log"))
    print(f"{name} ... ", end="", flush=True)
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, *flags, "--part", name, str(result), str(log)],
            cwd=ROOT,
            env=os.environ | {"PATH": programs},  # ninja and cmake of this environment
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code = process.wait(limit)
        status = {0: "ok", SKIPPED: "skipped"}.get(code, f"exit code {code}")
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    finally:
        kill_group(process.pid)  # compilers, readers, workers: what it left
        process.wait()
    seconds = round(time.monotonic() - start, 1)
    text = log.read_text(errors="replace").strip()
    last = text.rpartition("\n")[2]
    if status == "skipped":
        status, last = f"skipped: {last}", ""
    print(f"{status} ({seconds} s)", flush=True)
    found: dict[str, Any] = {"status": status, "seconds": seconds, "last line": last}
    if not status.startswith(("ok", "skipped")):
        found["log"] = text[-4000:]
    if result.exists():  # also of a part that ended early: what it finished
        found |= json.loads(result.read_text())
        result.unlink()
    return found


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def end_with_parent() -> None:
    """Kills this process and all that it started as soon as its standard input ends."""

    def wait() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def run_part(name: str, run: Run) -> int:
    """In the part's own process."""
    end_with_parent()
    part = PARTS[name]
    try:
        missing = [module for module in part.needs if not importable(module)]
        if missing:
            raise Skip(needs(missing))
        if name != "build":  # which replaces the extension
            import harness

            run.machine = harness.machine_line()
        part.run(run)
        run.save()
    except Skip as reason:
        print(reason)
        return SKIPPED
    except ModuleNotFoundError as error:
        module = str(error.name).partition(".")[0]
        if module == "nasfast" or (ROOT / "bench" / f"{module}.py").exists():
            raise
        print(needs([module]))
        return SKIPPED
    return 0


def importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def needs(modules: Sequence[str]) -> str:
    packages = " ".join(PACKAGES.get(module, module) for module in modules)
    return (
        f"needs {', '.join(modules)}; pip install {packages} (without a network: --no-index "
        "--find-links FOLDER, where its wheels are)"
    )


def markdown(report: Mapping[str, Any]) -> str:
    """How each part ended, then the tables, texts and notes of its cases."""
    from harness import table  # a part has built the extension by now

    lines = {
        name: {"status": found["status"], "seconds": found["seconds"], "last": found["last line"]}
        for name, found in report.items()
    }
    texts = [table("part", lines)]
    for name, found in report.items():
        tables: dict[str, dict[str, Any]] = {}
        notes = set()
        for case, result in found.get("result", {}).items():
            for title, cells in result.get("tables", {}).items():
                tables.setdefault(title, {})[case] = cells
            notes |= {f"- {name}, {note}" for note in result.get("notes", ())}
            if "failed" in result:
                notes.add(f"- {name}, {case}: {result['failed']}")
            texts += [result["text"]] if "text" in result else []
        for title, rows in tables.items():
            texts.append(f"{name}, {title}; {found['machine']}\n\n{table('case', rows)}")
        texts += ["\n".join(sorted(notes))] if notes else []
    return "\n\n".join(texts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
