"""Next candidate to the next free worker; what happens when a worker dies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic

from nasfast.methods.workers.base import Answer, Death, Defect, Evaluator, G, Job, Pool, Ready
from nasfast.records import Evaluation

_POLL = 0.1
"""Seconds between looks at the heartbeat."""


class WorkerError(Exception):
    """A defect in a worker; the text is the worker's traceback."""


class Dispatcher(Generic[G]):
    """Evaluates batches on a pool of workers.

    A candidate whose worker died is evaluated once more; if that one dies too, it is a failure with
    the cause of the second death. Workers that died are replaced.

    Args:
        pool: the workers; none is started yet.
        workers: how many.
        evaluator: of this process. It gives the heartbeat, the costs of candidates that have no
            evaluation, and the inputs that the workers' have to equal.
    """

    def __init__(self, pool: Pool[G], workers: int, evaluator: Evaluator[G]) -> None:
        self._pool, self._evaluator = pool, evaluator
        self._idle: list[int] = []
        self._running: dict[int, Job[G]] = {}  # by worker
        self._lost: dict[int, int] = {}  # deaths by worker, since its last evaluation
        self._waiting: deque[Job[G]] = deque()
        self._done: dict[int, Evaluation] = {}  # by index
        self._retried: set[int] = set()  # indices
        for worker in range(workers):
            pool.start(worker)

    def evaluate(
        self, jobs: Sequence[Job[G]], progress: Callable[[int], None]
    ) -> Iterator[Evaluation]:
        """Evaluations in the order of the jobs, as `Engine` says.

        Raises:
            WorkerError: a defect in a worker.
            RuntimeError: an error in a worker that is meant for the user; a worker that dies
                whenever it starts, or that reads other content than this process.
        """
        self._waiting.extend(jobs)
        self._hand_out(progress)
        for job in jobs:
            while job.index not in self._done:
                self._evaluator.runtime.heartbeat()
                for worker, answer in self._pool.wait(_POLL):
                    self._take(worker, answer)
                self._hand_out(progress)
            yield self._done.pop(job.index)

    def _hand_out(self, progress: Callable[[int], None]) -> None:
        while self._idle and self._waiting:
            worker, job = self._idle.pop(), self._waiting.popleft()
            self._running[worker] = job
            self._pool.send(worker, job)
        progress(len(self._running))

    def _take(self, worker: int, answer: Answer) -> None:
        match answer:
            case Evaluation():
                self._done[self._running.pop(worker).index] = answer
                self._lost.pop(worker, None)
                self._idle.append(worker)
            case Ready():
                self._require_same_inputs(answer)
                self._idle.append(worker)
            case Defect(message=None):
                raise WorkerError(f"in a worker:\n{answer.traceback}")
            case Defect():
                raise RuntimeError(answer.message)
            case Death():
                self._bury(worker, answer)
                self._pool.start(worker)

    def _bury(self, worker: int, death: Death) -> None:
        job = self._running.pop(worker, None)
        if worker in self._idle:
            self._idle.remove(worker)
        elif job is None or not death.working:
            self._lost[worker] = self._lost.get(worker, 0) + 1
            if self._lost[worker] == 2:
                raise RuntimeError(
                    f"workers: a worker died twice before its first candidate: {death.cause}; "
                    "use fewer --workers, or 1 to evaluate in this process"
                )
        if job is None:
            return
        if not death.working or job.index not in self._retried:
            self._waiting.appendleft(job)
            if death.working:
                self._retried.add(job.index)
            return
        params, macs = self._evaluator.cost(job.genotype)
        failure = f"worker died twice: {death.cause}"
        self._done[job.index] = Evaluation({}, {}, job.gate, params, macs, {}, failure)

    def _require_same_inputs(self, ready: Ready) -> None:
        wanted = self._evaluator.inputs
        changed = [name for name, value in wanted.items() if ready.inputs.get(name) != value]
        if changed:
            raise RuntimeError(
                f"workers: wanted the {', '.join(changed)} of this process in every worker, got "
                f"other content on {ready.host}; give all machines the same files"
            )
