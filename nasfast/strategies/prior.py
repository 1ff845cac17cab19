"""What a search can expect before its first evaluation: what was found on the generated data."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from importlib import resources
from typing import Any, Generic

from torch import Tensor

from nasfast.spaces.base import G, Space
from nasfast.strategies.gaussian_process import GaussianProcess, Scaler
from nasfast.utils.errors import UserError

_REFERENCE = 256
"""Uniform draws that tell how expectations are spread over the space."""


class Prior(Generic[G]):
    """Expected rewards of architectures, from their rewards on other data.

    What ranks architectures on one data set ranks them alike on another, as far as it is a matter
    of the network: docs/results.md, "Strategies".

    Args:
        space: of the architectures.
        scaler: of its features.
        evaluated: at least two architectures of the space with their rewards.
    """

    def __init__(
        self, space: Space[G], scaler: Scaler, evaluated: Sequence[tuple[G, float]]
    ) -> None:
        self._space, self._scaler = space, scaler
        self._model = GaussianProcess(
            self._describe([genotype for genotype, _ in evaluated]),
            [reward for _, reward in evaluated],
        )
        rng = random.Random(1)
        means = self._means([space.sample(rng) for _ in range(_REFERENCE)])
        self._center, self._spread = means.mean(), means.std().clamp(min=1e-12)

    def __call__(self, genotypes: Sequence[G]) -> Tensor:
        """Float64 ``[N]`` with mean 0 and variance 1 over the space."""
        return (self._means(genotypes) - self._center) / self._spread

    def _means(self, genotypes: Sequence[G]) -> Tensor:
        return self._model.predict(self._describe(genotypes))[0]

    def _describe(self, genotypes: Sequence[G]) -> Tensor:
        return self._scaler([self._space.features(genotype) for genotype in genotypes])


def shipped(space: Space[G]) -> list[tuple[G, float]] | None:
    """Rewards on the generated data, recorded by `bench/search_quality.py`; None where there are
    none of the space, or of one with other sizes."""
    rows = _rows(space.name)
    try:
        return [(space.decode(row["choices"]), row["reward"]) for row in rows] or None
    except UserError:
        return None


@functools.cache
def _rows(space: str) -> list[dict[str, Any]]:
    file = resources.files("nasfast.strategies") / "priors" / f"{space}.json"
    if not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return [row for row in rows if row["reward"] is not None]
