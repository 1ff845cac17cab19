"""Times of a target's operators, and the latency of networks that follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from nasfast.latency.operators import Operator

GROUPS = ("dense", "pointwise", "depthwise", "deformable", "rest")
STIFFNESS = 0.001
"""How much the factors of a table prefer 1: too few networks do not tell them apart."""
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
        """Milliseconds of an operator that was not timed: by its work and the values that it
        moves, from those of its group, or of all where none of it was timed."""
        weights = self._laws[operator.group]
        return math.exp(sum(w * v for w, v in zip(weights, _work(operator), strict=True)))

    @cached_property
    def _laws(self) -> dict[str, list[float]]:
        """Of each group the weights of the logarithms that give that of a time."""
        return {group: self._law(group) for group in GROUPS}

    def _law(self, group: str) -> list[float]:
        known = [(o, t) for o, t in self.times.items() if o.group == group]
        known = known or list(self.times.items())
        x = torch.tensor([_work(o) for o, _ in known], dtype=torch.float64)
        y = torch.tensor([math.log(max(t, 1e-6)) for _, t in known], dtype=torch.float64)
        ridge = 1e-2 * torch.eye(x.shape[1], dtype=torch.float64)
        law: list[float] = torch.linalg.solve(x.T @ x + ridge, x.T @ y).tolist()
        return law

    def fitted(self, networks: Sequence[tuple[Operators, float]]) -> LatencyTable:
        """With the factors and the constant that suit the latencies of networks best."""
        if not networks:
            return self
        sums = [self.sums(operators) for operators, _ in networks]
        latencies = torch.tensor([time for _, time in networks], dtype=torch.float64)
        rows = torch.tensor([[1.0, *(s[g] for g in GROUPS)] for s in sums], dtype=torch.float64)
        unit = latencies.mean()
        rows[:, 0] = unit  # the constant, in parts of the mean latency
        relative, wanted = rows / latencies[:, None], torch.ones(len(networks), 1).double()
        start = torch.tensor([[0.0, *[1.0] * len(GROUPS)]], dtype=torch.float64).T
        ridge = STIFFNESS * len(networks) * torch.eye(len(start), dtype=torch.float64)
        active = torch.ones(len(start), dtype=torch.bool)
        weights = start
        for _ in range(len(start)):  # none below 0
            a = relative * active
            weights = torch.linalg.solve(a.T @ a + ridge, a.T @ wanted + ridge @ start)
            weights = weights * active[:, None]
            if bool((weights >= 0).all()):
                break
            active &= (weights >= 0).flatten()
        constant, *factors = weights.flatten().tolist()
        return LatencyTable(self.times, dict(zip(GROUPS, factors)), constant * float(unit))


def _work(operator: Operator) -> tuple[float, float, float]:
    return 1.0, math.log(operator.cells), math.log1p(operator.macs)
