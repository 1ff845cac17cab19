"""Drawings of architectures: complete, apart and inside."""

import random
from dataclasses import replace
from itertools import combinations

import pytest

from nasfast.methods.restoration import report as restoration
from nasfast.methods.segmentation import report as segmentation
from nasfast.methods.templates import report as templates
from nasfast.models.zoo import ZOO
from nasfast.spaces import FastNASSpace, IRNASSpace, TemplateNASSpace
from nasfast.spaces.fast_nas import PRIMITIVES
from nasfast.spaces.template_nas import AGGREGATIONS, OPERATIONS

FAST_NAS = [FastNASSpace().sample(random.Random(i)) for i in range(20)]
IR_NAS = [IRNASSpace(layers=4, nodes=3 + i % 3).sample(random.Random(i)) for i in range(20)]
FREE = IRNASSpace(layers=4, nodes=2, widths="free", searched_depth=True)
TEMPLATE_NAS = [TemplateNASSpace().sample(random.Random(i)) for i in range(20)]


def drawn(svg, kind):
    """Texts of the groups of a kind."""
    found = [group for group in svg if kind in group.get("class", "").split()]
    return ["".join(group.itertext()) for group in found]


@pytest.mark.parametrize("genotype", FAST_NAS)
def test_fast_nas_has_every_node_and_edge(genotype):
    cell, decoder = segmentation.cell_graph(genotype), segmentation.decoder_graph(genotype)
    ops = [PRIMITIVES[o] for layer in genotype.cell.layers for o in layer[2:]]
    nodes = ["input", PRIMITIVES[genotype.cell.op0], *ops, "+", "+", "+", "output"]
    assert sorted(drawn(cell, "node")) == sorted(nodes)
    assert len(drawn(cell, "edge")) == 13 + len(genotype.cell.loose_ends)
    assert len(drawn(cell, "accent")) == len(genotype.cell.loose_ends)
    taps, blocks = (f"tap l{i}" for i in (1, 2, 3, 4)), (f"block {b}" for b in (0, 1, 2))
    assert drawn(decoder, "node") == [*taps, *blocks, "classifier"]
    assert len(drawn(decoder, "edge")) == 6 + len(genotype.collected_blocks)
    assert len(drawn(decoder, "accent")) == len(genotype.collected_blocks)


@pytest.mark.parametrize("genotype", IR_NAS)
def test_ir_nas_has_every_node_and_edge(genotype):
    cell, path = restoration.cell_graph(genotype), restoration.path_graph(genotype)
    ops = [op for node in genotype.nodes for op, _ in node]
    sums = ["+"] * len(genotype.nodes)
    nodes = ["layer - 2", "layer - 1", *ops, *sums, "output"]
    assert sorted(drawn(cell, "node")) == sorted(nodes)
    assert len(drawn(cell, "edge")) == 2 * len(ops) + len(sums)
    assert len(drawn(cell, "accent")) == len(sums)
    assert len(drawn(path, "accent")) == 4
    assert len(drawn(path, "edge")) == 2 + 5 + 7 + 7
    assert drawn(path, "op") == ["stem", *(f"{2**level} W" for level in genotype.levels)]


def test_any_depth_and_free_widths():
    """From the stem to 3 widths, from these to 3, 3 and 4, from these to 3, 3, 4 and 2."""
    path = restoration.path_graph(replace(FREE.decode([0] * 7), levels=(1, 2, 3)))
    assert drawn(path, "op") == ["stem", "1.5 W", "2 W", "4 W"]
    assert (len(drawn(path, "accent")), len(drawn(path, "edge"))) == (3, 3 + 10 + 12)


@pytest.mark.parametrize("genotype", TEMPLATE_NAS)
def test_template_nas_has_every_node_and_edge(genotype):
    for t, (op1, op2, aggregation) in enumerate(genotype.templates):
        svg = templates.template_graph(genotype, t)
        names = [OPERATIONS[op1], OPERATIONS[op2], AGGREGATIONS[aggregation]]
        assert drawn(svg, "node") == ["input 1", "input 2", *names, "output"]
        assert len(drawn(svg, "edge")) == 5
        unused = t not in {layer.template for layer in genotype.layers}
        assert (len(drawn(svg, "unused")), len(drawn(svg, "faint"))) == (6 * unused, 5 * unused)
    network, collected = templates.network_graph(genotype), genotype.collected_layers
    assert len(drawn(network, "node")) == 2 + 7 + 1
    assert len(drawn(network, "edge")) == 14 + len(collected)
    assert len(drawn(network, "accent")) == len(collected)


def test_template_nas_says_what_a_layer_does():
    genotype = ZOO["template_nas_arch0"].genotype
    layers = ["0: T0 /2", "1: T2 x2", "2: T1 x2", "3: T2", "4: T2", "5: T2 x2", "6: T0 x2"]
    shown = drawn(templates.network_graph(genotype), "node")
    assert shown == ["tap l1", "tap l2", *layers, "classifier"]


@pytest.mark.parametrize(
    ("draw", "genotypes"),
    [
        (segmentation.cell_graph, FAST_NAS),
        (segmentation.decoder_graph, FAST_NAS),
        (lambda genotype: templates.template_graph(genotype, 0), TEMPLATE_NAS),
        (templates.network_graph, TEMPLATE_NAS),
        (restoration.cell_graph, IR_NAS),
        (restoration.path_graph, IR_NAS),
    ],
)
def test_nodes_lie_apart_and_inside(draw, genotypes):
    for svg in map(draw, genotypes):
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        boxes = []
        for rect in svg.iter("rect"):
            x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width
            assert 0 <= y <= y + h <= height
            boxes.append((x, y, x + w, y + h))
        for a, b in combinations(boxes, 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
