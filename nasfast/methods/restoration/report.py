"""Supernet history, drawings and restored images, for the report of a search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from xml.etree.ElementTree import Element

from torch import Tensor

from nasfast.report.base import Section
from nasfast.report.charts import heat_map, line_chart
from nasfast.report.graphs import Edge, Node, grid_graph, layered_graph, sum_node
from nasfast.report.html import element, figure
from nasfast.runs.records import Record
from nasfast.runs.study import Study
from nasfast.searches.collapse import STAGE as SUPERNET
from nasfast.searches.collapse import collapse_warning
from nasfast.spaces.ir_nas import (
    FACTORS,
    PRIMITIVES,
    IRNASGenotype,
    moves,
    num_levels,
    steps,
    targets,
)

__all__ = ["RestorationReport", "cell_graph", "path_graph"]

MOVES = {-2: "narrower by two", -1: "narrower", 0: "same", 1: "wider", 2: "wider by two"}


class RestorationReport:
    """The PSNR, the cell and the widths; how a gradient search chose them."""

    metric = ("psnr", "PSNR")
    terms = MappingProxyType(
        {
            "reward": "SSIM + PSNR / 100 on images held out to score, more is better.",
            "PSNR": "Peak signal-to-noise ratio in dB; 3 dB more is half the squared error.",
            "SSIM": "Structural similarity to the truth, window by window; 1 where they are equal.",
            "supernet": "One network with every operation of the space, mixed. Its reward says how "
            "far the weights are trained, not how good the derived architecture is.",
            "stage0": "A sampled network is trained briefly, from scratch.",
            "gate": "Mean reward of the networks before.",
        }
    )

    def architecture(self, record: Record) -> Iterable[Section]:
        """Cell and widths."""
        genotype = IRNASGenotype.from_json(record.genotype)
        derived = SUPERNET in record.evaluation.rewards
        yield Section(
            f"The cell, after epoch {record.index + 1}"
            if derived
            else f"The best cell, of architecture {record.index}",
            [
                figure(
                    cell_graph(genotype),
                    "A node sums two operations on earlier states; states 0 and 1 are the outputs "
                    "of the layers before. The coloured edges are the nodes, concatenated to the "
                    "output.",
                )
            ],
        )
        yield Section(
            "Its widths",
            [
                figure(
                    path_graph(genotype),
                    "Layers from left to right, wider levels below; W is the basic width.",
                )
            ],
        )

    def sections(self, study: Study) -> Iterable[Section]:
        """Supernet history of a gradient search, and whether it collapsed."""
        if warning := collapse_warning(study.records):
            yield Section("Warning", [element("p", f"{warning[0].upper()}{warning[1:]}.")], True)
        state = study.load_checkpoint() or {}
        if study.records and "alphas" in state:
            yield from _supernet_history(
                study.records, state["alphas"], state["betas"], state.get("depths")
            )


def cell_graph(genotype: IRNASGenotype) -> Element:
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
        nodes.append(sum_node(column + 1))
    edges += [Edge(state, len(nodes), "accent") for state in states[2:]]
    nodes.append(Node("output", 1 + max(node.column for node in nodes), "end"))
    return layered_graph(nodes, edges, "Cell")


def path_graph(genotype: IRNASGenotype) -> Element:
    """SVG of the widths: every level that a layer can have, and the path through them."""
    path, widths = (0, *genotype.levels), genotype.widths
    places = [
        (layer, level) for layer in range(len(path)) for level in range(num_levels(layer, widths))
    ]
    nodes = [
        Node(
            f"{FACTORS[widths][level]:g} W" if layer else "stem",
            layer,
            "op" if path[layer] == level else "unused",
        )
        for layer, level in places
    ]
    edges = [
        Edge(i, places.index((layer + 1, target)), "faint")
        for i, (layer, source) in enumerate(places)
        if layer < len(genotype.levels)
        for target in targets(source, widths)
        if (source, target) != path[layer : layer + 2]
    ]
    chosen = [places.index(place) for place in enumerate(path)]
    edges += [Edge(source, target, "accent") for source, target in itertools.pairwise(chosen)]
    return grid_graph(nodes, [level for _, level in places], edges, "Widths of the layers")


def _supernet_history(
    records: tuple[Record, ...], alphas: Tensor, betas: Tensor, depths: Tensor | None
) -> Iterator[Section]:
    """Of probabilities alphas [epochs, edges, K], betas [epochs, moves, 3 or 5] and, where the
    depth is searched, depths [epochs, layers]."""
    changes = [
        after.index
        for before, after in itertools.pairwise(records)
        if before.canonical != after.canonical
    ]

    def chart(names: dict[str, str]) -> list[Element]:
        """Of metrics over epochs, with their labels."""
        series = {
            label: [
                (record.index, metrics[name])
                for record in records
                if name in (metrics := record.evaluation.metrics[SUPERNET])
            ]
            for name, label in names.items()
        }
        return line_chart(series, len(records), "epoch", first=1, dotted=changes)

    yield Section(
        "Losses and validation",
        [
            *chart({"psnr": "PSNR of the supernet, dB"}),
            *chart(
                {"loss": "loss of the weights", "architecture_loss": "loss of the architecture"}
            ),
            element(
                "p",
                f"Dotted: epochs after which another architecture was derived ({len(changes)}). "
                "The supernet is scored as it is, with its operations mixed.",
            ),
        ],
    )
    count = alphas.shape[1]
    edges = [(state, node) for node in range(count) for state in range(2 + node)][:count]
    edge_labels = [f"{state} → node {node}" for state, node in edges]
    uniform = math.log(len(PRIMITIVES))
    genotype = IRNASGenotype.from_json(records[-1].genotype)
    layers = len(genotype.levels) if depths is None else depths.shape[1]
    sources = moves(layers, genotype.widths)
    move_labels = [f"layer {layer}, level {level}" for layer, level in sources]
    move_names = [MOVES[step] for step in steps(genotype.widths)]
    entropies = {
        "alpha_entropy": f"operations of an edge (uniform: {uniform:.2f})",
        "beta_entropy": "moves of a level",
    }
    drawn_depths: list[Element] = []
    if depths is not None:
        entropies["depth_entropy"] = f"number of layers (uniform: {math.log(layers):.2f})"
        names = ["1 layer", *(f"{layer} layers" for layer in range(2, layers + 1))]
        drawn_depths = [
            element("h3", "Number of layers"),
            *heat_map(depths[:, None].tolist(), ["exit"], names, "epoch"),
        ]
    yield Section(
        "Supernet history",
        [
            element("h3", "Entropy, nats"),
            element("p", "How undecided the choices are: 0 where one has all the probability."),
            *chart(entropies),
            element("h3", "Operations"),
            *heat_map(alphas.tolist(), edge_labels, PRIMITIVES, "epoch"),
            element("h3", "Widths"),
            *heat_map(betas.tolist(), move_labels, move_names, "epoch"),
            *drawn_depths,
            element(
                "p",
                "A row is an edge of the cell, from a state to a node, or a source of the layer "
                "before; its colour is the most probable choice after each epoch, the stronger "
                "the more probable. An edge that was decided by perturbation has one operation, or "
                "none where it was left out.",
            ),
        ],
    )
