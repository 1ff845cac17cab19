"""What networks of a run predict: pictures beside the truth, and scores of the classes."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from nasfast.report.base import MethodReport, Section
from nasfast.report.html import element, figure, table
from nasfast.report.numbers import number
from nasfast.runs.study import PREDICTIONS, Study
from nasfast.tasks.base import CLASSES
from nasfast.training.pictures import FAILED
from nasfast.utils.errors import UserError
from nasfast.utils.files import read_json
from nasfast.utils.seals import read_sealed

__all__ = ["by_number", "predictions"]

FOLDERS = (PREDICTIONS, "pictures")
"""Of a training's pictures, and of those that `nasfast evaluate` made of it."""


@dataclass(frozen=True)
class _Network:
    """A network of the run that there is something to show of."""

    name: str
    title: str
    note: str
    pictures: Sequence[Path]
    classes: Sequence[Mapping[str, Any]]
    """Of the fields of `nasfast.tasks.base.ClassScore`; older trainings know no "color"."""
    failure: str | None = None
    """Why there are no pictures."""


def predictions(study: Study, hook: MethodReport) -> Iterator[Section]:
    """Predictions of the trained networks, of the best architecture as the search scored it, and
    the scores of the classes of all these."""
    networks = [*_trained(study, hook), *_scored(study)]
    for network in networks:
        if network.pictures or network.failure:
            yield Section(network.title, _gallery(network))
    classes = {network.name: network.classes for network in networks if network.classes}
    if classes:
        yield Section("Scores of the classes", [_class_table(classes)])


def _trained(study: Study, hook: MethodReport) -> Iterator[_Network]:
    found = {path.parent.parent for name in FOLDERS for path in study.path.glob(f"*/{name}/*")}
    found |= {path.parent for path in study.path.glob("*/metrics.json")}
    for folder in sorted(found - {study.path / PREDICTIONS}, key=by_number):
        file = folder / "metrics.json"
        metrics = read_sealed(file) if file.is_file() else {}
        genotype = metrics.get("genotype")
        index = next((r.index for r in study.ranking() if r.genotype == genotype), None)
        notes = [f"Architecture {index}, trained in full"] if index is not None else []
        key, label = hook.metric
        if key in metrics and "split" in metrics:
            notes.append(f"{label} {number(metrics[key])} on {metrics['split']}")
        pictures = [path for name in FOLDERS for path in sorted((folder / name).glob("*.png"))]
        iou = metrics.get("class_iou", {})
        older = [{"name": name, "metric": "IoU", "score": score} for name, score in iou.items()]
        yield _Network(
            folder.name,
            f"Predictions of the trained network, {folder.name}",
            "; ".join(notes),
            pictures,
            _classes(folder / PREDICTIONS) or older,
            _failure(folder / PREDICTIONS),
        )


def _scored(study: Study) -> Iterator[_Network]:
    best, folder = study.best, study.best_files
    if best is None:
        return
    stage = best.evaluation.last_stage
    name = f"architecture {best.index}, {stage}"
    if study.ranks_by == "last":
        name = f"{stage}, epoch {best.index + 1}"
        title = f"Predictions of the supernet, after epoch {best.index + 1}"
        note = "The supernet's own output, operations mixed; the derived network is not trained yet"
    else:
        title = f"Predictions of the best, architecture {best.index}"
        note = f"As the search scored it, after {stage}; a full training makes them better"
    pictures = sorted(folder.glob("*.png"))
    yield _Network(
        name,
        title,
        note,
        pictures,
        _classes(folder),
        _failure(folder),
    )


def by_number(folder: Path) -> tuple[int, str]:
    """train-9 before train-10."""
    number = folder.name.rpartition("-")[2]
    return (int(number) if number.isdigit() else -1, folder.name)


def _failure(folder: Path) -> str | None:
    path = folder / FAILED
    return path.read_text("utf-8", "replace") if path.is_file() else None


def _classes(folder: Path) -> list[dict[str, Any]]:
    path = folder / CLASSES
    if not path.is_file():
        return []
    entries = read_json(path)
    wanted = {"name", "metric", "score", "color"}
    if not (isinstance(entries, list) and all(wanted <= set(entry) for entry in entries)):
        raise UserError(
            f"{path}: expected a list of objects with {', '.join(sorted(wanted))}, got "
            f"{str(entries)[:40]!r}; remove it, or restore it from a copy"
        )
    return entries


def _gallery(network: _Network) -> Iterator[Element]:
    for path in network.pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        caption = f"{network.name}: {path.stem}"
        yield figure(element("img", src=f"data:image/png;base64,{data}", alt=caption), caption)
    if network.failure is not None:
        yield element("p", f"They could not be drawn: {network.failure}")
    if network.note:
        yield element("p", f"{network.note}.")


def _class_table(networks: Mapping[str, Sequence[Mapping[str, Any]]]) -> Element:
    """A row for each class, with its colour; a column for each network."""
    found = {entry["name"]: entry for classes in networks.values() for entry in classes}
    for classes in networks.values():
        found |= {entry["name"]: entry for entry in classes if "color" in entry}
    scores = [{entry["name"]: entry["score"] for entry in c} for c in networks.values()]
    rows = [
        (_named(entry), *(number(column.get(name)) for column in scores))
        for name, entry in found.items()
    ]
    metrics = ", ".join(dict.fromkeys(entry["metric"] for entry in found.values()))
    return table((f"class, {metrics}", *networks), rows, "classes")


def _named(entry: Mapping[str, Any]) -> Element | str:
    if "color" not in entry:
        return str(entry["name"])
    color = "#{:02x}{:02x}{:02x}".format(*entry["color"])
    swatch = element("rect", width=14, height=10, style=f"fill: {color}")
    key = element("svg", swatch, viewBox="0 0 14 10", width=14, height=10)
    return element("span", key, str(entry["name"]))
