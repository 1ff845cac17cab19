"""Drawings of pyramids and heads, and what a detection search learned, for its report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType
from xml.etree.ElementTree import Element

from nasfast.report.base import Section
from nasfast.report.charts import CostChart, line_chart
from nasfast.report.graphs import Edge, Node, layered_graph
from nasfast.report.html import element, figure, table
from nasfast.report.numbers import number
from nasfast.report.ranking import stages
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.spaces.nas_fcos import (
    AGGREGATORS,
    FPN_OPS,
    HEAD_OPS,
    Block,
    HeadGenotype,
    NASFCOSSpace,
)
from nasfast.utils.statistics import Estimate, rank_correlations

__all__ = ["DetectionReport", "head_graph", "pyramid_graph"]

TAPS = 4
"""C2 to C5, the first of the pool."""
SKIP = "skip_connect"
BOX, SUM = (128, 28), (56, 28)
PERIOD = 50
"""Heads in a period of the deck's figure; a shorter search has PERIODS of them."""
PERIODS = 4


class DetectionReport:
    """AP, pyramid and head; how much of the heads is shared, and what the reward says of AP."""

    metric = ("ap50", "AP50")
    terms = MappingProxyType(
        {
            "reward": "Minus the sum of the losses of classes, boxes and centre-ness on training "
            "images held out, normalised by their positive points; 0 would be perfect. The first "
            "phase has another head and another width than the second: rewards compare within a "
            "phase, not between phases.",
            "AP": "Average precision, the mean over IoU thresholds 0.5 to 0.95 and classes (COCO), "
            "of the centre crops that candidates are scored on.",
            "AP50": "The same at an IoU of 0.5.",
            "stage0": "What is searched is trained briefly, on features of what is frozen: the "
            "encoder in the first phase, with the best pyramid in the second.",
            "gate": "Mean reward of the candidates before its batch, to compare with: nothing "
            "depends on it in this search.",
        }
    )

    def architecture(self, record: Record) -> Iterable[Section]:
        """Pyramid and head, as far as they were searched."""
        genotype = NASFCOSSpace().from_json(record.genotype)
        if genotype.fpn is not None:
            yield Section(
                f"The pyramid of architecture {record.index}",
                [
                    figure(
                        pyramid_graph(genotype.fpn),
                        "A block applies an operation to each of two earlier maps and joins the "
                        "results, at the larger size of the two: psum adds them with a learned "
                        "weight for each channel, cat concatenates them. The coloured edges make "
                        "the levels: of the blocks that no other reads, the last three in turn P5, "
                        "P4 and P3; the earlier ones are added to all three.",
                    )
                ],
            )
        if genotype.head is not None:
            yield Section(
                f"The head of architecture {record.index}",
                [
                    figure(
                        head_graph(genotype.head),
                        "Classes and boxes have such a tower each. Layers with a coloured edge "
                        "have weights of their own for each level, the others share theirs.",
                    )
                ],
            )

    def sections(self, study: Study) -> Iterator[Section]:
        """Shared heads, and rewards against AP."""
        heads = [
            head
            for record in study.records
            if (head := NASFCOSSpace().from_json(record.genotype).head) is not None
        ]
        if len(heads) >= PERIODS:
            yield Section("Fully shared heads", _shared(heads))
        yield from _against_ap(study.records)


def _shared(heads: Sequence[HeadGenotype]) -> list[Element]:
    """Share of the heads without a layer for each level, over periods of the search."""
    period = min(PERIOD, -(-len(heads) // PERIODS))
    groups = [heads[i : i + period] for i in range(0, len(heads), period)]
    shares = [sum(head.share == 0 for head in group) / len(group) for group in groups]
    chart = line_chart({"share == 0": list(enumerate(shares))}, len(groups), "period", first=1)
    text = (
        f"The share, of every {period} heads that the strategy proposed, whose layers all share "
        f"their weights over the levels; {1 / (len(heads[0].ops) + 1):.2f} by chance."
    )
    return [*chart, element("p", text)]


def _against_ap(records: Sequence[Record]) -> Iterator[Section]:
    """What the strategy learned from against what a detector is bought for, phase by phase."""
    rows, charts = [], list[Element]()
    for stage in stages(records):
        pairs = [
            (record.index, reward, record.evaluation.metrics[stage.name]["ap50"])
            for record, reward in stage.passed(records)
            if record.duplicate_of is None and "ap50" in record.evaluation.metrics[stage.name]
        ]
        if not pairs:
            continue
        rewards, scores = [reward for _, reward, _ in pairs], [score for _, _, score in pairs]
        chart = CostChart.of_costs(f"{stage.label} reward", rewards, scores)
        marks = []
        for index, reward, score in pairs:
            text = f"architecture {index}: reward {number(reward)}, AP50 {number(score)}"
            place = {"cx": f"{chart.x(reward):.1f}", "cy": f"{chart.y(score):.1f}", "r": 3.5}
            marks.append(element("circle", element("title", text), class_="c0", **place))
        charts += [
            element("h3", f"{stage.label}: across the reward, up AP50"),
            chart.drawn(marks, f"AP50 against the {stage.label} reward"),
        ]
        tau, rho = rank_correlations(rewards, scores)
        rows.append((stage.label, str(len(pairs)), _interval(tau), _interval(rho)))
    if rows:
        text = (
            "Both of the same short training, on the same images held out. In brackets: 95 % "
            "intervals, percentiles of a bootstrap over architectures. nasfast study trains "
            "some of them longer and compares the reward with AP50 then."
        )
        head = ("stage", "n", "Kendall's tau", "Spearman's rho")
        yield Section(
            "Reward against AP50",
            [*charts, table(head, rows, "correlations"), element("p", text)],
        )


def _interval(estimate: Estimate) -> str:
    if estimate.value is None:
        return "-"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def pyramid_graph(blocks: Sequence[Block]) -> Element:
    """SVG of a pyramid: taps of the encoder, operations, the blocks that join them, levels.

    Taps that no block reads are faint; an operation that changes nothing is an edge.
    """
    read = {i for block in blocks for i in (block.input0, block.input1)}
    nodes = [Node(f"C{i + 2}", 0, "end" if i in read else "unused") for i in range(TAPS)]
    edges: list[Edge] = []
    pool = list(range(TAPS))  # nodes
    for number_, block in enumerate(blocks, start=TAPS):
        sources = []
        for place, op in ((block.input0, block.op0), (block.input1, block.op1)):
            source = pool[place]
            if FPN_OPS[op] != SKIP:
                edges.append(Edge(source, len(nodes)))
                source = len(nodes)
                nodes.append(Node(FPN_OPS[op], nodes[pool[place]].column + 1, size=BOX))
            sources.append(source)
        column = 1 + max(nodes[source].column for source in sources)
        edges += [Edge(source, len(nodes)) for source in sources]
        pool.append(len(nodes))
        label = f"f{number_} {AGGREGATORS[block.aggregator]}"
        nodes.append(Node(label, column, "end", BOX))
    loose = [i for i in range(TAPS, len(pool)) if i not in read]
    column = 1 + max(node.column for node in nodes)
    for level, own in zip(("P5", "P4", "P3"), loose[-3:], strict=True):
        edges += [Edge(pool[i], len(nodes), "accent") for i in (*loose[:-3], own)]
        nodes.append(Node(level, column, "end", SUM))
    for below, level in enumerate(("P6", "P7")):
        source = len(nodes) - 1 if below else len(nodes) - 3
        edges.append(Edge(source, len(nodes)))
        nodes.append(Node(level, nodes[source].column + 1, "end", SUM))
    return layered_graph(nodes, edges, "Pyramid")


def head_graph(head: HeadGenotype) -> Element:
    """SVG of a tower: its layers in order, those that change nothing faint."""
    nodes = [Node("level", 0, "end", SUM)]
    edges = []
    for i, op in enumerate(head.ops):
        kind = "unused" if HEAD_OPS[op] in (SKIP, "identity") else "op"
        edges.append(Edge(i, i + 1, "accent" if i < head.share else "plain"))
        nodes.append(Node(HEAD_OPS[op], i + 1, kind, BOX))
    edges.append(Edge(len(head.ops), len(nodes)))
    nodes.append(Node("predictors", len(nodes), "end"))
    return layered_graph(nodes, edges, "Head")
