"""Random search: the baseline every strategy has to beat (Li and Talwalkar, UAI 2019)."""

import random
from collections.abc import Mapping
from typing import Any, Generic

from nasfast.spaces.base import G, Space
from nasfast.strategies.base import check_state


class RandomSearch(Generic[G]):
    """Uniform and independent samples of the space; rewards are ignored."""

    def __init__(self, space: Space[G], seed: int) -> None:
        self._space = space
        self._rng = random.Random(seed)

    def ask(self) -> G:
        """The next sample."""
        return self._space.sample(self._rng)

    def tell(self, genotype: G, reward: float | None) -> None:
        """Nothing to learn."""

    def reject(self, genotype: G) -> None:
        """Nothing to learn: the next sample is uniform too, so that those within the limits are
        uniform among themselves."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"strategy": "random", "rng": self._rng.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another strategy wrote it."""
        check_state(state, "random")
        self._rng.setstate(state["rng"])
