"""Searches with many workers: the same records as with one, whoever is killed."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from search_runs import assert_same, exists, outcome, start, wait_for_records

from nasfast.commands import search
from nasfast.workers import cores


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers_of(process):
    """They are children of the server that is this process's child."""
    return [pid for child in children(process.pid) for pid in children(child)]


def assert_gone(pids):
    deadline = time.monotonic() + 10
    while any(map(exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(exists, pids))


def test_results_do_not_depend_on_the_number_of_workers(tiny_search, tmp_path):
    """Nor does what the controller learns from them, or the best of them."""
    runs = []
    flags = ["--batch", "4", "--budget", "5", "--stage0.epochs", "1"]
    for workers in ("1", "4"):
        root = tmp_path / workers
        argv = [*tiny_search, *flags, "--workers", workers, "--runs", str(root)]
        assert search.main(argv) == 0
        (run,) = root.iterdir()
        started = json.loads((run / "env.json").read_text())["workers"]["workers"]
        assert started == min(int(workers), cores())
        runs.append(run)
    assert len(outcome(runs[0])) >= 5
    assert_same(*runs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_workers_and_a_signal_lose_nothing(number, tiny_search, tiny_run, tmp_path, nightly):
    """hardening/test_kills.py kills a search with two workers without --nightly, too."""
    if number == signal.SIGKILL and not nightly:
        pytest.skip("one signal is enough: --nightly")
    process = start([*tiny_search, "--workers", "2", "--runs", str(tmp_path)], group=True)
    run = wait_for_records(process, tmp_path, 1)
    first = workers_of(process)
    assert len(first) == 2
    for pid in first:  # at least one of them is in the middle of a candidate
        os.kill(pid, signal.SIGKILL)
    wait_for_records(process, tmp_path, 4)
    replaced, server = workers_of(process), children(process.pid)
    assert not set(first) & set(replaced)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to the workers, too
    else:
        process.kill()
    stdout, stderr = process.communicate(timeout=60)  # ends when no worker holds the pipe
    assert process.returncode in (0, {signal.SIGINT: 130, signal.SIGKILL: -9}[number])
    if process.returncode == 130:  # otherwise it was through, or could not say it
        assert f"Continue with\n  nasfast search --resume {run}\n" in stdout
    assert stderr == ""
    assert_gone(replaced + server)
    assert 4 <= len(outcome(run)) <= len(outcome(tiny_run))
    assert search.main(["--resume", str(run), "--workers", "1"]) == 0
    assert outcome(run) == outcome(tiny_run)


def test_a_run_continues_with_other_workers(tiny_search, tiny_run, tmp_path, capsys):
    assert search.main([*tiny_search, "--budget", "3", "--runs", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    more = ["--resume", str(run), "--budget", "6", "--workers", "2", "--devices", "cpu,cpu"]
    assert search.main(more) == 0
    out = capsys.readouterr().out
    assert f"search --resume {run} --budget 6\n" in out
    assert "device   cpu, 1 thread, " in out
    assert "device   cpu, cpu, 2 workers of 1 thread, " in out
    assert "note:" not in out
    assert outcome(run) == outcome(tiny_run)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--name", "a/b"], 2, "name: expected letters, digits and ._+- (it becomes part of a"),
        (
            ["--stage0.lr", "1e30"],
            1,
            "search: all of the 5 candidates failed (5 x stage0: ",
        ),
    ],
)
def test_errors_leave_no_workers(flags, status, message, tiny_search, tmp_path, capsys):
    argv = [*tiny_search, "--workers", "2", "--runs", str(tmp_path), *flags]
    assert search.main(argv) == status
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert multiprocessing.active_children() == []
    for run in tmp_path.glob("*"):
        assert [bool(r["evaluation"]["failure"]) for r in outcome(run)] == [True] * 5
        assert (run / "report.html").is_file()
