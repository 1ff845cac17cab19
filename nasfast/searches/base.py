"""What the entry points know of every search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

from rich.console import Console

from nasfast.runs.study import Study
from nasfast.training.loop import Runtime
from nasfast.utils.config import Bound, Bounded, Seed


@dataclass(frozen=True)
class SearchSettings(Bounded):
    """Settings that every search has."""

    data: str = "synthetic"
    """"synthetic", or a folder."""
    seed: Seed = 0
    """Decides everything that is drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    deterministic: bool = False
    """On CUDA: the same bits in every run, by slower ways; a CPU gives them anyway."""
    threads: Annotated[int, Bound(1, 1024)] | None = None
    """Threads that a network is computed with; default: as many as there are cores, or that many
    shared out among a batch of candidates."""
    name: str | None = None
    """Name of the run; default: that of the data."""
    runs: Path = Path("runs")
    """Directory that run directories are made in."""

    def in_run(self, path: Path) -> Self:
        """With the copies that a run's directory has of files that the settings name."""
        return self


class Search(Protocol):
    """A search with its data open, ready to run."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """SHA-256 of everything that was read."""

    @property
    def runtime(self) -> Runtime: ...

    @property
    def ranking(self) -> Literal["score", "last"]:
        """What is best: the highest score, or what the search ended with."""

    @property
    def environment(self) -> Mapping[str, object]:
        """What env.json says beside the machine and the identity."""

    @property
    def more(self) -> str:
        """Flags that make a finished run go on, such as "--budget 16"; empty where none do."""

    def run(self, study: Study, console: Console) -> None:
        """Search from where the study stands to the end; every record and checkpoint is saved."""

    def close(self) -> None:
        """End what it started; nothing is lost."""
