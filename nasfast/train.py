"""Train an architecture in full: ``python -m nasfast.train RUN``.

RUN is the run directory of a search (its best architecture is trained on the search's data), a
JSON file with a genotype, or the name of a published architecture. ``--resume DIR`` continues a
training.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
import torch
import tyro
from rich.console import Console

from nasfast.device import machine_info, resolve_device
from nasfast.methods import METHODS, Method, method_of_genotype, method_of_source, read_genotype
from nasfast.methods.base import MODEL_FILE, Source, Trainer, TrainSettings
from nasfast.runs.study import Study
from nasfast.spaces.base import Genotype
from nasfast.training.loop import Runtime
from nasfast.utils.cli import flag_value, reports_errors, say
from nasfast.utils.config import from_mapping
from nasfast.utils.files import atomic_file, atomic_write
from nasfast.utils.interrupt import Interrupt, StopRequested

T = TypeVar("T", bound=TrainSettings)


@dataclasses.dataclass(frozen=True)
class _Resume:
    """Continue a training."""

    resume: Path
    """Directory that a training wrote."""


def find(config: TrainSettings, zoo: Mapping[str, Source]) -> Source:
    """The architecture that the settings point at."""
    if config.source.is_dir():
        study = Study.open(config.source, read_only=True)
        ranking = study.ranking()
        if not 1 <= config.rank <= len(ranking):
            raise ValueError(
                f"train: expected a rank from 1 to {len(ranking)} (the architectures that "
                f"{study.path} evaluated), got {config.rank}"
            )
        return Source(ranking[config.rank - 1].genotype, study.path, study.config)
    if config.source.is_file():
        return Source(read_genotype(config.source), config.source.parent, {})
    if str(config.source) in zoo:
        return zoo[str(config.source)]
    names = [name for method in METHODS.values() for name in method.zoo]
    raise FileNotFoundError(
        f"train: no run directory and no genotype file at {config.source}"
        + (f", nor a name of the zoo ({', '.join(names)})" if names else "")
        + "; python -m nasfast.search makes a run"
    )


def resolve(method: Method[Any, T, Any], config: T) -> tuple[T, Genotype]:
    """Fill in what the source decides: genotype, data and the output's directory."""
    source = find(config, method.zoo)
    genotype = method.genotype(source.genotype)
    config = method.resolve(config, source)
    assert config.data is not None
    numbered = (source.home / f"train-{n}" for n in itertools.count(1))
    out = config.out or next(path for path in numbered if not path.exists())
    named = str(config.source) in method.zoo
    return (
        dataclasses.replace(
            config,
            source=config.source if named else config.source.resolve(),
            data=(
                config.data
                if config.data == "synthetic"
                else str(Path(config.data).expanduser().resolve())
            ),
            out=out.resolve(),
        ),
        genotype,
    )


def fit(trainer: Trainer, out: Path, console: Console) -> None:
    """Train to the last round; a checkpoint follows every round."""
    while trainer.done < trainer.rounds:
        line = trainer.round()
        with atomic_file(out / "checkpoint.pt") as file:
            torch.save(trainer.state_dict(), file)
        say(console, line)


def _write_config(out: Path, config: TrainSettings, genotype: Genotype) -> None:
    out.mkdir(parents=True)
    plain = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    atomic_write(
        out / "config.toml", tomli_w.dumps({k: v for k, v in plain.items() if v is not None})
    )
    atomic_write(out / "genotype.json", json.dumps(genotype.to_json()) + "\n")
    atomic_write(out / "env.json", json.dumps(machine_info(), indent=2) + "\n")


def _open(argv: Sequence[str]) -> tuple[Method[Any, Any, Any], TrainSettings, Genotype, Path]:
    if flag_value(argv, "--resume") is not None:
        out = tyro.cli(_Resume, args=argv, prog="nasfast.train").resume.resolve()
        if not (out / "config.toml").is_file() or not (out / "genotype.json").is_file():
            raise FileNotFoundError(
                f"train: {out} is not the directory of a training: it has no config.toml and "
                "genotype.json; give the directory that nasfast.train printed"
            )
        form = read_genotype(out / "genotype.json")
        method = method_of_genotype(form)
        settings = tomllib.loads((out / "config.toml").read_text())
        config = from_mapping(method.train_config, settings, str(out / "config.toml"))
        return method, config, method.genotype(form), out
    method, found = method_of_source(argv)
    config, genotype = resolve(method, method.parse_train(argv, found, __doc__))
    assert config.out is not None
    if config.out.exists():
        raise FileExistsError(
            f"train: {config.out} exists and is never overwritten; give another --out, or "
            f"continue it with --resume {config.out}"
        )
    return method, config, genotype, config.out


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status (130 after Ctrl-C)."""
    console = Console()
    method, config, genotype, out = _open(sys.argv[1:] if argv is None else list(argv))
    with Interrupt() as interrupt:
        runtime = Runtime(resolve_device(config.device), interrupt.check)
        trainer = method.trainer(config, genotype, out, runtime)
        if (out / "checkpoint.pt").exists():
            state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
            trainer.load_state_dict(state)
        if not out.exists():  # only now: data or weights may have been refused
            _write_config(out, trainer.settings, genotype)
        say(console, f"training {genotype.to_json()}\n{trainer.summary}\nout      {out}")
        try:
            fit(trainer, out, console)
            found = trainer.finish()
        except StopRequested:
            say(
                console,
                "\nstopped; finished epochs are saved. Continue with\n"
                f"  python -m nasfast.train --resume {shlex.quote(str(out))}",
            )
            return 130
    say(
        console,
        f"{found}; {out}\n  python -m nasfast.evaluate {shlex.quote(str(out / MODEL_FILE))}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
