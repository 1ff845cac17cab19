"""Operators that detectors have beside those of maps."""

import pytest
import torch

from nasfast.latency.operators import Operator
from nasfast.latency.timing import torch_operator


@pytest.mark.parametrize(
    "operator",
    [
        Operator("cat", ((1, 6, 64), (1, 6, 16)), (1, 6, 80)),  # the points of all levels
        Operator("cat", ((1, 6, 4, 4), (1, 2, 4, 4)), (1, 8, 4, 4)),
        # of the coarsest level
        Operator("group_norm", ((1, 32, 1, 1),), (1, 32, 1, 1), settings=(8,)),
    ],
)
def test_they_are_made(operator):
    made = torch_operator(operator)
    assert made is not None
    assert made(*map(torch.rand, operator.reads)).shape == operator.makes
