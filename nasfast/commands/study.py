"""Find out whether the reward of a search predicts: ``nasfast study RUN``.

Architectures of RUN are trained longer, each at several seeds: the best of the search, and others
drawn at random. The report then has the rank correlations between the search's rewards and the
later scores, and a random search of the same budget beside the run. All settings of ``nasfast train
RUN`` are understood too, such as --epochs; --device may name several, such as cuda:0,cuda:1. What
was stopped goes on with the same command, and what is finished is never trained again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shlex
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from nasfast.commands import search, train
from nasfast.device import resolve_device
from nasfast.evaluation.candidate import failure_cause
from nasfast.methods.base import Architecture, Method, TrainSettings
from nasfast.methods.registry import method_of_source
from nasfast.report import correlation_table, write_report
from nasfast.report.numbers import number
from nasfast.runs.correlation import FOLDER, CorrelationStudy, Training, draw, evaluated
from nasfast.runs.records import Evaluation, Record
from nasfast.runs.study import Study
from nasfast.spaces.base import Genotype
from nasfast.strategies import STRATEGIES
from nasfast.training.loop import NonFiniteLossError, Runtime
from nasfast.utils.cli import reports_errors, say
from nasfast.utils.config import Bound, Bounded, Count, from_mapping
from nasfast.utils.errors import NothingFoundError, UserError
from nasfast.utils.interrupt import Interrupt, StopRequested
from nasfast.utils.seals import read_sealed
from nasfast.utils.statistics import LEAST
from nasfast.workers import Engine, Job, WorkerConfig, cores

METRICS = "metrics.json"
DECIDED = ("source", "rank", "out")
"""Settings of a training that the study decides."""
Number = Annotated[int, Bound(0, 10**6)]


@dataclass(frozen=True)
class StudySettings(Bounded):
    """What is trained longer, and what it is compared with."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of a search that trained its candidates one by one."""
    phase: Count | None = None
    """Phase of the search whose architectures are trained, from 1; default: the last. The report
    shows the phase of the last call; what was trained before of another is kept."""
    top: Number = 6
    """How many of the best architectures of the search."""
    others: Number = 6
    """How many beside them, drawn at random."""
    seeds: Annotated[int, Bound(1, 1000)] = 3
    """Trainings of each, at the seeds --seed, --seed + 1 and so on."""
    workers: Count = 1
    """Trainings in parallel, each in a process of its own; on one GPU they share it."""
    control: Path | None = None
    """A random search of the same settings and budget to compare with, instead of one that the
    study makes."""
    no_control: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare with no random search."""

    def require_sense(self) -> None:
        """Raise UserError where settings do not go together."""
        if self.top + self.others < LEAST:
            raise UserError(
                f"study: expected --top and --others of {LEAST} architectures together, which a "
                f"correlation takes, got {self.top} and {self.others}; raise one"
            )
        if self.control is not None and self.no_control:
            raise UserError("study: expected --control or --no-control, got both; leave one out")


@dataclass(frozen=True)
class Trainer:
    """Evaluates by a full training; every worker has one."""

    method: Method
    config: TrainSettings
    run: Path
    search: Mapping[str, Any]
    """Settings of the run."""
    metric: str
    planned: Sequence[tuple[int, int]]
    """(index of the record, seed) of each training; a job has its place here as index."""
    runtime: Runtime
    seed: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    feedback: str = "training"
    remedy: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    def costs(self, genotype: Genotype) -> dict[str, float]:
        """Nothing here asks for them."""
        return {"params": 0, "macs": 0}

    def __call__(self, genotype: Genotype, index: int, gates: Mapping[str, float]) -> Evaluation:
        """Train, or go on where an earlier call was stopped; what it finished is only read."""
        rewards, failure, seconds = {}, None, 0.0
        out = directory(self.run, *self.planned[index])
        try:
            if not (out / METRICS).is_file():
                session = self._session(genotype, out, self.planned[index][1])
                session.train(self.runtime, Console(quiet=True))
            (out / "checkpoint.pt").unlink(missing_ok=True)  # three times as large as the network
            metrics = read_sealed(out / METRICS)
            score, seconds = metrics.get(self.metric), float(metrics.get("seconds", 0.0))
            if isinstance(score, float | int) and math.isfinite(score):
                rewards = {self.feedback: float(score)}
            else:
                failure = f"its {self.metric} is {score}"
        except (RuntimeError, MemoryError, UserError) as error:
            # some trainings add to a loss that is not finite what to do about it
            causes = (error.__cause__, error)
            known = next((e for e in causes if isinstance(e, NonFiniteLossError)), error)
            failure = failure_cause(known)
            if failure is None:
                raise
        costs = self.costs(genotype)
        return Evaluation(rewards, {}, costs, None, {"train": seconds}, self.feedback, failure)

    def _session(self, genotype: Genotype, out: Path, seed: int) -> train.Session:
        device = str(self.runtime.device)
        if all((out / name).is_file() for name in ("config.toml", "genotype.json")):
            return train.Session.resume(train.Resume(out, device=device))
        shutil.rmtree(out, ignore_errors=True)  # it was killed while it began
        config = dataclasses.replace(self.config, out=out, seed=seed, device=device)
        architecture = Architecture(genotype.to_json(), out.parent, self.search)
        return train.Session.begin(self.method, config, architecture)


def directory(run: Path, index: int, seed: int) -> Path:
    """That of a training."""
    return run / FOLDER / f"arch-{index}-seed-{seed}"


def _in_worker(make: Callable[[Runtime], Trainer], device: str) -> Trainer:
    return make(Runtime(resolve_device(device)))


def pool_of(study: Study, phase: int | None = None) -> list[Record]:
    """Architectures to choose from, best first: those of a phase, from 1, or of the last.

    Raises:
        UserError: the run ranks none, or too few.
    """
    if study.ranks_by == "last":
        raise UserError(
            f"study {study.path}: expected a search that trained its candidates one by one, got "
            f"{study.config.get('strategy', 'one')} by gradient, whose rewards are those of its "
            "supernet and rank no architectures; search with a --strategy that samples, "
            f"{', '.join(STRATEGIES)}"
        )
    ranking = study.ranking()
    last = ranking[0].phase if ranking else 0
    if phase is not None and phase > last + 1:
        raise UserError(
            f"study {study.path}: expected a phase from 1 to {last + 1}, got {phase}; leave "
            "--phase out for the last"
        )
    pool = [r for r in ranking if r.phase == (last if phase is None else phase - 1)]
    if len(pool) < LEAST:
        raise UserError(
            f"study {study.path}: expected a search of at least {LEAST} architectures, got "
            f"{len(pool)}; nasfast search --resume {study.path} --budget N finds more"
        )
    return pool


def settings_of(
    study: Study, method: Method, config: TrainSettings, genotype: object
) -> tuple[TrainSettings, dict[str, Any]]:
    """Settings of all trainings: with what the search decides, and as JSON without what differs."""
    folder = study.path / FOLDER
    config = dataclasses.replace(config, source=study.path, out=folder / "none")
    config, _ = train.resolve(method, config, Architecture(genotype, folder, study.config))
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    left_out = (*DECIDED, "seed", "device")
    return config, {name: value for name, value in plain.items() if name not in left_out}


class Session:
    """One study from its settings to its report.

    Args:
        study: the run, open to write.
        settings: of the study.
        method: of the run.
        config: settings of the trainings.
        console: for what is said.
    """

    def __init__(
        self,
        study: Study,
        settings: StudySettings,
        method: Method,
        config: TrainSettings,
        console: Console,
    ) -> None:
        self.study, self.settings, self.method, self.console = study, settings, method, console
        self.folder = study.path / FOLDER
        settings.require_sense()
        pool = pool_of(study, settings.phase)
        top, sample = draw(pool, settings.top, settings.others)
        self.config, plain = settings_of(study, method, config, pool[0].genotype)
        seeds = tuple(range(config.seed, config.seed + settings.seeds))
        before = self._before(plain)
        found = CorrelationStudy(
            *method.report_of(study.config).metric, plain, {}, top, sample, seeds
        )
        control = str(self._given(settings.control)) if settings.control else None
        if before is not None:
            kept = None if settings.no_control else before.control
            found = dataclasses.replace(found, inputs=before.inputs, control=kept)
        self.found = dataclasses.replace(found, control=control or found.control)
        self.planned = [(index, seed) for index in found.architectures for seed in seeds]
        done = {(t.index, t.seed): t for t in (before.trainings if before else ())}
        self.done = {key: done[key] for key in self.planned if key in done}
        if len(found.architectures) < settings.top + settings.others:
            say(
                console,
                f"note: the search has {len(pool)} architectures, fewer than the {settings.top} "
                f"best and {settings.others} others asked for; all of them are trained",
            )

    def _before(self, settings: Mapping[str, Any]) -> CorrelationStudy | None:
        """What an earlier call found, with the same settings of trainings."""
        before, trained = CorrelationStudy.read(self.study.path), self.folder.glob("arch-*")
        if before is None and any(trained):
            raise UserError(
                f"study {self.study.path}: expected the results beside the trainings in "
                f"{self.folder}, got none; restore them from a copy, or move that folder away"
            )
        for name, value in before.settings.items() if before else ():
            if settings.get(name) != value:
                raise UserError(
                    f"study {self.study.path}: expected {name} {value}, as the study began, got "
                    f"{settings.get(name)}; give that, or move {self.folder} away for another study"
                )
        return before

    def _given(self, control: Path) -> Path:
        """Path of a random search that was made before."""
        found = Study.open(control, read_only=True)
        strategy = found.config.get("strategy")
        if (found.method, strategy) != (self.study.method, "random") or not found.records:
            raise UserError(
                f"control {control}: expected a finished search of {self.study.method} with "
                f"--strategy random, got {len(found.records)} candidates of {found.method} with "
                f"{strategy}; leave --control out, and the study makes one"
            )
        for name in ("data", "preset"):
            if found.config.get(name) != self.study.config.get(name):
                say(
                    self.console,
                    f"warning: the random search has {name} {found.config.get(name)}, the run "
                    f"{self.study.config.get(name)}; their rewards are not comparable",
                )
        if len(evaluated(found)) != len(evaluated(self.study)):
            say(
                self.console,
                f"note: the random search has {len(evaluated(found))} candidates, the run "
                f"{len(evaluated(self.study))}",
            )
        return found.path.resolve()

    def run(self) -> dict[str, Any]:
        """Train what is missing, search at random, write the report; returns the summary.

        Raises:
            NothingFoundError: every training failed.
            StopRequested: after Ctrl-C; what is finished is saved.
        """
        say(self.console, f"study    {self.folder}")
        self.folder.mkdir(exist_ok=True)
        try:
            missing = [key for key in self.planned if self._score(key) is None]
            self._save()
            if missing:
                self._train(missing)
            if not (self.settings.no_control or self.settings.control):
                self._search()
            return self._save()
        finally:
            write_report(self.study, self.method.report_of(self.study.config))

    def best(self) -> str:
        """The architecture with the best mean score after its trainings, and where they are."""
        means = {index: statistics.fmean(group) for index, group in self.found.scores().items()}
        index = max(means, key=means.__getitem__)
        path = directory(self.study.path, index, self.found.seeds[0])
        return (
            f"best     architecture {index}, {self.found.label} {number(means[index])} on average "
            f"over its seeds\n  nasfast evaluate {shlex.quote(str(path))}"
        )

    def _score(self, key: tuple[int, int]) -> float | None:
        return self.done[key].score if key in self.done else None

    def _save(self, **changes: Any) -> dict[str, Any]:
        trainings = tuple(self.done[key] for key in self.planned if key in self.done)
        self.found = dataclasses.replace(self.found, trainings=trainings, **changes)
        return self.found.write(self.study)

    def _train(self, missing: Sequence[tuple[int, int]]) -> None:
        """Each of the trainings, and a line about it."""
        say(self.console, f"training {len(missing)} of {len(self.planned)}: {self.found.label}")
        workers = WorkerConfig.of(
            workers=self.settings.workers,
            devices=self.config.device,
            threads=max(1, cores() // self.settings.workers),
            engine="process",
            batch=len(missing),
        )
        if workers.workers < self.settings.workers:
            say(
                self.console,
                f"workers  {workers.workers} instead of {self.settings.workers}: no more have "
                f"work, with {len(missing)} trainings and {cores()} cores",
            )
        run, search_settings = self.study.path, self.study.config
        make = functools.partial(
            Trainer, self.method, self.config, run, search_settings, self.found.metric, missing
        )
        genotypes = [self.method.genotype(self.study.records[i].genotype) for i, _ in missing]
        with Interrupt() as interrupt:
            trainer = make(Runtime(resolve_device(workers.devices[0]), interrupt.check))
            self._require_same_inputs(genotypes[0], trainer.runtime)
            engine: Engine[Any] = workers.engine_for(functools.partial(_in_worker, make))
            try:
                with self.console.status("") as status:
                    jobs = [Job(i, genotype, {}) for i, genotype in enumerate(genotypes)]
                    for key, evaluation in zip(
                        missing,
                        engine.evaluate(
                            trainer, jobs, lambda count: status.update(f"{count} in training")
                        ),
                    ):
                        self._record(key, evaluation)
            finally:
                engine.close()
        if not self.found.scores():
            causes = Counter(training.failure for training in self.done.values())
            counted = ", ".join(f"{count} x {cause}" for cause, count in causes.most_common())
            raise NothingFoundError(
                f"study: all of the {causes.total()} trainings failed ({counted}); the same "
                f"command tries them again, with fewer --workers; move {self.folder} away for "
                "other settings"
            )

    def _require_same_inputs(self, genotype: Genotype, runtime: Runtime) -> None:
        """Refuse to go on with other data; note what this is."""
        training = self.method.training(self.config, genotype, self.folder / "none", runtime)
        now = dict(training.inputs(self.study.config))
        changed = [name for name, value in self.found.inputs.items() if now.get(name) != value]
        if changed:
            raise UserError(
                f"study {self.study.path}: expected the {', '.join(changed)} that the study began "
                f"with, got other content; restore it, or move {self.folder} away for a new one"
            )
        self._save(inputs=now)

    def _record(self, key: tuple[int, int], evaluation: Evaluation) -> None:
        index, seed = key
        score, seconds = (
            next(iter(evaluation.rewards.values()), None),
            evaluation.seconds.get("train", 0.0),
        )
        self.done[key] = Training(index, seed, score, evaluation.failure, seconds)
        self._save()
        outcome = f"{self.found.label} {number(score)}"
        say(
            self.console,
            f"[{len(self.done):>{len(str(len(self.planned)))}}/{len(self.planned)}] "
            f"architecture {index}, seed {seed}: "
            f"{outcome if score is not None else f'failed: {evaluation.failure}'}  {seconds:.1f} s",
        )

    def _search(self) -> None:
        """The random search, of as many candidates as the run has."""
        study, place = self.study, self.folder / "random"
        counts = Counter(record.phase for record in evaluated(study))
        budgets, budget = [counts[phase] for phase in sorted(counts)], counts.total()
        if study.config.get("strategy") == "random":
            say(self.console, "random   the run is a random search itself; none to compare with")
            return
        begun = [path.parent for path in place.glob("*/records.jsonl")]
        if not begun or len(evaluated(Study.open(begun[0], read_only=True))) < budget:
            given: dict[str, Any] = {}
            if self.settings.workers > 1:
                given["workers"] = self.settings.workers
            if self.config.device != "auto":
                given |= {"device": "auto", "devices": self.config.device}
            say(self.console, f"random   a random search of {budget} candidates")
            with search.Session(self.console) as session:
                if begun:
                    state = Study.open(begun[0], read_only=True).load_checkpoint() or {}
                    own = budgets[min(state.get("phase", 0), len(budgets) - 1)]
                    session.resume(search.Resume(begun[0], budget=own, **given))
                else:
                    file = str(study.path / "config.toml")
                    config: Any = from_mapping(self.method.search_settings, study.config, file)
                    fixed = {"strategy": "random", "runs": place, "name": None}
                    config = dataclasses.replace(config.with_budgets(budgets), **fixed, **given)
                    session.begin(self.method, config, ["nasfast", "study", str(study.path)])
                begun = [session.run()[0].path]
        self._save(control=str(begun[0].relative_to(self.folder)))


def parse(argv: Sequence[str]) -> tuple[StudySettings, list[str]]:
    """Settings of the study, and the words of the command line that are of the trainings."""
    runs = [
        i
        for i, word in enumerate(argv)
        if (Path(word) / "records.jsonl").is_file() and argv[max(i - 1, 0)] != "--control"
    ]
    # first: of what it does not know, tyro cannot tell values of flags from the run
    words = [argv[i] for i in runs] + [word for i, word in enumerate(argv) if i not in runs]
    settings, others = tyro.cli(
        StudySettings,
        args=words,
        prog="nasfast study",
        description=__doc__,
        return_unknown_args=True,
    )
    require_free(word.partition("=")[0][2:] for word in others if word.startswith("--"))
    return settings, others


def require_free(names: Iterable[str]) -> None:
    """Raise UserError at a setting of a training that the study decides."""
    for name in names:
        if name in DECIDED:
            raise UserError(
                f"study: expected no {name}, which the study decides for each of its trainings; "
                "leave it out"
            )


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (130 after Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    console = Console()
    settings, words = parse(argv)
    with Study.open(settings.run) as study:
        path = str(study.path)
        method, found = method_of_source([path])
        config = method.parse_train([path, *words], found, __doc__)
        session = Session(study, settings, method, config, console)
        try:
            session.run()
        except StopRequested:
            say(
                console,
                "\nstopped; what is finished is saved. Continue with\n"
                f"  nasfast study {shlex.join(argv)}",
            )
            return 130
        console.print(correlation_table(session.found, study))
        say(console, session.best())
    say(console, f"  open {shlex.quote(str(study.path / 'report.html'))}")
    return 0
