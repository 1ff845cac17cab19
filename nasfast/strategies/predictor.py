"""Search with a model of the reward, fitted to what was evaluated so far.

Bayesian optimisation over architectures, as in BANANAS (White et al., AAAI 2021, arXiv 1910.11858)
and NAS-BOWL (Ru et al., ICLR 2021, arXiv 2006.07556).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nasfast.spaces.base import G, Space
from nasfast.strategies.base import Goals, check_state
from nasfast.strategies.gaussian_process import GaussianProcess, Scaler
from nasfast.strategies.history import HistoryStrategy
from nasfast.strategies.prior import Prior, shipped
from nasfast.utils.config import Bounded, Count, Weight
from nasfast.utils.pareto import Point, additions

_REFERENCE = 256
"""Uniform draws that tell how features, and expectations of a prior, are spread over the space."""

_COSTED, _EXACT = 96, 16
"""Uniform draws that models of the goals are fitted to, and draws of a pool whose goals are exact.
"""


@dataclass(frozen=True)
class PredictorConfig(Bounded):
    """Settings of the search with a model."""

    initial: Count = 8
    """Uniform draws before the model is asked."""
    pool: Count = 400
    """Uniform draws that the model compares for each proposal."""
    exploration: Weight = 0.3
    """Standard deviations of the model's uncertainty that are added to its mean."""
    prior: Literal["auto", "none"] = "auto"
    """auto: what was found of the space on the generated data, where that is known, chooses the
    first candidates and is where the model starts from. none: the search starts from nothing."""
    informed: Count = 20
    """Uniform draws of which such a prior takes one, for each of the initial candidates."""


class Predictor(HistoryStrategy[G]):
    """Proposes the best of many uniform draws, by the upper confidence bound of a model (Srinivas
    et al., Gaussian process optimization in the bandit setting, ICML 2010).

    The model is an ensemble of Gaussian processes. Candidates whose reward is not known yet count
    with the reward that is expected of them, so that a batch is not of one kind. Where candidates
    are rejected, a second model tells which of the draws are likely to be within the limits; others
    come after them.

    A prior, rewards of the space on other data, picks the first candidates, and is a trend of the
    model: how far the rewards follow it is learned.

    The draws are uniform, as mutants of the best so far are too much alike: rewards as noisy as
    those of short trainings do not tell them apart, and the search stays where luck had it.

    With goals beside the reward a draw is worth what it would add to the hypervolume of the front,
    with the confidence bound for its reward (Ponweiser et al., Multiobjective optimization on a
    limited budget of evaluations, SMS-EGO, 2008). A model of the goals finds some draws; of these
    they are exact.

    A proposal is a function of the seed and of what was proposed and told before.
    """

    def __init__(
        self, space: Space[G], config: PredictorConfig, seed: int, goals: Goals[G] | None = None
    ) -> None:
        super().__init__(space, goals)
        self._config, self._seed = config, seed
        rng = random.Random(0)
        self._scaler = Scaler([space.features(space.sample(rng)) for _ in range(_REFERENCE)])
        self._pool: tuple[str, list[G], Tensor] | None = None
        self._prior = self._make_prior() if config.prior == "auto" else None
        self._goal_models: list[GaussianProcess] | None = None

    def _make_prior(self) -> Prior | None:
        known = shipped(self._space)
        if known is None:
            return None
        rng = random.Random(1)
        reference = [self._space.sample(rng) for _ in range(_REFERENCE)]
        genotypes, rewards = zip(*known)
        return Prior(self._describe(genotypes), rewards, self._describe(reference))

    def ask(self) -> G:
        """A uniform draw at first; then the best of a pool, which is new after each reward."""
        history, space = self._history, self._space
        known = len(history.evaluated)
        if known + len(history.pending) < self._config.initial or known < 2:
            return history.ask(self._initial())
        pool, described = self._draw()
        for index in self._worth(pool, described).argsort(descending=True).tolist():
            if space.valid(pool[index]) and not history.seen(pool[index]):
                return history.ask(pool[index])
        return history.ask(self._uniform("more"))

    def _initial(self) -> G:
        """A uniform draw; where there is a prior, the best of some, of fewer the more are rejected:
        what it expects most of may be what a limit forbids."""
        if self._prior is None:
            return self._uniform("initial")
        count = max(1, self._config.informed // (1 + len(self._history.rejected)))
        drawn = [self._uniform(f"initial {i}") for i in range(count)]
        worth = self._prior(self._describe(drawn))
        if self._goals is not None:  # some that are good, some that are small, some between
            share = self._generator(f"initial {self._history.asked}").random()
            costs = torch.tensor([self._goals(genotype) for genotype in drawn]).double()
            spread = costs.std(0).clamp(min=1e-12) if len(drawn) > 1 else torch.ones(1)
            worth = share * worth - (1 - share) * ((costs - costs.mean(0)) / spread).mean(1)
        return drawn[int(worth.argmax())]

    def _uniform(self, purpose: str) -> G:
        history = self._history
        rng = self._generator(f"{purpose} {history.asked}")
        return history.fresh(lambda: self._space.sample(rng))

    def _generator(self, purpose: str) -> random.Random:
        return random.Random(f"{self._seed} {purpose}")

    def _draw(self) -> tuple[list[G], Tensor]:
        """Architectures to choose from, and what describes them ``[N, D]``: new ones after each
        reward, and where many of them have been rejected."""
        history, size = self._history, self._config.pool
        name = f"pool {len(history.evaluated) + len(history.failed)}"
        if rounds := len(history.rejected) // size:
            name = f"{name}, {rounds}"
        if self._pool is None or self._pool[0] != name:
            rng = self._generator(name)
            pool = [self._space.sample(rng) for _ in range(size)]
            self._pool = name, pool, self._describe(pool)
        return self._pool[1:]

    def _describe(self, genotypes: Sequence[G]) -> Tensor:
        return self._scaler([self._space.features(genotype) for genotype in genotypes])

    def _trend(self, x: Tensor) -> Tensor | None:
        return None if self._prior is None else self._prior(x)

    def _model(self) -> tuple[GaussianProcess, list[float]]:
        """Of the rewards, with those that are not known yet as it expects them, which follow."""
        history = self._history
        known = self._describe([genotype for genotype, _ in history.evaluated])
        rewards = [reward for _, reward in history.evaluated]
        model = GaussianProcess(known, rewards, self._trend(known))
        if not history.pending:
            return model, []
        waiting = self._describe(history.pending)
        means = model.predict(waiting, self._trend(waiting))[0].tolist()
        both = torch.cat([known, waiting])
        return GaussianProcess(both, [*rewards, *means], self._trend(both)), means

    def _worth(self, pool: Sequence[G], described: Tensor) -> Tensor:
        """What the draws are sorted by, ``[N]``."""
        history = self._history
        model, waiting = self._model()
        mean, deviation = model.predict(described, self._trend(described))
        worth = mean + self._config.exploration * deviation
        beyond = torch.zeros(len(pool), dtype=torch.bool)
        if history.rejected:
            known = [genotype for genotype, _ in history.evaluated]
            both = self._describe([*known, *history.rejected])
            within = [1.0] * len(known) + [-1.0] * len(history.rejected)
            beyond = GaussianProcess(both, within).predict(described)[0] < 0
        if self._goals is not None:
            return self._gain(pool, described, worth, beyond, model, waiting)
        return _last(worth, beyond)

    def _gain(
        self,
        pool: Sequence[G],
        described: Tensor,
        hoped: Tensor,
        beyond: Tensor,
        model: GaussianProcess,
        waiting: Sequence[float],
    ) -> Tensor:
        """What the draws would add to the front, ``[N]``, with rewards that are hoped for: exact
        for those where a model of the goals says most; the others come after them, and last those
        that seem to be beyond the limits."""
        history, goals = self._history, self._goals
        assert goals is not None
        known = [genotype for genotype, _ in history.evaluated]
        x = self._describe(known)
        means = model.predict(x, self._trend(x))[0].tolist()  # less noisy than the rewards
        both = [*zip(known, means, strict=True), *zip(history.pending, waiting, strict=True)]
        points: list[Point] = [(-reward, *goals(genotype)) for genotype, reward in both]
        rough = torch.stack([-hoped, *self._goals_of(described)], 1).tolist()
        gains = torch.tensor(additions(points, list(map(tuple, rough))), dtype=torch.float64)
        gains = _last(gains, beyond)
        order = gains.argsort(descending=True).tolist()
        likely = [i for i in order if not history.seen(pool[i])][:_EXACT]
        exact = additions(points, [(-hoped[i].item(), *goals(pool[i])) for i in likely])
        worth = gains - gains.max() + min(exact, default=0.0) - 1
        worth[likely] = torch.tensor(exact, dtype=torch.float64)
        return _last(worth, beyond)

    def _goals_of(self, described: Tensor) -> list[Tensor]:
        """What models of the goals expect, ``[N]`` each."""
        assert self._goals is not None
        if self._goal_models is None:
            rng = random.Random(2)
            some = [self._space.sample(rng) for _ in range(_COSTED)]
            x, values = self._describe(some), [self._goals(genotype) for genotype in some]
            self._goal_models = [GaussianProcess(x, column) for column in zip(*values)]
        return [model.predict(described)[0] for model in self._goal_models]

    def state_dict(self) -> dict[str, Any]:
        """The history and the seed; the model and the pool follow from them."""
        return {
            "strategy": "predictor",
            "history": self._history.state_dict(),
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; UserError if another strategy wrote it."""
        check_state(state, "predictor")
        self._history.load_state_dict(state["history"])
        self._seed, self._pool = state["seed"], None


def _last(worth: Tensor, which: Tensor) -> Tensor:
    """The same, with some below all others, in their order."""
    return worth - which * (worth.max() - worth.min() + 1)
