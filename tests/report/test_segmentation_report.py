"""Drawings of cells and decoders: complete, apart and inside."""

import random
from itertools import combinations

import pytest

from nasfast.methods.segmentation.report import cell_graph, decoder_graph
from nasfast.spaces.fast_nas import PRIMITIVES, FastNASSpace

SPACE = FastNASSpace()
PUBLISHED = {  # Fast NAS, CVPR 2019: arch0, arch1, arch2
    "arch0": [[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]],
    "arch1": [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]],
    "arch2": [[5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], [[1, 3], [4, 3], [2, 2]]],
}


def classes(svg, kind):
    return [group for group in svg if kind in group.get("class", "").split()]


def labels(svg):
    return ["".join(node.itertext()) for node in classes(svg, "node")]


def genotypes():
    random_ones = {f"random{i}": SPACE.sample(random.Random(i)) for i in range(20)}
    return {name: SPACE.from_json(form) for name, form in PUBLISHED.items()} | random_ones


@pytest.mark.parametrize("genotype", genotypes().values(), ids=genotypes())
def test_drawings_have_every_node_and_edge(genotype):
    cell, decoder = cell_graph(genotype), decoder_graph(genotype)
    ops = [PRIMITIVES[o] for layer in genotype.cell.layers for o in layer[2:]]
    assert sorted(labels(cell)) == sorted(
        ["input", PRIMITIVES[genotype.cell.op0], *ops, "+", "+", "+", "output"]
    )
    assert len(classes(cell, "edge")) == 13 + len(genotype.cell.loose_ends)
    assert len(classes(cell, "accent")) == len(genotype.cell.loose_ends)
    assert labels(decoder) == [
        *(f"tap l{i}" for i in (1, 2, 3, 4)),
        *(f"block {b}" for b in (0, 1, 2)),
        "classifier",
    ]
    assert len(classes(decoder, "edge")) == 6 + len(genotype.collected_blocks)
    assert len(classes(decoder, "accent")) == len(genotype.collected_blocks)


@pytest.mark.parametrize("genotype", genotypes().values(), ids=genotypes())
@pytest.mark.parametrize("draw", [cell_graph, decoder_graph])
def test_drawn_nodes_lie_apart_and_inside(draw, genotype):
    svg = draw(genotype)
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    boxes = []
    for rect in svg.iter("rect"):
        x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height
        boxes.append((x, y, x + w, y + h))
    for a, b in combinations(boxes, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
