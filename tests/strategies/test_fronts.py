"""Strategies that look for a front."""

import math
import random
import statistics

import pytest

from nasfast.spaces import FastNASSpace
from nasfast.strategies.evolution import Evolution, EvolutionConfig
from nasfast.strategies.predictor import Predictor, PredictorConfig
from nasfast.strategies.prior import shipped
from nasfast.strategies.random import RandomSearch
from nasfast.utils.pareto import hypervolume

SPACE = FastNASSpace()
COST = (1, 9, 3, 5, 2, 6, 12, 3, 4, 7, 8)
"""Of each operation."""


def operations(genotype):
    return [genotype.cell.op0, *(op for layer in genotype.cell.layers for op in layer[2:])]


def goals(genotype):
    return (math.log2(sum(COST[op] for op in operations(genotype))),)


def reward(genotype):
    """Costly operations are worth something, some of them more than others; so are fine taps."""
    worth = sum(math.sqrt(COST[op]) + (op % 3 == 2) for op in operations(genotype))
    return 0.02 * worth - 0.02 * sum(sum(pair) for pair in genotype.connections)


def volume(strategy, count, seed):
    noise, found = random.Random(seed), []
    for _ in range(count):
        genotype = strategy.ask()
        found.append((-reward(genotype), *goals(genotype)))
        strategy.tell(genotype, reward(genotype) + noise.gauss(0, 0.005))
    return hypervolume(found, (0.5, 7.0))


MAKERS = {
    "predictor": (20, lambda seed: Predictor(SPACE, PredictorConfig(6, 60), seed, goals)),
    "evolution": (60, lambda seed: Evolution(SPACE, EvolutionConfig(8, 3), seed, goals)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_front_covers_more_than_that_of_uniform_draws(name):
    count, make = MAKERS[name]
    seeds = range(2)
    found = sum(volume(make(seed), count, seed) for seed in seeds)
    assert found > 1.1 * sum(volume(RandomSearch(SPACE, seed), count, seed) for seed in seeds)


def test_the_fittest_are_on_the_first_fronts():
    """And of the front that enters in part those that add most."""
    strategy = Evolution(SPACE, EvolutionConfig(population=3, tournament=3), 0, goals)
    costs = [5.0, 1.0, 9.0, 5.0, 4.9, 2.0]
    rewards = [0.5, 0.1, 0.9, 0.4, 0.45, 0.05]  # the fourth and the last are dominated
    asked = []
    strategy._goals = lambda genotype: (costs[asked.index(genotype)],)
    for reward_of in rewards:
        asked.append(strategy.ask())
        strategy.tell(asked[-1], reward_of)
    living = {asked.index(genotype) for genotype, _ in strategy._population()}
    assert living == {0, 1, 2}
    assert strategy.points()[:2] == [(-0.5, 5.0), (-0.1, 1.0)]


def test_first_candidates_are_good_or_small_where_there_is_a_prior():
    """They are spread over the costs; where there is none they are uniform as without goals."""
    assert shipped(SPACE)

    def first(goals_or_none, prior="auto"):
        strategy = Predictor(SPACE, PredictorConfig(12, prior=prior), 0, goals_or_none)
        return [goals(strategy.ask())[0] for _ in range(12)]

    found, good, uniform = first(goals), first(None), first(goals, "none")
    assert uniform == first(None, "none")
    assert min(found) < min(*good, *uniform)
    assert statistics.stdev(found) > statistics.stdev(good)


def test_goals_that_are_the_same_for_all():
    """There the reward alone decides."""
    strategy = Predictor(SPACE, PredictorConfig(4, 40), 0, lambda genotype: (3.0, 1.0))
    asked = []
    for _ in range(8):
        asked.append(strategy.ask())
        strategy.tell(asked[-1], reward(asked[-1]))
    assert len(set(asked)) == 8


def test_what_is_likely_beyond_the_limits_comes_last():
    """Though it would add most to the front."""
    strategy = Predictor(SPACE, PredictorConfig(4, 60, prior="none"), 0, goals)
    kept = []
    for _ in range(20):
        genotype = strategy.ask()
        kept.append(goals(genotype)[0] < 5)
        if kept[-1]:
            strategy.tell(genotype, reward(genotype))
        else:
            strategy.reject(genotype)
    assert sum(kept[10:]) > 7
