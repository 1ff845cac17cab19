"""Graphs as SVG: in a layered layout (Sugiyama et al. 1981), or on a grid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from nasfast.report.html import element

__all__ = ["Edge", "Node", "grid_graph", "layered_graph", "sum_node"]

BOX = (92, 28)  # width and height of a labelled node, in SVG user units
DOT = 26  # diameter of a sum node
GAP = (42, 16)  # between columns, between nodes of a column
MARGIN = 8


@dataclass(frozen=True)
class Node:
    """A labelled node; the style sheet knows the kinds "op", "end", "sum" and "unused"."""

    label: str
    column: int
    kind: str = "op"
    size: tuple[int, int] = BOX


@dataclass(frozen=True)
class Edge:
    """From node to node, by their positions in the list; an edge spans one column or more.

    The style sheet knows the kinds "plain", "accent" and "faint".
    """

    source: int
    target: int
    kind: str = "plain"


def sum_node(column: int) -> Node:
    """A small round node that adds up what comes in."""
    return Node("+", column, "sum", (DOT, DOT))


def grid_graph(
    nodes: Sequence[Node], rows: Sequence[int], edges: Sequence[Edge], title: str
) -> Element:
    """SVG with each node in its column and row; later edges lie above earlier ones."""
    step, row_step = BOX[0] + GAP[0], BOX[1] + 2 * GAP[1]
    x = [MARGIN + BOX[0] / 2 + node.column * step for node in nodes]
    y = [MARGIN + BOX[1] / 2 + row * row_step for row in rows]
    drawn = [
        _edge(
            [
                (x[edge.source] + nodes[edge.source].size[0] / 2, y[edge.source]),
                (x[edge.target] - nodes[edge.target].size[0] / 2, y[edge.target]),
            ],
            edge.kind,
        )
        for edge in edges
    ]
    drawn += [_node(node, x[i], y[i]) for i, node in enumerate(nodes)]
    width, height = max(x) + BOX[0] / 2 + MARGIN, max(y) + BOX[1] / 2 + MARGIN
    return _svg(drawn, width, height, title)


def layered_graph(nodes: Sequence[Node], edges: Sequence[Edge], title: str) -> Element:
    """SVG with few crossings; an edge bends around the nodes of the columns that it passes."""
    widths = [0] * (max(node.column for node in nodes) + 1)
    for node in nodes:
        widths[node.column] = max(widths[node.column], node.size[0])
    starts = list(itertools.accumulate((width + GAP[0] for width in widths), initial=MARGIN))

    bent = list(nodes)
    paths = []  # per edge, its nodes with one bend in every column that it crosses
    for edge in edges:
        crossed = range(nodes[edge.source].column + 1, nodes[edge.target].column)
        bends = range(len(bent), len(bent) + len(crossed))
        bent += [Node("", column, "bend", (widths[column], 0)) for column in crossed]
        paths.append([edge.source, *bends, edge.target])
    links = [link for path in paths for link in itertools.pairwise(path)]
    y = _place(bent, links)
    top = min(y[i] - node.size[1] / 2 for i, node in enumerate(bent)) - MARGIN
    x = [starts[node.column] + widths[node.column] / 2 for node in bent]
    width = starts[-1] - GAP[0] + MARGIN
    height = max(y[i] + node.size[1] / 2 for i, node in enumerate(bent)) + MARGIN - top

    leave = _ports(bent, links, y, end=0)
    enter = _ports(bent, links, y, end=1)
    drawn = []
    position = itertools.count()
    for edge, path in zip(edges, paths, strict=True):
        points = []
        for source, target in itertools.pairwise(path):
            link = next(position)
            points += [
                (x[source] + bent[source].size[0] / 2, y[source] + leave[link] - top),
                (x[target] - bent[target].size[0] / 2, y[target] + enter[link] - top),
            ]
        drawn.append(_edge(points, edge.kind))
    for i, node in enumerate(nodes):
        drawn.append(_node(node, x[i], y[i] - top))
    return _svg(drawn, width, height, title)


def _svg(drawn: Sequence[Element], width: float, height: float, title: str) -> Element:
    return element(
        "svg",
        *drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        class_="graph",
        role="img",
        aria_label=title,
        font_family="ui-monospace, monospace",
        font_size=12,
    )


def _node(node: Node, x: float, y: float) -> Element:
    width, height = node.size
    shape = element(
        "rect",
        x=f"{x - width / 2:.1f}",
        y=f"{y - height / 2:.1f}",
        width=width,
        height=height,
        rx=height / 2 if node.kind != "op" else 5,
        fill="none",
        stroke="currentColor",
    )
    label = element(
        "text",
        node.label,
        x=f"{x:.1f}",
        y=f"{y + 4:.1f}",
        text_anchor="middle",
        fill="currentColor",
    )
    return element("g", shape, label, class_=f"node {node.kind}")


def _edge(points: Sequence[tuple[float, float]], kind: str) -> Element:
    """A curve that is horizontal at every point, so that the arrow head needs no rotation."""
    (x, y), (tip_x, tip_y) = points[0], points[-1]
    curve = f"M{x:.1f} {y:.1f}"
    for end_x, end_y in [*points[1:-1], (tip_x - 6, tip_y)]:
        middle = (x + end_x) / 2
        curve += f"C{middle:.1f} {y:.1f} {middle:.1f} {end_y:.1f} {end_x:.1f} {end_y:.1f}"
        x, y = end_x, end_y
    return element(
        "g",
        element("path", d=curve, fill="none", stroke="currentColor", class_="line"),
        element(
            "path", d=f"M{tip_x:.1f} {tip_y:.1f}l-7 -3.5v7z", fill="currentColor", class_="head"
        ),
        class_=f"edge {kind}",
    )


def _ports(
    nodes: Sequence[Node], links: Sequence[tuple[int, int]], y: Sequence[float], *, end: int
) -> list[float]:
    """Vertical offset at which each link leaves (end 0) or enters (end 1) its node."""
    offsets = [0.0] * len(links)
    for i, node in enumerate(nodes):
        mine = [k for k, link in enumerate(links) if link[end] == i]
        mine.sort(key=lambda k: y[links[k][1 - end]])
        step = min(9.0, (node.size[1] - 10) / len(mine)) if mine else 0.0
        for rank, k in enumerate(mine):
            offsets[k] = (rank - (len(mine) - 1) / 2) * step
    return offsets


def _place(nodes: Sequence[Node], links: Sequence[tuple[int, int]]) -> list[float]:
    """The height of each node: columns ordered for few crossings, then nodes near their neighbours.

    The first column keeps its order.
    """
    columns = [
        [i for i, node in enumerate(nodes) if node.column == c]
        for c in range(max(node.column for node in nodes) + 1)
    ]
    sides: list[list[list[int]]] = [[[] for _ in nodes], [[] for _ in nodes]]
    for source, target in links:
        sides[0][target].append(source)
        sides[1][source].append(target)

    rank = {i: float(r) for column in columns for r, i in enumerate(column)}
    best, fewest = [list(column) for column in columns], _crossings(links, nodes, rank)
    for sweep in range(24):
        side = sides[sweep % 2]
        for column in columns[1:] if sweep % 2 == 0 else columns[-2:0:-1]:
            column.sort(key=lambda i: _mean([rank[j] for j in side[i]], rank[i]))
            rank |= {i: float(r) for r, i in enumerate(column)}
        if (crossings := _crossings(links, nodes, rank)) < fewest:
            best, fewest = [list(column) for column in columns], crossings

    y = [0.0] * len(nodes)
    for column in best:
        heights = _spread([0.0] * len(column), column, nodes)
        y_middle = (heights[0] + heights[-1]) / 2
        for i, height in zip(column, heights, strict=True):
            y[i] = height - y_middle
    for sweep in range(100):
        for column in best[1:] if sweep % 2 == 0 else best[:0:-1]:
            wanted = [_pull(i, [*sides[0][i], *sides[1][i]], nodes, y) for i in column]
            for i, height in zip(column, _spread(wanted, column, nodes), strict=True):
                y[i] = height
    return y


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _pull(i: int, neighbours: Sequence[int], nodes: Sequence[Node], y: Sequence[float]) -> float:
    """Mean height of the neighbours; links between bends count most, so long edges are straight."""
    bends = [(nodes[i].kind == "bend") + (nodes[j].kind == "bend") for j in neighbours]
    weights = [(1, 2, 16)[count] for count in bends]
    total = sum(weight * y[j] for weight, j in zip(weights, neighbours, strict=True))
    return total / sum(weights) if weights else y[i]


def _crossings(
    links: Sequence[tuple[int, int]], nodes: Sequence[Node], rank: dict[int, float]
) -> int:
    return sum(
        nodes[a].column == nodes[c].column and (rank[a] - rank[c]) * (rank[b] - rank[d]) < 0
        for (a, b), (c, d) in itertools.combinations(links, 2)
    )


def _spread(wanted: Sequence[float], column: Sequence[int], nodes: Sequence[Node]) -> list[float]:
    """Heights nearest to the wanted ones (least squares) that keep the order and the distances.

    Pool-adjacent-violators: nodes that would come too close move as one.
    """
    gaps = [0.0]
    for above, below in itertools.pairwise(column):
        gaps.append((nodes[above].size[1] + nodes[below].size[1]) / 2 + GAP[1])
    offsets = list(itertools.accumulate(gaps))
    pools: list[tuple[float, int]] = []  # mean of wanted - offset, members
    for height, offset in zip(wanted, offsets, strict=True):
        mean, members = height - offset, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean = (mean * members + other * count) / (members + count)
            members += count
        pools.append((mean, members))
    bases = itertools.chain.from_iterable([mean] * members for mean, members in pools)
    return [base + offset for base, offset in zip(bases, offsets, strict=True)]
