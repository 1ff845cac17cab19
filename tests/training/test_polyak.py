import torch
from torch import nn

from nasfast.training.polyak import PolyakAverage, WeightAverage


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


def test_average_of_a_network_with_its_statistics():
    """The first decay is 2 / 11; the network has the average inside the block alone."""
    net = nn.BatchNorm2d(2)
    average = WeightAverage(net, 0.5)
    with torch.no_grad():
        net.weight.fill_(12.0)
        net.running_mean.fill_(11.0)
    average.update()
    with average.applied():
        torch.testing.assert_close(net.weight.detach(), torch.full((2,), 1 + 11 * 9 / 11))
        torch.testing.assert_close(net.running_mean, torch.full((2,), 9.0))
    assert net.weight.tolist() == [12, 12]
    again = WeightAverage(net, 0.5)
    again.load_state_dict(average.state_dict())
    for _ in range(20):
        average.update()
        again.update()
    with again.applied():
        torch.testing.assert_close(net.running_mean, torch.full((2,), 11.0), atol=1e-4, rtol=0)
    assert again.state_dict()["steps"] == average.steps == 21
