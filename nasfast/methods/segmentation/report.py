"""Drawings of a decoder and its cell, for the report of a search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar
from xml.etree.ElementTree import Element

from nasfast.methods.segmentation.tasks import Binding
from nasfast.report.base import Section
from nasfast.report.graphs import Edge, Node, layered_graph, sum_node
from nasfast.report.html import figure
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.spaces.fast_nas import PRIMITIVES, FastNASGenotype, FastNASSpace

__all__ = ["DecoderReport", "SegmentationReport", "cell_graph", "decoder_graph"]


class DecoderReport(ABC):
    """What reports of all decoders have: the metric and the words of the task."""

    STAGES: ClassVar[Mapping[str, str]]
    """What the stages and the gate mean."""

    def __init__(self, task: Binding[Any]) -> None:
        self.metric = task.metric
        self.terms: Mapping[str, str] = {**task.terms, **self.STAGES}

    @abstractmethod
    def architecture(self, record: Record) -> Iterable[Section]:
        """Drawings of one architecture."""

    def sections(self, study: Study) -> Iterable[Section]:
        """Nothing more than every report has."""
        return ()


class SegmentationReport(DecoderReport):
    """The metric of the task, the cell and the decoder."""

    STAGES = MappingProxyType(
        {
            "stage0": "The decoder alone is trained briefly, on features of the frozen encoder.",
            "gate": "Mean stage0 reward of the candidates before its batch. One that does not beat "
            "it gets no stage1; the first batch has no gate.",
            "stage1": "Encoder and decoder are then trained together, briefly.",
        }
    )

    def architecture(self, record: Record) -> Iterable[Section]:
        """Cell and decoder."""
        genotype = FastNASSpace().from_json(record.genotype)
        yield Section(
            f"The best cell, of architecture {record.index}",
            [
                figure(
                    cell_graph(genotype),
                    "Each operation reads one earlier feature map; two at a time are summed. The "
                    "coloured edges are the loose ends: maps that nothing reads, added up to the "
                    "output.",
                )
            ],
        )
        yield Section(
            f"The best decoder, of architecture {record.index}",
            [
                figure(
                    decoder_graph(genotype),
                    "A block applies the cell to both of its inputs and sums the results. The "
                    "coloured edges are the blocks that no other block reads, concatenated for the "
                    "classifier.",
                )
            ],
        )


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
        nodes.append(sum_node(2 * k + 1))
    edges += [Edge(end, len(nodes), "accent") for end in cell.loose_ends]
    nodes.append(Node("output", 2 * len(cell.layers) + 2, "end"))
    return layered_graph(nodes, edges, "Cell")


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
    edges += [Edge(taps + block, len(nodes), "accent") for block in genotype.collected_blocks]
    nodes.append(Node("classifier", len(genotype.connections) + 1, "end"))
    return layered_graph(nodes, edges, "Decoder")
