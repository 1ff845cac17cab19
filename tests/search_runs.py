"""What tests of whole searches and trainings share: one in a process of its own, what it left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from nasfast import search, train


def outcome(run: Path) -> list[dict[str, Any]]:
    """What a search decided and measured, without what the clock decided."""
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for record in records:
        del record["time"], record["evaluation"]["seconds"]
    return records


def start(
    command: list[str], threads: int = 1, *, group: bool = False, module: str = "nasfast.search"
) -> subprocess.Popen[str]:
    """`python -m nasfast.search` in a process of its own, or in a process group of its own."""
    root = str(Path(search.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", module, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path},
        start_new_session=group,
    )


def wait_for_records(process: subprocess.Popen[str], runs: Path, count: int) -> Path:
    """The run directory, as soon as it holds `count` records."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for path in runs.glob("*/records.jsonl"):
            if path.read_bytes().count(b"\n") >= count:
                return path.parent
        time.sleep(0.001)
    process.kill()
    raise AssertionError(f"{count} records did not appear: {process.communicate()}")


def drawn_moments() -> random.Random:
    """Decides when a test kills; NASFAST_TEST_SEED repeats what a failed test has printed."""
    seed = int(os.environ.get("NASFAST_TEST_SEED", random.SystemRandom().getrandbits(32)))
    print(f"moments drawn with seed {seed}; NASFAST_TEST_SEED={seed} repeats them")
    return random.Random(seed)


def killed_and_resumed(
    command: list[str],
    runs: Path,
    waits: Iterable[Callable[[subprocess.Popen[str]], object]],
    threads: int = 1,
) -> Path:
    """The run of a search that is killed after each wait, resumed, and in the end left alone."""
    for wait in waits:
        process = start(command, threads)
        wait(process)
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), stderr
        # a run of which not even the empty records.jsonl was written has not begun
        for path in runs.glob("*/records.jsonl"):
            command = ["--resume", str(path.parent)]
    process = start(command, threads)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    (run,) = (path.parent for path in runs.glob("*/records.jsonl"))
    return run


def assert_killed_training_resumes(argv: list[str], out: Path, whole: Path) -> None:
    """Killed after its first checkpoint and resumed, a training gives the network of `whole`."""
    process = start([*argv, "--out", str(out)], module="nasfast.train")
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr
    assert train.main(["--resume", str(out)]) == 0
    for name in ("model.safetensors", "genotype.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (
        json.loads((path / "metrics.json").read_text()) | {"seconds": 0} for path in (out, whole)
    )
    assert ours == theirs
