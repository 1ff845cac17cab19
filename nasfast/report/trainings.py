"""How the networks of a run learned: validation scores over the epochs of their trainings."""

from __future__ import annotations

from collections.abc import Iterator

from nasfast.report.base import MethodReport, Section
from nasfast.report.charts import line_chart
from nasfast.report.html import element
from nasfast.report.numbers import number
from nasfast.report.predictions import by_number
from nasfast.runs.study import Study
from nasfast.utils.seals import read_sealed

__all__ = ["trainings"]


def trainings(study: Study, hook: MethodReport) -> Iterator[Section]:
    """The method's metric over the epochs, of the trainings that were validated more than once."""
    key, label = hook.metric
    curves, notes, epochs = {}, [], 1
    for path in sorted(study.path.glob("*/metrics.json"), key=lambda path: by_number(path.parent)):
        metrics = read_sealed(path)
        points = [(e["epoch"] - 1, e[key]) for e in metrics.get("validation", []) if key in e]
        if len(points) < 2:
            continue
        name, count, kept = path.parent.name, metrics["epochs"], metrics["kept_epoch"]
        curves[name], epochs = points, max(epochs, count)
        value = number(dict(points).get(kept - 1))
        notes.append(f"{name}: the network is that of epoch {kept} of {count}, {label} {value}.")
    if curves:
        chart = line_chart(curves, epochs, "epoch", first=1)
        yield Section(f"{label} while training", [*chart, *(element("p", note) for note in notes)])
