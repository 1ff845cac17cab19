"""Polyak averaging of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class PolyakAverage:
    """Exponential moving average of parameters; buffers (BatchNorm statistics) are left alone.

    The average starts at the parameters' values on construction (section 3.3 of Fast NAS).
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.decay = decay
        self._live = [p for p in parameters if p.requires_grad]
        self._average = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters, once per optimisation step."""
        torch._foreach_lerp_(self._average, self._live, 1 - self.decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the parameters with their average."""
        torch._foreach_copy_(self._live, self._average)


class WeightAverage:
    """Exponential moving average of a network: parameters and BatchNorm statistics alike, so that
    the averaged network needs no further pass over the data.

    Of the first n steps the decay is (1 + n) / (10 + n) at most: the initial weights are forgotten
    however short the training is.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._live = [t for t in module.state_dict().values() if t.is_floating_point()]
        self._average = [t.clone() for t in self._live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network, once per optimisation step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the averaged values."""
        with torch.no_grad():
            before = [t.clone() for t in self._live]
            torch._foreach_copy_(self._live, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, before)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {"steps": self.steps, "average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.steps = state["steps"]
        for own, saved in zip(self._average, state["average"], strict=True):
            own.copy_(saved)
