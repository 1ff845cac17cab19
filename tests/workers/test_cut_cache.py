"""A feature cache that is cut short while a search reads it."""

import os
import shutil

import pytest
from search_runs import outcome, start, wait_for_records

from nasfast.commands import search


@pytest.mark.parametrize(("workers", "left"), [("1", 8192), ("2", 0)])
def test_the_search_says_so_and_can_be_continued(workers, left, tiny_search, tiny_run, tmp_path):
    caches, runs = tmp_path / "cache", tmp_path / "runs"
    flags = ["--cache-dir", str(caches), "--workers", workers, "--runs", str(runs)]
    process = start([*tiny_search, *flags])
    run = wait_for_records(process, runs, 1)
    files = list(caches.glob("*.features"))
    assert len(files) == 2
    for path in files:
        os.truncate(path, left)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    *earlier, last = stderr.splitlines()
    assert not earlier or workers == "2"  # each worker may have had to print it
    starts = [f"error: feature cache {path}: " for path in files]
    for line in [*earlier, last]:
        assert any(line.startswith(start) for start in starts) or line.startswith(
            "error: workers: expected a worker to go on, got the error that it printed above; "
        )
    shutil.rmtree(caches)
    assert search.main(["--resume", str(run), "--workers", "1"]) == 0
    assert outcome(run) == outcome(tiny_run)
