"""Search strategies. To add one: a file beside this one and a line in STRATEGIES.

`gradient` has those of a search by gradient, which mix operations instead of proposing genotypes.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

from nasfast.spaces.base import G, Space
from nasfast.strategies.base import Goals, Strategy
from nasfast.strategies.evolution import Evolution, EvolutionConfig
from nasfast.strategies.gradient import (
    GRADIENT_STRATEGIES,
    Mix,
    Relaxation,
    Temperature,
    make_relaxation,
)
from nasfast.strategies.ppo import PPO, PPOConfig
from nasfast.strategies.predictor import Predictor, PredictorConfig
from nasfast.strategies.random import RandomSearch
from nasfast.utils.errors import UserError

Name = Literal["auto", "predictor", "evolution", "ppo", "random"]
"""What a sampling search can be told: "auto" is `settled`."""


class StrategySettings(Protocol):
    """Settings of all strategies."""

    @property
    def ppo(self) -> PPOConfig: ...

    @property
    def evolution(self) -> EvolutionConfig: ...

    @property
    def predictor(self) -> PredictorConfig: ...


Maker = Callable[[Space[Any], int, StrategySettings, Goals[Any] | None], Strategy[Any]]
"""Makes a strategy of a space, a seed and the settings of all, with goals beside the reward. A
strategy that learns from one number takes no goals."""
STRATEGIES: dict[str, Maker] = {
    "predictor": lambda space, seed, settings, goals: Predictor(
        space, settings.predictor, seed, goals
    ),
    "evolution": lambda space, seed, settings, goals: Evolution(
        space, settings.evolution, seed, goals
    ),
    "ppo": lambda space, seed, settings, goals: PPO(space, settings.ppo, seed),
    "random": lambda space, seed, settings, goals: RandomSearch(space, seed),
}


def settled(name: str, budget: int) -> str:
    """The name; of "auto", what `bench/search_quality.py` recommends for a number of candidates.

    The predictor leads in both recorded spaces. It weighs every candidate against every other for
    each proposal, seconds beyond some hundreds, where evolution finds as much.
    """
    if name != "auto":
        return name
    return "predictor" if budget <= 300 else "evolution"


def make_strategy(
    name: str,
    space: Space[G],
    seed: int,
    settings: StrategySettings,
    goals: Goals[G] | None = None,
) -> Strategy[G]:
    """The strategy of that name; UserError lists the choices.

    Args:
        name: of the strategy.
        space: that it proposes from.
        seed: of what it draws.
        settings: of all strategies.
        goals: what is to be made small beside the reward, for a front of architectures.
    """
    if name not in STRATEGIES:
        raise UserError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name](space, seed, settings, goals)


__all__ = [
    "GRADIENT_STRATEGIES",
    "PPO",
    "STRATEGIES",
    "Evolution",
    "EvolutionConfig",
    "Goals",
    "Mix",
    "Name",
    "PPOConfig",
    "Predictor",
    "PredictorConfig",
    "RandomSearch",
    "Relaxation",
    "Strategy",
    "StrategySettings",
    "Temperature",
    "make_relaxation",
    "make_strategy",
    "settled",
]
