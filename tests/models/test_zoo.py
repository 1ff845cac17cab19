import re

import pytest
import torch

from nasfast.models import zoo
from nasfast.models.restorer import Restorer
from nasfast.spaces.ir_nas import IRNASGenotype, IRNASSpace
from nasfast.training.cost import count_parameters


@pytest.mark.parametrize(
    ("name", "channels", "layers", "nodes", "parameters"),
    [("irnas-denoise", 1, 4, 5, 661_693), ("irnas-derain", 3, 3, 4, 591_523)],
)
def test_architectures(name, channels, layers, nodes, parameters):
    genotype, config = zoo.get(name)
    IRNASSpace(layers, nodes).encode(genotype)
    assert IRNASGenotype.from_json(genotype.to_json()) == genotype
    net = Restorer(genotype, config, channels)
    assert count_parameters(net) == parameters
    with torch.no_grad():
        assert net.eval()(torch.rand(1, channels, 8, 8)).shape == (1, channels, 8, 8)


def test_unknown_name():
    message = "architecture: expected one of irnas-denoise, irnas-derain, got 'irnas'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        zoo.get("irnas")
