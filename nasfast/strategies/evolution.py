"""Regularised evolution: Real et al., Regularized evolution for image classifier architecture
search, AAAI 2019 (arXiv 1802.01548)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from nasfast.spaces.base import G, Space
from nasfast.strategies.base import check_state
from nasfast.strategies.history import HistoryStrategy, mutant
from nasfast.utils.config import Bound, Bounded, Count


@dataclass(frozen=True)
class EvolutionConfig(Bounded):
    """Settings of the evolution."""

    population: Count = 16
    """The latest evaluated candidates, of which parents are taken; the first ones are uniform
    draws. Older ones die, however good."""
    tournament: Count = 6
    """Candidates drawn from the population; the best of them is the parent."""
    more_mutations: Annotated[float, Bound(0, 1, open="high")] = 0.0
    """Probability that a child that has been changed is changed once more; published: 0."""


class Evolution(HistoryStrategy[G]):
    """Children of the winners of tournaments, each with a decision changed.

    Failed and rejected candidates do not enter the population. A child that was proposed before is
    drawn again.
    """

    def __init__(self, space: Space[G], config: EvolutionConfig, seed: int) -> None:
        super().__init__(space)
        self._config, self._rng = config, random.Random(seed)

    def ask(self) -> G:
        """A uniform draw until the population is full, then a child."""
        history, config = self._history, self._config
        initial = len(history.evaluated) + len(history.pending) < config.population
        if initial or not history.evaluated:
            return history.ask(history.fresh(lambda: self._space.sample(self._rng)))
        return history.ask(history.fresh(self._child))

    def _child(self) -> G:
        population = self._history.evaluated[-self._config.population :]
        count = min(self._config.tournament, len(population))
        parent, _ = max(self._rng.sample(population, count), key=lambda pair: pair[1])
        return mutant(self._space, parent, self._rng, self._config.more_mutations)

    def state_dict(self) -> dict[str, Any]:
        """The history and the state of the generator."""
        return {
            "strategy": "evolution",
            "history": self._history.state_dict(),
            "rng": self._rng.getstate(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another strategy wrote it."""
        check_state(state, "evolution")
        self._history.load_state_dict(state["history"])
        self._rng.setstate(state["rng"])
