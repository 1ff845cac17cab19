"""A worker that no longer does anything is named while the search waits for it."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
from toys import evaluate

from nasfast.workers import WorkerConfig, watch
from nasfast.workers.watch import Activity, Watch


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def warned(seen, at_work, clock, seconds, step=1.0):
    """Texts of the warnings while a time passes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(round(seconds / step)):
            clock[0] += step
            seen.look(at_work)
    return [str(warning.message) for warning in caught]


def test_a_worker_that_computes_is_left_alone(clock):
    seen = Watch(lambda worker: Activity(7, used=clock[0] / 10))
    assert warned(seen, {0: 3}, clock, 10_000) == []


def test_one_that_does_not_is_named_once_a_candidate(clock):
    seen = Watch(lambda worker: Activity(7, used=clock[0] if worker else 5.0))
    assert warned(seen, {0: 3, 1: 4}, clock, 1000) == [
        "workers: worker 0 (process 7) has computed nothing for 61 s at candidate 3, for which the "
        "search waits: kill 7 lets another process do its work"
    ]
    assert warned(seen, {0: None}, clock, 1000) == [
        "workers: worker 0 (process 7) has computed nothing for 61 s as it starts, for which the "
        "search waits: kill 7 lets another process do its work"
    ]


def test_the_time_in_which_the_search_is_stopped_does_not_count(clock):
    """Ctrl-Z, and fg after an hour: all processes of the search were stopped."""
    seen = Watch(lambda worker: Activity(7, used=5.0))
    assert warned(seen, {0: 3}, clock, 30) == []
    assert warned(seen, {0: 3}, clock, 3600, step=3600.0) == []


def test_one_elsewhere_is_named_when_it_takes_far_longer_than_others(clock):
    seen = Watch(lambda worker: Activity())
    assert warned(seen, {0: 0}, clock, 100) == []
    assert warned(Watch(lambda worker: Activity()), {0: 0}, clock, 3600) == []  # the first
    assert warned(seen, {0: 1}, clock, 2000) == [
        "workers: worker 0 has not answered for 1001 s at candidate 1, for which the search waits; "
        "look at it, or stop the search and continue it with --resume"
    ]


def test_what_a_process_does():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        stopped = Activity.of(process.pid)
        assert stopped.stopped
        os.kill(process.pid, signal.SIGCONT)
        end = time.monotonic() + 30
        while Activity.of(process.pid).used <= stopped.used and time.monotonic() < end:
            time.sleep(0.05)
        running = Activity.of(process.pid)
        assert running.used > stopped.used
        assert (running.process, running.stopped) == (process.pid, False)
    finally:
        process.kill()
        process.wait()
    assert Activity.of(process.pid) == Activity(process.pid)  # it has ended


def test_a_search_says_which_worker_is_stopped(tmp_path, monkeypatch):
    """And what lets it go on."""
    monkeypatch.setattr(watch, "_QUIET", 1.5)
    seen = []

    def note(message, *args, **kwargs):
        if "it was stopped" in str(message):
            seen.append(str(message))
            os.kill(int(re.search(r"kill -CONT (\d+)", seen[-1])[1]), signal.SIGCONT)

    monkeypatch.setattr(warnings, "warn", note)
    workers = WorkerConfig(workers=2, threads=1)
    rewards = [e.rewards.get("stage0") for e in evaluate({1: "stop"}, tmp_path, workers)]
    assert rewards == [0.0, 1.0, 2.0, 3.0]
    (text,) = seen
    assert re.fullmatch(
        r"workers: worker [01] \(process (\d+)\) has computed nothing for \d s at candidate 1, for "
        r"which the search waits: it was stopped; kill -CONT \1 lets it go on",
        text,
    )
