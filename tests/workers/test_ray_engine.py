"""The same candidates as actors of a local Ray cluster."""

import contextlib
import functools
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
from toys import evaluate, toy

from nasfast.commands import search
from nasfast.device import deterministic
from nasfast.workers import WorkerConfig, WorkerError, ray_pool
from nasfast.workers.ray_pool import RayPool

ray = pytest.importorskip("ray", reason="needs ray: pip install 'nasfast[distributed]'")
TWO = WorkerConfig(workers=2, threads=1, engine="ray")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """Actors import this module and the toys."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


@pytest.fixture
def cluster():
    """A cluster of two CPUs that was there before the search."""
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False
    )
    yield
    ray.shutdown()


def slow(place, device):
    (place / "begun").touch()
    time.sleep(60)
    return toy({}, place, device)


def test_deaths(tmp_path):
    """The actor is replaced and its candidate retried; the second death is a failure.

    The local cluster is the engine's own: it ends with it and takes no signal handler.
    """
    handlers = {signal.getsignal(signal.SIGTERM)}

    def show(running):
        handlers.add(signal.getsignal(signal.SIGTERM))

    plan = {1: "kill", 2: "once: kill"}
    with deterministic(True):
        first, second, third, last = evaluate(plan, tmp_path, TWO, show=show)
    assert len(handlers) == 1
    assert not ray.is_initialized()
    assert [e.rewards for e in (first, third, last)] == [{"stage0": i} for i in (0.0, 2.0, 3.0)]
    assert first.metrics == {"stage0": {"threads": 1.0, "deterministic": 1.0}}
    assert (first.files, last.files) == ({"index.txt": b"0"}, {"index.txt": b"3"})
    assert second.failure is not None
    assert second.failure.startswith(
        "worker died twice: The actor is dead because its worker process has died. Worker exit "
        "type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error"
    )
    assert "common causes" not in second.failure
    assert (second.params, second.macs, second.gate) == (123, 456, 0.5)


@pytest.mark.usefixtures("cluster")
def test_workers_without_a_place(monkeypatch, tmp_path):
    """It is told once, and not of those that have one and are slow to start."""
    monkeypatch.setattr(ray_pool, "_PATIENCE", 0.0)
    build = functools.partial(toy, {}, tmp_path)
    with contextlib.closing(RayPool(build, "cuda", 3, 2)) as pool:
        pool.start(0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                assert pool.wait(0.01) == []
    assert [str(warning.message) for warning in told] == [
        "workers: Ray has found no place for any in 0 s; each needs 3 CPU and 1 GPU, the cluster "
        "has 2 CPU and 0 GPU in all; add machines, wait until others have finished, or ask for "
        "less with --threads or --device cpu"
    ]
    monkeypatch.setattr(ray_pool, "_PATIENCE", 60.0)
    with contextlib.closing(RayPool(functools.partial(slow, tmp_path), "cpu", 1, 2)) as pool:
        pool.start(0)
        pool.start(1)
        while not (tmp_path / "begun").exists():
            assert pool.wait(0.01) == []
        pool._patient_until = 0.0
        with warnings.catch_warnings(action="error"):
            assert pool.wait(0.01) == []


@pytest.mark.usefixtures("cluster")
def test_a_search_gives_the_same_records(tiny_search, tiny_run, tmp_path):
    """The cluster stays; a defect is raised with its traceback."""
    with pytest.raises(WorkerError, match=r"in a worker:\nTraceback (.|\n)*KeyError"):
        evaluate({1: "defect"}, tmp_path, TWO)
    flags = ["--engine", "ray", "--workers", "2", "--budget", "2", "--runs", str(tmp_path)]
    assert search.main([*tiny_search, *flags]) == 0
    assert ray.is_initialized()
    (run,) = tmp_path.iterdir()
    from search_runs import outcome  # actors import this module, but do not find that one

    assert outcome(run) == outcome(tiny_run)[:2]
