"""Whether the reward of a search predicts: its architectures, trained longer, and a random search.

    RUN/study/
        study-results.json  arch-<index>-seed-<seed>/  random/<run directory>

study-results.json holds a `CorrelationStudy` and, below "summary", the figures made from it.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nasfast import __version__
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError
from nasfast.utils.files import atomic_write
from nasfast.utils.seals import read_sealed, sealed_json
from nasfast.utils.seeding import derive_seed
from nasfast.utils.statistics import ceiling, noise, rank_correlations

__all__ = [
    "ALL",
    "FOLDER",
    "RANDOM",
    "CorrelationStudy",
    "Training",
    "against_random",
    "draw",
    "evaluated",
]

FOLDER = "study"
RESULTS = "study-results.json"
VERSION = 1
ALL, RANDOM = "all trained", "random sample"
"""What a correlation is of."""


@dataclass(frozen=True)
class Training:
    """One architecture, trained longer once."""

    index: int
    """Of its record."""
    seed: int
    score: float | None
    """None for a failure."""
    failure: str | None = None
    """Its cause."""
    seconds: float = 0.0
    """Of its epochs."""


@dataclass(frozen=True)
class CorrelationStudy:
    """Architectures of a run, trained longer."""

    metric: str
    """The score of a training, by its name in metrics.json."""
    label: str
    """Of the metric, for people."""
    settings: Mapping[str, Any]
    """Of all trainings."""
    inputs: Mapping[str, str]
    """SHA-256 of what the trainings read, as far as it is what the search read."""
    top: tuple[int, ...]
    """Indices of the records of the run's best architectures, best first."""
    sample: tuple[int, ...]
    """Those of a uniform random sample of all; some may be among the best."""
    seeds: tuple[int, ...]
    trainings: tuple[Training, ...] = ()
    """In the order of the architectures, the best first, and of the seeds."""
    control: str | None = None
    """Run directory of the random search, relative to the folder of the study."""

    @classmethod
    def read(cls, run: Path) -> Self | None:
        """That of a run; None before there is one.

        Raises:
            UserError: its file is damaged, or of a newer version.
        """
        path = run / FOLDER / RESULTS
        if not path.is_file():
            return None
        form = read_sealed(path)
        version = form.pop("version", None)
        if version != VERSION:
            raise UserError(
                f'{path}: expected "version" {VERSION}, which nasfast {__version__} knows, got '
                f"{version!r}; open it with the nasfast that wrote it, or restore it from a copy"
            )
        form.pop("summary", None)
        return from_mapping(cls, form, str(path))

    def write(self, study: Study) -> dict[str, Any]:
        """Replace the file of a run, with the summary, which is returned."""
        summary = self.summary(study)
        form = {"version": VERSION, **dataclasses.asdict(self), "summary": summary}
        atomic_write(study.path / FOLDER / RESULTS, sealed_json(form))
        return summary

    @property
    def architectures(self) -> list[int]:
        """Indices of all, the best first, then those that only the sample has."""
        return list(dict.fromkeys((*self.top, *self.sample)))

    def scores(self) -> dict[int, list[float]]:
        """Scores of the seeds by architecture, of those that have any."""
        found: dict[int, list[float]] = {index: [] for index in self.architectures}
        for training in self.trainings:
            if training.score is not None:
                found[training.index].append(training.score)
        return {index: scores for index, scores in found.items() if scores}

    def random_search(self, study: Study) -> Study | None:
        """The control, to read; None where there is none, or none any more."""
        path = study.path / FOLDER / self.control if self.control else None
        if path is None or not (path / "records.jsonl").is_file():
            return None
        return Study.open(path, read_only=True)

    def summary(self, study: Study) -> dict[str, Any]:
        """The figures, as JSON: correlations, noise, and what the random search found."""
        control = self.random_search(study)
        return {
            "trainings": len(self.trainings),
            "failed": sum(training.score is None for training in self.trainings),
            "architectures": len(self.scores()),
            "seed_noise": noise(list(self.scores().values())),
            "correlations": self._correlations(study.records),
            "random_search": None if control is None else against_random(study, control),
        }

    def _correlations(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """Of each stage, over all architectures and over the random sample alone."""
        scores, found = self.scores(), []
        stages = dict.fromkeys(stage for i in scores for stage in records[i].evaluation.rewards)
        for stage in stages:
            for name, members in ((ALL, self.architectures), (RANDOM, self.sample)):
                have = [
                    (records[i].evaluation.rewards[stage], scores[i])
                    for i in members
                    if i in scores and stage in records[i].evaluation.rewards
                ]
                means = [statistics.fmean(group) for _, group in have]
                kendall, spearman = rank_correlations([reward for reward, _ in have], means)
                found.append(
                    {
                        "stage": stage,
                        "of": name,
                        "architectures": len(have),
                        "kendall": dataclasses.asdict(kendall),
                        "spearman": dataclasses.asdict(spearman),
                        "ceiling": ceiling([group for _, group in have]),
                    }
                )
        return found


def draw(pool: Sequence[Record], top: int, others: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the best architectures, and of a random sample of all.

    The sample is the beginning of a random order of all of them, as far as it takes to have so many
    ``others`` that are not among the best. It does not change while the pool grows, but for what
    joins it.

    Args:
        pool: architectures to choose from, best first.
        top: how many of the best.
        others: how many beside them.
    """
    best = {record.index for record in pool[:top]}
    sample: list[int] = []
    for record in sorted(pool, key=lambda record: derive_seed("study", record.index)):
        if sum(index not in best for index in sample) == others:
            break
        sample.append(record.index)
    return tuple(record.index for record in pool[:top]), tuple(sample)


def evaluated(study: Study) -> list[Record]:
    """What counts in the budget of a search: all but repeated architectures."""
    return [record for record in study.records if record.duplicate_of is None]


def against_random(study: Study, control: Study) -> dict[str, Any]:
    """Candidates, best and mean reward of both searches, by stage."""
    found: dict[str, Any] = {}
    both = {"run": evaluated(study), "control": evaluated(control)}
    for stage in dict.fromkeys(stage for r in study.records for stage in r.evaluation.rewards):
        rewards = {
            name: [r.evaluation.rewards[stage] for r in records if stage in r.evaluation.rewards]
            for name, records in both.items()
        }
        found[stage] = {
            name: {
                "candidates": len(values),
                "best": max(values, default=None),
                "mean": statistics.fmean(values) if values else None,
            }
            for name, values in rewards.items()
        }
    return found
