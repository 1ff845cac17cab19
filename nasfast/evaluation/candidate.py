"""Genotype to evaluation: seed, stages, gate, timing and failure policy, once for all methods."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from nasfast.inference.model import Model
from nasfast.runs.records import Evaluation
from nasfast.spaces.base import Genotype
from nasfast.tasks.base import Scores
from nasfast.tasks.processor import Processor
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.training.pictures import drawn
from nasfast.utils.errors import cause, out_of_memory
from nasfast.utils.seeding import derive_seed

G = TypeVar("G", bound=Genotype)
G_in = TypeVar("G_in", bound=Genotype, contravariant=True)
M = TypeVar("M", bound=nn.Module)
S = TypeVar("S", bound=Scores)

SeedOf = Callable[[str], int]
"""Seed of one thing that is drawn for a candidate, by its name, such as "stage0"."""


class Evaluator(Protocol[G_in]):
    """Genotype to evaluation: a pure function of genotype, index and its own configuration."""

    @property
    def seed(self) -> int: ...

    @property
    def inputs(self) -> Mapping[str, str]:
        """SHA-256 of everything that was read."""

    @property
    def runtime(self) -> Runtime: ...

    @property
    def feedback(self) -> str:
        """Stage whose reward the strategy learns from."""

    @property
    def remedy(self) -> str:
        """What to change where candidates fail."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time of the preparation, by step."""

    def __call__(self, genotype: G_in, index: int, gates: Mapping[str, float]) -> Evaluation: ...

    def costs(self, genotype: G_in) -> dict[str, float]:
        """Costs as an evaluation states them, "params", "macs" and "memory", without training."""


class Stage(Protocol[M, S]):
    """One training of a candidate, and its scores."""

    @property
    def names(self) -> Sequence[str]:
        """In records: ("stage0",), or one for each time that it is scored in training."""

    def train(self, model: M, seed_of: SeedOf) -> Generator[M]:
        """Train the candidate, or a copy of it; yields what was trained as often as it has names,
        each time to be scored, or to be stopped there."""

    def validate(self, model: M) -> S:
        """Score what was trained."""

    def show(self, model: M, scores: S) -> Mapping[str, bytes]:
        """Files by name that show what was trained and scored, such as pictures."""


class CandidateEvaluator(Generic[G, M]):
    """Builds a candidate and takes it through the stages, as far as it gets.

    A candidate stops where a reward, but the last, does not beat its gate, and in the first stage
    where the score after an epoch, at a rung, is below that rung's gate. Running out of memory,
    and a loss or logits that are not finite, are its failure and are recorded beside the rewards of
    the stages before; any other error is a defect and is raised. What a success predicts is shown
    by files of the evaluation, or why it cannot be. All randomness derives from the
    seed and the candidate's index; the caller's generators are left as they were.

    Args:
        build: genotype to network, on the CPU. Its initial weights come from torch's generator.
        costs: "params", "macs" and "memory" of a network that is not placed on a device yet.
        stages: in order; the strategy learns from the first. Its names but the last are rungs.
        runtime: device and precision.
        image: (C, H, W) of the images that costs are of.
        processor: how a network is used, by its genotype.
        seed: of the search.
        inputs: SHA-256 of everything that was read.
        remedy: what to change where candidates fail.
        seconds: wall time of the preparation, by step.
    """

    def __init__(
        self,
        build: Callable[[G], M],
        costs: Callable[[M], dict[str, float]],
        stages: Sequence[Stage[M, Any]],
        runtime: Runtime,
        *,
        image: tuple[int, int, int],
        processor: Callable[[G], Processor],
        seed: int,
        inputs: Mapping[str, str],
        remedy: str,
        seconds: Mapping[str, float],
    ) -> None:
        self._build, self._costs, self._stages = build, costs, tuple(stages)
        self.image, self._processor = image, processor
        self.runtime, self.seed, self.inputs = runtime, seed, inputs
        self.remedy, self.seconds = remedy, seconds
        *self._rungs, self.feedback = self._stages[0].names

    def costs(self, genotype: G) -> dict[str, float]:
        """Costs of a candidate, without training it."""
        with torch.random.fork_rng([]), torch.device("meta"):
            return self._costs(self._build(genotype))

    def deployed(self, genotype: G) -> Model:
        """The network as it would be used, with initial weights."""
        with torch.random.fork_rng([]):
            network = self._build(genotype)
        return Model(network, self._processor(genotype), {"genotype": genotype.to_json()})

    def __call__(self, genotype: G, index: int, gates: Mapping[str, float]) -> Evaluation:
        """Evaluate a candidate.

        Args:
            genotype: the architecture.
            index: the candidate's number in the search.
            gates: rewards that the stages have to beat for the next, by name, and that are to be
                reached at rungs; without one all pass.
        """
        seconds: dict[str, float] = {}
        rewards: dict[str, float] = {}
        metrics: dict[str, dict[str, float]] = {}
        costs: dict[str, float] = {"params": 0, "macs": 0}
        step, failure = "build", None
        files: Mapping[str, bytes] = {}
        device = self.runtime.device

        def seed_of(name: str) -> int:
            return derive_seed(self.seed, index, name)

        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, index))
            try:
                model = self._build(genotype)
                costs = self._costs(model)
                for stage in self._stages:
                    with closing(stage.train(model, seed_of)) as trained:
                        for step in stage.names:
                            with timed(seconds, f"{step}_train"):
                                model = next(trained)
                            with timed(seconds, f"{step}_validate"):
                                scores = stage.validate(model)
                            rewards[step], metrics[step] = scores.reward, scores.as_dict()
                            beats = operator.ge if step in self._rungs else operator.gt
                            passed = step not in gates or beats(rewards[step], gates[step])
                            if not passed:
                                break
                    if not passed:
                        break
                if self.feedback in rewards:
                    files = drawn(lambda: stage.show(model, scores))
            except (RuntimeError, MemoryError, NonFiniteLossError) as error:
                reason = failure_cause(error)
                if reason is None:
                    raise
                failure = f"{step}: {reason}"
        gate = gates.get(self.feedback)
        return Evaluation(
            rewards, metrics, costs, gate, seconds, self.feedback, failure, files=files
        )


def failure_cause(error: Exception) -> str | None:
    """Why a candidate failed, or None for an error that is not the candidate's."""
    if isinstance(error, NonFiniteLossError):
        return str(error)
    return f"out of memory ({cause(error)})" if out_of_memory(error) else None


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall time of the block to an entry."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
