import torch
from torch import nn

from nasfast.training.polyak import PolyakAverage


def test_recurrence():
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    average = PolyakAverage([*weights, frozen], 0.9)
    expected = [w.detach().clone() for w in weights]
    for _ in range(5):
        with torch.no_grad():
            for i, w in enumerate(weights):
                w.add_(torch.randn_like(w))
                expected[i] = 0.9 * expected[i] + 0.1 * w
            frozen.add_(1)
        average.update()
    moved = [w.detach().clone() for w in weights]
    assert all(torch.equal(w, m) for w, m in zip(weights, moved))
    average.copy_to_parameters()
    torch.testing.assert_close([w.detach() for w in weights], expected)
    assert frozen.tolist() == [6.0, 6.0]


def test_average_goes_on_after_a_copy():
    weight = nn.Parameter(torch.tensor([0.0]))
    average = PolyakAverage([weight], 0.5)
    for expected in (0.5, 1.0):
        with torch.no_grad():
            weight.add_(1)
        average.update()
        average.copy_to_parameters()
        assert weight.item() == expected
