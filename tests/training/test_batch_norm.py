"""Statistics of BatchNorm that are measured, and that stay."""

import torch
from torch import nn

from nasfast.training import batch_norm


def test_measured_statistics_are_the_mean_over_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, momentum=0.3))
    batches = torch.randn(4, 5, 3, 6, 6, dtype=torch.float64)
    model.double()(batches[0] * 100)  # forgotten
    left = iter(batches)
    batch_norm.measure(model, lambda: model(next(left)), 4)
    means, variances = batches.mean((1, 3, 4)).mean(0), batches.var((1, 3, 4)).mean(0)
    torch.testing.assert_close(model[0].running_mean, means)
    torch.testing.assert_close(model[0].running_var, variances)
    assert [model[0].momentum, model[2].momentum] == [0.1, 0.3]


def test_frozen_statistics_stay_until_the_next_train():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).train()
    batch_norm.freeze(model)
    model(torch.randn(4, 2, 5, 5)).sum().backward()
    assert model[1].running_mean.abs().sum() == 0
    assert model.training
    assert model[1].weight.grad is not None
    model.train()(torch.randn(4, 2, 5, 5))
    assert model[1].running_mean.abs().sum() > 0
