import torch
from torch import nn

from nasfast.training.polyak import PolyakAverage


def test_recurrence():
    weights = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    average = PolyakAverage([*weights, frozen], 0.9)
    expected = [w.detach().clone() for w in weights]
    for _ in range(3):  # the average goes on after a copy
        for _ in range(2):
            with torch.no_grad():
                for i, w in enumerate(weights):
                    w.add_(torch.randn_like(w))
                    expected[i] = 0.9 * expected[i] + 0.1 * w
                frozen.add_(1)
            moved = [w.detach().clone() for w in weights]
            average.update()
            assert all(torch.equal(w, m) for w, m in zip(weights, moved))
        average.copy_to_parameters()
        torch.testing.assert_close([w.detach() for w in weights], expected)
    assert frozen.tolist() == [7.0, 7.0]
