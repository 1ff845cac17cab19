"""Times of a target's operators, and the latency of networks that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nasfast.latency.operators import Operator
from nasfast.utils.least_squares import nonnegative

GROUPS = ("dense", "pointwise", "depthwise", "deformable", "rest")
STIFFNESS = 0.001
"""How much the factors of a table prefer 1: too few networks do not tell them apart."""
LEAST = 4
"""Operators that a law of their times is fitted to."""
Operators = Mapping[Operator, int]


@dataclass(frozen=True)
class LatencyTable:
    """What is known of a target.

    A latency is a constant and, for each group of operators, the sum of their times alone, times a
    factor: in a network an operator finds its input in a cache, or in another layout. The factors
    are fitted to whole networks.
    """

    times: Mapping[Operator, float]
    """Milliseconds of operators alone."""
    factors: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1.0))
    constant: float = 0.0
    """Milliseconds."""

    def predict(self, operators: Operators) -> float:
        """Milliseconds of a network."""
        sums = self.sums(operators)
        return self.constant + sum(self.factors[group] * sums[group] for group in GROUPS)

    def sums(self, operators: Operators) -> dict[str, float]:
        """Milliseconds of a network's operators, each alone, by group."""
        found = dict.fromkeys(GROUPS, 0.0)
        for operator, count in operators.items():
            time = self.times.get(operator)
            found[operator.group] += count * (self.estimate(operator) if time is None else time)
        return found

    def estimate(self, operator: Operator) -> float:
        """Milliseconds of an operator that was not timed: a constant, and parts that are
        proportional to the values it moves and to its multiply-adds, as fits those of its kind, or
        of its group or of all, whichever has been timed often enough."""
        weights = next(
            self._laws[key] for key in (operator.kind, operator.group, "") if key in self._laws
        )
        return float(sum(w * v for w, v in zip(weights, _work(operator), strict=True)))

    @cached_property
    def _laws(self) -> dict[str, list[float]]:
        """Milliseconds that each part of the work takes, by group of convolutions, by kind of other
        operators, by group of those, and "" of all."""
        known: dict[str, list[tuple[Operator, float]]] = {}
        for operator, time in self.times.items():
            kinds = (operator.group, "") if operator.weight else (operator.kind, operator.group, "")
            for key in kinds:
                known.setdefault(key, []).append((operator, time))
        laws = {}
        for key, pairs in known.items():
            if len(pairs) >= LEAST or not key:
                work = torch.tensor([_work(o) for o, _ in pairs], dtype=torch.float64)
                times = torch.tensor([max(t, 1e-6) for _, t in pairs], dtype=torch.float64)
                unit = work.mean(0).clamp(min=1e-12) / times.mean()
                weights = _proportions(work / unit, times, torch.zeros(3).double(), 1e-6)
                laws[key] = (weights / unit).tolist()
        return laws

    def fitted(self, networks: Sequence[tuple[Operators, float]]) -> LatencyTable:
        """With the factors and the constant that suit the latencies of networks best."""
        if not networks:
            return self
        sums = [self.sums(operators) for operators, _ in networks]
        latencies = torch.tensor([time for _, time in networks], dtype=torch.float64)
        unit = latencies.mean()  # of the constant
        rows = torch.tensor([[1.0, *(s[g] for g in GROUPS)] for s in sums], dtype=torch.float64)
        rows[:, 0] = unit
        start = torch.tensor([0.0, *[1.0] * len(GROUPS)], dtype=torch.float64)
        constant, *factors = _proportions(rows, latencies, start, STIFFNESS).tolist()
        return LatencyTable(self.times, dict(zip(GROUPS, factors)), constant * float(unit))


def _proportions(rows: Tensor, times: Tensor, start: Tensor, stiffness: float) -> Tensor:
    """Weights, none below 0, whose sums of the columns come closest to times, in parts of these.

    Args:
        rows: ``[N, K]``.
        times: ``[N]``.
        start: what the weights are where nothing speaks against it, ``[K]``.
        stiffness: how much speaks for that.
    """
    wanted = torch.ones(len(times), dtype=torch.float64)
    return nonnegative(rows / times[:, None], wanted, stiffness, start)


def _work(operator: Operator) -> tuple[float, float, float]:
    return 1.0, float(operator.cells), float(operator.macs)
