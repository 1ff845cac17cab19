"""The search loop of strategies that learn from rewards: ask, evaluate, record, tell."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, cast

import torch
from rich.console import Console

from nasfast.evaluation.candidate import CandidateEvaluator, Evaluator, G
from nasfast.latency import PROFILE, Backend, Latencies, Profile, Target, UndeployableError
from nasfast.models.zoo import ZOO
from nasfast.runs.objectives import Objectives
from nasfast.runs.records import Evaluation, Record
from nasfast.runs.study import Study
from nasfast.searches.base import SearchSettings
from nasfast.searches.costing import Costing
from nasfast.searches.halving import rung_gates, settled
from nasfast.searches.limits import Limit, Limits, constraint
from nasfast.spaces.base import Space
from nasfast.strategies import (
    EvolutionConfig,
    PPOConfig,
    PredictorConfig,
    Strategy,
    make_strategy,
)
from nasfast.training.loop import Runtime
from nasfast.utils.cli import say
from nasfast.utils.config import BatchSize, Bound, Count
from nasfast.utils.errors import NothingFoundError, UserError
from nasfast.utils.seeding import derive_seed
from nasfast.workers import Engine, InProcess, Job, WorkerConfig, cores

_MAX_FAILURES = 5
_MAX_DUPLICATES = 100
_MAX_REJECTIONS = 1000
_MAX_MEASURED = 50
"""Rejections in a row by a measurement, which takes seconds."""
LATENCY_FLAGS: Mapping[str, object] = {
    "latency_backend": "torch",
    "latency_table": None,
    "latency_size": None,
    "latency_batch": 1,
    "latency_threads": None,
}
"""Settings that say how latencies are measured, and their defaults."""
LATENCY = "latency"
"""Folder of a run for what latencies were measured and predicted from."""


@dataclass(frozen=True)
class SamplingSettings(SearchSettings):
    """Settings of a search that evaluates sampled candidates."""

    batch: Annotated[int, Bound(1, 4096)] = 1
    """Candidates that are sampled from one policy and reported to it together; all share the gate
    of the batch's start. 1 is the published order."""
    workers: Count | None = None
    """Candidates trained in parallel, each in a process of its own; changes no result. Default: as
    many as the batch has and the cores (on CUDA: the devices) keep busy; with ray the whole batch,
    at most that many: Ray schedules them."""
    devices: str | None = None
    """Instead of --device: devices to distribute the workers over, such as cuda:0,cuda:1."""
    engine: Literal["process", "ray"] = "process"
    """process: workers of this machine. ray: actors of the cluster at $RAY_ADDRESS, or of a local
    one."""
    max_params: str | int | None = None
    """Most parameters of a candidate, such as 0.3M. What exceeds a limit is not trained and does
    not count in the budget: another is drawn in its place, and the controller is told that it was
    as bad as the worst of the latest candidates."""
    max_macs: str | int | None = None
    """Most multiply-adds of a candidate, such as 1.5G, for an image of the size that candidates are
    scored on."""
    objective: tuple[str, ...] = ("score",)
    """What is looked for. "score latency" gives a front of networks that no other beats in both;
    "score latency:0.02" one network, where a halving of the latency is worth 0.02 of the score.
    Beside score: latency, params, macs, memory."""
    constraint: tuple[str, ...] = ()
    """Most that a candidate may cost: "latency<20ms" "params<0.3M" "macs<1.5G" "memory<64MB"."""
    latency_backend: Backend = "torch"
    """What latencies are of, once they matter: torch (on CUDA a graph of its kernels), compiled by
    torch, or the ONNX file of nasfast export in onnxruntime."""
    latency_table: Path | None = None
    """Table of another machine, of nasfast profile: latencies are predicted from it."""
    latency_size: str | None = None
    """HEIGHTxWIDTH of the images that latencies are of; default: those that candidates are scored
    on."""
    latency_batch: BatchSize = 1
    """Images of a forward pass."""
    latency_threads: Annotated[int, Bound(1, 1024)] | None = None
    """Threads of a forward pass; default: all cores."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    """The search with a model of the reward."""
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    """The evolution."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """The controller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _, objectives = self.limits, self.objectives
        if objectives.several and getattr(self, "strategy", None) == "ppo":
            raise UserError(
                "objective: expected one number for the strategy ppo to learn from, got "
                f"{' '.join(self.objective)}; give the costs weights, such as "
                f"{objectives.costs[0]}:0.02, or use --strategy predictor or evolution"
            )
        _ = self._latency_size
        given = [
            flag
            for flag, unused in LATENCY_FLAGS.items()
            if getattr(self, flag) != unused and not self.needs_latency
        ]
        if given:
            flag = given[0].replace("_", "-")
            raise UserError(
                f"{given[0]}: expected --objective score latency or a constraint of latency with "
                f"--{flag}, got neither; add one, or leave --{flag} out"
            )
        if self.devices is not None and self.engine == "ray":
            raise UserError(
                "devices: expected --engine process, as Ray hands out GPUs itself, got ray; give "
                "--device cuda and --workers"
            )
        if self.devices is not None and self.device != "auto":
            raise UserError(
                f"devices: expected --device or --devices, got both, {self.device} and "
                f"{self.devices}; leave one out"
            )

    @property
    def limits(self) -> Limits:
        """What candidates may cost; UserError for a value that is no count."""
        given = {"params": self.max_params, "macs": self.max_macs}
        counts = [Limit.of(cost, value) for cost, value in given.items() if value is not None]
        return Limits((*counts, *map(constraint, self.constraint)))

    @property
    def objectives(self) -> Objectives:
        """What is looked for; UserError for what is none."""
        return Objectives.of(self.objective)

    @property
    def needs_latency(self) -> bool:
        """Whether latencies decide anything."""
        limited = any(limit.cost == "latency" for limit in self.limits.limits)
        return limited or "latency" in self.objectives.costs

    @property
    def _latency_size(self) -> tuple[int, int] | None:
        if self.latency_size is None:
            return None
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", self.latency_size)
        if match is None or min(int(match[1]), int(match[2])) < 1:
            raise UserError(
                f"latency_size: expected HEIGHTxWIDTH, such as 360x480, got {self.latency_size!r}; "
                "correct it"
            )
        return int(match[1]), int(match[2])

    def phase(
        self,
        strategy: str,
        space: Space[G],
        seed: int,
        evaluator: CandidateEvaluator[G, Any],
        budget: int,
        engine: Engine[G],
        stop_early: float = 0.0,
    ) -> Phase[G]:
        """A phase of the search.

        Args:
            strategy: its name.
            space: that is searched.
            seed: of the strategy.
            evaluator: of candidates.
            budget: candidates to evaluate.
            engine: evaluates batches.
            stop_early: share of the candidates to stop at each rung.

        Raises:
            UserError: as `latencies` says.
        """
        objectives = self.objectives
        costing = Costing(evaluator, self.latencies(space, evaluator))
        goals = None
        if objectives.several:
            goals = lambda genotype: objectives.goals(costing(genotype))  # noqa: E731
        return Phase(
            space,
            make_strategy(strategy, space, seed, self, goals),
            evaluator,
            budget,
            self.batch,
            engine,
            self.limits,
            objectives,
            costing,
            stop_early,
            _published(space) if objectives.costs else {},
        )

    def latencies(
        self, space: Space[G], evaluator: CandidateEvaluator[G, Any]
    ) -> Latencies[G] | None:
        """Of networks of a space, where they decide anything.

        Raises:
            UserError: they cannot be measured here, or their table is of other networks or images.
        """
        if not self.needs_latency:
            return None
        channels, height, width = evaluator.image
        size, runtime = self._latency_size or (height, width), evaluator.runtime
        if self.latency_table is None:
            target = Target.of(
                self.latency_backend,
                runtime,
                threads=self.latency_threads or cores(),
                batch=self.latency_batch,
                size=size,
                channels=channels,
            )
            return Latencies(target, space, evaluator.deployed, heartbeat=runtime.heartbeat)
        if not self.latency_table.is_file():
            raise UserError(
                f"latency-table: expected a file of nasfast profile, got {self.latency_table}, "
                "which is none; make it on the target"
            )
        profile = Profile.read(self.latency_table)
        images = (self.latency_batch, channels, *size)
        if profile.target.shape != images:
            raise UserError(
                f"latency-table {self.latency_table}: expected times for images "
                f"{list(images)}, got a table for {list(profile.target.shape)}; give "
                "--latency-size and --latency-batch, or make another with nasfast profile"
            )
        found = Latencies(profile.target, space, evaluator.deployed, profile)
        found.require_known()
        return found

    def in_run(self, path: Path) -> Self:
        """As `SearchSettings` says."""
        kept = path / LATENCY / PROFILE
        if self.latency_table is None or not kept.is_file():
            return self
        return dataclasses.replace(self, latency_table=kept)

    def with_budgets(self, budgets: Sequence[int]) -> Self:
        """With the budgets of the phases, in their order; of methods with a field ``budget``."""
        changes: dict[str, Any] = {"budget": budgets[0]}
        return dataclasses.replace(self, **changes)

    def worker_config(
        self, workers: int | None = None, note: Callable[[str], None] = lambda text: None
    ) -> WorkerConfig:
        """The workers that these settings ask for, each with the threads of this process.

        Args:
            workers: how many, whatever the settings say.
            note: is told where they are fewer than the settings say.

        Raises:
            UserError: no such device, devices of two kinds, or Ray is not installed.
        """
        made = WorkerConfig.of(
            workers=workers or self.workers,
            devices=self.devices or self.device,
            threads=torch.get_num_threads(),
            engine=self.engine,
            batch=self.batch,
        )
        if self.workers is not None and made.workers < self.workers:
            note(
                f"workers  {made.workers} instead of {self.workers}: no more have work, in batches "
                f"of {self.batch} candidates and on {cores()} cores"
            )
        return made


def default_threads(batch: int) -> int:
    """Threads of a candidate such that a batch fills the cores. It decides last digits of results,
    so it must not depend on the number of workers."""
    return max(1, cores() // batch)


@dataclass(frozen=True)
class Phase(Generic[G]):
    """A part of a search: candidates of one space until the budget is spent."""

    space: Space[G]
    strategy: Strategy[G]
    evaluator: Evaluator[G]
    budget: int
    """Candidates to evaluate; repeated ones do not count."""
    batch: int = 1
    """Candidates that are sampled and reported together."""
    engine: Engine[G] = field(default_factory=InProcess)
    """Evaluates a batch."""
    limits: Limits = field(default_factory=Limits)
    """What is beyond them, or not valid in the space, is rejected: neither evaluated nor recorded,
    and not of the batch."""
    objectives: Objectives = field(default_factory=Objectives)
    """What is looked for beside the score."""
    costing: Costing[G] | None = None
    """Costs before training; default: those that the evaluator knows."""
    stop_early: float = 0.0
    """Share of the candidates to stop at each rung that the evaluator has."""
    published: Mapping[str, G] = field(default_factory=dict)
    """Architectures whose costs the report shows for comparison, by name."""


NextPhase = Callable[[Sequence[Record], Path], Phase[Any]]
"""Makes a phase from the ranking of the one before, best first: a pure function, called again to
resume. What it takes long for it may keep in the folder, which is the run's and the phase's own."""


@dataclass(frozen=True)
class _Proposal(Generic[G]):
    """A network within the limits that a strategy proposed."""

    genotype: G
    costs: dict[str, float]
    """Its costs; empty where nothing needs them before it is trained."""
    exceeded: tuple[dict[str, float], ...]
    """Of each proposal that was rejected before it, the costs beyond their limits; empty for what
    is no network."""
    failure: str | None = None
    """Why it does not run on the target: it is not trained."""


class SamplingSearch:
    """Phases one after the other: ask, evaluate, record, tell.

    Args:
        first: the first phase.
        then: makers of the later ones; a phase is made when the one before has ended.
        workers: of the phases' engines, for env.json.
    """

    ranking: Literal["score"] = "score"

    def __init__(
        self,
        first: Phase[Any],
        *then: NextPhase,
        workers: WorkerConfig | None = None,
    ) -> None:
        self._phase, self._then, self._number = first, then, 0
        self._workers = workers or WorkerConfig()

    @property
    def phase(self) -> Phase[Any]:
        """The one that is under way."""
        return self._phase

    @property
    def inputs(self) -> Mapping[str, str]:
        return self._phase.evaluator.inputs

    @property
    def runtime(self) -> Runtime:
        return self._phase.evaluator.runtime

    @property
    def environment(self) -> Mapping[str, object]:
        return {"workers": dataclasses.asdict(self._workers)}

    @property
    def more(self) -> str:
        return f"--budget {2 * self._phase.budget}"

    def run(self, study: Study, console: Console) -> None:
        """Search until every phase has evaluated ``budget`` candidates.

        After a crash the strategy continues from its checkpoint, the start of a batch; what is
        recorded of that batch is not evaluated again. So is a batch that the budget ended in.
        Without a checkpoint it is told all that is recorded, from the first batch on.

        Raises:
            NothingFoundError: all candidates failed.
            UserError: the last candidates all failed, or all repeated earlier ones; nothing keeps
                to the limits; or checkpoint and records do not belong together.
        """
        checkpoint = study.load_checkpoint()
        told, number, state = 0, 0, None
        seconds = {"encode": 0.0, "controller": 0.0}
        if checkpoint is not None:
            with study.restoring():
                told, state = checkpoint["told"], checkpoint["strategy"]
                number = checkpoint.get("phase", 0)  # version 1 has one phase
                seconds |= checkpoint["seconds"]
                study.require_records(told)
                if not 0 <= number <= len(self._then):
                    raise IndexError(f"phase {number}")
        if number > 0:
            self._enter(number, study)
        evaluated = self._evaluated(study)
        if evaluated > self._phase.budget:
            say(
                console,
                f"budget   {evaluated} instead of {self._phase.budget}: so many candidates have "
                "been evaluated, and none is added",
            )
            self._phase = dataclasses.replace(self._phase, budget=evaluated)
        while True:
            for step, spent in self._phase.evaluator.seconds.items():
                seconds[step] = seconds.get(step, 0.0) + spent
            if state is not None:
                with study.restoring():
                    self._phase.strategy.load_state_dict(state)
            told = self._run_phase(study, console, told, seconds)
            if study.best is None:
                raise _nothing_found(study.records, self._phase.evaluator.remedy)
            if self._number == len(self._then):
                return
            self._enter(self._number + 1, study)
            state = None

    def close(self) -> None:
        """End the workers."""
        self._phase.engine.close()

    def _enter(self, number: int, study: Study) -> None:
        """Make a phase from the ranking of the one before."""
        ranking = [record for record in study.ranking() if record.phase == number - 1]
        if not ranking:
            raise _nothing_found(
                [record for record in study.records if record.phase == number - 1],
                self._phase.evaluator.remedy,
            )
        self.close()
        folder = study.path / "checkpoint" / f"phase-{number}"
        self._phase, self._number = self._then[number - 1](ranking, folder), number

    def _run_phase(
        self, study: Study, console: Console, told: int, seconds: dict[str, float]
    ) -> int:
        """Returns how many records the strategies have been given."""
        phase = self._phase
        if phase.costing is not None and phase.costing.latencies is not None:
            name = LATENCY if not self._number else f"{LATENCY}-{self._number}"
            phase.costing.latencies.prepare(study.path / name, functools.partial(say, console))
        if phase.published or study.published:  # which may be of the phase before
            found = {name: self._costing(each) for name, each in phase.published.items()}
            study.write_published(found)
        # of a phase with a successor the strategy is only told again, whatever the budget is now
        end = sum(record.phase <= self._number for record in study.records)
        over = end < len(study.records)
        while True:
            study.save_checkpoint(
                {
                    "phase": self._number,
                    "told": told,
                    "strategy": phase.strategy.state_dict(),
                    "seconds": seconds,
                    "budget": phase.budget,
                }
            )
            spent = over or self._evaluated(study) >= phase.budget
            if told == (end if over else len(study.records)) and spent:
                return told
            start = time.perf_counter()
            asked = [self._ask() for _ in range(phase.batch)]
            seconds["controller"] += time.perf_counter() - start
            if over and told + len(asked) > end:
                return end
            self._evaluate(study, told, asked, console)
            if len(study.records) < told + len(asked):
                return len(study.records)  # the budget ends in the batch
            start = time.perf_counter()
            for proposal, record in zip(asked, study.records[told:]):
                phase.strategy.tell(proposal.genotype, self._told(proposal, record.evaluation))
            seconds["controller"] += time.perf_counter() - start
            told += len(asked)

    def _told(self, proposal: _Proposal[Any], evaluation: Evaluation) -> float | None:
        """What the strategy learns of a candidate: its reward, less weighted costs. They are those
        expected of it: what is measured differs from one time to the next."""
        reward = evaluation.told
        if reward is None or self._phase.objectives.weights is None:
            return reward
        return self._phase.objectives.value(reward, self._costing(proposal.genotype))

    @property
    def _costing(self) -> Costing[Any]:
        return self._phase.costing or Costing(self._phase.evaluator)

    def _ask(self) -> _Proposal[Any]:
        """The next proposal within the limits: of exact counts first, then of the latency that is
        expected, then of the measured one.

        Raises:
            UserError: too many in a row are beyond.
        """
        phase, costing = self._phase, self._costing
        needed = bool(phase.limits or phase.objectives.costs)
        exceeded, costs, measured = list[dict[str, float]](), list[dict[str, float]](), 0
        while len(exceeded) < _MAX_REJECTIONS and measured < _MAX_MEASURED:
            genotype = phase.strategy.ask()
            beyond, found, failure = dict[str, float](), dict[str, float](), None
            valid = phase.space.valid(genotype)
            if valid and needed:
                for costs_of in (costing.counts, costing, costing.final):
                    try:
                        found = costs_of(genotype)
                    except UndeployableError as error:
                        failure = f"latency: {error}"
                        break
                    beyond = phase.limits.exceeded(found)
                    if beyond:
                        measured += costs_of == costing.final
                        break
                costs.append(found)
            if valid and not beyond:
                return _Proposal(genotype, found, tuple(exceeded), failure)
            phase.strategy.reject(genotype)
            exceeded.append(beyond)
        if not costs:
            raise UserError(
                f"search: expected networks, got {len(exceeded):,} proposals in a row that are "
                "none; start a new run with --strategy random"
            )
        raise phase.limits.refusal(costs)

    def _evaluate(
        self, study: Study, told: int, asked: Sequence[_Proposal[Any]], console: Console
    ) -> None:
        """Record what is not yet recorded of a batch, in order, as far as the budget reaches."""
        phase = self._phase
        before = _fresh(self._records(study.records[:told]))
        originals = [r for r in self._records(study.records) if r.duplicate_of is None]
        first = {_key(record.canonical): record.index for record in originals}
        spent = len(originals)
        new: list[Job[Any]] = []
        entries: list[tuple[Job[Any], int]] = []  # with the index of its first record
        for index, proposal in enumerate(asked, told):
            genotype = proposal.genotype
            if index < len(study.records):
                if phase.space.from_json(study.records[index].genotype) != genotype:
                    raise UserError(
                        f"{study.path}: expected record {index} to be what the strategy asks for, "
                        "got another; the records or the checkpoint were edited, or come from a "
                        "machine that rounds otherwise: start a new run"
                    )
                continue
            if spent >= phase.budget:
                break
            gates = phase.objectives.gates(before, proposal.costs) | rung_gates(
                before, phase.stop_early, phase.objectives, proposal.costs
            )
            job = Job(index, genotype, gates)
            entries.append((job, first.setdefault(_key(genotype.canonical().to_json()), index)))
            if entries[-1][1] == index:
                new += [job] if proposal.failure is None else []
                spent += 1
        proposals = dict(enumerate(asked, told))
        exceeded = itertools.chain(*(proposals[job.index].exceeded for job, _ in entries))
        beyond = [costs for costs in exceeded if costs]
        if beyond:
            say(console, phase.limits.summary(beyond))
        with console.status("") as status:

            def show(running: int) -> None:
                done = self._evaluated(study)
                status.update(f"{running} in training, {done} of {phase.budget} done")

            evaluations = phase.engine.evaluate(phase.evaluator, new, show)
            for job, origin in entries:
                fresh, proposal = origin == job.index, proposals[job.index]
                if fresh and proposal.failure is not None:
                    evaluation = Evaluation(
                        {}, {}, proposal.costs, None, {}, phase.evaluator.feedback, proposal.failure
                    )
                elif fresh:
                    evaluation = settled(next(evaluations), job.gates, before)
                    both = evaluation.costs | proposal.costs
                    evaluation = dataclasses.replace(evaluation, costs=both)
                else:
                    evaluation = study.records[origin].evaluation
                record = Record(
                    index=job.index,
                    genotype=job.genotype.to_json(),
                    canonical=job.genotype.canonical().to_json(),
                    seed=derive_seed(phase.evaluator.seed, job.index),
                    evaluation=dataclasses.replace(evaluation, files={}),
                    duplicate_of=None if fresh else origin,
                    time=datetime.now(UTC).isoformat(timespec="seconds"),
                    phase=self._number,
                    rejected=proposal.exceeded,
                )
                study.keep_files(record, evaluation.files)
                study.append(record)
                done = f"{self._evaluated(study):>{len(str(phase.budget))}}/{phase.budget}"
                _print_record(study, record, f"[{done}]", console)
                _check_progress(self._records(study.records), phase.evaluator.remedy)

    def _records(self, records: Sequence[Record]) -> list[Record]:
        """Those of the phase."""
        return [record for record in records if record.phase == self._number]

    def _evaluated(self, study: Study) -> int:
        return len(_fresh(self._records(study.records)))


def _published(space: Space[G]) -> dict[str, G]:
    """Architectures of the zoo that are of the space, each under its first name."""
    found: dict[Any, str] = {}
    for name, entry in ZOO.items():
        if entry.genotype.to_json().get("space") == space.name:
            with contextlib.suppress(UserError):
                space.encode(cast(G, entry.genotype))
                found.setdefault(entry.genotype, name)
    return {name: each for each, name in found.items() if space.valid(each)}


def _key(canonical: dict[str, object]) -> str:
    return repr(sorted(canonical.items()))


def _fresh(records: Sequence[Record]) -> list[Evaluation]:
    return [record.evaluation for record in records if record.duplicate_of is None]


def _check_progress(records: Sequence[Record], remedy: str) -> None:
    evaluations = _fresh(records)
    failures = [e.failure for e in evaluations[-_MAX_FAILURES:]]
    if len(failures) == _MAX_FAILURES and all(failures):
        if all(evaluation.failure for evaluation in evaluations):
            raise _nothing_found(records, remedy)
        raise UserError(
            f"the last {_MAX_FAILURES} candidates failed, the last one: {failures[-1]}; {remedy}"
        )
    if all(record.duplicate_of is not None for record in records[-_MAX_DUPLICATES:]):
        raise UserError(
            f"the last {_MAX_DUPLICATES} architectures repeat earlier ones: the strategy has "
            "converged; take the best one found, or let it explore more (--ppo.ent-coef)"
        )


def _nothing_found(records: Sequence[Record], remedy: str) -> NothingFoundError:
    """The causes, the most frequent first."""
    causes = Counter(evaluation.failure for evaluation in _fresh(records))
    counted = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())
    return NothingFoundError(
        f"search: all of the {causes.total()} candidates failed ({counted}); {remedy}, in a new run"
    )


def _print_record(study: Study, record: Record, progress: str, console: Console) -> None:
    evaluation = record.evaluation
    if record.duplicate_of is not None:
        say(console, f"{progress} repeats architecture {record.duplicate_of}")
        return
    outcome = "  ".join(f"{stage} {reward:.4f}" for stage, reward in evaluation.stages.items())
    if evaluation.failure is not None:
        outcome = f"failed: {evaluation.failure}"
    if evaluation.stopped is not None:
        score, gate = evaluation.rewards[evaluation.rungs[-1]], evaluation.stopped["gate"]
        outcome = f"stopped after epoch {evaluation.stopped_after}: {score:.4f} < {gate:.4f}"
    mark = "  best so far" if study.best is record else ""
    say(
        console,
        f"{progress} {outcome:<32} {evaluation.params / 1e6:.2f} M params  "
        f"{sum(evaluation.seconds.values()):5.1f} s{mark}",
    )
