"""Regularised evolution: Real et al., Regularized evolution for image classifier architecture
search, AAAI 2019 (arXiv 1802.01548)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from nasfast.spaces.base import G, Space
from nasfast.strategies.base import Goals, check_state
from nasfast.strategies.history import HistoryStrategy, mutant
from nasfast.utils.config import Bound, Bounded, Count
from nasfast.utils.pareto import Scale, contributions, ranks


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

    With goals beside the reward the population is not the latest but the best so far: by fronts,
    and in the last front that enters by what each adds to the hypervolume (Beume et al., SMS-EMOA,
    2007). So are the winners.

    Failed and rejected candidates do not enter the population. A child that was proposed before is
    drawn again.
    """

    def __init__(
        self, space: Space[G], config: EvolutionConfig, seed: int, goals: Goals[G] | None = None
    ) -> None:
        super().__init__(space, goals)
        self._config, self._rng = config, random.Random(seed)
        self._best: tuple[int, list[tuple[G, float]]] = 0, []

    def ask(self) -> G:
        """A uniform draw until the population is full, then a child."""
        history, config = self._history, self._config
        initial = len(history.evaluated) + len(history.pending) < config.population
        if initial or not history.evaluated:
            return history.ask(history.fresh(lambda: self._space.sample(self._rng)))
        return history.ask(history.fresh(self._child))

    def _child(self) -> G:
        population = self._population()
        count = min(self._config.tournament, len(population))
        parent, _ = max(self._rng.sample(population, count), key=lambda pair: pair[1])
        return mutant(self._space, parent, self._rng, self._config.more_mutations)

    def _population(self) -> list[tuple[G, float]]:
        """Architectures and how fit each is."""
        evaluated, size = self._history.evaluated, self._config.population
        if self._goals is None:
            return evaluated[-size:]
        if self._best[0] != len(evaluated):
            self._best = len(evaluated), self._fittest(size)
        return self._best[1]

    def _fittest(self, size: int) -> list[tuple[G, float]]:
        """Of all that was evaluated."""
        evaluated = self._history.evaluated
        genotypes, points = [genotype for genotype, _ in evaluated], self.points()
        scale = Scale(points)
        scaled = scale(points)
        fronts = ranks(scaled)
        order = list[int]()  # best first
        for front in range(max(fronts) + 1):
            on_front = [i for i, rank in enumerate(fronts) if rank == front]
            adds = contributions([scaled[i] for i in on_front], scale.reference)
            order += [i for _, i in sorted(zip(adds, on_front), reverse=True)]
        return [(genotypes[i], -place) for place, i in enumerate(order[:size])]

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
        self._best = 0, []
        self._rng.setstate(state["rng"])
