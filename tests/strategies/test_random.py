import io

import pytest
import torch

from nasfast.spaces import FastNASSpace
from nasfast.strategies import PPO, PPOConfig, RandomSearch, make_strategy

SPACE = FastNASSpace()


def test_asks_the_samples_of_its_seed():
    first, same, other = (RandomSearch(SPACE, seed) for seed in (0, 0, 1))
    asked = [first.ask() for _ in range(20)]
    assert asked == [same.ask() for _ in range(20)] != [other.ask() for _ in range(20)]


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_state_round_trip(cut):
    strategy, resumed = RandomSearch(SPACE, 0), RandomSearch(SPACE, 1)
    for _ in range(cut):
        strategy.tell(strategy.ask(), 0.5)
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [strategy.ask() for _ in range(20)] == [resumed.ask() for _ in range(20)]


def test_make_strategy():
    assert isinstance(make_strategy("random", SPACE, 0, PPOConfig()), RandomSearch)
    assert isinstance(make_strategy("ppo", SPACE, 0, PPOConfig()), PPO)
    with pytest.raises(ValueError, match="strategy: expected one of ppo, random, got 'evolution'"):
        make_strategy("evolution", SPACE, 0, PPOConfig())


def test_state_of_another_strategy():
    ppo, search = PPO(SPACE, PPOConfig(), 0), RandomSearch(SPACE, 0)
    with pytest.raises(
        ValueError, match=("expected \"ppo\", got 'random'; resume with the strategy")
    ):
        ppo.load_state_dict(search.state_dict())
    with pytest.raises(
        ValueError, match=('expected "random", got None; resume with the strategy th')
    ):
        search.load_state_dict({})
