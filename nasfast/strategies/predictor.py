"""Search with a model of the reward, fitted to what was evaluated so far.

Bayesian optimisation over architectures, as in BANANAS (White et al., AAAI 2021, arXiv 1910.11858)
and NAS-BOWL (Ru et al., ICLR 2021, arXiv 2006.07556).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic

import torch

from nasfast.spaces.base import G, Space
from nasfast.strategies.base import check_state
from nasfast.strategies.gaussian_process import GaussianProcess
from nasfast.strategies.history import History, mutant
from nasfast.utils.config import Bounded, Count


@dataclass(frozen=True)
class PredictorConfig(Bounded):
    """Settings of the search with a model."""

    initial: Count = 8
    """Uniform draws before the model is asked."""
    pool: Count = 400
    """Architectures that the model compares for each proposal: half of them uniform draws, half
    mutants of the best."""
    parents: Count = 8
    """The best evaluated candidates, of which mutants are made."""


class Predictor(Generic[G]):
    """Proposes what the model expects to improve most on the best so far."""

    def __init__(self, space: Space[G], config: PredictorConfig, seed: int) -> None:
        self._space, self._config = space, config
        self._rng = random.Random(seed)
        self._history = History(space)

    def ask(self) -> G:
        """A uniform draw at first; then the best of a new pool."""
        history, config = self._history, self._config
        known = len(history.evaluated)
        if known + len(history.pending) < config.initial or known < 2:
            return history.ask(history.fresh(lambda: self._space.sample(self._rng)))
        pool = self._pool()
        if not pool:
            return history.ask(history.fresh(lambda: self._space.sample(self._rng)))
        gains = self._gains(pool)
        return history.ask(pool[int(gains.argmax())])

    def _pool(self) -> list[G]:
        """Distinct valid architectures that were not proposed."""
        space, rng, history = self._space, self._rng, self._history
        ranked = sorted(history.evaluated, key=lambda pair: -pair[1])
        parents = [genotype for genotype, _ in ranked[: self._config.parents]]
        pool: dict[G, G] = {}
        for k in range(self._config.pool):
            genotype = mutant(space, rng.choice(parents), rng) if k % 2 else space.sample(rng)
            canonical = genotype.canonical()
            if space.valid(genotype) and not history.seen(genotype):
                pool.setdefault(canonical, genotype)
        return list(pool.values())

    def _gains(self, pool: list[G]) -> torch.Tensor:
        """Expected improvement of each on the best so far."""
        features, history = self._space.features, self._history
        known = [features(genotype) for genotype, _ in history.evaluated]
        rewards = [reward for _, reward in history.evaluated]
        model = GaussianProcess(known, rewards)
        waiting = [features(genotype) for genotype in history.pending]
        if waiting:  # as if they had the reward that is expected of them
            means, _ = model.predict(waiting)
            model = GaussianProcess([*known, *waiting], [*rewards, *means.tolist()])
        mean, deviation = model.predict([features(genotype) for genotype in pool])
        return expected_improvement(mean, deviation, max(rewards))

    def tell(self, genotype: G, reward: float | None) -> None:
        """The reward of the genotype asked longest ago; None if its evaluation failed."""
        self._history.tell(genotype, reward)

    def reject(self, genotype: G) -> None:
        """The genotype asked last is not evaluated: it will not be proposed again."""
        self._history.reject(genotype)

    def state_dict(self) -> dict[str, Any]:
        """The history and the state of the generator; the model follows from them."""
        return {
            "strategy": "predictor",
            "history": self._history.state_dict(),
            "rng": self._rng.getstate(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another strategy wrote it."""
        check_state(state, "predictor")
        self._history.load_state_dict(state["history"])
        self._rng.setstate(state["rng"])


def expected_improvement(mean: torch.Tensor, deviation: torch.Tensor, best: float) -> torch.Tensor:
    """E[max(0, x - best)] of normal x (Mockus et al., 1978); all tensors [N]."""
    gain = mean - best
    z = gain / deviation.clamp(min=1e-12)
    density = (-z.square() / 2).exp() / (2 * torch.pi) ** 0.5
    improvement: torch.Tensor = gain * torch.special.ndtr(z) + deviation * density
    return improvement
