"""Workers: what they are given and when, what happens when they die, and who they are."""

import contextlib
import functools
import itertools
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from search_runs import exists
from toys import COSTS, GENOTYPE, Toy, evaluate, jobs, toy

from nasfast.device import deterministic
from nasfast.runs.records import Evaluation
from nasfast.utils.errors import UserError
from nasfast.utils.interrupt import Interrupt, StopRequested
from nasfast.workers import Job, WorkerConfig, WorkerError
from nasfast.workers.dispatcher import Dispatcher
from nasfast.workers.protocol import Ready, Worker, WorkerDied
from nasfast.workers.watch import Activity

KILLED = "killed by signal 9 (SIGKILL), out of memory?"
TWO = WorkerConfig(workers=2, threads=3)


def rewards(evaluations):
    return [evaluation.rewards.get("stage0") for evaluation in evaluations]


# ---- the queue


class Script:
    """A pool whose workers answer in any order, what is written down for a candidate."""

    def __init__(self, answers, choose):
        self.answers, self.choose = answers, choose
        self.pending = []
        self.sent = []
        self.most = 0

    def start(self, worker):
        self.pending.append((worker, Ready(Toy({}, Path()).inputs, "there")))

    def send(self, worker, job):
        assert worker not in [busy for busy, _ in self.pending]
        self.sent.append(job.index)
        written = self.answers.get(job.index)
        good = Evaluation(
            {"stage0": float(job.index)},
            {"stage0": {}},
            COSTS,
            job.gates.get("stage0"),
            {},
            "stage0",
        )
        self.pending.append((worker, written.pop(0) if written else good))
        self.most = max(self.most, len(self.pending))

    def wait(self, seconds):
        self.choose.shuffle(self.pending)
        count = self.choose.randint(0, len(self.pending))
        out, self.pending = self.pending[:count], self.pending[count:]
        return out

    def activity(self, worker):
        return Activity()

    def close(self): ...


@given(
    workers=st.integers(1, 5),
    batches=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    deaths=st.dictionaries(st.integers(0, 14), st.integers(0, 2), max_size=5),
    idle=st.sets(st.integers(0, 14), max_size=1),
    seed=st.integers(0, 2**32),
)
def test_any_order_and_any_death_give_the_same(workers, batches, deaths, idle, seed):
    pool = Script(
        {
            index: [
                *[WorkerDied("cause", False)] * (index in idle),
                *[WorkerDied("cause", True)] * count,
            ]
            for index, count in deaths.items()
        },
        random.Random(seed),
    )
    dispatcher = Dispatcher(pool, workers)
    indices = itertools.count()
    for size in batches:
        batch = [Job(next(indices), GENOTYPE, {"stage0": 0.5}) for _ in range(size)]
        running = []
        for job, evaluation in zip(
            batch, dispatcher.evaluate(Toy({}, Path()), batch, running.append)
        ):
            if deaths.get(job.index) == 2:
                failure = "worker died twice: cause"
                assert evaluation == Evaluation({}, {}, COSTS, 0.5, {}, "stage0", failure)
            else:
                assert evaluation.rewards == {"stage0": job.index}
        assert max(running) <= workers
    # a worker that was dead before it began is not counted against the candidate
    tries = [
        min(2, 1 + deaths.get(index, 0)) + (index in deaths and index in idle)
        for index in range(sum(batches))
    ]
    assert sorted(pool.sent) == [i for i, n in enumerate(tries) for _ in range(n)]
    assert pool.most <= workers


def test_workers_that_started_end_if_another_cannot():
    class Full(Script):
        closed = False

        def start(self, worker):
            if worker == 2:
                raise BlockingIOError("Resource temporarily unavailable")
            super().start(worker)

        def close(self):
            self.closed = True

    pool = Full({}, random.Random(0))
    with pytest.raises(BlockingIOError):
        Dispatcher(pool, 4)
    assert len(pool.pending) == 2
    assert pool.closed


# ---- processes


def test_evaluations_come_in_order_whoever_dies(tmp_path):
    """A worker that dies is replaced and its candidate retried; the second death is a failure."""
    plan = {0: "once: kill", 1: "kill", 2: "once: exit", 4: "exit"}
    evaluations = evaluate(plan, tmp_path, TWO, count=6)
    assert rewards(evaluations) == [0, None, 2, 3, None, 5]
    causes = {1: KILLED, 4: "exited with status 3"}
    for index, evaluation in enumerate(evaluations):
        if index in causes:
            failure = f"worker died twice: {causes[index]}"
            assert evaluation == Evaluation({}, {}, COSTS, 0.5, {}, "stage0", failure)
        else:
            assert evaluation.metrics == {"stage0": {"threads": 3.0, "deterministic": 0.0}}
            assert evaluation.gate == 0.5


def test_a_worker_that_could_only_print_what_is_wrong(tmp_path):
    """No candidate fails for it."""
    message = (
        "workers: expected a worker to go on, got the error that it printed above; mend that, and "
        "continue with --resume"
    )
    with pytest.raises(UserError) as caught:
        evaluate({1: "say why"}, tmp_path, TWO, count=3)
    assert str(caught.value) == message


def test_a_death_is_noticed_at_once(tmp_path):
    """While it is idle, too: the next batch finds another worker in its place."""
    evaluator = Toy({}, tmp_path)
    engine = TWO.engine_for(functools.partial(toy, {}, tmp_path))
    with contextlib.closing(engine):
        list(engine.evaluate(evaluator, jobs(2), lambda running: None))
        for child in engine._pool._workers.values():  # type: ignore[attr-defined]
            os.kill(child.process.pid, signal.SIGKILL)
        start = time.perf_counter()
        evaluations = engine.evaluate(evaluator, jobs(4), lambda running: None)
        assert rewards(list(evaluations)) == [0, 1, 2, 3]
        assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ("refuse", "[Errno 2] No such file or directory: '/no/where'"),
        ("refused", "[Errno 2] No such file or directory: '{place}/cpu'"),
        (
            "unborn",
            f"workers: a worker died twice before its first candidate: {KILLED}; use fewer "
            "--workers, or 1 to evaluate in this process",
        ),
        (
            "other",
            "workers: expected the plan of this process in every worker, got other content on "
            f"{os.uname().nodename}; give all machines the same files",
        ),
    ],
)
def test_what_is_meant_for_the_user_has_no_traceback(plan, text, tmp_path):
    with pytest.raises(UserError) as caught:
        evaluate({1: plan}, tmp_path, TWO)
    assert str(caught.value) == text.format(place=tmp_path)


def test_a_defect_is_raised_with_its_traceback(tmp_path):
    with pytest.raises(WorkerError, match=r"^in a worker:\nTraceback ") as caught:
        evaluate({1: "defect"}, tmp_path, TWO)
    assert "toys.py" in str(caught.value)
    assert str(caught.value).endswith("KeyError: 'no such thing'\n")


def test_a_stop_ends_workers_at_work(tmp_path):
    with Interrupt() as interrupt:

        def stop():
            while not (tmp_path / "asleep").exists():
                time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(StopRequested):
            evaluate({0: "sleep"}, tmp_path, TWO, heartbeat=interrupt.check)
        thread.join()
    assert not exists(int((tmp_path / "asleep").read_text()))


@pytest.mark.parametrize(("device", "chosen"), [("cpu", []), ("cuda", []), ("cuda:1", [1])])
def test_a_worker_computes_on_its_gpu(device, chosen, tmp_path, monkeypatch):
    set_devices = []
    # as torch does it: a device without a number is refused
    monkeypatch.setattr(torch._C, "_cuda_setDevice", set_devices.append, raising=False)
    worker = Worker(functools.partial(toy, {}, tmp_path), device, torch.get_num_threads())
    assert isinstance(worker.start(), Ready)
    assert set_devices == chosen


def test_workers_are_deterministic_where_the_search_is(tmp_path):
    with deterministic(True):
        (evaluation,) = evaluate({}, tmp_path, TWO, count=1)
    assert evaluation.metrics == {"stage0": {"threads": 3.0, "deterministic": 1.0}}


# ---- the workers


@pytest.fixture
def config_on(monkeypatch):
    """Makes the settings of workers on a machine with so many cores and GPUs."""

    def make(cores, gpus, **given):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        usual = {"workers": None, "devices": "cpu", "threads": 1, "engine": "process", "batch": 4}
        return WorkerConfig.of(**usual | given)

    return make


@pytest.mark.parametrize(
    ("machine", "given", "made"),
    [
        ((2, 0), {}, (2, ("cpu",), 1)),  # as many as fill the cores
        ((16, 0), {}, (4, ("cpu",), 1)),
        ((16, 0), {"threads": 4}, (4, ("cpu",), 4)),
        ((1, 0), {"threads": 2}, (1, ("cpu",), 2)),
        ((2, 0), {"workers": 1, "devices": "cpu, cpu"}, (1, ("cpu", "cpu"), 1)),
        ((16, 3), {"devices": "cuda:0,cuda:2"}, (2, ("cuda:0", "cuda:2"), 1)),  # one a device
        ((16, 3), {"devices": "auto"}, (1, ("cuda",), 1)),
        ((16, 3), {"workers": 5, "devices": "cuda", "batch": 8}, (5, ("cuda",), 1)),
        # no more than have work
        ((2, 0), {"workers": 1000}, (2, ("cpu",), 1)),
        ((16, 0), {"workers": 1000}, (4, ("cpu",), 1)),
        ((2, 3), {"workers": 1000, "devices": "cuda"}, (4, ("cuda",), 1)),
        ((2, 0), {"workers": 1000, "engine": "ray"}, (4, ("cpu",), 1, "ray")),
        ((2, 0), {"engine": "ray", "batch": 8}, (8, ("cpu",), 1, "ray")),  # a batch of a cluster
    ],
)
def test_default_workers(machine, given, made, config_on, monkeypatch):
    """The process that they are forked from starts where there are several."""
    started = []
    monkeypatch.setattr("nasfast.workers.config.start_server", lambda: started.append(True))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert config_on(*machine, **given) == WorkerConfig(*made)
    assert started == [True] * (made[0] > 1 and "ray" not in made)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"devices": "cuda:0,cpu"},
            "devices: expected devices of one kind, got cuda:0,cpu; rewards differ between kinds, "
            "so give devices of one",
        ),
        (
            {"engine": "ray"},
            "engine: expected one that is installed, got ray; pip install 'nasfast[distributed]', "
            "or leave --engine out",
        ),
    ],
)
def test_workers_that_cannot_be(given, text, config_on, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError) as caught:
        config_on(2, 1, **given)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("workers", "threads", "cpus"), [(8, 1, 4), (2, 1, 2), (2, 3, 4), (2, 6, 6)]
)
def test_a_local_cluster_hands_out_the_cores(monkeypatch, workers, threads, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    made = []

    def make(*arguments):
        made.append(arguments)
        return Script({}, random.Random(0))

    monkeypatch.setattr("nasfast.workers.config.RayPool", make)
    build = functools.partial(toy, {}, Path())
    WorkerConfig(workers, ("cpu",), threads, "ray").engine_for(build)
    assert made == [(build, "cpu", threads, cpus)]


def test_its_text():
    assert str(WorkerConfig(1, ("cpu", "cpu"), 1)) == "cpu, 1 thread"
    assert str(WorkerConfig(2, ("cuda:0", "cuda:1"), 4)) == "cuda:0, cuda:1, 2 workers of 4 threads"
