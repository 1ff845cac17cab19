"""Polyak averaging of weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


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
