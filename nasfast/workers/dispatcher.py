"""Next candidate to the next free worker; what happens when a worker dies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic

from nasfast.evaluation.candidate import Evaluator, G
from nasfast.runs.records import Evaluation
from nasfast.utils.errors import UserError
from nasfast.workers.protocol import Answer, Defect, Job, Pool, Ready, WorkerDied
from nasfast.workers.watch import Watch

_POLL = 0.1
"""Seconds between looks at the heartbeat."""


class WorkerError(Exception):
    """A defect in a worker; the text is the worker's traceback."""


class Dispatcher(Generic[G]):
    """Evaluates batches on a pool of workers, which it starts at once.

    A candidate whose worker died is evaluated once more; if that one dies too, it is a failure with
    the cause of the second death. Workers that died are replaced, and one that no longer does
    anything is named by a warning.
    """

    def __init__(self, pool: Pool[G], workers: int) -> None:
        self._pool = pool
        self._watch = Watch(pool.activity)
        self._starting: set[int] = set()
        self._idle: list[int] = []
        self._running: dict[int, Job[G]] = {}  # by worker
        self._lost: dict[int, int] = {}  # deaths by worker, since its last evaluation
        self._waiting: deque[Job[G]] = deque()
        self._done: dict[int, Evaluation] = {}  # by index
        self._retried: set[int] = set()  # indices
        try:
            for worker in range(workers):
                self._start(worker)
        except BaseException:
            pool.close()
            raise

    def evaluate(
        self, evaluator: Evaluator[G], jobs: Sequence[Job[G]], progress: Callable[[int], None]
    ) -> Iterator[Evaluation]:
        """Evaluations in the order of the jobs, as `Engine` says.

        Args:
            evaluator: of this process. It gives the heartbeat, the cost of a candidate that has no
                evaluation, and the inputs that the workers' have to equal.

        Raises:
            WorkerError: a defect in a worker.
            UserError: an error in a worker that is meant for the user; a worker that dies before
                it does anything, twice, or that reads other content than this process.
        """
        self._waiting.extend(jobs)
        self._hand_out(progress)
        for job in jobs:
            while job.index not in self._done:
                evaluator.runtime.heartbeat()
                for worker, answer in self._pool.wait(_POLL):
                    self._take(worker, answer, evaluator)
                self._hand_out(progress)
                running = {worker: job.index for worker, job in self._running.items()}
                self._watch.look(dict.fromkeys(self._starting) | running)
            yield self._done.pop(job.index)

    def close(self) -> None:
        """End all workers."""
        self._pool.close()

    def _start(self, worker: int) -> None:
        self._starting.add(worker)
        self._pool.start(worker)

    def _hand_out(self, progress: Callable[[int], None]) -> None:
        while self._idle and self._waiting:
            worker, job = self._idle.pop(), self._waiting.popleft()
            self._running[worker] = job
            self._pool.send(worker, job)
        progress(len(self._running))

    def _take(self, worker: int, answer: Answer, evaluator: Evaluator[G]) -> None:
        match answer:
            case Evaluation():
                self._done[self._running.pop(worker).index] = answer
                self._lost.pop(worker, None)
                self._idle.append(worker)
            case Ready():
                _require_same_inputs(answer, evaluator)
                self._starting.discard(worker)
                self._idle.append(worker)
            case Defect(message=None):
                raise WorkerError(f"in a worker:\n{answer.traceback}")
            case Defect():
                raise UserError(answer.message)
            case WorkerDied():
                job = self._requeue(worker, answer)
                if job is not None:
                    self._done[job.index] = Evaluation(
                        rewards={},
                        metrics={},
                        costs=evaluator.costs(job.genotype),
                        gate=job.gates.get(evaluator.feedback),
                        seconds={},
                        feedback=evaluator.feedback,
                        failure=f"worker died twice: {answer.cause}",
                    )
                self._start(worker)

    def _requeue(self, worker: int, death: WorkerDied) -> Job[G] | None:
        """Queue the job of a dead worker again; returns it instead if that was the second time."""
        job = self._running.pop(worker, None)
        if worker in self._idle:
            self._idle.remove(worker)
        elif job is None or not death.working:
            self._lost[worker] = self._lost.get(worker, 0) + 1
            if self._lost[worker] == 2:
                raise UserError(
                    f"workers: a worker died twice before its first candidate: {death.cause}; "
                    "use fewer --workers, or 1 to evaluate in this process"
                )
        if job is None or (death.working and job.index in self._retried):
            return job
        if death.working:
            self._retried.add(job.index)
        self._waiting.appendleft(job)
        return None


def _require_same_inputs(ready: Ready, evaluator: Evaluator[G]) -> None:
    changed = [name for name, value in evaluator.inputs.items() if ready.inputs.get(name) != value]
    if changed:
        raise UserError(
            f"workers: expected the {', '.join(changed)} of this process in every worker, got "
            f"other content on {ready.host}; give all machines the same files"
        )
