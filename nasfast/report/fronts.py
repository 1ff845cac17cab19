"""Reward against each cost, and the architectures that no other beats in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element

from nasfast.report.charts import CostChart
from nasfast.report.html import element, legend, legend_key, table
from nasfast.report.numbers import cost_label, cost_text, number
from nasfast.report.ranking import Stage, genotype_text, stages
from nasfast.runs.objectives import TIE
from nasfast.runs.records import Record
from nasfast.runs.study import Study

__all__ = ["fronts", "pareto_front"]

PREDICTED = {"predicted_latency"}
"""Costs without a chart: the measured latency has one."""


def fronts(study: Study) -> list[Element]:
    """A chart for each cost, and a table of the points on the fronts. Of the last stage, as rewards
    of several cannot be compared; nothing where fewer than two architectures passed it, and nothing
    of a search by gradient, whose rewards are those of one supernet."""
    found = stages(study.records)
    if study.ranks_by == "last" or not found:
        return []
    stage = found[-1]
    points = [
        (record, reward)
        for record, reward in stage.passed(study.records)
        if record.duplicate_of is None and record.score is not None
    ]
    if len(points) < 2:
        return []
    content, on_front = [], dict[int, list[str]]()
    known = dict.fromkeys(cost for record, _ in points for cost in record.evaluation.costs)
    costs = [cost for cost in known if cost not in PREDICTED]
    first = [cost for cost in study.objectives.costs if cost in costs]
    for cost in [*first, *(cost for cost in costs if cost not in first)]:
        both = [(r, reward) for r, reward in points if cost in r.evaluation.costs]
        tie = TIE if cost == "latency" else 0.0
        front = pareto_front([(r.evaluation.costs[cost], reward) for r, reward in both], tie)
        for i in front:
            on_front.setdefault(both[i][0].index, []).append(cost_label(cost))
        content.append(_chart(cost, both, front, stage, study.published))
    keys = [
        legend_key("no architecture is both cheaper and better", _dot("c0")),
        legend_key("others", _dot("c0 hollow")),
    ]
    if study.published:
        keys.append(legend_key("costs of published architectures, which were not trained", _line()))
    chosen = sorted(
        ((record, reward) for record, reward in points if record.index in on_front),
        key=lambda pair: pair[1],
        reverse=True,
    )
    rows = [
        (
            str(record.index),
            number(reward),
            *(cost_text(cost, record.evaluation.costs.get(cost)) for cost in costs),
            ", ".join(on_front[record.index]),
            genotype_text(record),
        )
        for record, reward in chosen
    ]
    head = ["index", stage.label, *map(cost_label, costs), "on the front of", "genotype"]
    return [*content, legend(*keys), table(head, rows, "numbers")]


def pareto_front(points: Sequence[tuple[float, float]], tie: float = 0.0) -> list[int]:
    """Indices of the points (cost, reward) for which no other costs no more and is worth no less,
    cheapest first; of equal points the first.

    Args:
        points: cost, which is positive, and reward.
        tie: share of a cost that two may differ by and count as equal.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (-points[i][1], points[i][0])):
        if not front or points[i][0] < points[front[-1]][0] * (1 - tie):
            front.append(i)
    return front[::-1]


def _chart(
    cost: str,
    points: Sequence[tuple[Record, float]],
    front: Iterable[int],
    stage: Stage,
    published: Mapping[str, Mapping[str, float]],
) -> Element:
    costs = [record.evaluation.costs[cost] for record, _ in points]
    rewards = [reward for _, reward in points]
    marked = {name: each[cost] for name, each in published.items() if cost in each}
    chart = CostChart.of_costs(cost, [*costs, *marked.values()], rewards)
    best = {i: (costs[i], rewards[i]) for i in front}
    marks = [chart.steps(list(best.values()), "c0")]
    for at, (name, value) in enumerate(sorted(marked.items(), key=lambda pair: pair[1])):
        marks.append(chart.vertical_line(value, "gate"))
        place = {"x": f"{chart.x(value):.1f}", "y": 12 + 12 * (at % 3), "dx": 4}
        marks.append(element("text", name, **place))
    for i, (record, reward) in enumerate(points):
        name = f"architecture {record.index}"
        text = f"{name}: {stage.label} reward {number(reward)}, {cost_text(cost, costs[i])}"
        x, y = f"{chart.x(costs[i]):.1f}", f"{chart.y(reward):.1f}"
        kind = "c0" if i in best else "c0 hollow"
        marks.append(element("circle", element("title", text), class_=kind, cx=x, cy=y, r=4))
        if i in best:
            marks.append(element("text", str(record.index), x=x, y=y, dx=6, dy=-6))
    return chart.drawn(marks, f"{stage.label} reward against {cost_label(cost)}")


def _line() -> Element:
    return element("path", d="M7 0v10", class_="line gate")


def _dot(kind: str) -> Element:
    return element("circle", cx=7, cy=5, r=4, class_=kind)
