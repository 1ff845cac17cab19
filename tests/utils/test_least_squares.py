import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nasfast.utils.least_squares import nonnegative


@pytest.mark.parametrize("weights", [(2.0, 0.5), (0.0, 3.0), (0.0, 0.0)])
def test_weights_that_made_the_sums(weights):
    a = torch.rand(9, 2, dtype=torch.float64)
    found = nonnegative(a, a @ torch.tensor(weights, dtype=torch.float64), 1e-9)
    assert found.tolist() == pytest.approx(weights, abs=1e-5)


def test_without_a_word_against_it_the_start_stays():
    assert nonnegative(torch.zeros(3, 2).double(), torch.ones(3).double(), 0.1).tolist() == [0, 0]
    start = torch.tensor([0.5, 2.0]).double()
    found = nonnegative(torch.zeros(3, 2).double(), torch.ones(3).double(), 0.1, start)
    assert torch.allclose(found, start)


@given(st.integers(0, 2**31))
def test_two_columns_at_their_best(seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(6, generator=generator, dtype=torch.float64)
    found = nonnegative(a, y, 1e-9)
    assert bool((found >= 0).all())

    def error(weights):
        return float((a @ torch.tensor(weights, dtype=torch.float64) - y).square().sum())

    grid = [step / 4 for step in range(9)]
    assert error(found.tolist()) <= min(map(error, itertools.product(grid, grid))) + 1e-6
