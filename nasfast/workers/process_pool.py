"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, Final, Generic, Literal

import torch

from nasfast.evaluation.candidate import G
from nasfast.workers.protocol import Answer, Builder, Defect, Job, Worker, WorkerDied
from nasfast.workers.watch import Activity

_PRELOAD = ["nasfast.methods.registry", "torch._dynamo"]
"""Imported once, by the server that workers are forked from: they start in milliseconds and share
its memory. The second is what torch imports when the first optimizer is made."""


_BEGUN: Final = "begun"
"""A worker's message that it has received a job."""


_SAID_WHY = 2
"""Exit status of a worker that has printed what is wrong, where it could not raise: a feature cache
was cut short as it was read. No candidate is at fault, and another worker would fare no better."""
_SAID = (
    "workers: expected a worker to go on, got the error that it printed above; mend that, and "
    "continue with --resume"
)


@dataclass
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    working: bool = False


class ProcessPool(Generic[G]):
    """Worker i evaluates on the device i modulo their number.

    The processes ignore Ctrl-C, which is this process's to handle, and die with it.

    Args:
        builders: names of devices, and what makes the evaluator of a worker there.
        threads: that a worker computes with.
    """

    def __init__(self, builders: Sequence[tuple[str, Builder[G]]], threads: int) -> None:
        self._builders, self._threads = builders, threads
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._workers: dict[int, _Worker] = {}

    def start(self, worker: int) -> None:
        """Begin a worker, or begin it again."""
        start_server()
        ours, theirs = connection.Pipe()
        device, build = self._builders[worker % len(self._builders)]
        process = get_context("forkserver").Process(
            target=_serve,
            args=(theirs, Worker(build, device, self._threads, self._deterministic)),
            name=f"nasfast-worker-{worker}",
            daemon=True,
        )
        process.start()
        theirs.close()  # so that the worker's end is its own, and closes when it dies
        self._workers[worker] = _Worker(process, ours)

    def send(self, worker: int, job: Job[G]) -> None:
        """Give an idle worker a candidate."""
        with contextlib.suppress(ConnectionError):  # it is dead, which `wait` reports
            self._workers[worker].pipe.send(job)

    def wait(self, seconds: float) -> list[tuple[int, Answer]]:
        """Answers so far, after at most ``seconds``."""
        pipes = {worker_process.pipe: worker for worker, worker_process in self._workers.items()}
        readable: list[Any] = connection.wait(pipes, seconds)
        answers = ((pipes[pipe], self._receive(pipes[pipe])) for pipe in readable)
        return [(worker, answer) for worker, answer in answers if answer is not None]

    def _receive(self, worker: int) -> Answer | None:
        worker_process = self._workers[worker]
        try:
            message: Answer | Literal["begun"] = worker_process.pipe.recv()
        except (EOFError, OSError):
            status = self._end(worker)
            if status == _SAID_WHY:
                return Defect("", _SAID)
            return WorkerDied(_cause(status), worker_process.working)
        worker_process.working = message == _BEGUN
        return None if message == _BEGUN else message

    def _end(self, worker: int) -> int:
        worker_process = self._workers.pop(worker)
        worker_process.pipe.close()
        worker_process.process.join()
        status = worker_process.process.exitcode or 0
        worker_process.process.close()
        return status

    def activity(self, worker: int) -> Activity:
        """What a worker does."""
        process = self._workers[worker].process.pid
        return Activity() if process is None else Activity.of(process)

    def close(self) -> None:
        """Kill all workers: none has anything to save."""
        for worker_process in self._workers.values():
            worker_process.process.kill()
        for worker in list(self._workers):
            self._end(worker)


def _cause(status: int) -> str:
    """What an exit status means."""
    if status >= 0:
        return f"exited with status {status}"
    cause = f"killed by signal {-status} ({signal.Signals(-status).name})"
    return f"{cause}, out of memory?" if -status == signal.SIGKILL else cause


def start_server() -> None:
    """Start the process that workers are forked from, unless it runs; it imports in background."""
    get_context("forkserver").set_forkserver_preload(_PRELOAD)
    resource_tracker.ensure_running()  # the server would start it, which unblocks signals
    # Inherited by the server and all workers. A signal that arrives now stays pending.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, worker: Worker[Any]) -> None:
    """A worker process: an answer for the start, then one for each job."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the search is gone
        pipe.send(worker.start())
        while True:
            job = pipe.recv()
            pipe.send(_BEGUN)
            pipe.send(worker.run(job))


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
