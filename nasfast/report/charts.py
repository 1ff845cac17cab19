"""Charts in SVG: lines over a count, points over a cost, heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from nasfast.report.html import element, legend, legend_key
from nasfast.report.numbers import cost_label, cost_text

__all__ = ["COLORS", "Chart", "CostChart", "heat_map", "line_chart", "sample"]

COLORS = 8  # of series and choices in the style sheet: .c0 to .c7
WIDTH = 1000  # of a chart, in SVG user units
ROW, LABEL = 20, 110  # height of a row of a heat map, width of its label


@dataclass(frozen=True)
class Chart:
    """Coordinates of a chart of values over a count, in SVG user units."""

    count: int
    """Values 0 .. count - 1 of the horizontal axis."""
    label: str
    """What is counted."""
    first: int
    """Number that the value 0 is shown with."""
    low: float
    high: float
    step: float
    """Distance of two grid lines of the vertical axis."""
    width: int = WIDTH
    height: int = 340
    left: int = 46
    bottom: int = 40

    @classmethod
    def of(
        cls, values: Iterable[float], count: int, label: str, first: int = 0, height: int = 340
    ) -> Chart:
        """Axes that hold all finite values."""
        low, high, step = _grid(values, 0.01)
        return cls(max(count, 1), label, first, low, high, step, height=height)

    def x(self, index: float) -> float:
        return self.left + 14 + (self.width - self.left - 28) * index / max(self.count - 1, 1)

    def y(self, value: float) -> float:
        floor = self.height - self.bottom
        return floor - 14 - (floor - 24) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Values and labels of the horizontal axis."""
        every = max(1, 10 ** math.floor(math.log10(self.count)))
        if self.count / every < 4:
            every = max(1, every // 5)
        return [(i, str(i + self.first)) for i in range(0, self.count, every)]

    def axes(self) -> list[Element]:
        marks = []
        for i in range(round((self.high - self.low) / self.step) + 1):
            value = self.low + i * self.step
            y = f"{self.y(value):.1f}"
            marks.append(element("path", d=f"M{self.left} {y}H{self.width}", class_="grid"))
            text = f"{value:.{max(0, -math.floor(math.log10(self.step)))}f}"
            marks.append(element("text", text, x=self.left - 8, y=y, dy=4, text_anchor="end"))
        floor = self.height - self.bottom
        marks.append(element("path", d=f"M{self.left} {floor}H{self.width}", class_="axis"))
        for value, text in self.ticks():
            place = {"x": f"{self.x(value):.1f}", "y": floor + 16, "text_anchor": "middle"}
            marks.append(element("text", text, **place))
        middle = (self.left + self.width) / 2
        place = {"x": middle, "y": self.height - 4, "text_anchor": "middle"}
        return [*marks, element("text", self.label, **place)]

    def steps(self, points: Sequence[tuple[float, float]], kind: str) -> Element:
        """A line through (index, value) that keeps each value until the next."""
        (index, value), *rest = points
        path = f"M{self.x(index):.1f} {self.y(value):.1f}"
        path += "".join(f"H{self.x(index):.1f}V{self.y(value):.1f}" for index, value in rest)
        return element("path", d=path, class_=f"line {kind}")

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> Element:
        """A polyline through (index, value)."""
        path = "L".join(f"{self.x(index):.1f} {self.y(value):.1f}" for index, value in points)
        return element("path", d=f"M{path}", class_=f"line {kind}")

    def band(
        self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]]
    ) -> Element:
        """The area between two polylines through (index, value)."""
        around = [*low, *reversed(high)]
        path = "L".join(f"{self.x(index):.1f} {self.y(value):.1f}" for index, value in around)
        return element("path", d=f"M{path}Z", class_="band")

    def vertical_line(self, index: float, kind: str) -> Element:
        """A line from bottom to top."""
        path = f"M{self.x(index):.1f} 0V{self.height - self.bottom}"
        return element("path", d=path, class_=f"line {kind}")

    def drawn(self, marks: Sequence[Element], title: str) -> Element:
        """The SVG of these marks on the axes."""
        svg = element(
            "svg",
            *self.axes(),
            *marks,
            viewBox=f"0 0 {self.width} {self.height}",
            class_="chart",
            role="img",
            aria_label=title,
        )
        return element("div", svg, class_="wide")


@dataclass(frozen=True)
class CostChart(Chart):
    """Coordinates of a chart of values over a cost, or over another quantity such as a reward."""

    cost: str = ""
    """Its name in the records."""
    cheapest: float = 0.0
    dearest: float = 1.0
    cost_step: float = 1.0

    @classmethod
    def of_costs(cls, cost: str, costs: Sequence[float], values: Iterable[float]) -> CostChart:
        """Axes that hold all points."""
        axes = (*_grid(values, 0.01), *_grid(costs, max(map(abs, costs), default=0.0) / 100 or 1.0))
        low, high, step, cheapest, dearest, cost_step = axes
        return cls(
            1,
            cost_label(cost),
            0,
            low,
            high,
            step,
            height=240,
            cost=cost,
            cheapest=cheapest,
            dearest=dearest,
            cost_step=cost_step,
        )

    def x(self, index: float) -> float:
        share = (index - self.cheapest) / (self.dearest - self.cheapest)
        return self.left + 14 + (self.width - self.left - 42) * share

    def ticks(self) -> list[tuple[float, str]]:
        """Costs in their unit."""
        count = round((self.dearest - self.cheapest) / self.cost_step)
        values = [self.cheapest + i * self.cost_step for i in range(count + 1)]
        return [(value, cost_text(self.cost, value)) for value in values]


def _grid(values: Iterable[float], least: float) -> tuple[float, float, float]:
    """Ends and step of a grid that holds all finite values; it spans ``least`` > 0 at least."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    raw = max(high - low, least) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return math.floor(low / step) * step, math.ceil(high / step + 0.1) * step, step


def sample(kind: str) -> tuple[Element, Element]:
    """Marks of a legend key for a line with dots."""
    line = element("path", d="M0 5h14", class_=f"line {kind}")
    return line, element("circle", cx=7, cy=5, r=3, class_=kind)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    count: int,
    label: str,
    *,
    first: int = 0,
    dotted: Iterable[float] = (),
) -> list[Element]:
    """Chart of named series of (index, value), each from where it begins, and its legend.

    Args:
        count: indices of the horizontal axis.
        label: what is counted.
        first: number that the index 0 is shown with.
        dotted: indices that get a dotted vertical line.
    """
    values = [value for points in series.values() for _, value in points]
    chart = Chart.of(values, count, label, first=first, height=220)
    marks = [chart.vertical_line(index, "gate") for index in dotted]
    keys = []
    for i, (name, points) in enumerate(series.items()):
        if points:
            marks.append(chart.line(points, f"c{i % COLORS}"))
            keys.append(legend_key(name, sample(f"c{i % COLORS}")[0]))
    return [chart.drawn(marks, ", ".join(series)), legend(*keys)]


def heat_map(
    steps: Sequence[Sequence[Sequence[float]]],
    labels: Sequence[str],
    choices: Sequence[str],
    step_name: str,
) -> list[Element]:
    """One row per label, one column per step, coloured by the most probable choice; a legend.

    Args:
        steps: probabilities, of each step, row and choice.
        labels: of the rows.
        choices: what the columns of a row stand for.
        step_name: what a step is, such as "epoch".
    """
    marks = []
    column = (WIDTH - LABEL) / len(steps)
    for row, label in enumerate(labels):
        y = row * ROW
        marks.append(element("text", label, x=LABEL - 8, y=y + 14, text_anchor="end"))
        for step, tables in enumerate(steps):
            shares = tables[row]
            best = max(range(len(shares)), key=shares.__getitem__)
            possible = sum(share > 0 for share in shares)
            least = 1 / possible if possible > 1 else 0.0
            # from the uniform distribution, faint, to certainty
            strength = 0.12 + 0.88 * min(1.0, 2 * (shares[best] - least) / (1 - least + 1e-9))
            text = f"{label}, {step_name} {step + 1}: {choices[best]} {shares[best]:.3f}"
            place = {"x": f"{LABEL + step * column:.1f}", "y": y, "width": f"{column + 0.2:.1f}"}
            marks.append(
                element(
                    "rect",
                    element("title", text),
                    height=ROW - 2,
                    class_=f"c{best % COLORS}",
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
        aria_label=f"most probable choice over {step_name}s",
    )
    keys = [
        legend_key(choice, element("rect", width=14, height=10, class_=f"c{i % COLORS}"))
        for i, choice in enumerate(choices)
    ]
    return [element("div", svg, class_="wide"), legend(*keys)]
