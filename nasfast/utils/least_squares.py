"""Least squares whose weights are not below 0."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def nonnegative(a: Tensor, y: Tensor, stiffness: float, start: Tensor | None = None) -> Tensor:
    """Weights of the columns whose sums come closest to ``y``, none below 0. Every choice of
    columns is tried: there are to be few.

    Args:
        a: float64 ``[N, K]``.
        y: float64 ``[N]``.
        stiffness: of a row, how much speaks for the start.
        start: what weights are where nothing speaks against it, ``[K]``, none below 0; default: 0.
    """
    start = a.new_zeros(a.shape[1]) if start is None else start
    ridge = stiffness * len(y) * torch.eye(len(start), dtype=a.dtype)
    best, least = start, float("inf")
    for chosen in itertools.product((True, False), repeat=len(start)):
        active = torch.tensor(chosen)
        used = a * active
        weights = torch.linalg.solve(used.T @ used + ridge, used.T @ y + ridge @ start) * active
        if bool((weights >= 0).all()):
            off = weights - start
            error = float((a @ weights - y).square().sum() + off @ ridge @ off)
            if error < least:
                best, least = weights, error
    return best
