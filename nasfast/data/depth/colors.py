"""Depths as colours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

STOPS = ((255, 244, 150), (250, 140, 60), (190, 50, 100), (80, 20, 120), (10, 5, 40))
"""From near to far, at equal steps of the logarithm."""
SPAN = 4.0
"""Nearest and farthest colour lie at a typical depth divided and multiplied by it."""


def colored_depth(depth: Tensor, typical: float) -> Tensor:
    """Colours uint8 [3, H, W] of depths [H, W] in metres: bright is near; black where the depth is
    0, not known."""
    table = torch.tensor([*STOPS, STOPS[-1]], dtype=torch.float32)
    share = (depth.clamp(min=1e-6) / typical).log() / math.log(SPAN)  # -1 .. 1
    place = (share.clamp(-1, 1) + 1) / 2 * (len(STOPS) - 1)
    low = place.floor().long()
    colors = torch.lerp(table[low], table[low + 1], (place - low)[..., None])
    return (colors * (depth > 0)[..., None]).round().byte().movedim(-1, 0)
