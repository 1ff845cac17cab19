"""What architectures of a sampling search cost, before they are trained."""

from __future__ import annotations

from typing import Generic

from nasfast.evaluation.candidate import Evaluator, G
from nasfast.latency import Latencies


class Costing(Generic[G]):
    """Costs of an architecture before it is trained.

    Args:
        evaluator: knows the exact ones.
        latencies: where they matter.
    """

    def __init__(self, evaluator: Evaluator[G], latencies: Latencies[G] | None = None) -> None:
        self._evaluator, self.latencies = evaluator, latencies
        self._counts: dict[G, dict[str, float]] = {}
        self._predicted: dict[G, float] = {}

    def counts(self, genotype: G) -> dict[str, float]:
        """Those that need no latency."""
        if genotype not in self._counts:
            self._evaluator.runtime.heartbeat()
            self._counts[genotype] = dict(self._evaluator.costs(genotype))
        return self._counts[genotype]

    def __call__(self, genotype: G) -> dict[str, float]:
        """Those of the records, with the latency that is expected where it matters."""
        costs = self.counts(genotype)
        if self.latencies is None:
            return costs
        if genotype not in self._predicted:
            self._predicted[genotype] = self.latencies.predict(genotype)
        latency = self._predicted[genotype]
        return costs | {"latency": latency, "predicted_latency": latency}

    def final(self, genotype: G) -> dict[str, float]:
        """The same, with the latency that decides, which is measured if this is the target.

        Raises:
            UndeployableError: the network does not run there.
        """
        costs = self(genotype)
        if self.latencies is not None:
            costs = costs | {"latency": self.latencies.of(genotype)}
        return costs
