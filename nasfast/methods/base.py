"""What a search method brings along; the entry points keep what all methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nasfast.data.checks import Findings
from nasfast.inference.exported import EXPORT_SUFFIXES
from nasfast.inference.model import Model, find_model
from nasfast.report import MethodReport
from nasfast.searches.base import Search, SearchSettings
from nasfast.spaces.base import Genotype
from nasfast.training.loop import Runtime
from nasfast.utils.cli import say
from nasfast.utils.config import BatchSize, Bound, Bounded, Count, Seed
from nasfast.utils.errors import UserError
from nasfast.utils.interrupt import Interrupt


@dataclass(frozen=True)
class TrainSettings(Bounded):
    """Settings that every full training has."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory of a search, or a JSON file with a genotype."""
    rank: Count = 1
    """Which architecture of the run's ranking; 1 is the best."""
    front: Count | None = None
    """Instead of one, train so many architectures of the run's front, which cover it best, one
    after the other."""
    data: str | None = None
    """Data as for nasfast search; default: the run's, or synthetic for a genotype file."""
    out: Path | None = None
    """Directory of the result; default: train-N in the run, or beside the genotype file."""
    seed: Seed = 0
    """Decides initial weights, crops and order."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    deterministic: bool = False
    """On CUDA: the same bits in every run, by slower ways; a CPU gives them anyway."""


Split = Literal["train", "val", "test"]
"""Part of a data set."""


@dataclass(frozen=True)
class EvaluateConfig(Bounded):
    """What to measure, and where."""

    model: Annotated[Path, tyro.conf.Positional]
    """model.safetensors, a directory with it, a run, or an .onnx or .pt2 of nasfast export."""
    data: str | None = None
    """Data as for nasfast search; default: what the network was trained on."""
    split: Split = "val"
    """Which images to score on; searches and trainings never read those of test."""
    batch: BatchSize = 1
    """Images per forward pass, for the latency."""
    seconds: Annotated[float, Bound(0, 3600, open="low")] = 5.0
    """How long to measure the latency."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    @property
    def path(self) -> Path:
        """The model file; UserError where there is none."""
        return find_model(self.model)

    def source(self, description: Mapping[str, Any]) -> str:
        """The data to score on.

        Raises:
            UserError: neither the settings nor the description of the model name any.
        """
        data = self.data or description.get("data")
        if data is None:
            raise UserError(
                f"evaluate {self.path}: expected --data DIR, as the file does not say what the "
                "network was trained on, got none; add it"
            )
        return str(data)

    @property
    def label(self) -> str:
        """What tables call the network."""
        path = self.path.resolve()
        return path.name if path.suffix in EXPORT_SUFFIXES else path.parent.name


@dataclass(frozen=True)
class CheckConfig:
    """What to look at, and how a search would read it; methods add their settings."""

    data: str
    """Data as for nasfast search."""
    out: Path | None = None
    """PNG to draw a dozen of the images on; default: DATA-check.png in the working directory. It is
    replaced where it exists."""


class Training(Protocol):
    """A full training in rounds, with a checkpoint after each."""

    out: Path
    """Where the result goes."""

    @property
    def settings(self) -> TrainSettings:
        """Those it was given, fitted to the data."""

    @property
    def done(self) -> int:
        """Rounds that are finished."""

    @property
    def rounds(self) -> int:
        """Rounds in all."""

    @property
    def summary(self) -> str:
        """What is trained on what, in a few lines."""

    def inputs(self, search: Mapping[str, Any]) -> Mapping[str, str]:
        """SHA-256 of what it read, by the names that a search of these settings has in its
        `Search.inputs`; without what the training takes from elsewhere."""

    def round(self) -> str:
        """Train one round; returns a line about it."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on: tensors and plain Python only."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""

    def finish(self) -> str:
        """Score the network, write model.safetensors and metrics.json; returns what to print."""


def check_same_images(training: Training, before: str, now: str) -> None:
    """Raise UserError where the fingerprint of the training images is not that of the beginning."""
    if before != now:
        raise UserError(
            f"resume {training.out}: expected the training images that it began with, got other "
            f"content in {training.settings.data}; restore it or start a new training"
        )


@dataclass(frozen=True)
class Architecture:
    """An architecture to train, and where it comes from."""

    genotype: object
    """JSON form."""
    home: Path
    """Directory that trainings are put in."""
    search: Mapping[str, Any]
    """Settings of the search that found it, as far as known; empty for a file."""


def warn(findings: Findings, console: Console) -> None:
    """Print the warnings before a search begins.

    Raises:
        UserError: the data cannot be used.
    """
    findings.require()
    for warning in findings.warnings:
        say(console, f"warning: {warning}")


class Method(ABC):
    """One search method: how it searches, trains what it found, and measures it.

    Settings are frozen dataclasses of the method's own. What the entry points know of them is in
    `SearchSettings`, `TrainSettings` and `EvaluateConfig`.
    """

    name: ClassVar[str]
    """On the command line and in run directories."""
    space: ClassVar[str]
    """Value of "space" in a genotype's JSON form."""
    search_settings: ClassVar[type[SearchSettings]]
    train_settings: ClassVar[type[TrainSettings]]
    check_settings: ClassVar[type[CheckConfig]]
    model_format: ClassVar[str]
    """Key in the metadata of this method's model files."""
    report: ClassVar[MethodReport]
    """What the report of a run shows for this method alone, unless its task says more."""
    zoo: ClassVar[Mapping[str, Architecture]] = {}
    """Named architectures."""

    def report_of(self, settings: Mapping[str, Any]) -> MethodReport:
        """The same for a run of these settings."""
        return self.report

    @abstractmethod
    def parse_search(self, argv: Sequence[str]) -> SearchSettings:
        """Settings from a command line."""

    @abstractmethod
    def search_with(self, settings: Mapping[str, Any]) -> SearchSettings:
        """Settings by name, such as "stage0.epochs", over those of the preset."""

    @abstractmethod
    def continued(
        self, settings: Any, checkpoint: Mapping[str, Any], budget: int | None
    ) -> SearchSettings:
        """Settings to continue a run by.

        Args:
            settings: those it began with.
            checkpoint: its last one, or an empty mapping.
            budget: a new one; None keeps the last.
        """

    @abstractmethod
    def build(
        self, settings: Any, interrupt: Interrupt, console: Console
    ) -> tuple[Search, SearchSettings]:
        """Open the data and prepare the search; the settings fit the data then."""

    @abstractmethod
    def check(self, settings: Any) -> Findings:
        """What data holds, and what about it would mislead a search of this method.

        Raises:
            UnknownLayout: it is no data of this method.
            UserError: it cannot be opened.
        """

    @abstractmethod
    def genotype(self, obj: object) -> Genotype:
        """A genotype from its JSON form, or the publication's."""

    @abstractmethod
    def parse_train(
        self, argv: Sequence[str], found: Mapping[str, Any], description: str | None
    ) -> TrainSettings:
        """Settings of a training from a command line, `Architecture.search` and a help text."""

    @abstractmethod
    def train_with(
        self, source: Path, settings: Mapping[str, Any], found: Mapping[str, Any]
    ) -> TrainSettings:
        """Settings of a training by name, over those of `Architecture.search`."""

    @abstractmethod
    def resolve(self, settings: Any, architecture: Architecture) -> TrainSettings:
        """Fill in what the architecture's search decides, but for the output's directory."""

    @abstractmethod
    def training(self, settings: Any, genotype: Any, out: Path, runtime: Runtime) -> Training:
        """A training whose result goes to a directory."""

    @abstractmethod
    def parse_evaluate(self, argv: Sequence[str], description: str | None) -> EvaluateConfig:
        """Settings of an evaluation from a command line and a help text."""

    @abstractmethod
    def inputs(self, model: Model, data: str, split: Split, count: int) -> list[Tensor]:
        """Up to ``count`` inputs ``[1, c, H, W]`` of a network, preprocessed, from all over a part
        of the data; UserError where it cannot be read or does not fit."""

    @abstractmethod
    def score(self, model: Model, data: str, split: Split, runtime: Runtime) -> dict[str, float]:
        """A network's metrics, more is better, on a part of the data, the first to be named first;
        errors as above."""

    @abstractmethod
    def evaluate(self, settings: Any) -> tuple[Mapping[str, Any], Table]:
        """Plain JSON for evaluation.json, and the same for a person."""
