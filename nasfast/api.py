"""What commands do, as functions: `nasfast.search`, `nasfast.train`, `nasfast.study` ..."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from nasfast.commands import profile as profile_command
from nasfast.commands import search as search_command
from nasfast.commands import study as study_command
from nasfast.commands import train as train_command
from nasfast.inference.model import Model, load
from nasfast.methods.base import Architecture
from nasfast.methods.registry import (
    DEFAULT,
    method_named,
    method_of_genotype,
    method_of_source,
)
from nasfast.models.detector import Detector
from nasfast.models.io import MODEL_FILE
from nasfast.models.zoo import ZOO, create_model, describe
from nasfast.runs.study import Study
from nasfast.spaces.base import Genotype
from nasfast.training.cost import count_macs, count_parameters
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError, did_you_mean
from nasfast.utils.files import expanded
from nasfast.utils.interrupt import StopRequested


def search(
    method: str = DEFAULT,
    *,
    resume: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Study:
    """Find an architecture, as ``nasfast search`` does.

    Args:
        method: "segmentation", "detection" or another of ``nasfast search --help``.
        resume: directory of a run to continue, instead of a new one; `settings` are then some of
            budget, device, workers, devices, engine, data, cache_dir, placement.
        quiet: whether to print nothing.
        settings: every setting of ``nasfast search METHOD --help`` by its name, with underscores:
            ``data``, ``preset``, ``budget``. Those of a group are a mapping, as in
            ``stage0={"epochs": 3}``, or have dots, as in ``**{"stage0.epochs": 3}``.

    Returns:
        The run: `path`, `best`, `ranking()`, `records`. `nasfast.train` takes it.

    Raises:
        UserError: there is no such setting, or data and settings do not go together.
        KeyboardInterrupt: after Ctrl-C; the text says how to continue.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    with _without_main(), search_command.Session(Console(quiet=quiet)) as session:
        try:
            if resume is not None:
                given = {"resume": resume, **settings}
                session.resume(from_mapping(search_command.Resume, given, "search"))
            else:
                found = method_named(method)
                words = [repr(method), *(f"{k}={v!r}" for k, v in settings.items())]
                command = [f"nasfast.search({', '.join(words)})"]
                session.begin(found, found.search_with(settings), command)
            study, _ = session.run()
        except StopRequested:
            path = str(session.study.path) if session.study else None
            raise KeyboardInterrupt(
                f"everything is saved; nasfast.search(resume={path!r}) continues"
                if path
                else "nothing was begun"
            ) from None
    return study


def train(
    source: str | Path | Study | Genotype | Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    resume: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Model:
    """Train an architecture in full, as ``nasfast train`` does.

    Args:
        source: a run (what `search` returned, or its directory), whose best architecture is
            trained on its data; the file of a genotype; a name of the zoo; a genotype or its JSON
            form.
        resume: directory of a training to continue, instead of a new one.
        quiet: whether to print nothing.
        settings: every setting of ``nasfast train SOURCE --help`` by its name, with underscores:
            ``data``, ``epochs``, ``out``.

    Returns:
        The trained network, ready for `predict`. Its file is ``model.path``.

    Raises:
        UserError: there is no such architecture or setting, or data and settings do not go
            together.
        KeyboardInterrupt: after Ctrl-C; the text says how to continue.
    """
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    if resume is not None:
        given = {"resume": resume, **settings}
        session = train_command.Session.resume(from_mapping(train_command.Resume, given, "train"))
    elif isinstance(source, str | Path | Study):
        path = source.path if isinstance(source, Study) else expanded(source)
        method, found = method_of_source([str(path)])
        session = train_command.Session.begin(method, method.train_with(path, settings, found))
    elif source is not None:
        genotype = describe(source)[1]["genotype"]
        method = method_of_genotype(genotype)
        architecture = Architecture(genotype, Path("runs") / method.name, {})
        config = method.train_with(Path("genotype"), settings, {})
        session = train_command.Session.begin(method, config, architecture)
    else:
        raise UserError(
            "train: expected a run, a genotype or the name of an architecture, got none"
        )
    try:
        session.run(Console(quiet=quiet))
    except StopRequested:
        raise KeyboardInterrupt(
            f"finished epochs are saved; nasfast.train(resume={str(session.out)!r}) continues"
        ) from None
    return load(session.out / MODEL_FILE, session.config.device)


def study(run: str | Path | Study, *, quiet: bool = False, **settings: Any) -> dict[str, Any]:
    """Find out whether the reward of a search predicts, as ``nasfast study`` does.

    Args:
        run: what `search` returned, or its directory.
        quiet: whether to print nothing.
        settings: ``top``, ``others``, ``seeds``, ``workers``, ``control``, ``no_control``, and
            every setting of `train`, such as ``epochs``.

    Returns:
        The "summary" of study-results.json: correlations with their intervals, noise of the seeds,
        and what a random search found.

    Raises:
        UserError: there is no such run or setting, or the study began with other settings.
        KeyboardInterrupt: after Ctrl-C; the same call continues.
    """
    own = {field.name for field in fields(study_command.StudySettings)} - {"run"}
    path = run.path if isinstance(run, Study) else expanded(run)
    given = {name: value for name, value in settings.items() if name in own}
    options = from_mapping(study_command.StudySettings, {"run": path, **given}, "study")
    others = {name: value for name, value in settings.items() if name not in own}
    study_command.require_free(others)
    with _without_main(), Study.open(options.run) as opened:
        method, found = method_of_source([str(opened.path)])
        config = method.train_with(opened.path, others, found)
        console = Console(quiet=quiet)
        try:
            return study_command.Session(opened, options, method, config, console).run()
        except StopRequested:
            raise KeyboardInterrupt("what is finished is saved; the same call continues") from None


def profile(
    method: str = DEFAULT,
    *,
    out: str | Path | None = None,
    bundle: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Path:
    """Time the operators of a search's networks, as ``nasfast profile`` does.

    Args:
        method: "segmentation", "detection" or another of ``nasfast search --help``.
        out: table to write, for ``latency_table`` of `search`; replaced where it exists.
        bundle: instead, a folder to write for a machine without nasfast.
        quiet: whether to print nothing.
        settings: those of `search`, which decide the networks, their images and what computes.

    Returns:
        What was written.

    Raises:
        UserError: there is no such setting, or the place is taken.
        KeyboardInterrupt: after Ctrl-C.
    """
    places = (None if place is None else expanded(place) for place in (out, bundle))
    config = profile_command.ProfileConfig(*places)
    found = method_named(method)
    given = settings | profile_command.NEEDED
    try:
        with _without_main():
            profile_command.write(config, found, found.search_with(given), Console(quiet=quiet))
    except StopRequested:
        raise KeyboardInterrupt("nothing is written; the same call begins again") from None
    path = config.out or config.bundle
    assert path is not None, "ProfileConfig has one"
    return path


@dataclass(frozen=True)
class Figure:
    """One measure of a published architecture."""

    measure: str
    published: float | None
    """None where the publication has none that is known."""
    ours: float | None
    """None where it has not been measured."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of an architecture of the zoo; printed, it is a table."""

    name: str
    method: str
    """Search method that trains and evaluates it."""
    genotype: Mapping[str, Any]
    """JSON form."""
    source: str
    """Publication."""
    parameters: int
    """Without auxiliary heads, which serve training only."""
    macs: int
    """Multiply-adds for one image of `size`."""
    size: tuple[int, int]
    """(H, W) in pixels."""
    figures: tuple[Figure, ...]
    """Published ones beside ours."""
    note: str
    """Why ours is another than the published one; empty where there is nothing to say."""

    def __str__(self) -> str:
        height, width = self.size
        rows = [("", "published", "ours")]
        for figure in self.figures:
            at = f", {height}x{width}" if figure.measure == "multiply-adds" else ""
            numbers = (_number(figure.published), _number(figure.ours))
            rows.append((figure.measure + at, *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows
        ]
        genotype = json.dumps(self.genotype)
        note = ["", *textwrap.wrap(self.note, 100)] if self.note else []
        return "\n".join([f"{self.name}, {self.method}", self.source, genotype, "", *table, *note])


def model_info(name: str) -> ModelInfo:
    """An architecture of the zoo: genotype, size, source, and published figures beside ours.

    The size is that of ``create_model(name, faithful=True)``, which builds what the publication
    counts.

    Raises:
        UserError: there is none of that name; the message lists them.
    """
    if name not in ZOO:
        raise UserError(
            f"model_info: expected one of {', '.join(ZOO)}, got {name!r}{did_you_mean(name, ZOO)}"
        )
    entry, network = ZOO[name], create_model(name, faithful=True)
    parameters = count_parameters(network)
    macs = count_macs(network, entry.size, channels=entry.channels)
    ours = {"parameters": parameters, "multiply-adds": macs}
    if isinstance(network, Detector):
        ours["trainable parameters"] = parameters - sum(
            count_parameters(layer) for layer in network.encoder.first()
        )
    figures = {**dict.fromkeys(ours), **entry.published}
    return ModelInfo(
        name,
        entry.method,
        entry.genotype.to_json(),
        entry.source,
        parameters,
        macs,
        entry.size,
        tuple(Figure(measure, value, ours.get(measure)) for measure, value in figures.items()),
        entry.note,
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 1e9:
        return f"{value / 1e9:.4g} G"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value / 1e6:.3g} M" if value >= 1e3 else f"{value:g}"


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a module be called as the function that has its name, whose place it takes once it is
    imported."""

    class Function(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    sys.modules[module].__class__ = Function


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep worker processes from running the caller's script, which need not have the guard
    ``if __name__ == "__main__"``: they use nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
