"""The search loop of strategies that are told rewards: ask, evaluate, record, tell."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Generic, Literal

from rich.console import Console

from nasfast.runs.records import Evaluation, Record
from nasfast.runs.study import Study
from nasfast.searches.base import SearchSettings
from nasfast.spaces.base import Space
from nasfast.strategies import Strategy
from nasfast.training.loop import Runtime
from nasfast.utils.cli import say
from nasfast.utils.config import require_positive
from nasfast.utils.seeding import derive_seed
from nasfast.workers import Crew, Engine, Evaluator, G, InProcess, Job, cores

FEEDBACK = "stage0"
"""The stage whose reward the strategy learns from, for every candidate: all have passed it, so it
is one scale. A later stage only ranks."""
_MAX_FAILURES = 5
_MAX_DUPLICATES = 100


@dataclass(frozen=True)
class SamplingSettings(SearchSettings):
    """Settings of a search that evaluates sampled candidates."""

    batch: int = 1
    """Candidates that are asked of the strategy at once and told to it at once, when all are
    evaluated; their gate is that of the batch's begin. 1 is the published order."""
    workers: int | None = None
    """Candidates in training at a time, each in a process of its own; changes no result. Default:
    as many as the batch has and the cores (on CUDA: the devices) keep busy, with ray as many as the
    batch has: so many at most, the cluster decides."""
    devices: str | None = None
    """Instead of --device: devices that the workers share out, such as cuda:0,cuda:1."""
    engine: Literal["process", "ray"] = "process"
    """process: workers of this machine. ray: actors of the cluster at $RAY_ADDRESS, or of a local
    one."""

    def __post_init__(self) -> None:
        given = [name for name in ("workers", "threads") if getattr(self, name) is not None]
        require_positive(self, "batch", *given)
        if self.devices is not None and self.engine == "ray":
            raise ValueError(
                "devices: expected --engine process, as Ray hands out GPUs itself, got ray; give "
                "--device cuda and --workers"
            )
        if self.devices is not None and self.device != "auto":
            raise ValueError(
                f"devices: expected --device or --devices, got both, {self.device} and "
                f"{self.devices}; leave one out"
            )

    @property
    def places(self) -> str:
        """Names of the devices, separated by commas."""
        return self.devices or self.device


def default_threads(batch: int) -> int:
    """Threads of a candidate such that a batch fills the cores. It decides last digits of results,
    so it must not depend on the number of workers."""
    return max(1, cores() // batch)


@dataclass(frozen=True)
class SamplingSearch(Generic[G]):
    """Candidates asked of a strategy, batch by batch, until the budget is spent."""

    space: Space[G]
    strategy: Strategy[G]
    evaluator: Evaluator[G]
    budget: int
    batch: int = 1
    crew: Crew = field(default_factory=Crew)
    engine: Engine[G] = field(default_factory=InProcess)
    """That of the crew."""

    @property
    def inputs(self) -> Mapping[str, str]:
        return self.evaluator.inputs

    @property
    def runtime(self) -> Runtime:
        return self.evaluator.runtime

    @property
    def environment(self) -> Mapping[str, object]:
        return {"feedback": FEEDBACK, "crew": dataclasses.asdict(self.crew)}

    @property
    def more(self) -> str:
        return f"--budget {2 * self.budget}"

    def run(self, study: Study, console: Console) -> None:
        """Ask, evaluate, record, tell, until ``budget`` candidates are evaluated.

        After a crash the strategy continues from its checkpoint, the begin of a batch; what is
        recorded of that batch is not evaluated again. So is a batch that the budget ended in.

        Raises:
            RuntimeError: the last candidates all failed, or all repeated earlier ones.
        """
        checkpoint = study.load_checkpoint()
        told, encode, controller = 0, self.evaluator.seconds["encode"], 0.0
        if checkpoint is not None:
            told, controller = checkpoint["told"], checkpoint["seconds"]["controller"]
            encode += checkpoint["seconds"]["encode"]
            self.strategy.load_state_dict(checkpoint["strategy"])
        while True:
            study.save_checkpoint(
                {
                    "told": told,
                    "strategy": self.strategy.state_dict(),
                    "seconds": {"encode": encode, "controller": controller},
                    "budget": self.budget,
                }
            )
            if told == len(study.records) and _evaluated(study) >= self.budget:
                return
            start = time.perf_counter()
            asked = [self.strategy.ask() for _ in range(self.batch)]
            controller += time.perf_counter() - start
            self._evaluate(study, told, asked, console)
            if len(study.records) < told + len(asked):
                return  # the budget ends in the batch
            start = time.perf_counter()
            for genotype, record in zip(asked, study.records[told:]):
                self.strategy.tell(genotype, record.evaluation.rewards.get(FEEDBACK))
            controller += time.perf_counter() - start
            told += len(asked)

    def close(self) -> None:
        """End the workers."""
        self.engine.close()

    def _evaluate(self, study: Study, told: int, asked: Sequence[G], console: Console) -> None:
        """Record what is not yet recorded of a batch, in order, as far as the budget reaches."""
        gate = _gate(study.records[:told])
        first = {_key(r.canonical): r.index for r in reversed(study.records) if not _repeats(r)}
        spent = _evaluated(study)
        new: list[Job[G]] = []
        entries: list[tuple[Job[G], int]] = []  # with the index of its first record
        for index, genotype in enumerate(asked, told):
            if index < len(study.records):
                if self.space.from_json(study.records[index].genotype) != genotype:
                    raise RuntimeError(
                        f"{study.path}: record {index} is not what the strategy asked for; the "
                        "records or the checkpoint were edited, start a new run"
                    )
                continue
            if spent >= self.budget:
                break
            job = Job(index, genotype, gate)
            entries.append((job, first.setdefault(_key(genotype.canonical().to_json()), index)))
            if entries[-1][1] == index:
                new.append(job)
                spent += 1
        with console.status("") as status:

            def show(running: int) -> None:
                status.update(f"{running} in training, {_evaluated(study)} of {self.budget} done")

            evaluations = self.engine.evaluate(self.evaluator, new, show)
            for job, origin in entries:
                fresh = origin == job.index
                record = Record(
                    index=job.index,
                    genotype=job.genotype.to_json(),
                    canonical=job.genotype.canonical().to_json(),
                    seed=derive_seed(self.evaluator.seed, job.index),
                    evaluation=next(evaluations) if fresh else study.records[origin].evaluation,
                    duplicate_of=None if fresh else origin,
                    time=datetime.now(UTC).isoformat(timespec="seconds"),
                )
                study.append(record)
                _print_record(study, record, self.budget, console)
                _check_progress(study, self.evaluator.remedy)


def _key(canonical: dict[str, object]) -> str:
    return repr(sorted(canonical.items()))


def _repeats(record: Record) -> bool:
    return record.duplicate_of is not None


def _fresh(records: Sequence[Record]) -> list[Evaluation]:
    return [record.evaluation for record in records if not _repeats(record)]


def _evaluated(study: Study) -> int:
    return len(_fresh(study.records))


def _gate(records: Sequence[Record]) -> float | None:
    """Running mean of the stage-0 rewards so far (section 3.3: a candidate must beat it)."""
    rewards = [e.rewards[FEEDBACK] for e in _fresh(records) if FEEDBACK in e.rewards]
    return statistics.fmean(rewards) if rewards else None


def _check_progress(study: Study, remedy: str) -> None:
    failures = [e.failure for e in _fresh(study.records)[-_MAX_FAILURES:]]
    if len(failures) == _MAX_FAILURES and all(failures):
        raise RuntimeError(
            f"the last {_MAX_FAILURES} candidates failed, the last one: {failures[-1]}; {remedy}"
        )
    if all(_repeats(record) for record in study.records[-_MAX_DUPLICATES:]):
        raise RuntimeError(
            f"the last {_MAX_DUPLICATES} architectures repeat earlier ones: the strategy has "
            "converged; take the best one found, or let it explore more (--ppo.ent-coef)"
        )


def _print_record(study: Study, record: Record, budget: int, console: Console) -> None:
    evaluation = record.evaluation
    place = f"[{_evaluated(study):>{len(str(budget))}}/{budget}]"
    if record.duplicate_of is not None:
        say(console, f"{place} repeats architecture {record.duplicate_of}")
        return
    rewards = "  ".join(f"{stage} {reward:.4f}" for stage, reward in evaluation.rewards.items())
    outcome = f"failed: {evaluation.failure}" if evaluation.failure else rewards
    mark = "  best so far" if study.best is record else ""
    say(
        console,
        f"{place} {outcome:<32} {evaluation.params / 1e6:.2f} M params  "
        f"{sum(evaluation.seconds.values()):5.1f} s{mark}",
    )
