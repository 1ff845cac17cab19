"""The model of the rewards, and the search with it."""

import itertools
import math
import random
import statistics

import pytest
import torch

from nasfast.spaces import FastNASSpace, IRNASSpace, NASFCOSSpace, TemplateNASSpace
from nasfast.strategies import gaussian_process
from nasfast.strategies.gaussian_process import GaussianProcess, Scaler, without_outliers
from nasfast.strategies.predictor import Predictor, PredictorConfig
from nasfast.strategies.prior import Prior, shipped
from nasfast.strategies.random import RandomSearch

SPACE = FastNASSpace()


def double(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def reference(x, trend, rewards, new, new_trend, length, slope, noise):
    """Equations 2.25, 2.26 and 2.30 of Rasmussen and Williams, and the likeliest variance."""

    def kernel(a, b, along_a, along_b):
        squares = (a[:, None] - b[None]).square().sum(-1) / (2 * a.shape[1])
        return torch.exp(-squares / (2 * length**2)) + slope * along_a[:, None] * along_b

    y = (rewards - rewards.mean()) / rewards.std()
    covariance = kernel(x, x, trend, trend) + noise * torch.eye(len(x), dtype=torch.float64)
    inverse, cross = torch.linalg.inv(covariance), kernel(new, x, new_trend, trend)
    variance = y @ inverse @ y / len(y)
    score = -len(y) / 2 * variance.log() - torch.logdet(covariance) / 2
    alone = torch.diagonal(kernel(new, new, new_trend, new_trend))
    deviation = (variance * (alone - (cross @ inverse * cross).sum(1))).sqrt()
    return cross @ inverse @ y, deviation, score


@pytest.mark.parametrize("with_trend", [False, True])
def test_predictions_are_those_of_the_formulas(monkeypatch, with_trend):
    monkeypatch.setattr(gaussian_process, "OUTLIER", math.inf)
    x, rewards, new = double(12, 5), double(12), double(7, 5)
    trend, new_trend = (double(12, 1)[:, 0], double(7, 1)[:, 0]) if with_trend else (None, None)
    slopes = gaussian_process.TRENDS if with_trend else [0.0]
    settings = itertools.product(gaussian_process.LENGTHS, slopes, gaussian_process.NOISES)
    known = (x, trend if with_trend else x.new_zeros(12), rewards)
    asked = (new, new_trend if with_trend else x.new_zeros(7))
    found = [reference(*known, *asked, *setting) for setting in settings]
    found = sorted(found, key=lambda each: -each[2])[: gaussian_process.MEMBERS]
    weights = torch.stack([score for *_, score in found]).softmax(0)
    means, deviations = (torch.stack([each[i] for each in found]) for i in (0, 1))
    mean = weights @ means
    deviation = (weights @ (deviations.square() + means.square()) - mean.square()).sqrt()
    predicted = GaussianProcess(x, rewards.tolist(), trend).predict(new, new_trend)
    torch.testing.assert_close(predicted[0], rewards.mean() + rewards.std() * mean)
    torch.testing.assert_close(predicted[1], rewards.std() * deviation)


@pytest.mark.parametrize("sign", [1, -1])
def test_rewards_follow_a_trend_as_far_as_they_turn_out_to(sign):
    x, trend = double(20, 5), double(20, 1)[:, 0]
    model = GaussianProcess(x, (0.5 + sign * 0.02 * trend).tolist(), trend)
    ahead, behind = model.predict(double(2, 5), torch.tensor([2.0, -2.0], dtype=torch.float64))[0]
    assert sign * (ahead - behind) == pytest.approx(0.08, rel=0.2)


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


# What is known before the first evaluation


def expected_by(strategy, genotypes):
    return strategy._prior(strategy._describe(genotypes))


def test_a_prior_is_in_units_of_its_space():
    rng = random.Random(3)
    scaler = Scaler([SPACE.features(SPACE.sample(rng)) for _ in range(100)])
    known = [(genotype, reward(genotype)) for genotype in (SPACE.sample(rng) for _ in range(100))]

    def describe(genotypes):
        return scaler([SPACE.features(genotype) for genotype in genotypes])

    reference = describe([SPACE.sample(random.Random(i)) for i in range(256)])
    prior = Prior(describe([genotype for genotype, _ in known]), [r for _, r in known], reference)
    drawn = [SPACE.sample(rng) for _ in range(200)]
    expected = prior(describe(drawn))
    assert expected.mean().abs() < 0.3
    assert 0.7 < expected.std() < 1.3
    true = torch.tensor([reward(genotype) for genotype in drawn], dtype=torch.float64)
    assert torch.corrcoef(torch.stack([expected, true]))[0, 1] > 0.6


def test_what_is_shipped():
    known = shipped(FastNASSpace())
    assert len(known) >= 100
    assert all(FastNASSpace().encode(genotype) and 0 < reward < 1 for genotype, reward in known)


@pytest.mark.parametrize(
    "space",
    [
        FastNASSpace(num_blocks=2),
        FastNASSpace(num_taps=3),
        NASFCOSSpace(),
        TemplateNASSpace(),
        IRNASSpace(),
    ],
)
def test_nothing_is_known_of_other_spaces(space):
    assert shipped(space) is None
    proposed = [
        Predictor(space, PredictorConfig(prior=prior), 0).ask() for prior in ("auto", "none")
    ]
    assert proposed[0] == proposed[1]


def test_the_first_candidates_are_those_that_a_prior_expects_most_of():
    judge = Predictor(SPACE, PredictorConfig(), 5)
    informed, uniform = (
        [strategy.ask() for _ in range(8)]
        for strategy in (
            Predictor(SPACE, PredictorConfig(), 0),
            Predictor(SPACE, PredictorConfig(prior="none"), 0),
        )
    )
    assert expected_by(judge, informed).min() > 0.5
    assert expected_by(judge, uniform).mean().abs() < 1


def test_a_prior_that_is_wrong_is_overruled():
    """Rewards are the opposite of what it expects."""
    strategy = Predictor(SPACE, PredictorConfig(initial=4, pool=100), 0)
    expected = []
    for _ in range(24):
        genotype = strategy.ask()
        expected.append(expected_by(strategy, [genotype]).item())
        strategy.tell(genotype, -expected[-1])
    assert statistics.fmean(expected[:4]) > 0.5
    assert statistics.fmean(expected[-8:]) < -0.5


def test_a_limit_on_what_a_prior_expects_most_of():
    """One in 25 of the space is within it; a search ends after 1,000 rejections in a row."""
    strategy = Predictor(SPACE, PredictorConfig(initial=4, pool=100), 0)
    rng = random.Random(7)
    expected = sorted(expected_by(strategy, [SPACE.sample(rng) for _ in range(500)]).tolist())
    for _ in range(6):
        rejected = 0
        while expected_by(strategy, [genotype := strategy.ask()]).item() > expected[20]:
            strategy.reject(genotype)
            rejected += 1
            assert rejected < 200
        strategy.tell(genotype, rng.random())
