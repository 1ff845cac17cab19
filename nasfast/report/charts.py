"""Charts of a report: axes, lines and legends in SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from nasfast.report.graphs import element

__all__ = ["Chart", "legend_key", "sample"]


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
    width: int = 1000
    height: int = 340
    left: int = 46
    bottom: int = 40

    @classmethod
    def of(
        cls, values: Iterable[float], count: int, label: str, first: int = 0, height: int = 340
    ) -> Chart:
        """Axes that hold all finite values."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        raw = max(high - low, 0.01) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
        return cls(
            count=max(count, 1),
            label=label,
            first=first,
            low=math.floor(low / step) * step,
            high=math.ceil(high / step + 0.1) * step,
            step=step,
            height=height,
        )

    def x(self, index: float) -> float:
        return self.left + 14 + (self.width - self.left - 28) * index / max(self.count - 1, 1)

    def y(self, value: float) -> float:
        floor = self.height - self.bottom
        return floor - 14 - (floor - 24) * (value - self.low) / (self.high - self.low)

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
        every = max(1, 10 ** math.floor(math.log10(self.count)))
        if self.count / every < 4:
            every = max(1, every // 5)
        for i in range(0, self.count, every):
            place = {"x": f"{self.x(i):.1f}", "y": floor + 16, "text_anchor": "middle"}
            marks.append(element("text", str(i + self.first), **place))
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

    def upright(self, index: float, kind: str) -> Element:
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


def legend_key(text: str, *marks: Element) -> Element:
    return element("li", element("svg", *marks, viewBox="0 0 14 10", width=14, height=10), text)


def sample(kind: str) -> tuple[Element, Element]:
    line = element("path", d="M0 5h14", class_=f"line {kind}")
    return line, element("circle", cx=7, cy=5, r=3, class_=kind)
