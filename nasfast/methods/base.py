"""What a search method brings along; the entry points keep what all methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import tyro
from rich.console import Console
from rich.table import Table

from nasfast.models.io import MODEL_FILE
from nasfast.report import MethodReport
from nasfast.searches.base import Search, SearchSettings
from nasfast.spaces.base import Genotype
from nasfast.training.loop import Runtime
from nasfast.utils.config import require_positive
from nasfast.utils.interrupt import Interrupt


@dataclass(frozen=True)
class TrainSettings:
    """Settings that every full training has."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory of a search, or a JSON file with a genotype."""
    rank: int = 1
    """Which architecture of the run's ranking; 1 is the best."""
    data: str | None = None
    """Data as for nasfast search; default: the run's, or synthetic for a genotype file."""
    out: Path | None = None
    """Directory of the result; default: train-N in the run, or beside the genotype file."""
    seed: int = 0
    """Decides initial weights, crops and order."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and where."""

    model: Annotated[Path, tyro.conf.Positional]
    """model.safetensors, or the directory that holds it."""
    data: str | None = None
    """Data as for nasfast search; default: what the network was trained on."""
    batch: int = 1
    """Images per forward pass, for the latency."""
    seconds: float = 5.0
    """How long to measure the latency."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_positive(self, "batch")

    @property
    def path(self) -> Path:
        """The model file."""
        return self.model / MODEL_FILE if self.model.is_dir() else self.model


class Training(Protocol):
    """A full training in rounds, with a checkpoint after each."""

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

    def round(self) -> str:
        """Train one round; returns a line about it."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next round depends on: tensors and plain Python only."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""

    def finish(self) -> str:
        """Score the network, write model.safetensors and metrics.json; returns what to print."""


@dataclass(frozen=True)
class Architecture:
    """An architecture to train, and where it comes from."""

    genotype: object
    """JSON form."""
    home: Path
    """Directory that trainings are put in."""
    search: Mapping[str, Any]
    """Settings of the search that found it, as far as known; empty for a file."""


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
    model_format: ClassVar[str]
    """Key in the metadata of this method's model files."""
    report: ClassVar[MethodReport]
    """What the report of a run shows for this method alone."""
    zoo: ClassVar[Mapping[str, Architecture]] = {}
    """Named architectures."""

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
    def evaluate(self, settings: Any) -> tuple[Mapping[str, Any], Table]:
        """Plain JSON for evaluation.json, and the same for a person."""
