"""What every sampling strategy keeps to."""

import random

import pytest
import torch

from nasfast.searches.sampling import SamplingSettings
from nasfast.spaces import FastNASSpace
from nasfast.strategies import (
    PPO,
    STRATEGIES,
    Evolution,
    EvolutionConfig,
    PPOConfig,
    Predictor,
    PredictorConfig,
    RandomSearch,
    make_strategy,
    settled,
)
from nasfast.utils.errors import UserError

SPACE = FastNASSpace()
SETTINGS = SamplingSettings(
    ppo=PPOConfig(hidden_size=8, lr=1e-2, batch_size=2),
    evolution=EvolutionConfig(population=3, tournament=2),
    predictor=PredictorConfig(initial=3, pool=20),
)
each = pytest.mark.parametrize("name", STRATEGIES)


def goals(genotype):
    """Two costs that disagree now and then."""
    ops = [op for layer in genotype.cell.layers for op in layer[2:]]
    return float(sum(ops)), float(max(ops) + sum(sum(pair) for pair in genotype.connections))


def make(name, seed=0, goals=None):
    return make_strategy(name, SPACE, seed, SETTINGS, goals)


def play(strategy, count):
    asked = []
    for i in range(count):
        asked.append(strategy.ask())
        if i % 4 == 3:
            strategy.reject(asked[-1])
        else:
            strategy.tell(asked[-1], None if i % 4 == 2 else random.Random(str(asked[-1])).random())
    return asked


@each
def test_the_seed_decides_and_global_generators_do_not_move(name):
    before = torch.get_rng_state(), random.getstate()
    first, same, other = (play(make(name, seed), 8) for seed in (0, 0, 1))
    assert first == same != other
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@each
@pytest.mark.parametrize("cut", [0, 1, 7])
@pytest.mark.parametrize("goals", [None, goals])
def test_state_round_trip(name, cut, goals, reloaded):
    strategy, resumed = make(name, goals=goals), make(name, seed=1, goals=goals)
    play(resumed, 6)
    play(strategy, cut)
    resumed.load_state_dict(reloaded(strategy.state_dict()))
    assert play(strategy, 8) == play(resumed, 8)


@pytest.mark.parametrize("name", ["predictor", "evolution"])
def test_goals_decide(name):
    with_goals = play(make(name, goals=goals), 12)
    assert with_goals == play(make(name, goals=goals), 12) != play(make(name), 12)


@each
def test_state_of_another_strategy(name):
    for state, got in (({"strategy": "x"}, "'x'"), ({}, "None")):
        message = f'expected "{name}", got {got}; resume with the strategy that wrote'
        with pytest.raises(UserError, match=message):
            make(name).load_state_dict(state)


def test_names():
    assert isinstance(make("random"), RandomSearch)
    assert isinstance(make("ppo"), PPO)
    assert isinstance(make("evolution"), Evolution)
    assert isinstance(make("predictor"), Predictor)
    known = "predictor, evolution, ppo, random"
    with pytest.raises(UserError, match=f"strategy: expected one of {known}, got 'bayes'"):
        make("bayes")


def test_auto_is_a_strategy():
    assert all(settled("auto", budget) in STRATEGIES for budget in (1, 24, 100, 2000))
    assert all(settled(name, 24) == name for name in STRATEGIES)
