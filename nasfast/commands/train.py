"""Train an architecture in full: ``nasfast train RUN``.

RUN is the run directory of a search (its best architecture is trained on the search's data), a
JSON file with a genotype, or the name of a published architecture (``nasfast info --models``).
``--resume DIR`` continues a training. ``torchrun --nproc-per-node 2 -m nasfast.train RUN`` divides
each batch of a segmentation network or a detector among processes, one a GPU. ``nasfast train RUN
--help`` shows the flags of RUN's method.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import tyro
from rich.console import Console

from nasfast.device import deterministic, machine_info, resolve_device
from nasfast.methods.base import Architecture, Method, Training, TrainSettings
from nasfast.methods.registry import method_of_genotype, method_of_source, read_genotype
from nasfast.models.io import MODEL_FILE
from nasfast.models.zoo import list_models
from nasfast.report import write_report
from nasfast.runs.checkpoint import load_checkpoint, restoring, save_checkpoint
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.spaces.base import Genotype
from nasfast.training import processes
from nasfast.training.loop import Runtime
from nasfast.utils.cli import flag_value, refuse_others, reports_errors, say
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError, about, did_you_mean
from nasfast.utils.files import (
    atomic_write,
    data_path,
    expanded,
    remove_unfinished,
    require_place,
)
from nasfast.utils.interrupt import Interrupt, StopRequested
from nasfast.utils.locks import claimed, is_free, locked
from nasfast.utils.pareto import spread
from nasfast.utils.seals import read_sealed_toml, sealed_json, sealed_toml

_EARLY = ("env.json", "config.toml")
"""Written before a training has begun: a folder that a killed one left with no more is free."""


@dataclasses.dataclass(frozen=True)
class Resume:
    """Continue a training."""

    resume: Path
    """Directory that a training wrote."""
    device: str | None = None
    """Another device than before."""
    data: str | None = None
    """Where the data is now, if it has moved; its content has to be the same."""


def find(config: TrainSettings, zoo: Mapping[str, Architecture]) -> Architecture:
    """The architecture that the settings point at."""
    if config.source.is_dir():
        study = Study.open(config.source, read_only=True)
        ranking = _found(study)
        if not 1 <= config.rank <= len(ranking):
            raise UserError(
                f"train: expected a rank from 1 to {len(ranking)} (the architectures that "
                f"{study.path} evaluated), got {config.rank}"
            )
        return Architecture(ranking[config.rank - 1].genotype, study.path, study.config)
    if config.source.is_file():
        return Architecture(read_genotype(config.source), config.source.parent, {})
    if str(config.source) in zoo:
        return zoo[str(config.source)]
    raise UserError(
        f"train: no run directory and no genotype file at {config.source}"
        f", nor a name of the zoo ({', '.join(list_models())})"
        f"; nasfast search makes a run{did_you_mean(str(config.source), list_models())}"
    )


def _found(study: Study) -> list[Record]:
    """The ranking; UserError where it is empty."""
    ranking = study.ranking()
    if not ranking:
        raise UserError(
            f"train: expected a run that found an architecture, got {study.path}, where "
            f"{len(study.records)} candidates failed; look into its report, and search again"
        )
    return ranking


def resolve(
    method: Method, config: TrainSettings, architecture: Architecture | None = None
) -> tuple[TrainSettings, Genotype]:
    """Fill in what the source decides: genotype, data and the output's directory."""
    named = architecture is not None or str(config.source) in method.zoo
    architecture = architecture or find(config, method.zoo)
    with about(config.source):
        genotype = method.genotype(architecture.genotype)
    config = method.resolve(config, architecture)
    assert config.data is not None
    out = (
        expanded(config.out) if config.out else next(filter(_is_free, numbered(architecture.home)))
    )
    return (
        dataclasses.replace(
            config,
            source=config.source if named else config.source.resolve(),
            data=data_path(config.data),
            out=out.resolve(),
        ),
        genotype,
    )


def numbered(home: Path) -> Iterator[Path]:
    """Directories of the trainings of a run."""
    return (home / f"train-{n}" for n in itertools.count(1))


def fit(training: Training, out: Path, console: Console) -> None:
    """Train to the last round; a checkpoint follows every round, from the process of rank 0."""
    while training.done < training.rounds:
        line = training.round()
        if processes.rank() == 0:
            save_checkpoint(out / "checkpoint.pt", training.state_dict())
            say(console, line)


def changes(config: TrainSettings, training: Training) -> list[str]:
    """Names of what the search of the run that is trained read otherwise than the training."""
    if not (config.source / "records.jsonl").is_file():
        return []
    study = Study.open(config.source, read_only=True)
    before = (study.env.get("identity") or {}).get("inputs", {})
    now = training.inputs(study.config)
    return [name for name, value in now.items() if before.get(name, value) != value]


def _write_config(out: Path, config: TrainSettings) -> None:
    text = json.dumps(dataclasses.asdict(config), default=str)
    plain = json.loads(text, object_hook=lambda o: {k: v for k, v in o.items() if v is not None})
    atomic_write(out / "config.toml", sealed_toml(plain))


def _describe(out: Path, config: TrainSettings, genotype: Genotype) -> None:
    atomic_write(out / "env.json", json.dumps(machine_info(), indent=2) + "\n")
    _write_config(out, config)
    # last: with it the training has begun, and is resumed
    atomic_write(out / "genotype.json", sealed_json(genotype.to_json()))


def _is_free(out: Path) -> bool:
    return is_free(out, _EARLY)


def _taken(out: Path) -> UserError:
    return UserError(
        f"train: {out} exists and is never overwritten; give another --out, or continue it with "
        f"--resume {out}"
    )


@dataclasses.dataclass
class Session:
    """One training from its settings to its model file.

    Attributes:
        method: of the architecture.
        config: the settings.
        genotype: the architecture.
        out: directory of the result. Where nobody has named it, another process may take it before
            the training begins, which then takes the next number.
        begun: whether it goes on from there.
        named: whether the user named the directory.
        moved: whether the data is elsewhere than when it began.
    """

    method: Method
    config: TrainSettings
    genotype: Genotype
    out: Path
    begun: bool
    named: bool = True
    moved: bool = False

    @classmethod
    def begin(
        cls, method: Method, config: TrainSettings, architecture: Architecture | None = None
    ) -> Self:
        """A new one, of the architecture or of what the settings point at.

        Raises:
            UserError: there is no such architecture, or its directory exists; several are asked
                for.
        """
        if config.front is not None:
            raise UserError(
                f"train: expected one architecture, got front={config.front}; give a rank, of "
                "study.ranking(), or train the front with nasfast train RUN --front"
            )
        named = config.out is not None
        config, genotype = resolve(method, config, architecture)
        assert config.out is not None
        if not _is_free(config.out):
            raise _taken(config.out)
        require_place(config.out, "give another --out")
        return cls(method, config, genotype, config.out, begun=False, named=named)

    @classmethod
    def resume(cls, arguments: Resume) -> Self:
        """One that stopped.

        Raises:
            UserError: the directory is not that of a training.
        """
        out = expanded(arguments.resume).resolve()
        if not (out / "config.toml").is_file() or not (out / "genotype.json").is_file():
            raise UserError(
                f"train: {out} is not the directory of a training: it has no config.toml and "
                "genotype.json; give the directory that nasfast train printed"
            )
        form = read_genotype(out / "genotype.json")
        method = method_of_genotype(form)
        settings = read_sealed_toml(out / "config.toml")
        config = from_mapping(method.train_settings, settings, str(out / "config.toml"))
        if arguments.device is not None:
            config = dataclasses.replace(config, device=arguments.device)
        if arguments.data is not None:
            config = dataclasses.replace(config, data=data_path(arguments.data))
        elif config.data not in (None, "synthetic") and not Path(config.data).is_dir():
            raise UserError(
                f"resume {out}: expected its data in {config.data}, got no such folder; give "
                "--data DIR where it has moved"
            )
        with about(out / "genotype.json"):
            genotype = method.genotype(form)
        return cls(method, config, genotype, out, begun=True, moved=arguments.data is not None)

    def run(self, console: Console) -> str:
        """Train to the end; what to print. The report of the run that the training is in shows its
        network then.

        Raises:
            StopRequested: after Ctrl-C; finished epochs are saved.
        """
        with Interrupt() as interrupt:
            device = resolve_device(processes.device(self.config.device))
            found = self.train(Runtime(device, interrupt.check), console)
        if processes.rank() == 0 and self.out.parent == self.config.source:
            study = Study.open(self.config.source, read_only=True)
            write_report(study, self.method.report_of(study.config))
        return found

    def train(self, runtime: Runtime, console: Console) -> str:
        """The same on a given device, without a report."""
        with ExitStack() as stack:
            stack.enter_context(deterministic(self.config.deterministic))
            return self._train(runtime, console, stack)

    def _train(self, runtime: Runtime, console: Console, stack: ExitStack) -> str:
        writes = processes.rank() == 0
        if not self.begun:
            self.out = processes.agreed(lambda: self._claim(stack))
            self.config = dataclasses.replace(self.config, out=self.out)
        elif writes:
            stack.enter_context(locked(self.out))
            remove_unfinished(self.out, "checkpoint.pt")
        training = self.method.training(self.config, self.genotype, self.out, runtime)
        checkpoint = self.out / "checkpoint.pt"
        remedy = "restore it from a copy, or remove it: the training then begins again"
        state = load_checkpoint(checkpoint, remedy)
        if state is not None:
            with restoring(checkpoint, remedy):
                training.load_state_dict(state)
        if writes and not self.begun:  # only now: data or weights may have been refused
            _describe(self.out, training.settings, self.genotype)
            changed = changes(self.config, training)
            if changed:
                say(
                    console,
                    f"warning: {self.config.source}: the {', '.join(changed)} changed since "
                    "the search read them; the network is trained on what is there now",
                )
        elif writes and self.moved:
            _write_config(self.out, training.settings)
        about_it = f"training {self.genotype.to_json()}\n{training.summary}"
        say(console, f"{about_it}\nout      {self.out}")
        fit(training, self.out, console)
        return training.finish() if writes else ""

    def _claim(self, stack: ExitStack) -> Path:
        """Make the directory and hold it; it goes again where nothing is written to it."""
        others = filter(_is_free, numbered(self.out.parent))
        for out in [self.out] if self.named else others:
            with ExitStack() as attempt:
                try:
                    free = attempt.enter_context(claimed(out, _EARLY))
                except UserError:
                    if self.named:
                        raise
                    continue
                if free:
                    stack.enter_context(attempt.pop_all())
                    return out
        raise _taken(self.out)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (130 after Ctrl-C)."""
    with processes.joined():
        return _main(sys.argv[1:] if argv is None else list(argv))


def _main(argv: list[str]) -> int:
    console = Console(quiet=processes.rank() > 0)
    if flag_value(argv, "--resume") is not None:
        refuse_others(
            Resume,
            argv,
            "a training keeps its settings, which its learning rates follow: start a new one",
        )
        session = Session.resume(tyro.cli(Resume, args=argv, prog="nasfast train"))
    else:
        method, found = method_of_source(argv)
        config = method.parse_train(argv, found, __doc__)
        todo = each_of_front(config, console)
        for done, each in enumerate(todo, 1):
            session = Session.begin(method, each)
            processes.barrier()  # all have found the directory free before one claims it
            status = _run(session, console)
            if status:
                ranks = [str(other.rank) for other in todo[done:]]
                if ranks:
                    say(console, f"not begun: --rank {', --rank '.join(ranks)} of the front")
                return status
        return 0
    return _run(session, console)


def each_of_front(config: TrainSettings, console: Console) -> list[TrainSettings]:
    """The settings, or where they ask for several architectures of the front, those of each.

    Raises:
        UserError: the source has no front, or the settings name one architecture, or one output.
    """
    if config.front is None:
        return [config]
    for name, given in (("rank", config.rank != 1), ("out", config.out is not None)):
        if given:
            raise UserError(
                f"train: expected --front or --{name}, got both: the front has architectures of "
                "its own, and each its own directory; leave one out"
            )
    if not config.source.is_dir():
        raise UserError(
            f"train: expected a run of a search for --front, got {config.source}; give its "
            "directory"
        )
    study = Study.open(config.source, read_only=True)
    if not study.objectives.several:
        raise UserError(
            f"train: expected a run with several objectives for --front, got {study.path}, which "
            "looked for one network; leave --front out, or search with --objective score latency"
        )
    ranking, front = _found(study), study.front()
    points = [study.point(record) for record in front]
    chosen = [front[i] for i in spread(points, config.front)]
    found = ", ".join(str(record.index) for record in chosen)
    say(console, f"architectures {found}: {len(chosen)} of {len(front)} on the front")
    ranks = [ranking.index(record) + 1 for record in chosen]
    return [dataclasses.replace(config, front=None, rank=rank) for rank in ranks]


def _run(session: Session, console: Console) -> int:
    """Train to the end; returns the exit status."""
    try:
        scores = session.run(console)
    except StopRequested:
        saved = (session.out / "checkpoint.pt").is_file()
        say(
            console,
            f"\nstopped; {'finished epochs are saved' if saved else 'no epoch was finished'}. "
            "Continue with\n"
            f"  nasfast train --resume {shlex.quote(str(session.out))}",
        )
        return 130
    model = shlex.quote(str(session.out / MODEL_FILE))
    say(console, f"{scores}; {session.out}\n  nasfast evaluate {model}")
    if session.out.parent == session.config.source:
        say(console, f"  open {shlex.quote(str(session.config.source / 'report.html'))}")
    return 0
