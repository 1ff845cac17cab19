"""Messages and interfaces between the search, its engines and their workers."""

from __future__ import annotations

import platform
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import torch

from nasfast.device import use_deterministic_algorithms
from nasfast.evaluation.candidate import Evaluator, G
from nasfast.runs.records import Evaluation
from nasfast.spaces.base import Genotype
from nasfast.utils.errors import text_for_user
from nasfast.workers.watch import Activity

G_in = TypeVar("G_in", bound=Genotype, contravariant=True)
G_out = TypeVar("G_out", bound=Genotype, covariant=True)


Builder = Callable[[str], Evaluator[G]]
"""Makes a worker's evaluator on a device. It is pickled, and opens all that it needs by itself."""


@dataclass(frozen=True)
class Job(Generic[G_out]):
    """A candidate to evaluate."""

    index: int
    genotype: G_out
    gates: Mapping[str, float]
    """Rewards to beat, by stage."""


@dataclass(frozen=True)
class Ready:
    """A worker waits for its first job."""

    inputs: Mapping[str, str]
    """Of its evaluator."""
    host: str


@dataclass(frozen=True)
class Defect:
    """An error in a worker that is no candidate's failure."""

    traceback: str
    message: str | None
    """Its text where it is meant for the user."""


@dataclass(frozen=True)
class WorkerDied:
    """An unexpected end of a worker."""

    cause: str
    working: bool
    """Whether it had begun its job; an earlier death is not the candidate's fault."""


Answer: TypeAlias = Ready | Evaluation | Defect | WorkerDied


class Worker(Generic[G]):
    """An evaluator in a process of its own; errors are answers."""

    def __init__(
        self, build: Builder[G], device: str, threads: int, deterministic: bool = False
    ) -> None:
        self._build, self._device, self._threads = build, device, threads
        self._deterministic = deterministic

    def start(self) -> Ready | Defect:
        """Build the evaluator."""
        try:
            torch.set_num_threads(self._threads)
            if self._deterministic:
                use_deterministic_algorithms()
            if self._device.startswith("cuda:"):  # "cuda" is the current one, perhaps Ray's choice
                torch.cuda.set_device(self._device)
            self._evaluate = self._build(self._device)
        except Exception as error:
            return _defect(error)
        return Ready(dict(self._evaluate.inputs), platform.node())

    def run(self, job: Job[G]) -> Evaluation | Defect:
        """Evaluate a candidate."""
        try:
            return self._evaluate(job.genotype, job.index, job.gates)
        except Exception as error:
            return _defect(error)


def _defect(error: Exception) -> Defect:
    text = "".join(traceback.format_exception(error))
    return Defect(text, text_for_user(error))


class Pool(Protocol[G_in]):
    """Workers by number. They only run jobs: `Dispatcher` has the queue and the retries."""

    def start(self, worker: int) -> None:
        """Begin a worker, or begin it again; its first answer is Ready."""

    def send(self, worker: int, job: Job[G_in]) -> None:
        """Give an idle worker a candidate; does not wait."""

    def wait(self, seconds: float) -> list[tuple[int, Answer]]:
        """Answers as they come; none after ``seconds`` without one."""

    def activity(self, worker: int) -> Activity:
        """What a worker does, as far as it is known."""

    def close(self) -> None:
        """End all workers at once."""


class Engine(Protocol[G]):
    """Evaluates batches of candidates."""

    def evaluate(
        self, evaluator: Evaluator[G], jobs: Sequence[Job[G]], progress: Callable[[int], None]
    ) -> Iterator[Evaluation]:
        """Evaluations in the order of the jobs, each as soon as it and those before it are done.

        Args:
            evaluator: of this process. Workers' evaluators give the same.
            jobs: the batch.
            progress: called with the number of candidates in training, whenever it changes.
        """

    def close(self) -> None:
        """End all workers at once."""


class InProcess(Generic[G]):
    """No workers: this process evaluates, one candidate after the other."""

    def evaluate(
        self, evaluator: Evaluator[G], jobs: Sequence[Job[G]], progress: Callable[[int], None]
    ) -> Iterator[Evaluation]:
        """As `Engine` says."""
        for job in jobs:
            progress(1)
            yield evaluator(job.genotype, job.index, job.gates)

    def close(self) -> None:
        """Nothing to end."""
