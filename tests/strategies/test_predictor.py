"""The model of the rewards, and the search with it."""

import itertools
import math
import random
import statistics

import pytest
import torch

from nasfast.spaces import FastNASSpace, NASFCOSSpace
from nasfast.strategies import gaussian_process
from nasfast.strategies.gaussian_process import GaussianProcess, Scaler, without_outliers
from nasfast.strategies.predictor import Predictor, PredictorConfig
from nasfast.strategies.random import RandomSearch

SPACE = FastNASSpace()


def double(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(x, rewards, new, length, noise):
    """Equations 2.25, 2.26 and 2.30 of Rasmussen and Williams, and the likeliest variance."""

    def kernel(a, b):
        squares = (a[:, None] - b[None]).square().sum(-1) / (2 * a.shape[1])
        return torch.exp(-squares / (2 * length**2))

    y = (rewards - rewards.mean()) / rewards.std()
    covariance = kernel(x, x) + noise * torch.eye(len(x), dtype=torch.float64)
    inverse, cross = torch.linalg.inv(covariance), kernel(new, x)
    variance = y @ inverse @ y / len(y)
    score = -len(y) / 2 * variance.log() - torch.logdet(covariance) / 2
    deviation = (variance * (1 - (cross @ inverse * cross).sum(1))).sqrt()
    return cross @ inverse @ y, deviation, score


def test_predictions_are_those_of_the_formulas(monkeypatch):
    monkeypatch.setattr(gaussian_process, "OUTLIER", math.inf)
    x, rewards, new = double(12, 5), double(12), double(7, 5)
    settings = itertools.product(gaussian_process.LENGTHS, gaussian_process.NOISES)
    found = [reference(x, rewards, new, *setting) for setting in settings]
    found = sorted(found, key=lambda each: -each[2])[: gaussian_process.MEMBERS]
    weights = torch.stack([score for *_, score in found]).softmax(0)
    means, deviations = (torch.stack([each[i] for each in found]) for i in (0, 1))
    mean = weights @ means
    deviation = (weights @ (deviations.square() + means.square()) - mean.square()).sqrt()
    predicted = GaussianProcess(x, rewards.tolist()).predict(new)
    torch.testing.assert_close(predicted[0], rewards.mean() + rewards.std() * mean)
    torch.testing.assert_close(predicted[1], rewards.std() * deviation)


def test_a_scaler_centres_its_reference():
    scaler = Scaler([{"a": 1.0, "same": 5.0}, {"a": 3.0, "same": 5.0}, {"same": 5.0, "b": 1.0}])
    x = scaler([{"a": 1.0, "same": 5.0}, {"a": 3.0, "same": 5.0}, {"same": 5.0, "b": 1.0}])
    torch.testing.assert_close(x.mean(0), torch.zeros(3, dtype=torch.float64))
    assert x.std(0).tolist() == pytest.approx([1, 1, 0])
    assert torch.equal(scaler([{"same": 9.0, "new": 4.0}]), scaler([{}]))


def test_outliers_below_are_brought_near():
    rewards = torch.tensor([0.5, 0.52, 0.48, 0.51, 0.1, 0.9], dtype=torch.float64)
    brought = without_outliers(rewards)
    assert 0.4 < brought[4] < 0.48
    assert torch.equal(brought[[0, 1, 2, 3, 5]], rewards[[0, 1, 2, 3, 5]])
    assert torch.equal(without_outliers(torch.ones(3)), torch.ones(3))


def reward(genotype):
    """Many large convolutions on the finest taps."""
    ops = [genotype.cell.op0, *(op for layer in genotype.cell.layers for op in layer[2:])]
    taps = sum(i for pair in genotype.connections for i in pair if i < genotype.num_taps)
    return 0.01 * sum(op in (1, 5, 6) for op in ops) - 0.01 * taps


def mean_of_the_last(strategy, count=40, last=12):
    rng, found = random.Random(0), []
    for _ in range(count // 4):
        asked = [strategy.ask() for _ in range(4)]
        for genotype in asked:
            found.append(reward(genotype))
            strategy.tell(genotype, found[-1] + rng.gauss(0, 0.01))
    return statistics.fmean(found[-last:])


def test_it_learns_from_noisy_rewards():
    learned = mean_of_the_last(Predictor(SPACE, PredictorConfig(pool=150), 0))
    assert learned > mean_of_the_last(RandomSearch(SPACE, 0)) + 0.02


def test_nothing_is_proposed_twice():
    strategy = Predictor(SPACE, PredictorConfig(initial=2, pool=3), 0)
    asked = []
    for i in range(30):
        asked.append(strategy.ask())
        if i % 3 == 2:
            strategy.reject(asked[-1])
        else:
            strategy.tell(asked[-1], None if i % 4 == 3 else reward(asked[-1]))
    assert len({genotype.canonical() for genotype in asked}) == 30


def test_it_learns_what_is_rejected():
    """The reward grows with what the limit forbids."""

    def size(genotype):
        return sum(op for layer in genotype.cell.layers for op in layer[2:])

    strategy, rejected = Predictor(SPACE, PredictorConfig(pool=100), 0), []
    for _ in range(16):
        rejected.append(0)
        while size(genotype := strategy.ask()) > 28:
            strategy.reject(genotype)
            rejected[-1] += 1
        strategy.tell(genotype, float(size(genotype)))
    assert sum(rejected[:12]) > sum(rejected[12:]) <= 4


def test_what_is_no_network_is_not_proposed():
    space = NASFCOSSpace()
    strategy = Predictor(space, PredictorConfig(initial=3, pool=20), 0)
    for i in range(6):
        genotype = strategy.ask()
        assert space.valid(genotype)
        strategy.tell(genotype, float(i))
