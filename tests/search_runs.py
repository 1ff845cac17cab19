"""What tests of whole searches share: a search in a process of its own, and what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nasfast import search


def outcome(run: Path) -> list[dict[str, Any]]:
    """What a search decided and measured, without what the clock decided."""
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for record in records:
        del record["time"], record["evaluation"]["seconds"]
    return records


def start(command: list[str], threads: int = 1, *, group: bool = False) -> subprocess.Popen[str]:
    """`python -m nasfast.search` in a process of its own, or in a process group of its own."""
    root = str(Path(search.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "nasfast.search", *command],
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
