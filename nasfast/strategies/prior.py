"""What a search can expect before its first evaluation: what was found on the generated data."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from torch import Tensor

from nasfast.spaces.base import G, Space
from nasfast.strategies.gaussian_process import GaussianProcess
from nasfast.utils.errors import UserError


class Prior:
    """Expected rewards of architectures, from their rewards on other data.

    What ranks architectures on one data set ranks them alike on another, as far as it is a matter
    of the network: docs/results.md, "Strategies".

    Args:
        x: at least two architectures, float64 ``[N, D]`` of a `Scaler`.
        rewards: theirs.
        reference: a sample of the space, ``[R, D]``.
    """

    def __init__(self, x: Tensor, rewards: Sequence[float], reference: Tensor) -> None:
        self._model = GaussianProcess(x, rewards)
        means, _ = self._model.predict(reference)
        self._center, self._spread = means.mean(), means.std().clamp(min=1e-12)

    def __call__(self, x: Tensor) -> Tensor:
        """Float64 ``[N]`` with mean 0 and variance 1 over the space."""
        return (self._model.predict(x)[0] - self._center) / self._spread


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
