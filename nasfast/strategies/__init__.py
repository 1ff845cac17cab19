"""Search strategies. To add one: a file beside this one and a line in STRATEGIES.

`gradient` has those of a search by gradient, which mix operations instead of proposing genotypes.
"""

from collections.abc import Callable
from typing import Any

from nasfast.spaces.base import G, Space
from nasfast.strategies.base import Strategy
from nasfast.strategies.gradient import (
    GRADIENT_STRATEGIES,
    Mix,
    Relaxation,
    Temperature,
    make_relaxation,
)
from nasfast.strategies.ppo import PPO, PPOConfig
from nasfast.strategies.random import RandomSearch
from nasfast.utils.errors import UserError

STRATEGIES: dict[str, Callable[[Space[Any], int, PPOConfig], Strategy[Any]]] = {
    "ppo": lambda space, seed, ppo: PPO(space, ppo, seed),
    "random": lambda space, seed, ppo: RandomSearch(space, seed),
}


def make_strategy(name: str, space: Space[G], seed: int, ppo: PPOConfig) -> Strategy[G]:
    """The strategy of that name; UserError lists the choices."""
    if name not in STRATEGIES:
        raise UserError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    return STRATEGIES[name](space, seed, ppo)


__all__ = [
    "GRADIENT_STRATEGIES",
    "PPO",
    "STRATEGIES",
    "Mix",
    "PPOConfig",
    "RandomSearch",
    "Relaxation",
    "Strategy",
    "Temperature",
    "make_relaxation",
    "make_strategy",
]
