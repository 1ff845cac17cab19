"""Architectures as SVG graphs, in a layered layout (Sugiyama et al. 1981)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from nasfast.spaces.fast_nas import PRIMITIVES, FastNASGenotype
from nasfast.spaces.ir_nas import LEVELS, IRNASGenotype, num_levels, targets

__all__ = ["cell_graph", "decoder_graph", "element", "ir_cell_graph", "ir_path_graph"]

BOX = (92, 28)  # width and height of a labelled node, in SVG user units
DOT = 26  # diameter of a sum node
GAP = (42, 16)  # between columns, between nodes of a column
MARGIN = 8


def element(tag: str, *children: Element | str, **attributes: object) -> Element:
    """An HTML or SVG element; `class_` and `stroke_width` name "class" and "stroke-width".

    Text is escaped when the tree is serialised, so no string can break out of its place.
    """
    node = Element(
        tag, {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items()}
    )
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            node.append(child)
            last = child
        elif last is None:
            node.text = (node.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return node


def cell_graph(genotype: FastNASGenotype) -> Element:
    """SVG of the cell: operations, sums of pairs, and the loose ends that make the output.

    One node per feature of the cell and one for the output, columns in order of the layers.
    """
    cell = genotype.cell
    nodes = [Node("input", 0, "end"), Node(PRIMITIVES[cell.op0], 1)]
    edges = [Edge(0, 1)]
    for k, (p1, p2, o1, o2) in enumerate(cell.layers, start=1):
        edges += [Edge(p1, len(nodes)), Edge(p2, len(nodes) + 1)]
        nodes += [Node(PRIMITIVES[o1], 2 * k), Node(PRIMITIVES[o2], 2 * k)]
        edges += [Edge(len(nodes) - 2, len(nodes)), Edge(len(nodes) - 1, len(nodes))]
        nodes.append(Node("+", 2 * k + 1, "sum", (DOT, DOT)))
    edges += [Edge(end, len(nodes), "loose") for end in cell.loose_ends]
    nodes.append(Node("output", 2 * len(cell.layers) + 2, "end"))
    return _draw(nodes, edges, "Cell")


def decoder_graph(genotype: FastNASGenotype) -> Element:
    """SVG of the decoder: encoder taps, blocks, and the collected blocks that reach the classifier.

    A block applies the cell to each of its two inputs and sums the results; taps that no block
    reads are faint.
    """
    taps = genotype.num_taps
    read = {i for pair in genotype.connections for i in pair}
    nodes = [Node(f"tap l{i + 1}", 0, "end" if i in read else "unused") for i in range(taps)]
    edges = []
    for block, pair in enumerate(genotype.connections):
        edges += [Edge(source, taps + block) for source in pair]
        nodes.append(Node(f"block {block}", block + 1))
    edges += [Edge(taps + block, len(nodes), "loose") for block in genotype.collected_blocks]
    nodes.append(Node("classifier", len(genotype.connections) + 1, "end"))
    return _draw(nodes, edges, "Decoder")


def ir_cell_graph(genotype: IRNASGenotype) -> Element:
    """SVG of the cell: two inputs, nodes as sums of two operations, and their concatenation."""
    nodes = [Node("layer - 2", 0, "end"), Node("layer - 1", 0, "end")]
    edges, states = [], [0, 1]  # the drawn node of each state
    for pair in genotype.nodes:
        column = 1 + max(nodes[states[state]].column for _, state in pair)
        total = len(nodes) + 2  # the sum, behind both operations
        for op, state in pair:
            edges += [Edge(states[state], len(nodes)), Edge(len(nodes), total)]
            nodes.append(Node(op, column))
        states.append(total)
        nodes.append(Node("+", column + 1, "sum", (DOT, DOT)))
    edges += [Edge(state, len(nodes), "loose") for state in states[2:]]
    nodes.append(Node("output", 1 + max(node.column for node in nodes), "end"))
    return _draw(nodes, edges, "Cell")


def ir_path_graph(genotype: IRNASGenotype) -> Element:
    """SVG of the widths: every level that a layer can have, and the path through them."""
    step, row = (BOX[0] + GAP[0], BOX[1] + 2 * GAP[1])
    layers = len(genotype.levels)
    path = (0, *genotype.levels)

    def place(layer: int, level: int) -> tuple[float, float]:
        return MARGIN + BOX[0] / 2 + layer * step, MARGIN + BOX[1] / 2 + level * row

    drawn = []
    for chosen in (False, True):  # the path lies above the other moves
        for layer in range(layers):
            for source in range(num_levels(layer)):
                for target in targets(source):
                    if chosen == ((source, target) == (path[layer], path[layer + 1])):
                        (x, y), (tip, end) = place(layer, source), place(layer + 1, target)
                        points = [(x + BOX[0] / 2, y), (tip - BOX[0] / 2, end)]
                        drawn.append(_edge(points, "loose" if chosen else "faint"))
    for layer in range(layers + 1):
        for level in range(num_levels(layer)):
            label = f"{2**level} W" if layer else "stem"
            kind = "op" if path[layer] == level else "unused"
            drawn.append(_node(Node(label, layer, kind), *place(layer, level)))
    width = 2 * MARGIN + BOX[0] + layers * step
    height = 2 * MARGIN + BOX[1] + (min(LEVELS, layers + 1) - 1) * row
    return _svg(drawn, width, height, "Widths of the layers")


@dataclass(frozen=True)
class Node:
    label: str
    column: int
    kind: str = "op"
    size: tuple[int, int] = BOX


@dataclass(frozen=True)
class Edge:
    source: int
    target: int
    kind: str = "plain"


def _draw(nodes: Sequence[Node], edges: Sequence[Edge], title: str) -> Element:
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
