"""Drawings of templates and of the network they build, for the report of a search."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from xml.etree.ElementTree import Element

from nasfast.methods.segmentation.report import DecoderReport
from nasfast.report.base import Section
from nasfast.report.graphs import Edge, Node, layered_graph
from nasfast.report.html import figure
from nasfast.runs.records import Record
from nasfast.spaces.template_nas import (
    AGGREGATIONS,
    OPERATIONS,
    TemplateNASGenotype,
    TemplateNASSpace,
)

__all__ = ["TemplatesReport", "network_graph", "template_graph"]

LAYER = (108, 28)


class TemplatesReport(DecoderReport):
    """The metric of the task, the templates and the network."""

    STAGES = MappingProxyType(
        {
            "stage0": "The layers of templates alone are trained briefly, on features of the "
            "frozen encoder.",
            "gate": "Mean reward of the candidates before its batch. One that does not beat it "
            "is trained no further; the first batch has no gate.",
            "stage1": "Encoder and layers are then trained together, briefly.",
        }
    )

    def architecture(self, record: Record) -> Iterable[Section]:
        """Templates and network."""
        genotype = TemplateNASSpace().from_json(record.genotype)
        yield Section(
            f"The templates of architecture {record.index}",
            [
                figure(
                    template_graph(genotype, template),
                    f"Template {template}"
                    + ("." if template in genotype.used_templates else ", which no layer applies."),
                )
                for template in range(len(genotype.templates))
            ],
        )
        yield Section(
            f"The network of architecture {record.index}",
            [
                figure(
                    network_graph(genotype),
                    "A layer applies one template, as T0, to two earlier maps; x3 is three times: "
                    "then the second input and the output are its inputs again. /2 halves height "
                    "and width and doubles the channels. Where two maps differ in size, layers 0 "
                    f"to {genotype.downsampling - 1} join them at the smaller, later ones at the "
                    "larger. The coloured edges are the layers that no other layer reads, "
                    "concatenated for the classifier.",
                )
            ],
        )


def template_graph(genotype: TemplateNASGenotype, template: int) -> Element:
    """SVG of a template: two inputs, an operation on each, and how they are joined. It is faint
    where no layer applies it."""
    op1, op2, aggregation = genotype.templates[template]
    used = template in genotype.used_templates
    ends, inner = ("end", "op") if used else ("unused", "unused")
    nodes = [
        *(Node(f"input {i}", 0, ends) for i in (1, 2)),
        *(Node(OPERATIONS[op], 1, inner) for op in (op1, op2)),
        Node(AGGREGATIONS[aggregation], 2, inner),
        Node("output", 3, ends),
    ]
    edges = [
        Edge(source, target, "plain" if used else "faint")
        for source, target in ((0, 2), (1, 3), (2, 4), (3, 4), (4, 5))
    ]
    return layered_graph(nodes, edges, f"Template {template}")


def network_graph(genotype: TemplateNASGenotype) -> Element:
    """SVG of the network: encoder taps, layers, and the collected layers that reach the classifier.

    A tap that no layer reads is faint.
    """
    taps = genotype.num_taps
    read = {i for layer in genotype.layers for i in layer[:2]}
    nodes = [Node(f"tap l{i + 1}", 0, "end" if i in read else "unused") for i in range(taps)]
    edges = []
    for k, layer in enumerate(genotype.layers):
        inputs = layer[:2]
        edges += [Edge(source, taps + k) for source in inputs]
        times = f" x{layer.repeats + 1}" if layer.repeats else ""
        label = f"{k}: T{layer.template}{times}{' /2' if layer.stride else ''}"
        column = 1 + max(nodes[source].column for source in inputs)
        nodes.append(Node(label, column, size=LAYER))
    edges += [Edge(taps + k, len(nodes), "accent") for k in genotype.collected_layers]
    last = max(node.column for node in nodes)
    nodes.append(Node("classifier", last + 1, "end"))
    return layered_graph(nodes, edges, "Network")
