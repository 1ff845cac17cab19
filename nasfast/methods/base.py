"""What a search method brings along; the entry points keep what all methods share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from nasfast.searches.base import Search, SearchSettings
from nasfast.spaces.base import Genotype
from nasfast.training.loop import Runtime
from nasfast.utils.config import require_positive
from nasfast.utils.interrupt import Interrupt

MODEL_FILE = "model.safetensors"
"""Name of a trained network in the directory of its training."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings that every full training has."""

    source: Annotated[Path, tyro.conf.Positional]
    """Run directory of a search, or a JSON file with a genotype."""
    rank: int = 1
    """Which architecture of the run's ranking; 1 is the best."""
    data: str | None = None
    """Data as for nasfast.search; default: the run's, or synthetic for a genotype file."""
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
    """Data as for nasfast.search; default: what the network was trained on."""
    batch: int = 1
    """Images a forward pass, for the latency."""
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


class Trainer(Protocol):
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
class Source:
    """An architecture to train, and where it comes from."""

    genotype: object
    """JSON form of the architecture."""
    home: Path
    """Directory that trainings are put in."""
    search: Mapping[str, Any]
    """Settings of the search that found it, as far as known; empty for a file."""


S = TypeVar("S", bound=SearchSettings)
T = TypeVar("T", bound=TrainSettings)
E = TypeVar("E", bound=EvaluateConfig)


@dataclass(frozen=True)
class Method(Generic[S, T, E]):
    """One search method: how it searches, trains what it found, and measures it."""

    name: str
    """On the command line and in run directories."""

    search_config: type[S]
    parse_search: Callable[[Sequence[str]], S]
    """Settings from a command line."""
    continued: Callable[[S, Mapping[str, Any], int | None], S]
    """Settings to continue a run by: (those it began with, its checkpoint, a new budget)."""
    build: Callable[[S, Interrupt, Console], tuple[Search, S]]
    """Open the data and prepare the search; the settings fit the data then."""

    space: str
    """Value of "space" in a genotype's JSON form."""
    genotype: Callable[[object], Genotype]
    """A genotype from its JSON form, or the publication's."""
    zoo: Mapping[str, Source]
    """Named architectures."""
    train_config: type[T]
    parse_train: Callable[[Sequence[str], Mapping[str, Any], str | None], T]
    """Settings from a command line, those of the source (as `Source.search`) and a help text."""
    resolve: Callable[[T, Source], T]
    """Fill in what the source decides, but for the output's directory."""
    trainer: Callable[[T, Any, Path, Runtime], Trainer]
    """From settings, genotype, the output's directory and runtime; continues its checkpoint."""

    format: str
    """Key in the metadata of this method's model files."""
    parse_evaluate: Callable[[Sequence[str], str | None], E]
    """Settings from a command line and a help text."""
    evaluate: Callable[[E], tuple[Mapping[str, Any], Table]]
    """Plain JSON for evaluation.json, and the same for a person."""
