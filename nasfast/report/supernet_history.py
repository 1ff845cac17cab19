"""How the choice of a gradient search formed, for its report."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from nasfast.report.charts import Chart, legend_key, sample
from nasfast.report.graphs import element, ir_cell_graph, ir_path_graph
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.spaces.ir_nas import PRIMITIVES, IRNASGenotype, moves

__all__ = ["architecture", "formation", "pictures"]

STEPS = ("narrower", "same", "wider")
ROW, LABEL = 20, 110  # height of a row of a heat map, width of its label, in SVG user units
WIDTH = 1000


def formation(study: Study) -> Iterator[tuple[str, list[Element]]]:
    """Title and content of each section; none where the study holds no gradient search."""
    state = study.load_checkpoint() or {}
    records = study.records
    if not records or "alphas" not in state:
        return
    changes = [
        record.index
        for before, record in itertools.pairwise(records)
        if before.canonical != record.canonical
    ]
    yield (
        "Losses and validation",
        [
            *_lines(records, changes, {"psnr": "PSNR of the supernet, dB"}),
            *_lines(
                records,
                changes,
                {"loss": "loss of the weights", "architecture_loss": "loss of the architecture"},
            ),
            element(
                "p",
                f"Dotted: epochs after which another architecture was derived ({len(changes)}). "
                "The supernet is scored as it is, with its operations mixed.",
            ),
        ],
    )
    entropies = {
        "alpha_entropy": f"operations of an edge (uniform: {math.log(len(PRIMITIVES)):.2f})",
        "beta_entropy": "moves of a level",
    }
    alphas, betas = state["alphas"].tolist(), state["betas"].tolist()
    layers = len(records[-1].genotype["levels"])  # type: ignore[arg-type]
    yield (
        "How the choice formed",
        [
            element("h3", "Entropy, nats"),
            *_lines(records, changes, entropies),
            element("h3", "Operations"),
            *_heat(alphas, [f"{i} → node {n}" for i, n in _edges(len(alphas[0]))], PRIMITIVES),
            element("h3", "Widths"),
            *_heat(betas, [f"layer {la}, level {le}" for la, le in moves(layers)], STEPS),
            element(
                "p",
                "A row is an edge of the cell, from a state to a node, or a source of the layer "
                "before; its colour is the most probable choice after each epoch, the stronger "
                "the more probable.",
            ),
        ],
    )


def architecture(record: Record) -> list[tuple[str, Element, str]]:
    """Title, drawing and caption of the cell and the path of a record."""
    genotype = IRNASGenotype.from_json(record.genotype)
    return [
        (
            f"The cell, after epoch {record.index + 1}",
            ir_cell_graph(genotype),
            "A node sums two operations on earlier states; states 0 and 1 are the outputs of the "
            "layers before. The coloured edges are the nodes, concatenated to the output.",
        ),
        (
            "Its widths",
            ir_path_graph(genotype),
            "Layers from left to right; a level is twice as wide as the one above it.",
        ),
    ]


def pictures(study: Study) -> list[Element]:
    """The strips that nasfast.evaluate made of the networks trained in this run."""
    figures = []
    for path in sorted(study.path.glob("*/pictures/*.png"), key=_order):
        data = base64.b64encode(path.read_bytes()).decode()
        caption = f"{path.parent.parent.name}: {path.stem}"
        image = element("img", src=f"data:image/png;base64,{data}", alt=caption)
        figures.append(
            element("figure", element("div", image, class_="wide"), element("figcaption", caption))
        )
    return figures


def _order(path: Path) -> tuple[Any, ...]:
    training = path.parent.parent.name
    number = training.rpartition("-")[2]
    return (int(number) if number.isdigit() else -1, training, path.name)


def _edges(count: int) -> list[tuple[int, int]]:
    """(state, node) of each edge of a cell's supernet."""
    edges = [(state, node) for node in range(count) for state in range(2 + node)]
    return edges[:count]


def _lines(
    records: Sequence[Record], changes: Sequence[int], names: dict[str, str]
) -> list[Element]:
    """Chart of metrics over epochs, each from where it begins, and its legend."""
    series = {}
    for name in names:
        metrics = ((r.index, r.evaluation.metrics["supernet"].get(name)) for r in records)
        series[name] = [(index, value) for index, value in metrics if value is not None]
    values = [value for points in series.values() for _, value in points]
    chart = Chart.of(values, len(records), "epoch", first=1, height=220)
    marks = [chart.upright(index, "gate") for index in changes]
    legend = []
    for i, (name, points) in enumerate(series.items()):
        if points:
            marks.append(chart.line(points, f"c{i}"))
            legend.append(legend_key(names[name], sample(f"c{i}")[0]))
    return [
        chart.drawn(marks, ", ".join(names.values())),
        element("ul", *legend, class_="legend"),
    ]


def _heat(
    epochs: Sequence[Sequence[Sequence[float]]], labels: Sequence[str], choices: Sequence[str]
) -> list[Element]:
    """One row per label, one column per epoch, coloured by the most probable choice; a legend.

    Args:
        epochs: probabilities, of each epoch, row and choice.
        labels: of the rows.
        choices: what the columns of a row stand for.
    """
    marks = []
    step = (WIDTH - LABEL) / len(epochs)
    for row, label in enumerate(labels):
        y = row * ROW
        marks.append(element("text", label, x=LABEL - 8, y=y + 14, text_anchor="end"))
        for epoch, tables in enumerate(epochs):
            shares = tables[row]
            best = max(range(len(shares)), key=shares.__getitem__)
            least = 1 / sum(share > 0 for share in shares)
            # from the uniform distribution, faint, to certainty
            strength = 0.12 + 0.88 * min(1.0, 2 * (shares[best] - least) / (1 - least + 1e-9))
            text = f"{label}, epoch {epoch + 1}: {choices[best]} {shares[best]:.3f}"
            place = {"x": f"{LABEL + epoch * step:.1f}", "y": y, "width": f"{step + 0.2:.1f}"}
            marks.append(
                element(
                    "rect",
                    element("title", text),
                    height=ROW - 2,
                    class_=f"c{best}",
                    fill_opacity=f"{max(strength, 0.12):.2f}",
                    **place,
                )
            )
    svg = element(
        "svg",
        *marks,
        viewBox=f"0 0 {WIDTH} {len(labels) * ROW}",
        class_="chart",
        role="img",
        aria_label="most probable choice over epochs",
    )
    legend = [
        legend_key(choice, element("rect", width=14, height=10, class_=f"c{i}"))
        for i, choice in enumerate(choices)
    ]
    return [element("div", svg, class_="wide"), element("ul", *legend, class_="legend")]
