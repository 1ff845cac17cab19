import pytest
import torch

from nasfast.models.build import build_restorer
from nasfast.models.zoo import ZOO
from nasfast.spaces import IRNASGenotype, IRNASSpace
from nasfast.training.cost import count_parameters


@pytest.mark.parametrize(
    ("name", "layers", "nodes", "parameters"),
    [("irnas-denoise", 4, 5, 661_693), ("irnas-derain", 3, 4, 591_523)],
)
def test_architectures(name, layers, nodes, parameters):
    entry = ZOO[name]
    IRNASSpace(layers, nodes).encode(entry.genotype)
    assert IRNASGenotype.from_json(entry.genotype.to_json()) == entry.genotype
    net = build_restorer(entry.genotype, entry.network, entry.channels).eval()
    assert count_parameters(net) == parameters
    images = torch.rand(1, entry.channels, 8, 8)
    with torch.no_grad():
        assert net(images).shape == images.shape
