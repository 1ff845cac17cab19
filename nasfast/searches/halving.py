"""Early stopping of candidates within the stage that the strategy learns from.

Asynchronous successive halving (Li et al., A system for massively parallel hyperparameter tuning,
MLSys 2020, arXiv 1810.05934): a candidate is scored after some of its epochs, the rungs, and stops
where its score is below a quantile of those that earlier candidates had there.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from nasfast.runs.objectives import Objectives
from nasfast.runs.records import Evaluation

LEAST = 4
"""Candidates that have finished before one is stopped."""
Pairs = list[tuple[Evaluation, float]]
"""Candidates with their scores."""


def rung_gates(
    before: Sequence[Evaluation],
    share: float,
    objectives: Objectives = Objectives(),  # noqa: B008 - it is frozen
    costs: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """Scores that a candidate has to reach, by rung: quantiles of all earlier scores.

    Where costs are objectives, scores count by what they are above the one that is expected at the
    candidate's costs: else small networks would stop on the way to a front.

    Args:
        before: evaluations of the earlier candidates, without duplicates.
        share: of the candidates to stop at a rung, in [0, 1).
        objectives: of the search.
        costs: of the candidate, those that are objectives at least.
    """
    finished = sum(evaluation.feedback in evaluation.rewards for evaluation in before)
    scores: dict[str, Pairs] = {}
    for evaluation in before if finished >= LEAST else ():
        for rung in evaluation.rungs:
            scores.setdefault(rung, []).append((evaluation, evaluation.rewards[rung]))
    gates = {}
    for rung, pairs in scores.items():

        def usual(at: Mapping[str, float], pairs: Pairs = pairs) -> float:
            return objectives.expected(pairs, at) if objectives.costs else 0.0

        above = [score - usual(evaluation.costs) for evaluation, score in pairs]
        margin = torch.tensor(above, dtype=torch.float64).quantile(share).item()
        gates[rung] = usual(costs) + margin
    return gates


def settled(
    evaluation: Evaluation, gates: Mapping[str, float], before: Sequence[Evaluation]
) -> Evaluation:
    """The evaluation; where a rung stopped it, with the gate there and the estimate of its reward.

    Args:
        evaluation: a new one.
        gates: that it was given.
        before: those that the gates were made of.
    """
    rung = evaluation.last_stage
    if evaluation.failure is not None or rung is None or evaluation.feedback in evaluation.rewards:
        return evaluation
    pairs = [
        (e.rewards[rung], e.rewards[e.feedback])
        for e in before
        if rung in e.rewards and e.feedback in e.rewards
    ]
    stopped = {"gate": gates[rung], "estimate": estimate(evaluation.rewards[rung], pairs)}
    return dataclasses.replace(evaluation, stopped=stopped)


def estimate(score: float, pairs: Sequence[tuple[float, float]]) -> float:
    """The final reward to expect of a candidate that scored so low at a rung.

    It lies on the least-squares line through the finished candidates, as far as that does not fall,
    and between the worst and the mean of their rewards: a strategy must not take what was stopped
    for better than what usually finishes, nor learn from values that no reward has.

    Args:
        score: at the rung.
        pairs: of each finished candidate, the score at that rung and the final reward.
    """
    scores, rewards = [score for score, _ in pairs], [reward for _, reward in pairs]
    mean, slope = statistics.fmean(rewards), 0.0
    if len(set(scores)) > 1:
        slope = max(0.0, statistics.linear_regression(scores, rewards).slope)
    line = mean + slope * (score - statistics.fmean(scores))
    return min(mean, max(min(rewards), line))
