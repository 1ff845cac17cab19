"""What a search method brings to the report of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol
from xml.etree.ElementTree import Element

from nasfast.runs.records import Record
from nasfast.runs.study import Study

__all__ = ["MethodReport", "Section"]


@dataclass(frozen=True)
class Section:
    """A part of the page with its heading."""

    title: str
    content: Iterable[Element]
    warning: bool = False
    """Whether it stands before all others, marked."""


class MethodReport(Protocol):
    """The part of a report that only the method of the run knows."""

    @property
    def terms(self) -> Mapping[str, str]:
        """What "reward", "gate", the stages and the metrics mean, a line each; the report shows
        those that its records have."""

    @property
    def metric(self) -> tuple[str, str]:
        """Name in the records and label of the metric that tables show beside the rewards."""

    def architecture(self, record: Record) -> Iterable[Section]:
        """Drawings of one architecture."""

    def sections(self, study: Study) -> Iterable[Section]:
        """Whatever else there is to show about this run."""
