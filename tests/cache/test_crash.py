"""Several processes fill a cache, some are killed: each sample is right, and encoded once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import crash_driver

import nasfast

ROOT = Path(nasfast.__file__).parents[1]


def drive(directory: Path, fillers: int, kills: int) -> dict:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    command = [sys.executable, crash_driver.__file__, str(directory)]
    done = subprocess.run(
        [*command, str(seed), str(fillers), str(kills)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert done.stderr == ""
    return json.loads(done.stdout)


def check(round: dict) -> None:
    """A sample is encoded by one process, or again after one was killed before it published."""
    encoded, published = defaultdict(list), defaultdict(list)
    for event, pid, rows in round["events"]:
        for row in rows:
            if event == "encoded":
                assert not published[row], f"sample {row} was published, and is encoded again"
                encoded[row].append(pid)
            else:
                published[row].append(pid)
    assert sorted(encoded) == list(range(crash_driver.COUNT))
    for row, pids in encoded.items():
        assert all(pid in round["killed"] for pid in pids[:-1]), f"sample {row}: {pids}"
        assert len(published[row]) <= 1
        assert published[row] in ([], [pids[-1]])


def test_four_processes_encode_each_sample_once(tmp_path: Path) -> None:
    (round,) = drive(tmp_path, fillers=4, kills=0)["rounds"]
    check(round)
    pids = [pid for event, pid, rows in round["events"] if event == "encoded"]
    assert len(set(pids)) == 4
    assert len(pids) == crash_driver.COUNT / crash_driver.CHUNK


def test_fifty_kills(tmp_path: Path) -> None:
    result = drive(tmp_path, fillers=3, kills=50)
    assert result["killed"] == 50
    for round in result["rounds"]:
        check(round)
    # the kills fell into the middle of things
    owners = {pid for r in result["rounds"] for event, pid, rows in r["events"]}
    assert len([pid for r in result["rounds"] for pid in r["killed"] if pid in owners]) > 10
