"""What a search looks for beside the score: small costs, how they are weighed, and fronts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nasfast.runs.records import Evaluation, Record
from nasfast.utils.errors import UserError
from nasfast.utils.least_squares import nonnegative

COSTS = ("latency", "params", "macs", "memory")
"""Objectives beside the score; all are to be made small."""
TIE = 0.05
"""Share of a latency, which is measured, that two may differ by and count as equal."""
MOST = 3
"""Costs of a front: a volume of more dimensions takes minutes to compare."""
LEAST = 6
"""Candidates that a line is fitted to."""


@dataclass(frozen=True)
class Objectives:
    """The costs that matter, in their order."""

    costs: tuple[str, ...] = ()
    weights: Mapping[str, float] | None = None
    """How much of the score a halving of each cost is worth; None: there is no such exchange, and
    the search looks for a front."""

    @classmethod
    def of(cls, words: Sequence[str]) -> Objectives:
        """Of "score", "latency" or "latency:0.02" ..

        Raises:
            UserError: another word, a word twice, no score, weights for some only, or too many.
        """
        names, weights = [], dict[str, float]()
        for word in words:
            name, colon, weight = word.partition(":")
            if name not in ("score", *COSTS):
                raise UserError(
                    f"objective: expected score, {', '.join(COSTS)}, or one with a weight such as "
                    f"latency:0.02, got {word!r}; correct it"
                )
            if name in names:
                raise UserError(f"objective: expected each once, got {name} twice; leave one out")
            names.append(name)
            if colon:
                weights[name] = _weight(word, weight)
        if "score" not in names:
            raise UserError(
                f"objective: expected score among them, got {' '.join(words) or 'none'}; without "
                "it the smallest network would be the best: add score"
            )
        if "score" in weights:
            raise UserError(
                f"objective: expected score without a weight, got score:{weights['score']:g}; the "
                "weight of a cost says how much of the score a halving is worth"
            )
        costs = tuple(name for name in names if name != "score")
        if weights and set(weights) != set(costs):
            bare = [name for name in costs if name not in weights]
            raise UserError(
                f"objective: expected weights for all costs or for none, got {bare[0]} without; "
                f"write {bare[0]}:0.02, or look for a front without weights"
            )
        if len(costs) > MOST and not weights:
            raise UserError(
                f"objective: expected at most {MOST} costs for a front, got {', '.join(costs)}; "
                "give them weights, or limit some with --constraint"
            )
        return cls(costs, weights or None)

    @property
    def several(self) -> bool:
        """Whether the search looks for a front."""
        return bool(self.costs) and self.weights is None

    def goals(self, costs: Mapping[str, float]) -> tuple[float, ...]:
        """What a strategy is to make small: the binary logarithm of each cost."""
        return tuple(math.log2(max(costs[name], 1e-12)) for name in self.costs)

    def value(self, reward: float, costs: Mapping[str, float]) -> float:
        """A reward less the weighted costs; the reward itself where there are no weights."""
        if self.weights is None:
            return reward
        goals = self.goals(costs)
        return reward - sum(
            self.weights[name] * goal for name, goal in zip(self.costs, goals, strict=True)
        )

    def gates(self, before: Sequence[Evaluation], costs: Mapping[str, float]) -> dict[str, float]:
        """Rewards that a candidate of such costs has to beat, by stage.

        The published gate is the running mean of the rewards so far. With weights it is that of the
        values, and the reward needed follows from the candidate's own costs. On the way to a front
        it is what the earlier candidates lead one to expect at these costs, by a least-squares
        line: else no small network would pass.
        """
        found: dict[str, list[tuple[Evaluation, float]]] = {}
        for evaluation in before:
            for stage, reward in evaluation.stages.items():
                found.setdefault(stage, []).append((evaluation, reward))
            if evaluation.stopped is not None:
                reward = evaluation.stopped["estimate"]
                found.setdefault(evaluation.feedback, []).append((evaluation, reward))
        return {stage: self.expected(pairs, costs) for stage, pairs in found.items()}

    def expected(
        self, pairs: Sequence[tuple[Evaluation, float]], costs: Mapping[str, float]
    ) -> float:
        """The reward that is usual at some costs, from those of other candidates."""
        rewards = [reward for _, reward in pairs]
        if not self.costs:
            return statistics.fmean(rewards)
        if self.weights is not None:
            values = [self.value(reward, e.costs) for e, reward in pairs]
            return statistics.fmean(values) - self.value(0.0, costs)
        if len(pairs) < LEAST:
            return statistics.fmean(rewards)
        return _line([self.goals(e.costs) for e, _ in pairs], rewards, self.goals(costs))


def _line(x: Sequence[Sequence[float]], y: Sequence[float], at: Sequence[float]) -> float:
    """Value at a point of the least-squares line through others, which rises with every cost, and
    stays between the least and the greatest of them."""
    points = torch.tensor(x, dtype=torch.float64)
    values = torch.tensor(y, dtype=torch.float64)
    centre, mean = points.mean(0), values.mean()
    a = points - centre
    slopes = nonnegative(a, values - mean, 1e-3)
    line = mean + (torch.tensor(at, dtype=torch.float64) - centre) @ slopes
    return float(line.clamp(values.min(), values.max()))


def _weight(word: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(
            f"objective: expected a weight above 0, how much of the score a halving is worth, got "
            f"{word!r}; write latency:0.02"
        )
    return weight


def front(records: Sequence[Record], costs: Sequence[str]) -> list[Record]:
    """Those that no other beats: a higher reward comes first, and what follows is kept where it
    costs less, in something, than each that was kept. Costs are those of the records; a latency has
    to be lower by more than `TIE`."""
    kept: list[Record] = []
    order = sorted(
        records, key=lambda r: (-_reward(r), *(r.evaluation.costs[name] for name in costs))
    )
    for record in order:
        if all(_cheaper(record.evaluation.costs, other.evaluation.costs, costs) for other in kept):
            kept.append(record)
    return kept


def _reward(record: Record) -> float:
    stage = record.evaluation.last_stage
    assert stage is not None
    return record.evaluation.rewards[stage]


def _cheaper(a: Mapping[str, float], b: Mapping[str, float], costs: Sequence[str]) -> bool:
    """Whether one costs less than the other in something."""
    return any(a[name] < b[name] * (1 - TIE if name == "latency" else 1) for name in costs)
