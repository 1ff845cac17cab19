"""Find an architecture: ``nasfast search [METHOD]``.

METHOD is "segmentation" (the default), "templates", "detection" or "restoration"; ``METHOD --help``
shows its settings.
Without flags it searches a small network for generated images, in a minute; ``--data DIR`` takes
your own. ``--workers N`` trains N candidates in parallel, which changes no result.
``--resume RUN`` continues a run where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from nasfast.device import deterministic, machine_info
from nasfast.methods.base import Method
from nasfast.methods.flags import HELP
from nasfast.methods.registry import DEFAULT, METHODS, method_named
from nasfast.report import terminal_table, write_report
from nasfast.runs.study import Study
from nasfast.searches.base import Search, SearchSettings
from nasfast.utils.cli import flag_value, refuse_others, reports_errors, say
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError
from nasfast.utils.files import data_path
from nasfast.utils.interrupt import Interrupt, StopRequested


@dataclasses.dataclass(frozen=True)
class Resume:
    """Continue a run."""

    resume: Path
    """Run directory."""
    budget: int | None = None
    """Candidates to evaluate in all, where it should be more than before."""
    device: str | None = None
    """Another device than before."""
    workers: int | None = None
    """Another number of candidates trained in parallel."""
    devices: str | None = None
    """Other devices to distribute the workers over, such as cuda:0,cuda:1."""
    engine: Literal["process", "ray"] | None = None
    """Other workers."""
    data: str | None = None
    """Where the data is now, if it has moved; its content has to be the same."""
    cache_dir: Path | None = None
    """Another folder for the features of the encoder, which are computed again there."""
    placement: Literal["auto", "file", "ram", "device"] | None = None
    """Another place for them."""


def _settings_to_resume(study: Study, arguments: Resume) -> tuple[Method, SearchSettings]:
    """The run's method, and the settings that it goes on by."""
    method = method_named(study.method)
    config = from_mapping(method.search_settings, study.config, str(study.path / "config.toml"))
    with study.restoring():
        config = method.continued(config, study.load_checkpoint() or {}, arguments.budget)
    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("device", "workers", "devices", "engine", "cache_dir", "placement")
        if getattr(arguments, name) is not None
    }
    for name in given.keys() - {field.name for field in dataclasses.fields(config)}:
        raise UserError(
            f"resume {study.path}: expected no {name} for {method.name}, which keeps no features; "
            "leave it out"
        )
    if "device" in given:
        given.setdefault("devices", None)
    elif "devices" in given:
        given["device"] = "auto"
    if arguments.data is not None:
        given["data"] = data_path(arguments.data)
    elif config.data != "synthetic" and not Path(config.data).is_dir():
        raise UserError(
            f"resume {study.path}: expected its data in {config.data}, got no such folder; give "
            "--data DIR where it has moved"
        )
    given["threads"] = int(_recorded_identity(study)["computation"]["threads"])
    return method, dataclasses.replace(config, **given).in_run(study.path)


def _identity(search: Search) -> dict[str, dict[str, str]]:
    """What a bit-exact continuation needs to be the same: what was read, and what computed."""
    return {
        "inputs": dict(search.inputs),
        "computation": {
            "device": str(search.runtime.device),
            "precision": search.runtime.precision,
            "threads": str(torch.get_num_threads()),
            "torch": torch.__version__,
        },
    }


def _recorded_identity(study: Study) -> dict[str, dict[str, str]]:
    """The same, of the run's beginning."""
    identity = study.env.get("identity")
    whole = (
        isinstance(identity, dict)
        and identity.keys() == {"inputs", "computation"}
        and all(isinstance(part, dict) for part in identity.values())
        and re.fullmatch(r"[1-9]\d{0,3}", str(identity["computation"].get("threads")))
    )
    if not whole:
        raise UserError(
            f"{study.path / 'env.json'}: expected the identity of inputs and computation that the "
            f"search wrote, got {str(identity)[:80]}; restore the file from a copy"
        )
    found: dict[str, dict[str, str]] = study.env["identity"]
    return found


def _check_identity(study: Study, search: Search, console: Console, where: str) -> None:
    """Refuse to continue a run on other data or weights; say where it will not be bit-exact.

    Args:
        study: the run.
        search: that is to continue it.
        console: for what is said.
        where: its data and weights are.
    """
    now = _identity(search)
    for kind, before in _recorded_identity(study).items():
        changed = [name for name, value in before.items() if now[kind].get(name) != value]
        if changed and kind == "inputs":
            raise UserError(
                f"resume {study.path}: expected the {', '.join(changed)} that the run began with, "
                f"got other content in {where}; restore it or start a new run"
            )
        for name in now[kind].keys() - before.keys():
            say(
                console,
                f"note: the run began without {name}, which this version has; rewards before and "
                "after are not comparable: a new run is better",
            )
        for name in changed:
            say(
                console,
                f"note: the run began with {name} {before[name]}, this is {now[kind].get(name)}; "
                "rewards will not be bit-identical to an uninterrupted run",
            )


class Session(contextlib.ExitStack):
    """One search from its settings to its report; leaving it closes the run and the search."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.study: Study | None = None
        self._interrupt = self.enter_context(Interrupt())
        self.callback(torch.set_num_threads, torch.get_num_threads())

    def begin(self, method: Method, config: SearchSettings, command: Sequence[str]) -> None:
        """Open the data, then make the run directory: the former may refuse the settings. Whether
        the directory can be made is known before.

        Args:
            command: that env.json has.
        """
        name = config.name or re.sub(r"[^\w.+-]+|^[.+-]+", "_", Path(config.data).name)
        Study.require_place(config.runs, method.name, name)
        config = self._build(method, config)
        environment = machine_info() | {
            "command": list(command),
            "identity": _identity(self.search),
            **self.search.environment,
        }
        settings, ranking = dataclasses.asdict(config), self.search.ranking
        study = Study.create(config.runs, method.name, name, settings, environment, ranking=ranking)
        self.study = self.enter_context(study)

    def resume(self, arguments: Resume) -> None:
        """Open a run, and the data that it is about."""
        self.study = self.enter_context(Study.open(arguments.resume))
        config = self._build(*_settings_to_resume(self.study, arguments))
        moved = arguments.data is not None
        where = config.data if moved else "the same place"
        _check_identity(self.study, self.search, self.console, where)
        if moved:
            self.study.move_data(config.data)

    def _build(self, method: Method, config: SearchSettings) -> SearchSettings:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.enter_context(deterministic(config.deterministic))
        self.method = method
        self.search, config = method.build(config, self._interrupt, self.console)
        self.callback(self.search.close)
        return config

    def run(self) -> tuple[Study, Path]:
        """Search to the end; the run and its report, which is written in any case.

        Raises:
            StopRequested: after Ctrl-C; everything is saved.
        """
        assert self.study is not None, "begin or resume comes first"
        say(self.console, f"run      {self.study.path}")
        try:
            self.search.run(self.study, self.console)
        finally:
            report = write_report(self.study, self.method.report_of(self.study.config))
        return self.study, report


def methods_help() -> str:
    """Every method, and how to continue a run."""
    lines = [f"  {name:<14} {inspect.getdoc(m)}" for name, m in METHODS.items()]
    others = (f"[--{f.name}]" for f in dataclasses.fields(Resume) if f.name != "resume")
    return "\n".join(
        [
            "methods; nasfast search METHOD --help shows the flags of each",
            *lines,
            "continue a run",
            f"  nasfast search --resume RUN {' '.join(others)}",
            "",
        ]
    )


def parse_resume(argv: Sequence[str]) -> Resume:
    """What beside --resume may be given; the name of the run's method may come first."""
    named, words = (argv[0], argv[1:]) if argv[0] in METHODS else (None, argv)
    refuse_others(Resume, words, "a run keeps its settings: start a new one with others")
    arguments = tyro.cli(Resume, args=words, prog="nasfast search")
    method = Study.open(arguments.resume, read_only=True).method if named else None
    if named != method:
        raise UserError(
            f"resume {arguments.resume}: expected a run of {named}, got one of {method}; leave "
            "the name out"
        )
    return arguments


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (130 after Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    console = Console()
    start = time.perf_counter()
    with Session(console) as session:
        try:
            if flag_value(argv, "--resume") is not None:
                session.resume(parse_resume(argv))
            else:
                method = method_named(argv[0] if argv and argv[0][:1] != "-" else DEFAULT)
                if not HELP.isdisjoint(argv):
                    say(console, methods_help())
                command = ["nasfast", "search", *argv]
                session.begin(method, method.parse_search(argv), command)
            study, report = session.run()
        except StopRequested:
            if flag_value(argv, "--resume") is None and session.study is not None:
                argv = ["--resume", str(session.study.path)]
            say(
                console,
                f"\nstopped; {'everything is saved' if session.study else 'nothing was begun'}. "
                f"Continue with\n  nasfast search {shlex.join(argv)}",
            )
            return 130
        console.print(terminal_table(study, session.method.report_of(study.config)))
        path, more = shlex.quote(str(study.path)), session.search.more
        say(
            console,
            f"{time.perf_counter() - start:.0f} s; everything is in {study.path}\n"
            f"  nasfast train {path}      # train the best one in full\n"
            + (f"  nasfast train {path} --front 5\n" if study.objectives.several else "")
            + (f"  nasfast search --resume {path} {more}\n" if more else "")
            + f"  open {shlex.quote(str(report))}",
        )
    return 0
