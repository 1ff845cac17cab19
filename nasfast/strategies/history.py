"""What a strategy has proposed so far, and what it was told."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Generic

from nasfast.spaces.base import G, Space
from nasfast.strategies.base import Goals
from nasfast.utils.pareto import Point

_TRIES = 100


class History(Generic[G]):
    """Proposals in the order asked, and rewards; no architecture is proposed twice."""

    def __init__(self, space: Space[G]) -> None:
        self._space = space
        self.pending: deque[G] = deque()
        """Asked, and neither told nor rejected."""
        self.evaluated: list[tuple[G, float]] = []
        """With their rewards, in the order told."""
        self.failed: list[G] = []
        self.rejected: list[G] = []
        self._seen: set[G] = set()

    @property
    def asked(self) -> int:
        """How many have been proposed, without those that failed."""
        return len(self.evaluated) + len(self.rejected) + len(self.pending)

    def fresh(self, draw: Callable[[], G]) -> G:
        """The first of up to 100 draws that is valid and was not proposed before, else the last."""
        for _ in range(_TRIES):
            genotype = draw()
            if self._space.valid(genotype) and not self.seen(genotype):
                break
        return genotype

    def seen(self, genotype: G) -> bool:
        """Whether the architecture, by whatever names, was proposed before."""
        return genotype.canonical() in self._seen

    def ask(self, genotype: G) -> G:
        """Propose it."""
        self.pending.append(genotype)
        self._seen.add(genotype.canonical())
        return genotype

    def tell(self, genotype: G, reward: float | None) -> None:
        """Of the proposal asked longest ago.

        Raises:
            ValueError: it is another, or the reward is not finite.
        """
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"tell: expected a finite reward, got {reward}; tell None for a failed evaluation"
            )
        if not self.pending or self.pending[0] != genotype:
            expected = self.pending[0] if self.pending else "no genotype"
            raise ValueError(
                f"tell: expected the reward of {expected}, got {genotype}; "
                "report every genotype of ask() once, in order"
            )
        self.pending.popleft()
        if reward is None:
            self.failed.append(genotype)
        else:
            self.evaluated.append((genotype, reward))

    def reject(self, genotype: G) -> None:
        """Of the proposal asked last; ValueError if it is another."""
        if not self.pending or self.pending[-1] != genotype:
            asked = self.pending[-1] if self.pending else "no genotype"
            raise ValueError(f"reject: expected {asked}, asked last, got {genotype}")
        self.rejected.append(self.pending.pop())

    def state_dict(self) -> dict[str, Any]:
        """Choices and rewards."""
        encode = self._space.encode
        return {
            "pending": [encode(genotype) for genotype in self.pending],
            "evaluated": [(encode(genotype), reward) for genotype, reward in self.evaluated],
            "failed": [encode(genotype) for genotype in self.failed],
            "rejected": [encode(genotype) for genotype in self.rejected],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        decode = self._space.decode
        self.pending = deque(decode(choices) for choices in state["pending"])
        self.evaluated = [(decode(choices), reward) for choices, reward in state["evaluated"]]
        self.failed, self.rejected = (
            [decode(choices) for choices in state[name]] for name in ("failed", "rejected")
        )
        known = [*self.pending, *self.failed, *self.rejected, *(g for g, _ in self.evaluated)]
        self._seen = {genotype.canonical() for genotype in known}


class HistoryStrategy(Generic[G]):
    """What strategies share that learn from the history alone: a proposal is their `ask`."""

    def __init__(self, space: Space[G], goals: Goals[G] | None = None) -> None:
        self._space, self._history, self._goals = space, History(space), goals

    def points(self) -> list[Point]:
        """What was evaluated, as points whose objectives are all to be made small."""
        goals = self._goals or (lambda genotype: ())
        return [(-reward, *goals(genotype)) for genotype, reward in self._history.evaluated]

    def tell(self, genotype: G, reward: float | None) -> None:
        """The reward of the genotype asked longest ago; None if its evaluation failed."""
        self._history.tell(genotype, reward)

    def reject(self, genotype: G) -> None:
        """The genotype asked last is not evaluated: it will not be proposed again."""
        self._history.reject(genotype)


def mutant(space: Space[G], parent: G, rng: random.Random, more: float = 0.5) -> G:
    """The parent with one decision changed, with probability `more` a second one, and so on."""
    genotype = space.mutate(parent, rng)
    while rng.random() < more:
        genotype = space.mutate(genotype, rng)
    return genotype
